from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from small_training import batches_of, blobs, net, signature_of, source
from torch import Tensor
from torch.utils.data import TensorDataset

from omgoptim.models.data import DataSource
from omgoptim.models.raw_batch import RawBatch
from omgoptim.training._distillation import teacher_outputs
from omgoptim.training._distillation.teacher_outputs import TeacherOutput, TeacherOutputs, cache_outputs, digests
from omgoptim.training.batches import Batch, Batches
from omgoptim.training.config import TrainingConfig

X, Y = blobs()
PLAN = TrainingConfig(epochs=2, batch=16)
TEACHER = net(seed=1)


def taught(batch: Batch) -> TeacherOutput:
    with torch.no_grad():
        return TeacherOutput([TEACHER(batch.inputs["x"])])


def kept(
    batches: Batches, config: TrainingConfig = PLAN, asked: Callable[[Batch], TeacherOutput] = taught
) -> tuple[TeacherOutputs | None, str]:
    count, first = batches.survey(config.batch, config.seed, lambda _target: None)
    return cache_outputs(batches, config, count, first, asked)


def changing(change: Callable[[Tensor], Tensor]) -> Batches:
    """Data whose inputs are changed as they are read."""
    whole = source(TensorDataset(X, Y))

    def epoch(size: int) -> Iterator[RawBatch]:
        for raw in whole.epoch(size):
            yield RawBatch(change(raw.inputs), raw.target)

    return Batches(DataSource(whole.batches, epoch, real=True), TEACHER, signature_of(TEACHER, X[:2]))


def test_outputs_come_back_in_a_batchs_order_and_only_if_all_are_there() -> None:
    store = TeacherOutputs()
    store.add(Batch({"x": X[:8]}), TeacherOutput([torch.empty(0), X[:8] * 2]))
    store.add(Batch({"x": X[6:12]}), TeacherOutput([torch.empty(0), X[6:12] * 3]))
    assert (len(store), store.size_bytes) == (12, 14 * 4 * 4)
    mixed = Batch({"x": X[[11, 0, 7]]})
    assert store.holds(mixed)
    found = store.of(mixed)
    assert found is not None
    assert torch.equal(found[1], torch.stack([X[11] * 3, X[0] * 2, X[7] * 2]))
    assert not found[0].numel()  # an output that is not learnt keeps its place
    assert store.of(Batch({"x": X[[0, 12]]})) is None
    assert not store.holds(Batch({"x": X[[0, 12]]}))


def test_digests_tell_samples_apart_by_name_dtype_shape_and_every_byte() -> None:
    flags = torch.tensor([True, False])
    inputs = [
        {"x": X[:2]},
        {"y": X[:2]},
        {"x": X[:2].double()},
        {"x": X[:2].bfloat16()},
        {"x": X[:2].reshape(2, 2, 2)},
        {"x": X[:2], "mask": flags},
        {"x": X[:2], "mask": ~flags},
        {"x": X[:2].nextafter(torch.tensor(9.0))},
        {"x": torch.zeros(2, 0)},
        {"x": torch.arange(2)},
    ]
    found = [digests(Batch(named)) for named in inputs]
    assert len({pair[0] for pair in found}) == len(inputs)
    assert digests(Batch({"mask": flags, "x": X[:2]})) == found[5]
    assert digests(Batch({"x": X[:4].T.contiguous().T[:2]})) == found[0]


def test_every_sample_is_computed_once_and_served_in_any_order() -> None:
    asked: list[int] = []

    def counted(batch: Batch) -> TeacherOutput:
        asked.append(batch.size)
        return taught(batch)

    store, words = kept(batches_of(TEACHER, X, Y), asked=counted)
    assert store is not None
    assert words == "computed once for 96 samples and cached (1.15 kB)"
    assert asked == [16] * 7  # one of another pass, to see what they are like
    shuffled = Batch({"x": X.flip(0)})
    torch.testing.assert_close(store.of(shuffled), taught(shuffled))


def test_samples_that_come_more_than_once_are_kept_once() -> None:
    store, words = kept(batches_of(TEACHER, torch.cat([X, X]), torch.cat([Y, Y])))
    assert store is not None
    assert len(store) == 96
    assert "96 samples" in words


def test_the_sample_that_a_pass_leaves_out_is_no_augmentation() -> None:
    batches = batches_of(TEACHER, X[:81], Y[:81])  # the last batch of one is left out, and it is another each time
    for seed in range(12):
        config = TrainingConfig(epochs=2, batch=16, seed=seed)
        batches._counted.clear()
        store, words = kept(batches, config)
        assert store is not None, words
        assert len(store) == 80


def test_inputs_that_change_from_pass_to_pass_are_seen_before_the_teacher_is_asked_about_them() -> None:
    asked: list[int] = []

    def counted(batch: Batch) -> TeacherOutput:
        asked.append(batch.size)
        return taught(batch)

    noisy = changing(lambda inputs: inputs + 0.01 * torch.randn_like(inputs))
    assert kept(noisy, asked=counted) == (None, "computed for every batch: the inputs are augmented")
    assert asked == [16]

    def flipped(inputs: Tensor) -> Tensor:
        return torch.where(torch.rand(len(inputs), 1) < 0.5, inputs.flip(1), inputs)

    assert kept(changing(flipped))[0] is None


def test_outputs_that_serve_once_or_are_not_one_for_each_sample_are_not_kept() -> None:
    batches = batches_of(TEACHER, X, Y)
    assert kept(batches, TrainingConfig(epochs=1, batch=16)) == (
        None,
        "computed for every batch: there is only one epoch",
    )
    none, words = kept(batches, asked=lambda batch: TeacherOutput([taught(batch)[0].T]))
    assert none is None
    assert "no row per sample" in words


def test_outputs_that_need_too_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_outputs, "LIMIT_BYTES", 1000)
    assert kept(batches_of(TEACHER, X, Y)) == (None, "computed for every batch: a cache would take 1.15 kB")


def test_the_same_seed_fills_them_with_the_same_bits() -> None:
    stores = [kept(batches_of(TEACHER, X, Y))[0] for _ in range(2)]
    batch = Batch({"x": X})
    found = [store.of(batch) for store in stores if store is not None]
    assert torch.equal(found[0][0], found[1][0])  # type: ignore[index]
