from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import Net, batches_of, blobs, evaluator_of, fit, net, same, signature_of, source, state
from torch import nn
from torch.utils.data import TensorDataset

from omgoptim.errors import DataError, ModelError, RequestError, RunError, SetupError, TechniqueError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.data import DataSource, random_data
from omgoptim.models.raw_batch import RawBatch
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.loop import TrainingResult
from omgoptim.training.losses import Loss, loss_of
from omgoptim.training.trainable_weights import ZeroMasks

X, Y = blobs()
PLAN = TrainingConfig(epochs=2, batch=16)
ROOT = Path(__file__).parents[2]


def cross_entropy(module: nn.Module, inputs: torch.Tensor = X, target: torch.Tensor = Y) -> Loss:
    with torch.no_grad():
        found = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), module(inputs[:8]), target[:8])
    assert found is not None
    return found


def trained(module: nn.Module, config: TrainingConfig = PLAN, eval_mode: bool = True, **more: Any) -> TrainingResult:
    evaluator = evaluator_of(module, X, Y) if eval_mode else None
    return fit(module, batches_of(module, X, Y), cross_entropy(module), config, evaluator, **more)


def test_two_epochs_on_digits_raise_the_accuracy_of_a_small_net() -> None:
    from sklearn.datasets import load_digits  # here: a process that is killed imports this file too

    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    module = net(inputs=64, width=64, outputs=10)
    evaluator = evaluator_of(module, images[1200:], labels[1200:])
    batches = batches_of(module, images[:1200], labels[:1200])
    fitted = fit(module, batches, cross_entropy(module, images, labels), TrainingConfig(epochs=2, batch=32), evaluator)
    assert fitted.quality_before is not None
    assert fitted.quality_before < 0.3
    assert fitted.quality is not None
    assert fitted.quality > 0.8
    assert evaluator.score(module) == fitted.quality
    assert [record.epoch for record in fitted.epochs] == [1, 2]
    assert fitted.epochs[1].loss < fitted.epochs[0].loss


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_the_default_learning_rate_of_every_optimizer_learns(optimizer: Any) -> None:
    from omgoptim.training.config import LEARNING_RATES

    x, y = blobs(480)
    module = net()
    evaluator = evaluator_of(module, X, Y)
    config = TrainingConfig(epochs=6, batch=16, optimizer=optimizer, learning_rate=LEARNING_RATES[optimizer])
    fitted = fit(module, batches_of(module, x, y), cross_entropy(module), config, evaluator)
    assert fitted.quality is not None
    assert fitted.quality > max(evaluator.original, 0.7)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        module = net()
        trained(module, TrainingConfig(epochs=2, batch=16, seed=seed), eval_mode=False)
        runs.append(state(module))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_accumulated_batches_make_the_step_that_one_large_batch_makes() -> None:
    def after(batch: int, accumulate: int, cuts: list[int]) -> dict[str, torch.Tensor]:
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        module.load_state_dict(start)
        parts = list(zip(X[:60].split(cuts), target.split(cuts), strict=True))
        batches = Batches(source(lambda: parts), module, signature_of(module, X[:2]))
        config = TrainingConfig(
            epochs=3, batch=batch, accumulate=accumulate, optimizer="sgd", learning_rate=0.1, clip_norm=0
        )
        fit(module, batches, cross_entropy(module), config, None)
        return state(module)

    start = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).state_dict()
    target = Y[:60].clone()
    target[5:14] = -100  # uneven: a batch's mean is over the targets that count
    one, many = after(24, 1, [24, 24, 12]), after(8, 3, [8] * 7 + [4])  # the last group has two batches
    for name in one:
        torch.testing.assert_close(one[name], many[name])


def test_frozen_parameters_stay_and_frozen_batch_norm_keeps_its_statistics() -> None:
    module = net()
    for parameter in [*module.fc.parameters(), *module.norm.parameters()]:
        parameter.requires_grad_(False)
    before = state(module)
    fitted = trained(module, eval_mode=False)
    after = state(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"out.weight", "out.bias"}
    assert fitted.trained_params == 16 * 3 + 3
    assert fitted.total_params == sum(parameter.numel() for parameter in module.parameters())
    assert [parameter.requires_grad for parameter in module.fc.parameters()] == [False, False]


