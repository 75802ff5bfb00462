"""Tiny artifacts, so that measuring processes can be real: ONNX files written by hand, and modules with a behaviour."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from omgoptim.measure.launch import LATENCY, THROUGHPUT
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.models.artifact import save_module, save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

SIGNATURE = Signature((InputTensor("x", "float32", (BATCH, 4), False),), "tensor")
EXAMPLE = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)

MODULES = '''
"""Modules that double their input, with a behaviour beside it."""
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn

HERE = Path(__file__).parent


class Double(nn.Module):
    def __init__(self, name="", does=""):
        super().__init__()
        self.weight, self.name, self.does, self.calls = nn.Parameter(torch.tensor(2.0)), name, does, 0

    def forward(self, x):
        start = time.perf_counter()
        self.calls += 1
        getattr(self, "do_" + self.does, lambda: None)()
        result = x * self.weight
        if self.name:
            with (HERE / "calls.jsonl").open("a") as file:
                file.write(json.dumps([self.name, os.getpid(), os.getppid(), start, time.perf_counter()]) + "\\\\n")
        if self.does == "nan" and x.shape[0] == 3:
            return result * torch.nan
        return result

    def do_die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def do_die_later(self):
        if self.calls > 20:
            os.kill(os.getpid(), signal.SIGKILL)

    def do_exit(self):
        sys.exit(7)

    def do_fail(self):
        raise ValueError("no kernel for this\\\\nand pages of advice")

    def do_hang(self):
        signal.pause()

    def do_print(self):
        print("x" * 100_000)
        sys.stdout.flush()
        os.write(1, b"y" * 100_000)

    def do_read(self):
        assert sys.stdin.read() == ""

    def do_work(self):
        torch.ones(300, 300) @ torch.ones(300, 300)

    def do_leave_a_child(self):
        if os.fork() == 0:
            signal.pause()
'''.replace("\\\\n", "\\n")

MakeModule = Callable[..., Path]
MakeProgram = Callable[..., Path]


@pytest.fixture
def user_code(tmp_path: Path) -> Path:
    """A project whose `modules_of_user.py` has the modules."""
    (tmp_path / "modules_of_user.py").write_text(MODULES)
    return tmp_path


@pytest.fixture
def make_module(user_code: Path) -> MakeModule:
    """`make_module(folder name, name=…, does=…)`: a module artifact; `name` writes every call to calls.jsonl."""

    def make(folder: str, **kwargs: str) -> Path:
        recipe = Recipe("callable", "modules_of_user.py:Double", kwargs, str(user_code))
        scaled = torch.nn.Module()
        scaled.weight = torch.nn.Parameter(torch.tensor(2.0))
        manifest = Manifest("torch_eager", "float32", SIGNATURE)
        save_module(user_code / folder, scaled, recipe, manifest, OutputCheck({"x": EXAMPLE}, [EXAMPLE * 2]))
        return user_code / folder

    return make


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """`make_program(folder name, runtime=…, factor=…)`: an ONNX artifact that multiplies its input."""

    def make(folder: str, runtime: str = "onnxruntime", factor: float = 2.0) -> Path:
        x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "output"))
        weight = onnx.numpy_helper.from_array(np.float32(factor).reshape(()), "factor")
        graph = helper.make_graph([helper.make_node("Mul", ["x", "factor"], ["output"])], "g", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = tmp_path / f"{folder}.scratch" / "model.onnx"
        path.parent.mkdir()
        onnx.save(model, path)
        manifest = Manifest(runtime, "float32", SIGNATURE)
        save_program(tmp_path / folder, path, manifest, OutputCheck({"x": EXAMPLE}, [EXAMPLE * factor]))
        return tmp_path / folder

    return make


@pytest.fixture
def batches(tmp_path: Path) -> Mapping[str, Path]:
    """The prepared batches: one sample, and three."""
    files = {LATENCY: tmp_path / "latency.npz", THROUGHPUT: tmp_path / "throughput.npz"}
    np.savez(files[LATENCY], x=EXAMPLE[:1])
    np.savez(files[THROUGHPUT], x=np.concatenate([EXAMPLE, EXAMPLE[:1]]))
    return files


@pytest.fixture
def bench(batches: Mapping[str, Path], tmp_path: Path) -> TimingSetup:
    return TimingSetup(batches, batch=3, threads=1, cwd=tmp_path)


@pytest.fixture
def is_alive() -> Callable[[int], bool]:
    """`is_alive(pid)`: whether the process exists."""

    def exists(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return exists
