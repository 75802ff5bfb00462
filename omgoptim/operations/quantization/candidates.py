"""What can be tried: technique x engine, for this model, on this machine; and making one candidate's artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omgoptim.errors import OmgoptimError, RequestError, SetupError
from omgoptim.hardware import cpu_features
from omgoptim.models.onnx_graph import GraphTraits
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.reports import Candidate
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.requests.quantize import Auto, Bf16, Dynamic, Fp32, Static
from omgoptim.runtimes import ENGINES
from omgoptim.techniques.quantize._ptq.presets import apply_preset
from omgoptim.techniques.quantize.static import variants
from omgoptim.techniques.registry import technique_of

BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that can be tried."""

    params: Params
    runtime: str
    note: str = ""
    """What sets it apart from others of its technique: `3 layers in float`."""

    @property
    def scheme(self) -> str:
        return str(getattr(self.params, "scheme"))  # noqa: B009  every technique of this verb has it

    @property
    def name(self) -> str:
        algorithm = getattr(self.params, "algorithm", "auto")
        noted = f", {self.note}" if self.note else ""
        return f"{self.scheme}{'' if algorithm == 'auto' else f'-{algorithm}'}{noted} on {self.runtime}"

    @property
    def on_module(self) -> bool:
        return ENGINES[self.runtime].runs == "module"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What will be tried, and what will not with the reason."""

    options: list[Option]
    passed_over: list[Candidate]


@dataclass(frozen=True, slots=True)
class Program:
    """The one export that all program candidates start from, or why the model has none."""

    path: Path | None
    traits: GraphTraits | None
    error: OmgoptimError | None = None
    fixed_batch: str | None = None
    """Why its batch is 1, where torch.export could not free it."""


def propose(request: QuantizeRequest, loaded: LoadedModel, program: Program) -> Proposal:
    """Techniques x engines for this request, with what is passed over and why.

    Raises:
        SetupError: the engine that was asked for is not installed.
        RequestError: the scheme that was asked for does not exist on that engine.
    """
    passed_over: list[Candidate] = []
    options: list[Option] = []
    automatic = isinstance(request.scheme, Auto)
    for params in _schemes(request, program, passed_over):
        for runtime in _runtimes_of(params, request, loaded):
            option = Option(params, runtime)
            reason = _why_not(option, loaded, program, automatic)
            if reason is None:
                options.append(option)
            else:
                passed_over.append(_candidate(option, "skipped", reason))
    if request.runtime != "auto":
        reason = ENGINES[request.runtime].missing(loaded.device)
        if reason:
            raise SetupError(f"runtime {request.runtime} cannot be used", reason, "omgoptim doctor lists what can")
    if not options:
        why = "; ".join(f"{c.name}: {c.why}" for c in passed_over)
        if program.error is not None and request.runtime not in ("torch_eager", "torch_compile"):
            raise program.error
        raise RequestError(
            "nothing can be tried for this request",
            why or "no engine runs this scheme",
            "use scheme auto, runtime auto",
        )
    return Proposal(options, passed_over)


def _schemes(request: QuantizeRequest, program: Program, passed_over: list[Candidate]) -> list[Params]:
    """The concrete params of a request: `auto` stands for all that the model could gain from."""
    asked = request.scheme
    if isinstance(asked, Static):
        asked = apply_preset(asked, request.effort)
        return [asked] if program.path is None else list(variants(asked, program.path))
    if not isinstance(asked, Auto):
        return [asked]
    schemes: list[Params] = []
    if program.path is not None:
        static = apply_preset(Static(calibration_samples=asked.calibration_samples), request.effort)
        schemes += variants(static, program.path)
    schemes += [Dynamic(), Bf16(), Fp32()]
    passed_over.append(
        Candidate(
            name="fp32 on torch_compile",
            scheme="fp32",
            runtime="torch_compile",
            status="skipped",
            why="compiles anew in every process, which takes long; ask for it with runtime torch_compile",
        )
    )
    return schemes


def _runtimes_of(params: Params, request: QuantizeRequest, loaded: LoadedModel) -> list[str]:
    technique = technique_of(params)
    runtimes = list(technique.runtimes)
    if loaded.module is not None:
        if technique.torch_precision is not None:
            runtimes.append("torch_eager")
        if request.runtime == "torch_compile" and technique.torch_precision != "int8_dynamic":
            runtimes.append("torch_compile")
    if request.runtime == "auto":
        return runtimes
    if request.runtime not in runtimes and not isinstance(request.scheme, Auto):
        raise RequestError(
            f"scheme '{getattr(params, 'scheme', '')}' does not exist on runtime {request.runtime}",
            f"it runs on {', '.join(runtimes)}",
            f"give runtime {runtimes[0]}, or leave it out",
        )
    return [runtime for runtime in runtimes if runtime == request.runtime]


def _why_not(option: Option, loaded: LoadedModel, program: Program, automatic: bool) -> str | None:
    """Why an option is not tried, or None. What was asked for by name is tried wherever it can be."""
    missing = ENGINES[option.runtime].missing(loaded.device)
    if missing:
        return missing
    if not option.on_module and program.error is not None:
        return f"{program.error.what}: {program.error.why}"
    if option.on_module and (getattr(option.params, "targets", []) or getattr(option.params, "ignore", [])):
        return "torch quantizes every layer of a kind: targets and ignore need another runtime"
    if not automatic:
        return None
    return _hopeless(option, loaded, program.traits)


def _hopeless(option: Option, loaded: LoadedModel, traits: GraphTraits | None) -> str | None:
    """What `auto` does not even build, because it is known to bring nothing."""
    params = option.params
    if isinstance(params, Static):
        if not loaded.data.real:
            return "static ranges need real data: give data"
        if traits and traits.conv_weight_bytes + traits.matmul_weight_bytes == 0:
            return "no convolution or Linear in the model"
    if isinstance(params, Dynamic):
        if traits and traits.matmul_weight_bytes + traits.recurrent_weight_bytes == 0:
            return "no Linear, LSTM or GRU in the model"
        if traits and traits.conv_weight_bytes > traits.matmul_weight_bytes + traits.recurrent_weight_bytes:
            return "most weights are in convolutions, which dynamic quantization only slows down"
        if option.on_module and traits and not traits.has_gru:
            return "torch's own dynamic int8 is slower than ONNX Runtime's, except that only it computes a GRU in int8"
    if isinstance(params, Bf16) and loaded.device == "cpu" and not set(cpu_features()) & set(BF16_UNITS):
        return "this processor has no bfloat16 instructions"
    return None


def _candidate(option: Option, status: Literal["skipped", "planned"], why: str) -> Candidate:
    return Candidate(name=option.name, scheme=option.scheme, runtime=option.runtime, status=status, why=why)
