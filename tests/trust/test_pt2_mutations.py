"""Thousands of exported programs with something hostile put somewhere into their JSON: none runs it."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import payloads
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError
from omgoptim.models._pt2.archive import open_pt2

JSON = ("models/model.json", "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
OTHERS: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        2**31,
        2**63,
        2**64,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "a" * 5000,
        "None",
        "self",
        "import",
    ),
    *("torch.load", "os.system", "builtins.eval", "torch.ops.aten.from_file.default", "torch.ops.load_library"),
    *("_operator.methodcaller", "torch.hub.load", "collections.defaultdict", "__class__", "..", [], {}, [[]]),
]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (self.layer(x),))
        return {"a": y.reshape(-1), "n": (y.shape[0] * 2, y.mean())}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of an exported program with a symbolic batch, a branch and a nested output."""
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=99)}}
    with torch.no_grad():
        torch.export.save(torch.export.export(Small().eval(), (torch.randn(3, 4),), dynamic_shapes=shapes), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Silence what torch tells about programs that do not fit together."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def hostile(code: str) -> list[Any]:
    """Values that would run `code` where text is evaluated, and what else stands in no program."""
    texts = [code, f"x); {code}#", f"eval({code!r})", f"Symbol({code!r})", f'"+{code}+"', f"'+{code}+'", f"[{code}]"]
    factory = {"default_factory_module": "os", "default_factory_name": "system", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(factory), "children_spec": []}
    fields = [{"as_expr": {"expr_str": code, "hint": None}}, {"as_string": code}, {"as_operator": "os.system"}]
    return [*texts, *fields, json.dumps([1, tree]), *OTHERS]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested objects and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutate(program: Any, values: list[Any], chance: random.Random) -> None:
    """Put something hostile in one place: for a value, for its name, or into its text."""
    path = chance.choice(list(places(program)))
    holder = program
    for key in path[:-1]:
        holder = holder[key]
    old, new = holder[path[-1]], copy.deepcopy(chance.choice(values))
    way = chance.choice(["value", "value", "name", "text", "text", "gone"])
    if way == "name" and isinstance(holder, dict):
        holder[str(new)] = holder.pop(path[-1])
    elif way == "text" and isinstance(old, str):
        place = chance.randrange(len(old) + 1)
        holder[path[-1]] = f"{old[:place]}{new}{old[place:]}"
    elif way == "gone":
        del holder[path[-1]]
    else:
        holder[path[-1]] = new


def opens(members: dict[str, bytes], name: str, program: Any, folder: Path) -> bool:
    """Open and call an archive with one member replaced; whether it could be opened. No mark may be there then."""
    with zipfile.ZipFile(folder / "net.pt2", "w") as archive:
        for one, content in members.items():
            archive.writestr(one, json.dumps(program).encode() if one == name else content)
    opened = False
    with contextlib.suppress(ModelError):
        module = open_pt2(folder / "net.pt2")
        opened = True
        with contextlib.suppress(Exception):  # a program that does not fit together fails in torch's words
            module(torch.randn(3, 4))
    assert not (folder / "mark").exists(), json.dumps(program)[:2000]
    return opened


@pytest.mark.usefixtures("_quiet")
def test_code_in_the_place_of_any_text_of_a_program_is_not_run(members: dict[str, bytes], tmp_path: Path) -> None:
    code = payloads.MARK_CODE(tmp_path / "mark")
    name = next(name for name in members if name.endswith(JSON[0]))
    whole = json.loads(members[name])
    whole["guards_code"] = ["True"]
    opened = []
    for path in list(places(whole)):
        program = copy.deepcopy(whole)
        holder = program
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder[path[-1]], str):
            holder[path[-1]] = code
            opened.append(opens(members, name, program, tmp_path))
    assert len(opened) > 50
    assert 0 < sum(opened) < len(opened)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_program_with_something_hostile_anywhere_is_opened_without_it_or_named(
    members: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    chance = random.Random(count)
    values = hostile(payloads.MARK_CODE(tmp_path / "mark"))
    opened = []
    for _ in range(count):
        member = chance.choice([*JSON, *JSON[:1] * 5])
        name = next(name for name in members if name.endswith(member))
        program = json.loads(members[name])
        for _ in range(chance.choice([1, 1, 2, 3])):
            if list(places(program)):
                mutate(program, values, chance)
        opened.append(opens(members, name, program, tmp_path))
    assert 0 < sum(opened) < len(opened)
