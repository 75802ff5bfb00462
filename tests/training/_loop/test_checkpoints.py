from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import net, same, state

from omgoptim.errors import ArtifactError, RunError
from omgoptim.training._loop.checkpoints import (
    Checkpoint,
    all_tensors,
    checkpoint_file,
    put_tensors,
    read_checkpoint,
    trained_tensors,
    write_checkpoint,
)

MADE = Checkpoint(
    identity={"seed": 1, "shape of fc.weight": [16, 4]},
    state=all_tensors(net()),
    best={},
    best_epoch=1,
    scores=[0.1, 0.5],
    epochs=[{"round": 1, "epoch": 1, "loss": 0.5, "quality": None, "learning_rate": 0.1, "seconds": 1.0}],
    optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    scheduler={"last_epoch": 3},
    scaler={},
    stopped=None,
    seconds=1.5,
    resumed=0,
)


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path / "new", 3)
    assert read_checkpoint(path, MADE.identity) is None
    write_checkpoint(path, MADE)
    read = read_checkpoint(path, MADE.identity)
    assert read is not None
    assert same(read.state, MADE.state)
    assert (read.scores, read.records[0].loss, read.optimizer, read.seconds) == ([0.1, 0.5], 0.5, MADE.optimizer, 1.5)
    assert [file.name for file in path.parent.iterdir()] == ["round_003.pt"]


def test_a_checkpoint_that_fails_to_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path, 1)
    write_checkpoint(path, MADE)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        write_checkpoint(path, replace(MADE, scheduler={"function": lambda: 0}))
    assert read_checkpoint(path, MADE.identity) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_of_another_training_is_named_with_the_difference(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path, 1)
    write_checkpoint(path, MADE)
    with pytest.raises(RunError, match="training with other settings") as error:
        read_checkpoint(path, {**MADE.identity, "seed": 2})
    assert error.value.why == "seed was 1 and is 2 now"
    assert str(path) in error.value.fix


def test_a_damaged_checkpoint_and_one_that_holds_code_are_refused(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path, 1)
    write_checkpoint(path, MADE)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArtifactError):
        read_checkpoint(path, MADE.identity)
    (tmp_path / "ran").unlink(missing_ok=True)

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": 1, "state": Code()}, path)
    with pytest.raises(ArtifactError):
        read_checkpoint(path, MADE.identity)
    assert not (tmp_path / "ran").exists()


def test_tensors_are_put_back_in_place() -> None:
    module = net()
    module.fc.weight.requires_grad_(False)
    weight, kept, before = module.out.weight, trained_tensors(module), state(module)
    assert "fc.weight" not in kept
    assert "norm.running_mean" in kept
    with torch.no_grad():
        module.out.weight.add_(1)
        module.norm.running_mean.add_(1)  # type: ignore[union-attr]
    put_tensors(module, kept)
    assert module.out.weight is weight
    assert same(state(module), before)
