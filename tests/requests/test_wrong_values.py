"""Every argument of every verb with values of every wrong type: a request, or a RequestError that says what to give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from omgoptim.errors import OmgoptimError
from omgoptim.requests import QUERIES, VERBS, parse, technique_field, techniques

WRONG: list[Any] = [
    *(None, True, False, 0, -1, 3.5, 1e400, float("nan"), 10**30, 1j, b"x", object()),
    *("", "x", "auto", "../a", "nan", "1e400", "null", "\x00", "\ud800", "a" * 100_000),
    *([], [None], [[]], ["x"], [1], (1,), {1}, {}, {"a": None}, {"x": {"y": [1]}}, {1: 2}),
]
ENOUGH: dict[str, dict[str, Any]] = {verb: {"model": "net.py:build"} for verb in VERBS} | {
    "compare": {"before": "a", "after": "b"},
    "search": {"model": "net.py:build", "target_speedup": 2},
    "runs": {"action": "list"},
    "doctor": {},
}


def requests(verb: str) -> Iterator[dict[str, Any]]:
    """Arguments of a verb of which one is wrong, flat and within the object of each technique."""
    request = (VERBS | QUERIES)[verb]
    kinds, key = techniques(request), technique_field(request)
    names = {
        *request.model_fields,
        *request.aliases,
        "no_such_name",
        *(n for k in kinds.values() for n in k.model_fields),
    }
    for value in WRONG:
        for name in sorted(names):
            yield {**ENOUGH[verb], name: value}
        for technique, params in kinds.items():
            for name in params.model_fields:
                yield {**ENOUGH[verb], str(key): {str(key): technique, name: value}}
                yield {**ENOUGH[verb], str(key): technique, name: value}
    yield {1: 2}  # type: ignore[dict-item]


def refusal(verb: str, arguments: dict[str, Any]) -> OmgoptimError | None:
    try:
        parse(verb, arguments)
    except OmgoptimError as error:
        return error
    return None


@pytest.mark.parametrize("verb", VERBS | QUERIES)
def test_no_value_of_any_argument_raises_anything_but_a_request_error(verb: str) -> None:
    for arguments in requests(verb):
        error = refusal(verb, arguments)
        if error is not None:
            assert error.exit_code == 2, arguments
            assert error.what
            assert max(len(part) for part in (error.what, error.why, error.fix)) < 1500
            f"{error.what}{error.why}{error.fix}".encode()


@pytest.mark.parametrize(
    ("verb", "key"), [("quantize", "scheme"), ("prune", "method"), ("factorize", "method"), ("distill", "student")]
)
def test_null_where_a_technique_is_named_is_refused_with_the_known_ones(verb: str, key: str) -> None:
    with pytest.raises(OmgoptimError, match=f"None is not a {key} of {verb}") as error:
        parse(verb, {"model": "net.py:build", key: None})
    assert next(iter(techniques(VERBS[verb]))) in error.value.why
