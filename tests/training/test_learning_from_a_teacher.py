"""The training loop with a teacher: its cost, cached outputs, and an interrupted training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_pairs import Conv, Encoder, features_of, heard_by, inner_state, made
from small_training import batches_of, blobs, evaluator_of, fit, net, same, signature_of, source, state
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from omgoptim.errors import DataError, RunError, TechniqueError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.data import DataSource
from omgoptim.models.raw_batch import RawBatch
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training._loop import training_state
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.loop import TrainingResult
from omgoptim.training.losses import Loss, loss_of

X, Y = blobs()
ROOT = Path(__file__).parents[2]
PLAN = TrainingConfig(epochs=3, batch=16, learning_rate=0.01)


def pictures(count: int = 48) -> tuple[Tensor, Tensor]:
    """Bright upper, lower or left halves, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    x = torch.randn(count, 1, 8, 8, generator=generator)
    x[labels == 0, :, :4] += 1.5
    x[labels == 1, :, 4:] += 1.5
    x[labels == 2, :, :, :4] += 1.5
    return x, labels


P, L = pictures()


def cross_entropy(module: nn.Module, inputs: Tensor, target: Tensor) -> Loss:
    with torch.no_grad():
        found = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), module(inputs[:8]), target[:8])
    assert found is not None
    return found