def test_a_module_comes_back_in_its_modes_with_its_own_forward_and_without_gradients() -> None:
    module = net()
    module.drop.train()
    attributes = set(vars(module))
    trained(module, TrainingConfig(epochs=1, batch=16, mixed_precision="bf16"))
    assert set(vars(module)) == attributes
    assert module.forward.__func__ is Net.forward  # type: ignore[attr-defined]
    assert [module.training, module.drop.training, module.norm.training] == [False, True, False]
    assert all(parameter.grad is None and parameter.dtype is torch.float32 for parameter in module.parameters())
    copied = copy.deepcopy(module)
    nn.init.zeros_(copied.out.weight)
    assert not torch.equal(copied.eval()(X), module.eval()(X))


def test_trainings_of_several_precisions_follow_each_other_and_a_callers_accelerator_survives() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        results = []
        for precision in ("no", "bf16", "no"):
            module = net()
            trained(module, TrainingConfig(epochs=1, batch=16, mixed_precision=precision), eval_mode=False)  # type: ignore[arg-type]
            results.append(state(module))
        assert same(results[0], results[2])
        assert not same(results[0], results[1])
        assert (own.mixed_precision, own.gradient_state.num_steps) == ("no", 4)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_half_precision_floats_on_a_cpu_are_refused_with_the_way_out() -> None:
    with pytest.raises(RequestError, match="fp16") as error:
        trained(net(), TrainingConfig(mixed_precision="fp16"))
    assert "bf16" in error.value.fix


def test_the_callers_random_state_is_untouched() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trained(net())
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    trained(net(), TrainingConfig(epochs=1, batch=16, mixed_precision="bf16"))
    assert capfd.readouterr() == ("", "")


def test_progress_tells_the_epoch_the_loss_and_the_time_left() -> None:
    told: list[tuple[str, float | None]] = []
    trained(net(), progress=lambda text, done: told.append((text, done)))
    assert all(re.fullmatch(r"training: epoch [12] of 2, loss [\d.e-]+, eta \d+ s", text) for text, _ in told)
    assert told[-1][1] == 1.0
    assert [done for _, done in told] == sorted(done for _, done in told if done is not None)


def test_training_that_only_hurts_is_undone() -> None:
    module = net()
    trained(module, TrainingConfig(epochs=10, batch=16))
    before, good = state(module), evaluator_of(module, X, Y)
    config = TrainingConfig(epochs=3, batch=16, learning_rate=0.05)
    fitted = fit(module, batches_of(module, X, (Y + 1) % 3), cross_entropy(module), config, good)
    assert same(state(module), before)
    assert (fitted.best_epoch, fitted.quality) == (0, good.original)
    assert [record.best for record in fitted.epochs] == [False] * 3
    assert fitted.notes


