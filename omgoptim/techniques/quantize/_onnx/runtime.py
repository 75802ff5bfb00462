"""Run ONNX programs in memory, and call quantization libraries without their output or bare exceptions."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.models.onnx_file import is_large, save


def open_program(model: ModelProto, threads: int, level: str = "ORT_ENABLE_ALL") -> Any:
    """Open a session on a program in memory; a program over 2 GB goes through a temporary file.

    Args:
        model: the program.
        threads: of the session.
        level: name of ONNX Runtime's graph optimization level. At `ORT_ENABLE_BASIC` and below, pairs of
            QuantizeLinear and DequantizeLinear are computed as they are written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    with as_technique_error("ONNX Runtime cannot open the program"):
        if not is_large(model):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "program.onnx")
            return onnxruntime.InferenceSession(str(Path(folder) / "program.onnx"), options, providers=providers)


def has_free_batch(model: ModelProto) -> bool:
    """Return whether the first dimension of every input and output is dynamic, so that a batch can be sliced."""

    def free(value: onnx.ValueInfoProto) -> bool:
        dims = value.type.tensor_type.shape.dim
        return len(dims) > 0 and not dims[0].HasField("dim_value")

    return all(free(value) for value in (*model.graph.input, *model.graph.output))


def lacks_int8_dot_product() -> bool:
    """Return whether int8 products may saturate on this CPU, so that weights must be kept to 7 bits.

    x86 without VNNI (AVX-512 or AVX) adds pairs of products in 16 bits. Where the flags cannot be read, saturation is
    assumed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True


def weight_levels() -> int:
    """Return the largest integer of a symmetric int8 weight on this CPU, as in ONNX Runtime's quantizer."""
    return 64 if lacks_int8_dot_product() else 127


@contextlib.contextmanager
def as_technique_error(what: str, fix: str = "") -> Iterator[None]:
    """Convert any exception of a library to a TechniqueError, which is recorded as the candidate's failure."""
    try:
        yield
    except OmgoptimError:
        raise
    except Exception as error:
        raise TechniqueError(what, f"{type(error).__name__}: {error}", fix) from error


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect descriptor 1 (C and Python) to descriptor 2 and silence Python warnings."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # sys.stdout need not be descriptor 1
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
