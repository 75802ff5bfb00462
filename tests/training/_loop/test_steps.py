"""Two processes that train one module: the steps of one process, and shares that add up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omgoptim.errors import TechniqueError
from omgoptim.training._loop.steps import share_of
from omgoptim.training.batches import Batch

TESTS = Path(__file__).parents[2]

TRAINING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from small_training import batches_of, blobs, evaluator_of, net, fit
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training.config import TrainingConfig
from omgoptim.training.losses import loss_of

torch.set_num_threads(1)
module = net(dropout=0.0)
if {plain}:
    module.norm = torch.nn.Identity()
(x, y), policy = blobs(), PathPolicy.of(Path.cwd(), [])
loss = loss_of(RequestedFunction("auto", policy, 60.0), module(x[:8]).detach(), y[:8])
config = TrainingConfig(epochs=3, batch=20, optimizer="sgd")
fitted = fit(module, batches_of(module, x, y), loss, config, evaluator_of(module, *blobs(seed=3)))
torch.save((module.state_dict(), fitted.quality, [each.loss for each in fitted.epochs]), {target!r})
"""


def trained(folder: Path, ranks: int, plain: bool) -> list[tuple[dict[str, torch.Tensor], float, list[float]]]:
    """Weights at the end of each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    begun = []
    for rank in range(ranks):
        target = str(folder / f"{ranks}-{rank}.pt")
        code = TRAINING.format(tests=str(TESTS), plain=plain, target=target)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        begun.append(subprocess.Popen([sys.executable, "-c", code], env=os.environ | (shared | own if own else {})))
    assert [process.wait(120) for process in begun] == [0] * ranks
    return [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, plain: bool) -> None:
    [(alone, quality, losses)] = trained(tmp_path, 1, plain)
    (first, one, first_losses), (second, other, second_losses) = trained(tmp_path, 2, plain)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one, first_losses) == (other, second_losses)
    if plain:  # batch normalization sees a share of each batch at a time
        assert all(torch.allclose(first[name], alone[name], atol=1e-5) for name in alone)
        assert first_losses == pytest.approx(losses, abs=1e-5)
    assert one == pytest.approx(quality, abs=0.1)


def test_shares_divide_a_batch_and_a_small_one_stays_whole() -> None:
    batch = Batch({"x": torch.arange(7.0)}, torch.arange(7))
    shares = [share_of(batch, rank, 3) for rank in range(3)]
    assert [share.target.tolist() for share in shares if share] == [[0, 1], [2, 3], [4, 5, 6]]
    small = Batch({"x": torch.arange(5.0)}, torch.arange(5))
    assert share_of(small, 0, 3) is small
    assert share_of(small, 1, 3) is None


def test_a_target_that_is_one_object_for_a_batch_cannot_be_divided() -> None:
    with pytest.raises(TechniqueError, match="cannot be split"):
        share_of(Batch({"x": torch.zeros(4)}, {"boxes": []}), 0, 2)