class Scripted:
    """An evaluator that gives the scores it was told to; the loop sees a score and nothing else."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.seen = list(scores), []
        self.metric = evaluator_of(net(), X, Y).metric

    def score(self, module: nn.Module) -> float:
        self.seen.append(state(module))
        return self.scores[len(self.seen) - 1]


def fit_scripted(config: TrainingConfig, *scores: float) -> tuple[TrainingResult, Scripted, nn.Module]:
    module, evaluator = net(), Scripted(*scores)
    fitted = fit(module, batches_of(module, X, Y), cross_entropy(module), config, evaluator)  # type: ignore[arg-type]
    return fitted, evaluator, module


def test_the_best_epoch_is_kept_and_of_equal_ones_the_latest() -> None:
    fitted, evaluator, module = fit_scripted(TrainingConfig(epochs=4, batch=16), 0.1, 0.7, 0.9, 0.9, 0.8)
    assert same(state(module), evaluator.seen[3])
    assert (fitted.best_epoch, fitted.quality, fitted.quality_before) == (3, 0.9, 0.1)
    assert [record.best for record in fitted.epochs] == [False, False, True, False]


def test_training_stops_after_so_many_epochs_without_better_quality() -> None:
    fitted, _, _ = fit_scripted(TrainingConfig(epochs=9, batch=16, patience=2), 0.1, 0.5, 0.5, 0.4)
    assert len(fitted.epochs) == 3  # an equal score is no better one
    assert fitted.stopped is not None
    assert "2 epochs" in fitted.stopped
    patient, _, _ = fit_scripted(TrainingConfig(epochs=4, batch=16, patience=2), 0.1, 0.5, 0.4, 0.6, 0.5)
    assert (len(patient.epochs), patient.stopped) == (4, None)


def test_a_collapsed_epoch_is_never_the_best_and_has_no_quality() -> None:
    fitted, evaluator, module = fit_scripted(TrainingConfig(epochs=2, batch=16), 0.1, 0.4, float("-inf"))
    assert same(state(module), evaluator.seen[1])
    assert [record.quality for record in fitted.epochs] == [0.4, None]


@pytest.mark.parametrize("bad_call", [3, 9])
def test_a_loss_that_is_no_number_stops_training_and_brings_the_best_weights_back(bad_call: int) -> None:
    module = net()
    sound = cross_entropy(module)
    calls, after_epoch = [], []

    def function(outputs: Any, target: Any) -> torch.Tensor:
        calls.append(0)
        value = sound.function(outputs, target)
        return value * float("nan") if len(calls) - 1 == bad_call else value  # the first call is the trial

    def keep(_text: str, done: float | None) -> None:
        if done is not None and round(done * 4, 6).is_integer():
            after_epoch.append(state(module))

    before = state(module)
    config = TrainingConfig(epochs=4, batch=16)  # six steps an epoch
    fitted = fit(module, batches_of(module, X, Y), Loss("odd", function), config, None, progress=keep)
    assert same(state(module), before if bad_call == 3 else after_epoch[0])
    assert fitted.best_epoch == (0 if bad_call == 3 else 1)
    assert fitted.stopped is not None
    assert "nan" in fitted.stopped
    assert ("from before training" in fitted.stopped) == (bad_call == 3)


def test_zeros_stay_zero_through_momentum_and_weight_decay_and_all_others_learn() -> None:
    for optimizer in ("sgd", "adam"):
        module = net()
        with torch.no_grad():
            module.fc.weight[torch.rand(16, 4, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
        zero = module.fc.weight == 0
        before = module.fc.weight.detach().clone()
        masks = ZeroMasks.of(module, ["fc"])
        config = TrainingConfig(epochs=2, batch=16, optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
        trained(module, config, masks=masks)
        assert torch.equal(module.fc.weight == 0, zero)
        assert (module.fc.weight[~zero] != before[~zero]).all()


def test_zeros_are_held_after_every_step_whatever_else_writes_to_the_weights() -> None:
    module = net()
    sound = cross_entropy(module)
    with torch.no_grad():
        module.fc.weight[:, 0] = 0
    masks = ZeroMasks.of(module, ["fc"])

    def meddling(outputs: Any, target: Any) -> torch.Tensor:
        module.fc.weight.data.add_(0.5)
        return sound.function(outputs, target)

    fit(module, batches_of(module, X, Y), Loss("meddling", meddling), PLAN, None, masks=masks)
    assert (module.fc.weight == 0).sum() == 16
    assert not torch.signbit(module.fc.weight[:, 0]).any()


def test_a_teacher_is_learnt_from_without_targets_and_not_changed_by_it() -> None:
    teacher = net(seed=1)
    trained(teacher, TrainingConfig(epochs=8, batch=16), eval_mode=False)
    before, modes = state(teacher), [layer.training for layer in teacher.modules()]
    student = net(seed=2)
    evaluator = evaluator_of(teacher, X, None, "top1_agreement")
    fitted = fit(
        student, batches_of(student, X, None), None, TrainingConfig(epochs=6, batch=16, learning_rate=1e-2), evaluator,
        teacher=teacher, distillation=DistillationLoss(temperature=2.0, form="hinton"),
    )  # fmt: skip
    assert same(state(teacher), before)
    assert [layer.training for layer in teacher.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert fitted.quality is not None
    assert fitted.quality > 0.8
    assert "KL" in fitted.loss


def test_random_inputs_are_enough_to_learn_from_a_teacher() -> None:
    teacher, student = net(seed=1), net(seed=2)
    data = random_data(["8x4"], student, count=12, seed=0)
    batches = Batches(data, student, signature_of(student, X[:2]))
    evaluator = evaluator_of(teacher, X, None)
    before = evaluator.score(student)
    config = TrainingConfig(epochs=10, learning_rate=1e-2)
    fit(student, batches, None, config, None, teacher=teacher)
    assert evaluator.score(student) > before


def test_alpha_weighs_targets_against_the_teacher() -> None:
    def after(alpha: float, with_teacher: bool) -> dict[str, torch.Tensor]:
        module = net()
        more = {"teacher": net(seed=5), "distillation": DistillationLoss(4.0, alpha)} if with_teacher else {}
        trained(module, eval_mode=False, **more)
        return state(module)

    assert same(after(1.0, True), after(1.0, False))
    assert not same(after(0.5, True), after(1.0, False))


def test_nothing_to_train_and_nothing_to_learn_from_are_refused() -> None:
    module = net()
    with pytest.raises(TechniqueError, match="neither a target nor a teacher"):
        fit(module, batches_of(module, X, None), None, PLAN, None)
    module.requires_grad_(False)
    with pytest.raises(TechniqueError, match="no trainable parameter"):
        trained(module)


def test_no_epochs_change_nothing() -> None:
    module = net()
    before = state(module)
    fitted = trained(module, TrainingConfig(epochs=0))
    assert same(state(module), before)
    assert (fitted.epochs, fitted.best_epoch, fitted.quality) == ([], 0, fitted.quality_before)


def test_a_label_out_of_range_in_the_last_batch_stops_before_the_first_step() -> None:
    module = net()
    labels = Y.clone()
    labels[-1] = 3
    before = state(module)
    with pytest.raises(DataError, match="label 3 is out of range") as error:
        fit(module, batches_of(module, X, labels), cross_entropy(module), PLAN, None)
    assert "0 to 2" in error.value.why
    assert same(state(module), before)
    assert not module.training


def test_a_loss_that_fails_does_so_before_the_first_step(policy: PathPolicy) -> None:
    module = net()
    before = state(module)
    detached = loss_of(RequestedFunction(lambda outputs, target: outputs.detach().sum(), policy, 60.0), None, None)
    with pytest.raises(DataError, match="without a gradient"):
        fit(module, batches_of(module, X, Y), detached, PLAN, None)
    assert same(state(module), before)


def test_missing_accelerate_is_said_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SetupError, match="accelerate") as error:
        trained(net())
    assert f'{sys.executable} -m pip install "accelerate' in error.value.fix


def cut_training(folder: Path, optimizer: Any, killed: bool = False) -> tuple[TrainingResult, nn.Module]:
    """Four epochs with zeros to keep; `killed`: by the data, in the middle of the second."""
    module, whole, passes = net(), source(TensorDataset(X, Y)), []
    with torch.no_grad():
        module.fc.weight[:, ::2] = 0

    def epoch(size: int) -> Iterator[RawBatch]:
        passes.append(0)
        for number, batch in enumerate(whole.epoch(size)):
            if killed and len(passes) == 3 and number == 4:  # the first pass counts, the third is epoch 2
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    batches = Batches(DataSource(whole.batches, epoch, real=True), module, signature_of(module, X[:2]))
    config = TrainingConfig(epochs=4, batch=16, optimizer=optimizer, learning_rate=0.02, accumulate=4)
    evaluator, masks = evaluator_of(module, X, Y), ZeroMasks.of(module, ["fc"])
    return fit(module, batches, cross_entropy(module), config, evaluator, checkpoints=folder, masks=masks), module


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_training_killed_in_its_second_epoch_ends_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    code = """if True:
        import importlib.util, pathlib, sys, torch
        torch.set_num_threads(1)
        spec = importlib.util.spec_from_file_location("cut", sys.argv[1])
        cut = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cut)
        cut.cut_training(pathlib.Path(sys.argv[2]), sys.argv[3], killed=True)"""
    command = [sys.executable, "-c", code, __file__, str(tmp_path / "cut"), optimizer]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["round_001.pt"]
    (whole, one), (cut, other) = (cut_training(tmp_path / name, optimizer) for name in ("whole", "cut"))
    assert (whole.resumed, cut.resumed) == (0, 1)
    assert same(state(one), state(other))
    assert [record.loss for record in whole.epochs] == [record.loss for record in cut.epochs]
    assert (whole.best_epoch, whole.quality) == (cut.best_epoch, cut.quality)
    assert int((other.fc.weight == 0).sum()) == 32  # type: ignore[union-attr]


def test_the_best_weights_of_an_epoch_before_the_interruption_are_kept(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_text: str, done: float | None) -> None:
        if done is not None and done > 0.55:
            raise Stop

    def run(evaluator: Scripted, **more: Any) -> tuple[TrainingResult, nn.Module]:
        module = net()
        config = TrainingConfig(epochs=4, batch=16)
        batches, loss = batches_of(module, X, Y), cross_entropy(module)
        return fit(module, batches, loss, config, evaluator, checkpoints=tmp_path, **more), module  # type: ignore[arg-type]

    first = Scripted(0.1, 0.9, 0.5)
    with pytest.raises(Stop):
        run(first, progress=stop)
    fitted, module = run(Scripted(0.4, 0.3))
    assert (fitted.best_epoch, fitted.quality, fitted.resumed, len(fitted.epochs)) == (1, 0.9, 1, 4)
    assert same(state(module), first.seen[1])
    assert [record.quality for record in fitted.epochs] == [0.9, 0.5, 0.4, 0.3]


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first, second = net(), net()
    trained(first, checkpoints=tmp_path)
    again = trained(second, checkpoints=tmp_path)
    assert same(state(first), state(second))
    assert (len(again.epochs), again.resumed) == (2, 0)


def test_a_checkpoint_of_another_training_is_refused_and_another_round_has_its_own(tmp_path: Path) -> None:
    trained(net(), checkpoints=tmp_path)
    kept = (tmp_path / "round_001.pt").read_bytes()
    with pytest.raises(RunError, match="training with other settings") as error:
        trained(net(), TrainingConfig(epochs=3, batch=16), checkpoints=tmp_path)
    assert "plan.epochs was 2 and is 3" in error.value.why
    with pytest.raises(RunError, match="training with other settings"):
        trained(net(width=8), checkpoints=tmp_path)
    assert (tmp_path / "round_001.pt").read_bytes() == kept
    trained(net(width=8), checkpoints=tmp_path, round_number=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_001.pt", "round_002.pt"]


def test_rounds_differ_in_what_they_draw() -> None:
    one, two = net(), net()
    trained(one, eval_mode=False, round_number=1)
    trained(two, eval_mode=False, round_number=2)
    assert not same(state(one), state(two))


def test_data_that_is_iterated_only_once_is_loaded_anew_each_epoch() -> None:
    module = net()
    loads: list[int] = []

    def load() -> Any:
        loads.append(0)
        return iter([(X[:8], Y[:8]), (X[8:16], Y[8:16])])

    batches = Batches(source(load), module, signature_of(module, X[:2]))
    fitted = fit(module, batches, cross_entropy(module), PLAN, None)
    assert len(fitted.epochs) == 2
    assert len(loads) == 3  # one to count


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.out = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.b(torch.relu(self.a(x)))))

    module = Tied().eval()
    trained(module)
    assert module.a.weight is module.b.weight


def test_a_dataset_is_shuffled_anew_in_each_epoch() -> None:
    module = net()
    sound = cross_entropy(module)
    seen: list[int] = []

    def function(outputs: Any, target: Any) -> torch.Tensor:
        seen.extend(target.tolist())
        return sound.function(outputs, target)

    labels = torch.arange(96) % 3
    fit(module, batches_of(module, X, labels), Loss("seen", function), PLAN, None)
    one, other = seen[16:112], seen[112:]  # the first batch is tried before training
    assert one != other
    assert sorted(one) == sorted(other) == sorted(labels.tolist())


def test_a_forward_that_autograd_cannot_go_back_through_is_the_models_error() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(x).sigmoid()
            return out.add_(1)

    with pytest.raises(ModelError, match="cannot be trained") as error:
        trained(InPlace(), eval_mode=False)
    assert "inplace operation" in error.value.why
    assert "in-place" in error.value.fix
