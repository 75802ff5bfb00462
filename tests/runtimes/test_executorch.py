"""Programs for ExecuTorch: what is written, what runs, and what the file says about its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.errors import NoLayerChanged, TechniqueError
from omgoptim.measure.size import module_layers
from omgoptim.models import pte_file
from omgoptim.models.pte_file import lowered_layers
from omgoptim.operations.quantization.coverage import FloatModel, measure_coverage
from omgoptim.requests.quantize import Dynamic, Static
from omgoptim.runtimes import ENGINES, SessionSettings, engine_named
from omgoptim.runtimes.signature import InputTensor, Signature, structure_of
from omgoptim.techniques.quantize._executorch.lowering import LoweringInput, lower
from omgoptim.techniques.registry import Outcome, ProgramRun

SAMPLES = 12


class Mixed(nn.Module):
    """A convolution with its normalization, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Spread(nn.Module):
    """Convolutions with channels of very different scale, a clip, and a Linear layer on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.clip = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1)
        self.wide, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        factors = 64 ** torch.linspace(-1, 0.2, 16)
        with torch.no_grad():
            self.norm.weight.mul_(factors)
            self.depthwise.weight.div_(factors[:, None, None, None])
            for layer in (self.depthwise, self.point, self.wide, self.head):  # nothing but the input is a signal
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.point(self.depthwise(self.clip(self.norm(self.stem(x))))))
        return self.head(torch.relu(self.wide(x.flatten(2).transpose(1, 2)))).mean(1)


class Tokens(nn.Module):
    """An embedding with integer positions, called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(20, 16), nn.Embedding(8, 16), nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1]) + 1
        return self.head((self.words(ids) + self.places(places - 1)).mean(1))


class Recurrent(nn.Module):
    """A GRU whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x)[0][:, -1])


def portable_operators(program: Path) -> list[str]:
    """Return the operators that no delegate computes."""
    plan = pte_file._program(program.read_bytes()).execution_plan[0]
    return sorted({f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators})


def test_a_missing_package_is_reported_with_the_whole_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == "torchao" else object())
    assert engine_named("executorch").missing("cpu") == "torchao is not installed: pip install torchao"
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    said = str(engine_named("executorch").missing("cpu"))
    assert said.endswith("not installed: pip install executorch torchao ruamel.yaml flatbuffers tabulate")
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: object())
    assert "on the CPU only" in str(engine_named("executorch").missing("cuda"))


@pytest.fixture(scope="module")
def _installed() -> None:
    pytest.importorskip(
        "executorch.extension.pybindings._C", reason="executorch is not installed", exc_type=ImportError
    )
    if engine_named("executorch").missing("cpu"):
        pytest.skip("what exporting to ExecuTorch needs is not installed")


def given_of(module: nn.Module, x: torch.Tensor, scratch: Path, *, keyword: bool = False) -> LoweringInput:
    name = "ids" if keyword else "x"
    module = module.eval()
    with torch.no_grad():
        outputs = structure_of(module(x[:1]))
    shape = (1, *x.shape[1:])
    signature = Signature((InputTensor(name, str(x.dtype).removeprefix("torch."), shape, keyword),), outputs)
    ones = [{name: x[i : i + 1].numpy()} for i in range(len(x))]
    layers = {layer.path: layer.op for layer in module_layers(module)}
    return LoweringInput(module, signature, ones[0], ProgramRun(ones, scratch), layers)


def with_program(given: LoweringInput, folder: Path) -> LoweringInput:
    """Add the module's ONNX program to the input of a lowering, as a run does."""
    from omgoptim.runtimes.export import export_onnx

    program = folder / "float.onnx"
    batch = {name: torch.from_numpy(np.concatenate([array, array])) for name, array in given.example.items()}
    export_onnx(given.module, batch, given.signature.at_batch("batch"), program)
    return replace(given, program=program)


def noise_db(given: LoweringInput, program: Path) -> float:
    """SQNR of the program against the module, on the calibration samples."""
    session = ENGINES["executorch"].open(program, given.signature, SessionSettings(1))
    want, got = [], []
    with torch.no_grad():
        for batch in given.run.calibration:
            args, kwargs = given.signature.to_call({name: torch.from_numpy(a) for name, a in batch.items()})
            want.append(given.module(*args, **kwargs).numpy())
            got.append(session.run(batch)[0])
    noise = float(np.square(np.concatenate(got) - np.concatenate(want)).sum())
    return 10 * float(np.log10(np.square(np.concatenate(want)).sum() / max(noise, 1e-20)))


