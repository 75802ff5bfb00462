"""Candidates of a quantize run: the combinations of technique and engine for a model and machine."""

from __future__ import annotations

from dataclasses import dataclass

from omgoptim.errors import RequestError, SetupError
from omgoptim.models.onnx_graph import GraphTraits
from omgoptim.operations.float_program import Program
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.reports import Candidate
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.requests.quantize import Auto, Bf16, Dynamic, Fp16, Fp32, Static
from omgoptim.runtimes import ENGINES
from omgoptim.techniques.quantize._ptq.state import apply_preset
from omgoptim.techniques.quantize.static import variants
from omgoptim.techniques.registry import technique_of

BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU features with bfloat16 instructions, by the names of /proc/cpuinfo."""


EMBEDDING_SHARE = 0.3
"""Share of the weights' bytes in embedding tables above which `auto` tries them in 4 bits: an int8 file then shrinks by
a seventh at least. Chosen."""

LOWERED = (Static, Dynamic, Fp32)
"""Techniques with a form for ExecuTorch, which is tried only where it is named: it is for another device."""


@dataclass(frozen=True, slots=True)
class CandidateSpec:
    """Specification of one candidate: technique parameters and engine."""

    params: Params
    runtime: str
    note: str = ""
    """Difference from other candidates of its technique, such as `3 layers in float`; part of the name only."""
    float_layers: int = 0
    """Number of layers that a mixed precision search keeps in float."""

    @property
    def scheme(self) -> str:
        """Quantization scheme, such as `static`."""
        return str(getattr(self.params, "scheme"))  # noqa: B009  every technique of this verb has it

    @property
    def name(self) -> str:
        """Name in reports, such as `static on openvino`."""
        algorithm = getattr(self.params, "algorithm", "auto")
        small = "4-bit embeddings" if getattr(self.params, "embedding_bits", 8) == 4 else ""
        noted = "".join(f", {text}" for text in (small, self.note) if text)
        return f"{self.scheme}{'' if algorithm == 'auto' else f'-{algorithm}'}{noted} on {self.runtime}"

    def record(self, status: str, why: str, **measured: float | None) -> Candidate:
        """Return the candidate's record for the report, with what was measured of it."""
        known = {"name": self.name, "scheme": self.scheme, "runtime": self.runtime, "status": status, "why": why}
        return Candidate.model_validate(known | measured)

    @property
    def key(self) -> str:
        """Parameters in JSON: candidates of one key have the same program on every engine that runs programs."""
        return self.params.model_dump_json()

    @property
    def on_module(self) -> bool:
        """True if its engine runs the PyTorch module instead of an ONNX file."""
        return ENGINES[self.runtime].runs == "module"

    @property
    def is_lowered(self) -> bool:
        """True if its engine runs programs that are lowered from the module."""
        return ENGINES[self.runtime].runs == "lowered"


@dataclass(frozen=True, slots=True)
class CandidatePlan:
    """Candidates to build, and skipped ones with the reason."""

    specs: list[CandidateSpec]
    skipped: list[Candidate]


def plan_candidates(request: QuantizeRequest, loaded: LoadedModel, program: Program) -> CandidatePlan:
    """Return the candidates of a request, and the skipped combinations with their reasons.

    Raises:
        SetupError: the requested engine is not installed.
        RequestError: the requested scheme does not exist on that engine.
    """
    skipped: list[Candidate] = []
    specs: list[CandidateSpec] = []
    automatic = isinstance(request.scheme, Auto)
    for params in _schemes(request, program, skipped):
        for runtime in _runtimes_of(params, request, loaded):
            spec = CandidateSpec(params, runtime)
            reason = _skip_reason(spec, loaded, program, automatic)
            if reason is None:
                specs.append(spec)
            else:
                skipped.append(spec.record("skipped", reason))
    if request.runtime != "auto":
        reason = ENGINES[request.runtime].missing(loaded.device)
        if reason:
            raise SetupError(f"runtime {request.runtime} cannot be used", reason, "omgoptim doctor lists what can")
    if not specs:
        why = "; ".join(f"{c.name}: {c.why}" for c in skipped)
        if program.error is not None and request.runtime not in ("torch_eager", "torch_compile"):
            raise program.error
        raise RequestError(
            "no candidate is possible for this request",
            why or "no engine runs this scheme",
            "leave scheme and runtime out",
        )
    return CandidatePlan(specs, skipped)


