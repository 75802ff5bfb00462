"""Kinds of errors across a process boundary."""

from __future__ import annotations

import pytest

from omgoptim.errors import ModelError, OmgoptimError, TechniqueError, UnknownModelError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TechniqueError("no layer was changed"), TechniqueError),
        (UnknownModelError("'x' is not a model"), ModelError),
        (OmgoptimError("the engine failed"), OmgoptimError),
    ],
)
def test_an_error_comes_back_from_another_process_as_the_kind_that_the_tree_shows(
    error: OmgoptimError, kind: type[OmgoptimError]
) -> None:
    back = OmgoptimError.from_dict(error.to_dict())
    assert type(back) is kind
    assert (back.what, back.kind) == (error.what, kind.__name__)