@pytest.fixture
def mixed(tmp_path: Path, _installed: None) -> LoweringInput:
    torch.manual_seed(0)
    return given_of(Mixed(), torch.randn(SAMPLES, 3, 8, 8), tmp_path)


def lowered(given: LoweringInput, params: Any, folder: Path) -> tuple[Outcome, Path]:
    return lower(given, params, folder / "model.pte"), folder / "model.pte"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("build", "inputs", "keyword"),
    [
        (Mixed, lambda: torch.randn(SAMPLES, 3, 8, 8), False),
        (Tokens, lambda: torch.randint(0, 20, (SAMPLES, 8)), True),
        (Recurrent, lambda: torch.randn(SAMPLES, 5, 6), False),
    ],
)
def test_a_float_program_gives_what_torch_gives(
    build: Callable[[], nn.Module], inputs: Callable[[], torch.Tensor], keyword: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    given = given_of(build(), inputs(), tmp_path, keyword=keyword)
    outcome, program = lowered(given, None, tmp_path)
    assert not outcome.changed
    assert noise_db(given, program) > 100
    assert {layer.computed_in for layer in lowered_layers(program)} == {"float32"}


def test_static_quantization_puts_every_layer_in_integers_and_the_file_proves_it(
    mixed: LoweringInput, tmp_path: Path
) -> None:
    outcome, program = lowered(mixed, Static(), tmp_path)
    layers = {layer.path: layer for layer in lowered_layers(program)}
    assert {path: (one.dtype, one.computed_in) for path, one in layers.items()} == {
        "conv": ("int8", "int8"),
        "head": ("int8", "int8"),
    }
    assert layers["head"].bytes == 4 * 8 + 4 * 4 + 4 * 4  # weights, a scale for each output, float biases
    assert portable_operators(program) == ["aten::mean.out"]
    assert [change.path for change in outcome.changed] == ["conv", "head"]
    assert noise_db(mixed, program) > 25
    coverage = measure_coverage(
        FloatModel(None, mixed.module), saved(mixed, program, tmp_path / "artifact"), "static", [], []
    )
    assert coverage is not None
    assert (coverage.verdict, coverage.changed, coverage.integer) == ("REAL", 2, 2)


@pytest.mark.usefixtures("_installed")
def test_weights_of_the_ptq_pipeline_keep_what_spread_channels_lose(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = with_program(given_of(Spread(), torch.randn(32, 3, 12, 12), tmp_path), tmp_path)
    plain, program = lowered(given, Static(equalize=False, bias_correction=False, rounding="nearest"), tmp_path)
    plain_db = noise_db(given, program)
    outcome, program = lowered(given, Static(), tmp_path)
    assert noise_db(given, program) > plain_db + 6
    assert [change.path for change in outcome.changed] == [change.path for change in plain.changed]
    assert "raised SQNR" in " ".join(outcome.notes)


@pytest.mark.usefixtures("_installed")
def test_equalization_alone_leaves_the_outputs_of_the_module_as_they_are(tmp_path: Path) -> None:
    from omgoptim.runtimes.export_patches import quiet_export
    from omgoptim.techniques.quantize._executorch.improved_weights import improve_weights

    torch.manual_seed(0)
    given = with_program(given_of(Spread(), torch.randn(16, 3, 12, 12), tmp_path), tmp_path)
    x = torch.from_numpy(given.example["x"])
    params = Static(equalize=True, bias_correction=False, rounding="nearest", range_method="minmax")
    assert given.program is not None
    with quiet_export():
        module = torch.export.export(given.module, (x,)).module()
        found = improve_weights(module, given.program, [dict(b) for b in given.run.calibration], params, given.run)
    assert found is not None
    before, after, in_float = found
    with torch.no_grad():
        want = module(x)
        scale = float(want.abs().max())
        assert float((before(x) - want).abs().max()) < 1e-5 * scale
        assert float((after(x) - want).abs().max()) < 1e-4 * scale
    assert not in_float
    weights = [dict(form.named_parameters()) for form in (before, after)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not [node for node in after.graph.nodes if "relu6" in str(node.target) or "hardtanh" in str(node.target)]


@pytest.mark.usefixtures("_installed")
def test_without_a_program_the_weights_stay_and_the_summary_says_why(mixed: LoweringInput, tmp_path: Path) -> None:
    outcome, _ = lowered(mixed, Static(), tmp_path)
    assert any("were left out: the model has no ONNX program" in note for note in outcome.notes)


@pytest.mark.usefixtures("_installed")
def test_small_weights_keep_their_own_scale(tmp_path: Path) -> None:
    """A scale of at least 2**-12, as ExecuTorch's own, would leave four integers of these weights."""
    torch.manual_seed(0)
    module = nn.Linear(16, 4)
    with torch.no_grad():
        module.weight.mul_(2e-3)
        module.bias.zero_()
    _, program = lowered(given := given_of(module, torch.randn(SAMPLES, 16), tmp_path), Dynamic(), tmp_path)
    assert noise_db(given, program) > 25


def test_a_layer_that_is_ignored_stays_in_float_and_an_unknown_name_is_refused(
    mixed: LoweringInput, tmp_path: Path
) -> None:
    outcome, program = lowered(mixed, Static(ignore=["head"]), tmp_path)
    assert {layer.path: layer.dtype for layer in lowered_layers(program)} == {"conv": "int8", "head": "float32"}
    assert [skip.path for skip in outcome.skipped] == ["head"]
    with pytest.raises(NoLayerChanged, match="'haed' matches no layer"):
        lower(mixed, Static(ignore=["haed"]), tmp_path / "other.pte")


@pytest.mark.usefixtures("_installed")
def test_dynamic_quantization_takes_the_linear_layers_and_leaves_integer_positions_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = given_of(Tokens(), torch.randint(0, 20, (SAMPLES, 8)), tmp_path, keyword=True)
    outcome, program = lowered(given, Dynamic(), tmp_path)
    assert [change.path for change in outcome.changed] == ["head"]
    assert {skip.path for skip in outcome.skipped} == {"words", "places"}
    assert "aten::embedding.out" in portable_operators(program)
    assert noise_db(given, program) > 25


@pytest.mark.usefixtures("_installed")
def test_what_has_no_form_there_is_refused_with_the_reason_and_another_scheme(tmp_path: Path) -> None:
    convolutions = given_of(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8), tmp_path)
    with pytest.raises(NoLayerChanged, match="dynamic quantization changed no layer") as nothing:
        lower(convolutions, Dynamic(), tmp_path / "model.pte")
    assert nothing.value.schemes == ("static",)
    attention = given_of(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 4, 8), tmp_path)
    with pytest.raises(TechniqueError, match="not supported on ExecuTorch") as refused:
        lower(attention, Static(), tmp_path / "model.pte")
    assert refused.value.fix == "use scheme dynamic"


def saved(given: LoweringInput, program: Path, folder: Path) -> Path:
    from omgoptim.models.artifact import save_program
    from omgoptim.models.manifest import Manifest
    from omgoptim.models.output_check import OutputCheck

    session = ENGINES["executorch"].open(program, given.signature, SessionSettings(1))
    check = OutputCheck(given.example, session.run(given.example))
    save_program(folder, program, Manifest("executorch", "int8", given.signature), check)
    return folder


def test_an_artifact_is_its_program_and_a_fresh_process_gives_the_same(mixed: LoweringInput, tmp_path: Path) -> None:
    from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
    from omgoptim.models.artifact import loading_snippet
    from omgoptim.models.manifest import Manifest

    _, program = lowered(mixed, Static(), tmp_path)
    folder = saved(mixed, program, tmp_path / "artifact")
    manifest = Manifest.read(folder)
    assert manifest.size_files == ["model.pte"]
    assert manifest.size_bytes == program.stat().st_size
    with MeasuringProcess(folder, TimingSetup({}, 1, 1, tmp_path)) as process:
        process.begin_open()
        assert max(process.end_open()["differences"]) < 1e-6
    lines = loading_snippet(folder, manifest)
    assert "executorch-android" in lines
    assert "Swift" in lines


@pytest.mark.slow
@pytest.mark.usefixtures("_installed")
def test_the_reported_quality_is_that_of_the_program_opened_again(tmp_path: Path) -> None:
    import omgoptim

    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 4

    def load(split: str) -> torch.utils.data.TensorDataset:
        part = slice(0, 20) if split == "eval" else slice(20, 40)
        return torch.utils.data.TensorDataset(images[part], labels[part])

    report = omgoptim.quantize(
        Mixed().eval(), data=load, runtime="executorch", scheme="static", timing="quick", max_quality_drop=1.0,
        project=str(tmp_path),
    )  # fmt: skip
    assert report.coverage is not None
    assert report.after is not None
    assert report.artifact is not None
    assert (report.coverage.verdict, report.coverage.integer) == ("REAL", 2)
    model = omgoptim.open_artifact(report.artifact.path)
    scores = torch.cat([model(x[None]) for x in images[:20]])
    assert report.after.quality == pytest.approx(float((scores.argmax(1) == labels[:20]).float().mean()))
    assert "executorch-android" in report.artifact.load
