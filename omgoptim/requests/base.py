"""Base of all requests: the common arguments, the shape of an input, and the address of a target.

The annotation of a field says how the MCP server lists it. A tool list is paid for in every conversation: a field's
description is its text there unless `Short` gives another, and a `RARE` argument is only named, in the object
`options`. `omgoptim VERB --help` has the full descriptions.

    symmetric: Annotated[bool, RARE] = False
    checkpoint: Annotated[str | None, Short("Weights: .safetensors, or .pt/.pth state dict.")] = None
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from omgoptim.errors import RequestError, argument, did_you_mean


@dataclass(frozen=True, slots=True)
class Short:
    """Text of an argument in the tool list, in place of its description; empty where its name says it."""

    text: str


@dataclass(frozen=True, slots=True)
class Rare:
    """Marker of a rarely used argument, which the tool takes in `options`."""


RARE: Final = Rare()


def is_rare(field: FieldInfo) -> bool:
    """Return whether the tool takes an argument in `options`."""
    return RARE in field.metadata


def short_text(field: FieldInfo) -> str:
    """Return the text of an argument in the tool list."""
    marker = next((one for one in field.metadata if isinstance(one, Short)), None)
    return field.description or "" if marker is None else marker.text


ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?:(?P<host>[A-Za-z0-9][A-Za-z0-9._-]{0,252})|\[(?P<ipv6>[0-9A-Fa-f:.]{2,45})\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
"""A user or a host never begins with a dash, which ssh would read as an option."""


@dataclass(frozen=True, slots=True)
class TargetAddress:
    """Host of a target, with optional user and port; the user's SSH configuration decides the rest."""

    host: str
    user: str | None = None
    port: int | None = None

    @staticmethod
    def parse(text: str) -> TargetAddress:
        """Read `ssh://[user@]host[:port]`; an IPv6 address stands in brackets.

        Raises:
            RequestError: it is anything else, such as a path, a password, a shell character or an option of ssh.

        Example:
            >>> from omgoptim.requests.base import TargetAddress
            >>> TargetAddress.parse("ssh://pi@192.0.2.7:2222")
            TargetAddress(host='192.0.2.7', user='pi', port=2222)
        """
        found = ADDRESS.fullmatch(text)
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 0 < port < 65536):
            raise RequestError(
                f"'{text[:80]}' is not a target",
                "a target is ssh://host, ssh://user@host or ssh://user@host:port: letters, digits, dots and dashes, "
                "no path, no password, no options",
                f"give {argument('target', 'ssh://user@host')}; jump hosts and keys belong to ~/.ssh/config",
            )
        return TargetAddress(found["host"] or found["ipv6"], found["user"], port)

    @property
    def login(self) -> str:
        """`user@host`, as ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


Runtime = Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
AnyRuntime = Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino", "tensorrt", "executorch"]
"""Runtimes of profile and quantize; artifacts of other verbs can be quantized for ExecuTorch afterwards."""
ON_TARGETS = ("onnxruntime", "openvino")
"""Engines that are measured on a target."""
Timing = Literal["quick", "standard", "careful"]

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


GRANTS = ("allow_path", "allow_module", "allow_remote_code", "trust_artifact")
"""Fields that extend the rights of a request: only the user may set them, never an agent or a file."""


class Request(BaseModel):
    """Base class of all requests: immutable, without extra fields, its docstrings are the schema's descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    aliases: ClassVar[dict[str, str]] = {}
    """Aliases of arguments: `{"teacher": "model"}`."""


class Params(Request):
    """Base class of a technique's parameters: one class per technique, one literal field that names it."""

    by_source: ClassVar[bool] = False
    """True if a bare name is the value of `source`, a model source, and not a technique."""

    def bare(self, key: str) -> str:
        """Return the bare name of these params; `key` is the field that names the technique."""
        return str(getattr(self, "source" if self.by_source else key))


def _valid_target(text: str | None) -> str | None:
    return None if text is None else str(TargetAddress.parse(text))


Target = Annotated[str | None, AfterValidator(_valid_target), RARE]
"""A machine to measure on; None for this one."""


