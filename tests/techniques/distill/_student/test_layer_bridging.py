from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.child_removal import keep_children
from omgoptim.models.forward import first_forward, input_tensors, name_inputs
from omgoptim.models.samples import Samples
from omgoptim.requests.distill import FewerLayers
from omgoptim.techniques.distill._student.layer_bridging import Span, fit_spans
from omgoptim.techniques.distill.fewer_layers import apply
from omgoptim.techniques.registry import ModuleRun


class Block(nn.Module):
    """x + W relu(V x): how a stream is written to; `after` normalizes the sum, `scaled` multiplies it."""

    def __init__(self, width: int, after: bool = False, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(3 * width, width, bias=bias)
        self.norm = nn.LayerNorm(width) if after else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.outer(torch.relu(self.inner(x)))) * self.scale
        return x if self.norm is None else self.norm(x)


class Stacked(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stacked(layers: int = 4, seed: int = 0, **arguments: object) -> Stacked:
    torch.manual_seed(seed)
    return Stacked([Block(6, **arguments) for _ in range(layers)]).eval()  # type: ignore[arg-type]


def run_on(teacher: nn.Module, inputs: Tensor, scratch: Path, real: bool = True) -> ModuleRun:
    named = [name_inputs(teacher, inputs)]
    signature = first_forward(teacher, input_tensors(named), {name: tensor for name, tensor, _ in named[0]})
    samples = Samples([{signature.input_names[0]: inputs.numpy()}], [None])
    return ModuleRun(signature, samples, lambda outputs, _: outputs.sum(), teacher, scratch, real=real)


def cut(teacher: nn.Module, keep: list[int]) -> nn.Module:
    student = copy.deepcopy(teacher)
    keep_children(student, "blocks", keep)
    return student


def distance(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((teacher(inputs) - student(inputs)).square().mean() / teacher(inputs).var())


@pytest.mark.parametrize("after", [False, True], ids=["pre-norm", "post-norm"])
def test_layers_that_stay_come_nearer_to_the_teacher_on_inputs_that_were_not_fitted_on(
    after: bool, tmp_path: Path
) -> None:
    teacher = stacked(after=after)
    student, bare = cut(teacher, [0, 2]), cut(teacher, [0, 2])
    spans = [Span("blocks.0", "blocks.1"), Span("blocks.1", "blocks.3")]
    assert fit_spans(student, teacher, spans, run_on(teacher, torch.randn(400, 6), tmp_path)) == [
        "blocks.0",
        "blocks.1",
    ]
    fresh = torch.randn(200, 6)
    assert distance(teacher, student, fresh) < 0.5 * distance(teacher, bare, fresh)


def test_the_fitted_layer_is_the_least_squares_solution(tmp_path: Path) -> None:
    teacher = stacked(layers=2)
    student = cut(teacher, [0])
    inputs = torch.randn(500, 6)
    fit_spans(student, teacher, [Span("blocks.0", "blocks.1")], run_on(teacher, inputs, tmp_path))
    block = student.get_submodule("blocks.0")
    with torch.no_grad():
        hidden = torch.relu(block.inner(inputs))
        wanted = teacher.blocks[1](teacher.blocks[0](inputs)) - inputs
    solved = torch.linalg.lstsq(torch.cat([hidden, torch.ones(500, 1)], 1).double(), wanted.double()).solution
    expected = torch.cat([hidden, torch.ones(500, 1)], 1).double() @ solved
    torch.testing.assert_close(block.outer(hidden).double(), expected, atol=0.05, rtol=0)


def test_a_span_of_one_layer_stays_exactly_what_it_was(tmp_path: Path) -> None:
    teacher = stacked(after=True)
    student = copy.deepcopy(teacher)
    inputs = torch.randn(300, 6)
    fit_spans(student, teacher, [Span("blocks.0", "blocks.0")], run_on(teacher, inputs, tmp_path))
    torch.testing.assert_close(student(inputs), teacher(inputs), atol=1e-4, rtol=1e-4)


def test_a_layer_that_does_more_than_add_is_left_alone(tmp_path: Path) -> None:
    teacher = stacked(scale=0.5)
    student = cut(teacher, [0, 2])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    spans = [Span("blocks.0", "blocks.1"), Span("blocks.1", "blocks.3")]
    assert fit_spans(student, teacher, spans, run_on(teacher, torch.randn(50, 6), tmp_path)) == []
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_linear_without_bias_stays_without(tmp_path: Path) -> None:
    teacher = stacked(bias=False)
    student, bare = cut(teacher, [0, 2]), cut(teacher, [0, 2])
    inputs = torch.randn(400, 6)
    spans = [Span("blocks.0", "blocks.1"), Span("blocks.1", "blocks.3")]
    assert len(fit_spans(student, teacher, spans, run_on(teacher, inputs, tmp_path))) == 2
    assert student.get_submodule("blocks.0").outer.bias is None
    assert distance(teacher, student, inputs) < distance(teacher, bare, inputs)


def test_padding_does_not_change_the_fit(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stacked().blocks

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return (x * attention_mask[..., None]).sum(1)

    teacher = Masked().eval()
    x, mask = torch.randn(40, 5, 6), torch.ones(40, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    fitted = []
    for padding in (0.0, 100.0):
        inputs = {"x": torch.where(mask[..., None] == 1, x, torch.full_like(x, padding)), "attention_mask": mask}
        named = [name_inputs(teacher, inputs)]
        signature = first_forward(teacher, input_tensors(named), inputs)
        samples = Samples([{name: tensor.numpy() for name, tensor in inputs.items()}], [None])
        run = ModuleRun(signature, samples, lambda outputs, _: outputs.sum(), teacher, tmp_path)
        student = cut(teacher, [0, 2])
        fit_spans(student, teacher, [Span("blocks.0", "blocks.1"), Span("blocks.1", "blocks.3")], run)
        fitted.append(student.state_dict())
    for name, tensor in fitted[0].items():
        torch.testing.assert_close(tensor, fitted[1][name], atol=1e-4, rtol=1e-4)


def test_torchs_own_encoder_is_fitted_although_it_has_a_fused_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    teacher = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Flatten()).eval()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3)
    student = copy.deepcopy(teacher)
    outcome = apply(student, FewerLayers(keep_layers=2), run_on(teacher, torch.randn(120, 5, 8), tmp_path))
    assert any("2 kept layers were fitted" in note for note in outcome.notes)
    bare = copy.deepcopy(teacher)
    apply(bare, FewerLayers(keep_layers=2), run_on(teacher, torch.randn(120, 5, 8), tmp_path, real=False))
    fresh = torch.randn(60, 5, 8)
    assert distance(teacher, student, fresh) < distance(teacher, bare, fresh)