def _schemes(request: QuantizeRequest, program: Program, skipped: list[Candidate]) -> list[Params]:
    """Return the technique parameters of a request; `auto` expands to all that may help."""
    params = request.scheme
    if isinstance(params, Static):
        params = apply_preset(params, request.effort)
        if request.runtime == "executorch":
            return [params]
        return [params] if program.path is None else list(variants(params, program.path))
    if not isinstance(params, Auto):
        return [params]
    schemes: list[Params] = []
    static = apply_preset(Static(calibration_samples=params.calibration_samples), request.effort)
    if request.runtime == "executorch":
        schemes.append(static)
    elif program.path is not None:
        schemes += variants(static, program.path)
    schemes.append(Dynamic())
    if program.traits and program.traits.embedding_weight_bytes > EMBEDDING_SHARE * program.traits.total_weight_bytes:
        smaller = {"embedding_bits": 4}
        schemes += [each.model_copy(update=smaller) for each in schemes if isinstance(each, Static | Dynamic)]
    schemes += [Bf16(), Fp32()]
    schemes += [Fp16()] if request.device == "cuda" else []
    why = "compiles in every process, which takes long; request it with runtime torch_compile"
    skipped.append(CandidateSpec(Fp32(), "torch_compile").record("skipped", why))
    return schemes


def runtimes_of(params: Params) -> tuple[str, ...]:
    """Return the engines that a scheme's artifacts may run on; none for auto, which has several schemes."""
    if isinstance(params, Auto):
        return ()
    technique = technique_of(params)
    eager = ("torch_eager",) if technique.torch_precision is not None else ()
    return (*technique.runtimes, *eager, *(("executorch",) if isinstance(params, LOWERED) else ()))


def _runtimes_of(params: Params, request: QuantizeRequest, loaded: LoadedModel) -> list[str]:
    technique = technique_of(params)
    runtimes = list(technique.runtimes)
    if loaded.device == "cuda" and "onnxruntime" in runtimes:
        runtimes.append("tensorrt")
    if loaded.module is not None:
        if technique.torch_precision is not None:
            runtimes.append("torch_eager")
        if request.runtime == "torch_compile" and technique.torch_precision != "int8_dynamic":
            runtimes.append("torch_compile")
        if request.runtime == "executorch" and isinstance(params, LOWERED):
            runtimes.append("executorch")
    if request.runtime == "auto":
        return runtimes
    if request.runtime not in runtimes and not isinstance(request.scheme, Auto):
        raise RequestError(
            f"scheme '{getattr(params, 'scheme', '')}' does not exist on runtime {request.runtime}",
            f"it runs on {', '.join(runtimes)}",
            f"give runtime {runtimes[0]}, or leave it out",
        )
    return [runtime for runtime in runtimes if runtime == request.runtime]


def _skip_reason(spec: CandidateSpec, loaded: LoadedModel, program: Program, automatic: bool) -> str | None:
    """Return the reason to skip a candidate, or None. One requested by name is skipped only if it cannot run."""
    missing = ENGINES[spec.runtime].missing(loaded.device) or _missing_on_target(spec, loaded)
    if missing:
        return missing
    if not spec.on_module and not spec.is_lowered and program.error is not None:
        return program.error.reason
    if spec.on_module and (getattr(spec.params, "targets", []) or getattr(spec.params, "ignore", [])):
        return "torch quantizes every layer of a kind: targets and ignore need another runtime"
    if (spec.on_module or spec.is_lowered) and getattr(spec.params, "embedding_bits", 8) == 4:
        return "only ONNX programs store embeddings in 4 bits: use runtime onnxruntime or openvino"
    if spec.is_lowered and getattr(spec.params, "algorithm", "auto") != "auto":
        return "ExecuTorch's programs are written by its own quantizer: leave algorithm out"
    if loaded.device == "cuda" and spec.on_module and isinstance(spec.params, Dynamic):
        return "torch computes its dynamic int8 on the CPU only"
    if not automatic:
        return None
    return _no_benefit(spec, loaded, program.traits)


def _missing_on_target(spec: CandidateSpec, loaded: LoadedModel) -> str | None:
    target = loaded.bench.target
    if target is None or spec.runtime in target.machine.engines:
        return None
    return "only programs are measured on a target" if spec.on_module else f"{target.address} has no {spec.runtime}"


def _no_benefit(spec: CandidateSpec, loaded: LoadedModel, traits: GraphTraits | None) -> str | None:
    """Return the reason for `auto` not to build a candidate that is known to bring no gain."""
    params = spec.params
    if isinstance(params, Static):
        if not loaded.data.real:
            return "static calibration needs real data: give data"
        if traits and traits.conv_weight_bytes + traits.matmul_weight_bytes == 0:
            return "no convolution or Linear in the model"
    if isinstance(params, Dynamic):
        if traits and traits.matmul_weight_bytes + traits.recurrent_weight_bytes == 0:
            return "no Linear, LSTM or GRU in the model"
        if traits and traits.conv_weight_bytes > traits.matmul_weight_bytes + traits.recurrent_weight_bytes:
            return "most weights are in convolutions, which dynamic quantization slows down"
        if spec.on_module and traits and not traits.has_gru:
            return "torch's own dynamic int8 is slower than ONNX Runtime's, except that only it computes a GRU in int8"
    if isinstance(params, Bf16) and loaded.device == "cpu" and not set(loaded.bench.cpu_features) & set(BF16_UNITS):
        return "this processor has no bfloat16 instructions"
    return None
