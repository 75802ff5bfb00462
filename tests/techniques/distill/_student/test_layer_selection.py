from __future__ import annotations

import pytest
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.models.child_removal import keep_children
from omgoptim.requests.distill import Narrow
from omgoptim.techniques.distill._student.layer_selection import LayerSelection, paths_of


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), nn.Linear(2, 2))


def test_globs_follow_the_layers_that_they_named_to_their_new_numbers() -> None:
    module = stack()
    selection = LayerSelection.of(module, Narrow(targets=["1.[13]", "2"], ignore=["1.3"]))
    before = paths_of(module)
    assert [path for path in ("0", "1.1", "1.2", "1.3", "2") if selection.includes(path)] == ["1.1", "2"]
    keep_children(module, "1", [0, 1, 3])
    after = selection.after(before, module)
    assert [path for path in ("0", "1.0", "1.1", "1.2", "2") if after.includes(path)] == ["1.1", "2"]


def test_targets_that_are_all_gone_name_nothing_instead_of_everything() -> None:
    module = stack()
    selection, before = LayerSelection.of(module, Narrow(targets=["1.3"])), paths_of(module)
    keep_children(module, "1", [0])
    after = selection.after(before, module)
    assert after.nothing
    assert not after.includes("0")


def test_what_was_not_named_stays_not_named_and_everything_stays_everything() -> None:
    module = stack()
    everything, before = LayerSelection.of(module, Narrow()), paths_of(module)
    keep_children(module, "1", [0, 3])
    assert everything.after(before, module) == LayerSelection([], [])


def test_a_glob_that_names_no_layer_is_refused() -> None:
    with pytest.raises(TechniqueError, match="'3' names no layer"):
        LayerSelection.of(stack(), Narrow(ignore=["3"]))