class ModelRequest(Request):
    """Common arguments of every verb on a model."""

    model: Annotated[
        str,
        Short(
            "file.py:callable, package.module:callable, artifact folder, run id, model.pt2, model.onnx, "
            "hf:FOLDER, timm:NAME or torchvision:NAME."
        ),
    ] = Field(min_length=1)
    """Model source: file.py:callable, package.module:callable, an artifact folder, a run id, model.pt2, model.onnx, hf:FOLDER, timm:NAME or torchvision:NAME."""  # noqa: E501
    checkpoint: Annotated[str | None, Short("Weights: .safetensors, or .pt/.pth state dict.")] = None
    """Weights to load: a .safetensors file, or a .pt/.pth state dict."""
    weights: Annotated[Literal["auto", "ema", "plain"], RARE] = "auto"
    """Weights to load from a checkpoint with averaged (EMA, SWA) and plain ones; auto: averaged, if present."""
    model_kwargs: Annotated[dict[str, Any], RARE] = {}
    """Keyword arguments of the model's callable."""
    data: Annotated[
        str | None,
        Short("file.py:callable with an argument split=train|calibration|eval, or .npz/.safetensors of named arrays."),
    ] = None
    """Data source: file.py:callable with an argument split=train|calibration|eval, or a .npz/.safetensors file of named arrays."""  # noqa: E501
    inputs: Annotated[list[str], Short("Without data: shapes, batch first: 1x3x224x224 or input_ids:int64:1x128.")] = []
    """Shapes for random inputs when there is no data, batch first: 1x3x224x224 or input_ids:int64:1x128."""
    metric: Annotated[
        str,
        Short("auto, top1, r2, cosine, perplexity, kl, a torchmetrics name, or file.py:callable; higher is better."),
    ] = "auto"
    """Quality metric, higher is better: auto, top1, r2, cosine, perplexity, kl, a torchmetrics name, or file.py:callable."""  # noqa: E501
    target_output: Annotated[str | None, RARE] = None
    """Name or index of the output that the labels belong to."""
    ignore_outputs: Annotated[list[str], RARE] = []
    """Outputs to leave out of the comparison, such as auxiliary heads."""
    device: Annotated[Literal["auto", "cpu", "cuda"], RARE] = "auto"
    """Device to run and measure on; auto: cpu."""
    target: Target = None
    """Machine to measure on, ssh://[user@]host[:port], through the user's own OpenSSH; default: this machine."""
    timing: Annotated[Timing, RARE] = "standard"
    """Process launches per latency measurement. quick: one; standard: five, with an interval; careful: until narrow."""
    batch: Annotated[int, RARE] = Field(32, ge=1, le=4096)
    """Batch size for throughput; latency is always measured at batch 1."""
    threads: Annotated[int | None, RARE] = Field(None, ge=1, le=512)
    """CPU threads of a measured process; default: all cores available."""
    samples: Annotated[int, RARE] = Field(2000, ge=1, le=1_000_000)
    """Maximum number of evaluation samples."""
    seed: Annotated[int, RARE] = Field(0, ge=0, lt=2**32)
    """Random seed."""
    time_limit_s: Annotated[float, RARE] = Field(300, gt=0, le=10_000_000)
    """Timeout, in seconds, of one call into user code (build, load, metric)."""
    project: Annotated[str | None, Short("Absolute path; all files must be inside.")] = None
    """Absolute path of the project; model, checkpoint and data must be inside it."""
    python: Annotated[str | None, RARE] = None
    """Python interpreter with the model's packages; default: the project's .venv, else the active environment."""
    allow_path: list[str] = []
    """Additional folders that may be read."""
    allow_remote_code: bool = False
    """Allow model libraries to run a repository's own code and load its pickles (trust_remote_code in model_kwargs)."""
    allow_module: list[str] = []
    """Installed modules whose functions and classes may be used as model, data, metric or loss, such as timm.models."""
    trust_artifact: bool = False
    """Open an artifact from elsewhere even if loading it runs code of this project or of a model library."""

    @model_validator(mode="after")
    def _target_runs_programs(self) -> Self:
        runtime = str(getattr(self, "runtime", "auto"))
        is_known = runtime in ("auto", *ON_TARGETS)
        if self.target is not None and (not is_known or self.device == "cuda"):
            given = argument("device", self.device) if is_known else argument("runtime", runtime)
            raise RequestError(
                f"{given} cannot be measured on a target",
                "a target has numpy and an engine for ONNX files on its CPU: torch, the model's code and its packages "
                "do not go over",
                f"leave it out, or give {argument('runtime', 'onnxruntime')}",
            )
        return self

    @field_validator("inputs")
    @classmethod
    def _inputs_parse(cls, inputs: list[str]) -> list[str]:
        for text in inputs:
            InputSpec.parse(text)
        return inputs


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of a model: name (None for positional), dtype, and shape with the batch first."""

    name: str | None
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> InputSpec:
        """Parse `SHAPE`, `DTYPE:SHAPE` or `NAME:DTYPE:SHAPE`, where SHAPE is like 1x3x224x224.

        Raises:
            RequestError: the text is none of the three, or names an unknown dtype.
        """
        name: str | None
        *head, last = text.split(":")
        if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12}){0,15}", last) or len(head) > 2:
            raise RequestError(
                f"'{text[:80]}' is not an input shape",
                "an input is SHAPE, DTYPE:SHAPE or NAME:DTYPE:SHAPE, sizes joined by x, the batch first",
                f"for instance {argument('inputs', ['1x3x224x224', 'input_ids:int64:1x128'])}",
            )
        name, dtype = (head[0], head[1]) if len(head) == 2 else (None, head[0] if head else "float32")
        if dtype not in DTYPES:
            raise RequestError(f"'{dtype[:80]}' in '{text[:80]}' is not a dtype", did_you_mean(dtype, DTYPES))
        shape = tuple(int(size) for size in last.split("x"))
        if 0 in shape:
            raise RequestError(f"'{text}' has a dimension of size 0", "every size is at least 1")
        return InputSpec(name, dtype, shape)


def bare_name(key: str) -> Callable[[object], object]:
    """Return a validator that turns `"static"` into `{key: "static"}` and leaves anything else alone."""

    def expand(value: object) -> object:
        return {key: value} if isinstance(value, str) else value

    return expand


def before_over_after(value: object) -> object:
    """Return a ratio; refuse a fraction below 1 with the likely meaning, for a `BeforeValidator`.

    Raises:
        ValueError: a number in 0..1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not 0 < number <= 1:
        return value
    meant = f"; to leave {number:.3g} of it, give {1 / number:.3g}" if number < 1 else ""
    raise ValueError(f"the ratio is before / after, and so above 1{meant}")