class Counted(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def distilled(
    teacher: nn.Module, student: nn.Module, config: TrainingConfig = PLAN, alpha: float = 0.5, **more: Any
) -> TrainingResult:
    return fit(
        student, batches_of(student, X, Y), cross_entropy(student, X, Y), config, None,
        teacher=teacher, distillation=more.pop("distillation", DistillationLoss(2.0, alpha)), **more,
    )  # fmt: skip


def test_a_teacher_is_asked_once_about_each_sample_and_the_student_learns_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, student = Counted(net(seed=1)).eval(), net()
    fitted = distilled(teacher, student)
    assert fitted.teacher_outputs == "computed once for 96 samples and cached (1.15 kB)"
    assert teacher.calls == 1 + 1 + 1 + 6  # settled on, tried, one example, one pass of six batches
    monkeypatch.setattr(training_state, "cache_outputs", lambda *_: (None, "computed for every batch"))
    again, other = Counted(net(seed=1)).eval(), net()
    whole = distilled(again, other)
    assert again.calls == 2 + 3 * 6
    for name, tensor in state(other).items():
        torch.testing.assert_close(state(student)[name], tensor)
    assert [record.loss for record in fitted.epochs] == pytest.approx([record.loss for record in whole.epochs])


def test_what_is_done_with_the_teachers_outputs_is_said() -> None:
    def words(**more: Any) -> str | None:
        return distilled(net(seed=1), net(), **more).teacher_outputs

    assert words(config=TrainingConfig(epochs=1, batch=16)) == "computed for every batch: there is only one epoch"
    assert words(alpha=1.0) is None
    student = net()
    features = features_of("fitnets", student, net(seed=1, width=8), X[:4])
    fitted = distilled(net(seed=1, width=8), student, features=features)
    assert fitted.teacher_outputs == "computed for every batch: feature distillation needs its activations too"
    assert fit(net(), batches_of(net(), X, Y), cross_entropy(net(), X, Y), PLAN, None).teacher_outputs is None


@pytest.mark.parametrize("form", ["hinton", "mse", "dkd", "dist"])
def test_every_form_brings_a_student_to_its_teachers_answers(form: Any) -> None:
    teacher, student = net(seed=1), net(seed=2)
    distilled(teacher, teacher, TrainingConfig(epochs=8, batch=16), alpha=1.0)
    evaluator = evaluator_of(teacher, X, None, "top1_agreement")
    before = evaluator.score(student)
    fitted = distilled(
        teacher, student, TrainingConfig(epochs=10, batch=16, learning_rate=0.02),
        distillation=DistillationLoss(2.0, 0.1, form=form),
    )  # fmt: skip
    assert evaluator.score(student) > max(before, 0.85)
    assert "0.1 x cross-entropy + 0.9 x " in fitted.loss


def test_outputs_of_another_shape_and_forms_that_do_not_suit_are_refused_before_any_step() -> None:
    student = net()
    before = state(student)
    with pytest.raises(DataError, match="different shapes") as error:
        distilled(net(seed=1, outputs=5), student)
    assert "(16, 3)" in error.value.why
    assert "(16, 5)" in error.value.why
    batches = batches_of(student, X, None)
    with pytest.raises(DataError, match="label of each row"):
        fit(student, batches, None, PLAN, None, teacher=net(seed=1), distillation=DistillationLoss(form="dkd"))

    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(x * student.fc.weight.sum(), dim=1)

    module = nn.Sequential(student.fc, Unit())
    with pytest.raises(TechniqueError, match="dist needs class logits"):
        fit(module, batches, None, PLAN, None, teacher=module, distillation=DistillationLoss(form="dist"))
    assert same(state(student), before)


def test_decoupled_distillation_of_a_causal_language_model_is_refused() -> None:
    class TinyCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    ids = torch.arange(24).reshape(8, 3) % 7
    module = TinyCausalLM().eval()
    loss = cross_entropy(module, ids, ids)
    with pytest.raises(TechniqueError, match="causal") as error:
        fit(module, batches_of(module, ids, ids), loss, PLAN, None, teacher=TinyCausalLM(),
            distillation=DistillationLoss(form="dkd"))  # fmt: skip
    assert "hinton" in error.value.fix
    assert "DIST" in fit(module, batches_of(module, ids, ids), loss, PLAN, None, teacher=TinyCausalLM(),
                         distillation=DistillationLoss(form="dist")).loss  # fmt: skip


@pytest.mark.parametrize("method", ["fitnets", "attention", "relational"])
def test_features_are_learnt_and_the_teacher_is_not_changed(method: str) -> None:
    teacher, student = made(Conv, 1, width=8), made(Conv, 2, width=4)
    fit(teacher, batches_of(teacher, P, L), cross_entropy(teacher, P, L), PLAN, None)
    features = features_of(method, student, teacher, P[:4])
    before, tensors, hooks = inner_state(teacher), state(teacher), inner_state(student)
    fitted = fit(
        student, batches_of(student, P, L), cross_entropy(student, P, L),
        TrainingConfig(epochs=6, batch=16, learning_rate=0.02), None,
        teacher=teacher, distillation=DistillationLoss(2.0), features=features,
    )  # fmt: skip
    assert inner_state(teacher) == before
    assert same(state(teacher), tensors)
    assert inner_state(student) == hooks
    assert fitted.loss.endswith(f" + 1 x {features.name}")
    assert fitted.trained_params == sum(parameter.numel() for parameter in student.parameters())
    assert fitted.epochs[-1].loss < fitted.epochs[0].loss  # type: ignore[operator]
    assert set(student.state_dict()) == set(made(Conv, 0).state_dict())
    assert all(parameter.grad is None for parameter in features.parameters())


def test_the_adapters_learn_with_the_student_and_come_nearer_to_the_teacher() -> None:
    teacher, student = made(Conv, 1, width=8), made(Conv, 2, width=4)
    features = features_of("fitnets", student, teacher, P[:4])
    started, before = state(features), heard_by(features, student, teacher, P).item()
    fit(student, batches_of(student, P, None), None, TrainingConfig(epochs=8, batch=16, learning_rate=0.02), None,
        teacher=teacher, features=features)  # fmt: skip
    assert not any(torch.equal(started[name], tensor) for name, tensor in state(features).items())
    assert heard_by(features, student, teacher, P).item() < 0.7 * before


def test_layers_alone_can_be_learnt_from_a_teacher_of_other_classes_or_width() -> None:
    teacher, student = made(Encoder, 1), made(Encoder, 2, width=8)
    ids = torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    batches = Batches(source(data), student, signature_of(student, data[0]))
    features = features_of("relational", student, teacher, data[0])
    config = TrainingConfig(epochs=6, batch=8, learning_rate=0.01)
    with pytest.raises(DataError, match="different shapes"):
        fit(student, batches, None, config, None, teacher=teacher, features=features)
    fitted = fit(student, batches, None, config, None, teacher=teacher, distillation=DistillationLoss(alpha=1.0),
                 features=features)  # fmt: skip
    assert fitted.loss == "1 x relations between samples (RKD)"
    assert fitted.epochs[-1].loss < fitted.epochs[0].loss  # type: ignore[operator]


def test_features_that_are_no_number_end_training_with_the_weights_from_before() -> None:
    teacher, student = made(Conv, 1, width=8), made(Conv, 2)
    features = features_of("fitnets", student, teacher, P[:4])
    with torch.no_grad():
        teacher.stage1[0].weight[0] = float("nan")
        teacher.stage2[0].weight[:, 0] = 0.0
    before = state(student)
    fitted = fit(student, batches_of(student, P, L), cross_entropy(student, P, L), PLAN, None, teacher=teacher,
                 distillation=DistillationLoss(alpha=1.0), features=features)  # fmt: skip
    assert fitted.stopped is not None
    assert "nan" in fitted.stopped
    assert same(state(student), before)


def test_features_without_a_teacher_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="teacher"):
        fit(net(), batches_of(net(), X, Y), cross_entropy(net(), X, Y), PLAN, None,
            features=FeatureLoss("relational", 1.0, []))  # fmt: skip


