"""The same hostile files through the shell, a real stdio client, HTTP and Python: refused, and no mark is written."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import onnx
import payloads
import pytest
import torch
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from torch import nn

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.models.artifact import save_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.runtimes.signature import InputTensor, Signature

ROOT = Path(__file__).parents[2]
TOKEN = "token-0123456789"
NET = "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 2)\n"
SHAPES = {"inputs": ["1x3"]}
Arguments = dict[str, Any]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pt2_with_pickled_inputs(project: Path, mark: Path) -> Arguments:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),)), project / "plain.pt2")
    with zipfile.ZipFile(project / "plain.pt2") as old, zipfile.ZipFile(project / "net.pt2", "w") as new:
        for name in old.namelist():
            inputs = name.endswith("data/sample_inputs/model.pt")
            new.writestr(name, saved(((payloads.Marking(mark),), {})) if inputs else old.read(name))
    return {"model": "net.pt2"}


def pt2_with_code_in_a_shape(project: Path, mark: Path) -> Arguments:
    pt2_with_pickled_inputs(project, mark)
    with zipfile.ZipFile(project / "plain.pt2") as old, zipfile.ZipFile(project / "net.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(content)
                program["guards_code"] = [payloads.MARK_CODE(mark)]
                program["range_constraints"] = {payloads.MARK_CODE(mark): {"min_val": 0, "max_val": 9}}
                content = json.dumps(program).encode()
            new.writestr(name, content)
    return {"model": "net.pt2"}


def pickled_module(project: Path, mark: Path) -> Arguments:
    (project / "net.pt").write_bytes(saved(payloads.Marking(mark)))
    return {"model": "net.pt", **SHAPES}


def pickled_checkpoint(project: Path, mark: Path) -> Arguments:
    (project / "weights.ckpt").write_bytes(payloads.marking_checkpoint(mark))
    return {"model": "net.py:Net", "checkpoint": "weights.ckpt", **SHAPES}


def pickled_arrays(project: Path, mark: Path) -> Arguments:
    (project / "data.npz").write_bytes(payloads.marking_npz(mark))
    return {"model": "net.py:Net", "data": "data.npz"}


def onnx_with_data_elsewhere(project: Path, mark: Path) -> Arguments:
    """Its weights are said to lie outside the project, in a file that is there."""
    (project.parent / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    value = onnx.helper.make_tensor_value_info
    inputs, outputs = (value(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y"))
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, "../secret", offset=0, length=12)
    weight.ClearField("raw_data")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [inputs], [outputs], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    (project / "net.onnx").write_bytes(model.SerializeToString())
    return {"model": "net.onnx"}


def safetensors_of_lies(project: Path, mark: Path) -> Arguments:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 10**12]}}).encode()
    (project / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return {"model": "net.py:Net", "checkpoint": "weights.safetensors", **SHAPES}


def artifact_from_elsewhere(project: Path, mark: Path) -> Arguments:
    """Its recipe names a file that writes the mark when it is imported, and grants itself the right to."""
    (project / "theirs.py").write_text(payloads.mark_module(mark))
    module, x = nn.Linear(3, 2), np.ones((2, 3), np.float32)
    signature = Signature((InputTensor("x", "float32", ("batch", 3), False),), "tensor")
    check = OutputCheck({"x": x}, [module(torch.from_numpy(x)).detach().numpy()])
    recipe = Recipe("callable", "net.py:Net", {}, str(project))
    save_module(project / "small", module, recipe, Manifest("torch_eager", "float32", signature), check)
    record = json.loads((project / "small" / "recipe.json").read_text())
    record |= {"name": "theirs.py:Net", "allowed": ["/"]}
    (project / "small" / "recipe.json").write_text(json.dumps(record))
    return {"model": "small"}


def code_of_a_repository(project: Path, mark: Path) -> Arguments:
    (project / "bert").mkdir()
    config = {"model_type": "bert", "auto_map": {"AutoModel": "theirs.Net", "AutoConfig": "theirs.Net"}}
    (project / "bert" / "config.json").write_text(json.dumps(config | {"architectures": ["Net"]}))
    (project / "bert" / "theirs.py").write_text(payloads.mark_module(mark))
    (project / "bert" / "pytorch_model.bin").write_bytes(payloads.marking_checkpoint(mark))
    return {"model": "hf:bert", "inputs": ["input_ids:int64:1x8"]}


def file_outside(project: Path, mark: Path) -> Arguments:
    (project.parent / "theirs.py").write_text(payloads.mark_module(mark))
    return {"model": "../theirs.py:Net", **SHAPES}


def function_of_a_library(project: Path, mark: Path) -> Arguments:
    return {"model": "os:system", "model_kwargs": {"command": payloads.mark_command(mark)}, **SHAPES}


HOSTILE: list[Callable[[Path, Path], Arguments]] = [
    pt2_with_pickled_inputs, pt2_with_code_in_a_shape, pickled_module, pickled_checkpoint, pickled_arrays,
    onnx_with_data_elsewhere, safetensors_of_lies, artifact_from_elsewhere, code_of_a_repository, file_outside,
    function_of_a_library,
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    for name in ("OMGOPTIM_PROJECTS", "CLAUDE_PROJECT_DIR", "OMGOPTIM_ALLOW_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def environment(project: Path) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "OMGOPTIM_PROJECT": str(project), "OMGOPTIM_TOKEN": TOKEN}
    return dict(os.environ) | ours


def from_the_shell(project: Path, arguments: Arguments) -> str:
    """Kind of the error."""
    command = [sys.executable, "-m", "omgoptim.cli", "profile", arguments["model"], "--json", "--timing", "quick"]
    for name, value in arguments.items():
        for one in value if isinstance(value, list) else [value]:
            if name != "model":
                text = json.dumps(one) if isinstance(one, dict) else one
                command += [f"--{name.replace('_', '-')}", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment(project), timeout=120)
    assert done.returncode in (2, 3), done.stdout + done.stderr
    return str(json.loads(done.stdout)["error"]["kind"])


def from_a_stdio_client(project: Path, arguments: Arguments) -> str:
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "omgoptim.server"], env=environment(project), cwd=str(project)
    )

    async def ask() -> Any:
        async with Client(server) as client:
            return await client.call_tool("profile", tool_arguments(arguments), read_timeout_seconds=120)

    result = anyio.run(ask)
    assert result.is_error
    return str(result.structured_content["error"]["kind"])


def tool_arguments(arguments: Arguments) -> Arguments:
    return arguments | {"timing": "quick", "wait_s": 45}


def from_python(project: Path, arguments: Arguments) -> str:
    with pytest.raises(OmgoptimError) as refused:
        omgoptim.profile(**arguments, timing="quick")
    return type(refused.value).__name__


@contextlib.contextmanager
def http_server(project: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "omgoptim.cli", "mcp", "--http", "--port", "0"]
    environ = environment(project)
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=project, env=environ, text=True) as server:
        assert server.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/mcp", server.stderr.readline())
        assert found
        try:
            yield int(found[1])
        finally:
            server.terminate()
            server.communicate(timeout=20)


def from_http(project: Path, arguments: Arguments) -> str:
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    headers |= {"Authorization": f"Bearer {TOKEN}", "MCP-Protocol-Version": "2025-06-18"}
    start = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    call = {"name": "profile", "arguments": tool_arguments(arguments)}
    with http_server(project) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for number, (method, params) in enumerate([("initialize", start), ("tools/call", call)]):
            body = json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
            connection.request("POST", "/mcp", body, headers)
            response = connection.getresponse()
            text = response.read().decode()
            session = response.getheader("Mcp-Session-Id")
            headers |= {"Mcp-Session-Id": session} if session else {}
        connection.close()
    messages = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line.startswith(("data:", "{"))]
    (answer,) = [message["result"] for message in messages if "result" in message]
    assert answer["isError"]
    return str(answer["structuredContent"]["error"]["kind"])


FACES = [from_the_shell, from_a_stdio_client, from_http, from_python]


@pytest.mark.parametrize("hostile", [pt2_with_pickled_inputs], ids=lambda hostile: hostile.__name__)
@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_a_hostile_file_is_refused_by_every_face_and_runs_nothing(
    project: Path, tmp_path: Path, face: Callable[[Path, Arguments], str], hostile: Callable[[Path, Path], Arguments]
) -> None:
    mark = tmp_path / "mark"
    kind = face(project, hostile(project, mark))
    assert kind in ("ModelError", "DataError", "RequestError", "ArtifactError")
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("hostile", HOSTILE[1:], ids=lambda hostile: hostile.__name__)
@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_every_kind_of_hostile_file_is_refused_by_every_face_and_runs_nothing(
    project: Path, tmp_path: Path, face: Callable[[Path, Arguments], str], hostile: Callable[[Path, Path], Arguments]
) -> None:
    test_a_hostile_file_is_refused_by_every_face_and_runs_nothing(project, tmp_path, face, hostile)