def cut_distillation(
    folder: Path, method: str, killed_pass: int = 0
) -> tuple[TrainingResult, nn.Module, FeatureLoss | None]:
    """Four epochs with a teacher; `killed_pass`: by the data, in the middle of that pass."""
    whole, passes = source(TensorDataset(P, L)), []
    teacher, student = made(Conv, 1, width=8), made(Conv, 2)

    def epoch(size: int) -> Iterator[RawBatch]:
        passes.append(0)
        for number, batch in enumerate(whole.epoch(size)):
            if len(passes) == killed_pass and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    batches = Batches(DataSource(whole.batches, epoch, real=True), student, signature_of(student, P[:2]))
    features = None if method == "outputs" else features_of(method, student, teacher, P[:4])
    fitted = fit(
        student, batches, cross_entropy(student, P, L), TrainingConfig(epochs=4, batch=7, learning_rate=0.02),
        evaluator_of(student, P, L), checkpoints=folder, teacher=teacher,
        distillation=DistillationLoss(2.0, form="dist"), features=features,
    )  # fmt: skip
    return fitted, student, features


@pytest.mark.parametrize(("method", "killed_pass"), [("fitnets", 3), ("outputs", 5)])
def test_a_distillation_killed_in_its_second_epoch_ends_with_the_same_bits(
    method: str, killed_pass: int, tmp_path: Path
) -> None:
    code = """if True:
        import importlib.util, pathlib, sys, torch
        torch.set_num_threads(1)
        spec = importlib.util.spec_from_file_location("cut", sys.argv[1])
        cut = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cut)
        cut.cut_distillation(pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"""
    command = [sys.executable, "-c", code, __file__, str(tmp_path / "cut"), method, str(killed_pass)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["round_001.pt"]
    whole, one, adapters = cut_distillation(tmp_path / "whole", method)
    cut, other, again = cut_distillation(tmp_path / "cut", method)
    assert (whole.resumed, cut.resumed) == (0, 1)
    assert same(state(one), state(other))
    if adapters is not None and again is not None:
        assert len(list(adapters.parameters())) == 4
        assert same(state(adapters), state(again))
    assert [record.loss for record in whole.epochs] == [record.loss for record in cut.epochs]
    assert (whole.best_epoch, whole.quality, whole.teacher_outputs) == (
        cut.best_epoch,
        cut.quality,
        cut.teacher_outputs,
    )


def test_a_finished_distillation_says_what_it_did_without_doing_it_again(tmp_path: Path) -> None:
    first, _, _ = cut_distillation(tmp_path, "outputs")
    assert first.teacher_outputs == "computed once for 48 samples and cached (576 bytes)"
    again, _, _ = cut_distillation(tmp_path, "outputs", killed_pass=2)  # one pass to count, and no other
    assert again.teacher_outputs == first.teacher_outputs


def test_a_checkpoint_with_other_features_is_refused(tmp_path: Path) -> None:
    cut_distillation(tmp_path, "fitnets")
    with pytest.raises(RunError, match="training with other settings") as error:
        cut_distillation(tmp_path, "attention")
    assert "features" in error.value.why
