"""A folder of hostile files: whatever they hold, opening them writes no mark, and the error names what stands there."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import payloads
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError, OmgoptimError
from omgoptim.models import artifact, onnx_file
from omgoptim.models._pt2.archive import open_pt2
from omgoptim.models.onnx_file import declared_signature
from omgoptim.models.recipe import Recipe
from omgoptim.models.security import hub_options
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import build, load_source
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
INPUTS, CONSTANTS = "data/sample_inputs/model.pt", "data/constants/model_constants_config.json"

PROGRAM_ENGINES = [name for name, engine in ENGINES.items() if engine.runs == "program" and not engine.missing("cpu")]


class Small(nn.Module):
    """A layer, a buffer, a constant, a dimension that is computed from a free one, and a dictionary of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("shift", torch.ones(4))
        self.scale = torch.full((4,), 2.0)

    def forward(self, x: Tensor, more: dict[str, Tensor], *, bias: Tensor) -> dict[str, Tensor]:
        y = self.fc(x) * self.scale + self.shift + more["z"] + bias
        return {"y": y, "zeros": x.new_zeros(x.shape[0] * 3 // 2 + 2)}


def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.ones(4, 3), {"z": torch.ones(4, 4)}), {"bias": torch.ones(4)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    batch = torch.export.Dim("batch")
    args, kwargs = call()
    torch.manual_seed(0)
    shapes = {"x": {0: batch}, "more": {"z": {0: batch}}, "bias": None}
    torch.export.save(torch.export.export(Small(), args, kwargs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The mark that no payload may write."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "a payload ran"


@pytest.fixture
def policy(tmp_path: Path) -> PathPolicy:
    return PathPolicy.of(tmp_path, [])


def rewritten(source: Path, target: Path, **changed: bytes | Callable[[Any], object]) -> Path:
    """`source` with members replaced: by bytes, or by what a function does to the JSON in them; new ones are added."""
    members = {member: changed.pop(member, None) for member in list(changed)}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            root, _, member = name.partition("/")
            change = members.pop(member, None)
            if callable(change):
                value = json.loads(old.read(name))
                change(value)
                new.writestr(name, json.dumps(value))
            else:
                new.writestr(name, old.read(name) if change is None else change)
        for member, content in members.items():
            assert isinstance(content, bytes)
            new.writestr(f"{root}/{member}", content)
    return target


def nodes(program: Any) -> Any:
    return program["graph_module"]["graph"]["nodes"]


@pytest.mark.parametrize("kind", ["reduce", "inst", "obj", "build", "nested"])
def test_each_payload_writes_its_mark_when_something_runs_it(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    pickle.loads(payloads.marking_pickle(mark) if kind == "reduce" else payloads.marking_instruction(mark, kind))
    assert mark.exists()


def test_a_program_of_torch_export_is_opened_and_gives_what_the_module_gave(exported: Path) -> None:
    args, kwargs = call()
    opened, wanted = open_pt2(exported), torch.export.load(exported).module()
    for name, value in wanted(*args, **kwargs).items():
        assert torch.equal(opened(*args, **kwargs)[name], value)
    assert opened.state_dict().keys() == wanted.state_dict().keys()
    fewer = opened(args[0][:3], {"z": args[1]["z"][:3]}, **kwargs)
    assert fewer["zeros"].shape == (6,)
    with pytest.raises(RuntimeError):  # the shapes of inputs are still checked
        opened(torch.ones(4, 5), args[1], **kwargs)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def of_pickled_weight(config: Any) -> None:
    config["config"]["fc.weight"]["use_pickle"] = True


PICKLES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "example inputs": lambda mark: {INPUTS: saved(((payloads.Marking(mark),), {}))},
    "example inputs, a bare pickle": lambda mark: {INPUTS: payloads.marking_pickle(mark)},
    "a pickled weight": lambda mark: {
        WEIGHTS: of_pickled_weight,
        "data/weights/weight_0": saved(payloads.Marking(mark)),
    },
    "a pickled constant": lambda mark: {
        CONSTANTS: lambda config: config["config"].update(
            scale={"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        ),
        "data/constants/tensor_0": saved(payloads.Marking(mark)),
    },
    "an opaque object": lambda mark: {
        CONSTANTS: lambda config: config["config"].update(
            scale={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        ),
        "data/constants/opaque_obj_0": payloads.marking_pickle(mark),
    },
    "weights of an older format": lambda mark: {"data/weights/model.pt": saved(payloads.Marking(mark))},
    "constants of an older format": lambda mark: {"data/constants/model.pt": saved(payloads.Marking(mark))},
    "compiled code": lambda mark: {"data/aotinductor/model/model.so": b"\x7fELF" + bytes(str(mark), "utf-8")},
    "a second program": lambda mark: {"models/other.json": b"{}"},
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pt2_file_with_a_pickle_or_compiled_code_is_refused_unopened(
    exported: Path, tmp_path: Path, mark: Path, policy: PathPolicy, kind: str
) -> None:
    rewritten(exported, tmp_path / "net.pt2", **PICKLES[kind](mark))
    with pytest.raises(ModelError, match=r"net\.pt2 is not opened") as refused:
        load_source("net.pt2", policy)
    assert "data/" in refused.value.why or "models/" in refused.value.why  # the member is named
    assert "as a checkpoint" in refused.value.fix
    assert "ONNX" in refused.value.fix
    with pytest.raises(ModelError):  # an artifact's model.pt2 goes the same way
        build(Recipe("pt2", str(tmp_path / "net.pt2")), policy)


def test_a_file_of_the_format_before_torch_2_9_is_refused_as_such(tmp_path: Path, mark: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as old:
        old.writestr("version", "8.8")
        old.writestr("serialized_exported_program.json", "{}")
        for part in ("state_dict", "constants", "example_inputs"):
            old.writestr(f"serialized_{part}.pt", saved(payloads.Marking(mark)))
    with pytest.raises(ModelError) as refused:
        open_pt2(tmp_path / "old.pt2")
    assert "torch before 2.9" in refused.value.why


def in_tree(part: str, mark: Path, kind: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature[part])
        first = tree if part == "out_spec" else tree["children_spec"][0]
        if kind == "enum":  # the file names a module, which torch's reader imports
            first["context"] = json.dumps([{"__enum__": True, "fqn": f"{mark.stem}_module:Net", "name": "Net"}])
        elif kind == "factory":
            factory = {"default_factory_module": f"{mark.stem}_module", "default_factory_name": "Net"}
            first.update(type="collections.defaultdict", context=json.dumps(factory | {"dict_context": ["y", "zeros"]}))
        else:
            tree["children_spec"][1]["context"] = json.dumps([f"bias': {payloads.MARK_CODE(mark)}, 'b"])
        signature[part] = json.dumps([version, tree])

    return change


def set_in_node(**fields: Any) -> Callable[[Any], None]:
    return lambda program: nodes(program)[0].update(fields)


def injected(program: Any, old: str, new: str) -> None:
    """Replace a name wherever it stands in the program."""
    again = json.loads(json.dumps(program).replace(json.dumps(old), json.dumps(new)))
    program.clear()
    program.update(again)


def with_call(target: str, *arguments: dict[str, Any], name: str = "hidden") -> Callable[[Any], None]:
    """A node of the program that calls `target`."""

    def change(program: Any) -> None:
        inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
        nodes(program).append(
            {"target": target, "inputs": inputs, "outputs": [{"as_none": True}], "metadata": {}, "name": name}
        )

    return change


def code(mark: Path) -> str:
    return payloads.MARK_CODE(mark)


def symbolic(expression: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": expression, "hint": {"as_int": 4}}}

    return change


def first_signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


PROGRAMS: dict[str, Callable[[Path], Callable[[Any], object]]] = {
    "a shape that is code": lambda mark: symbolic(code(mark)),
    "a shape that hides code in a call": lambda mark: symbolic(f"Add(Symbol('s0'), {code(mark)})"),
    "a shape with an attribute": lambda mark: symbolic("Symbol('s0').func.__globals__"),
    "a symbol whose name is code": lambda mark: symbolic(f"Symbol({code(mark)!r})"),
    "a shape that calls a function of sympy": lambda mark: symbolic(f"sympify({code(mark)!r})"),
    "a shape that calls with a keyword": lambda mark: symbolic(f"Add(Integer(1), evaluate={code(mark)})"),
    "a shape that takes forever": lambda mark: symbolic("Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
    "a shape of a billion digits": lambda mark: symbolic("LShift(Integer(1), Integer(9999999999))"),
    "a number of a billion digits": lambda mark: symbolic("Float('0.1', precision=9999999999)"),
    "a range's name": lambda mark: lambda p: p["range_constraints"].update({code(mark): {"min_val": 0, "max_val": 9}}),
    "a range of a trillion symbols": lambda mark: (
        lambda p: p["range_constraints"].update(u999999999999={"min_val": 0, "max_val": 9})
    ),
    "torch.load": lambda mark: with_call("torch.load", {"as_string": str(mark)}),
    "os.system through torch": lambda mark: with_call(
        "torch.hub.os.system", {"as_string": payloads.mark_command(mark)}
    ),
    "a library to load": lambda mark: with_call("torch.ops.load_library", {"as_string": str(mark)}),
    "a method by name": lambda mark: with_call("_operator.methodcaller", {"as_string": "save"}),
    "an operator that writes a file": lambda mark: with_call("torch.ops.aten.save.default", {"as_string": str(mark)}),
    "an operator that maps a file": lambda mark: with_call(
        "torch.ops.aten.from_file.default", {"as_string": str(mark)}, {"as_bool": True}, {"as_int": 4}
    ),
    "a function applied flat": lambda mark: with_call("torch.ops.higher_order.flat_apply"),
    "a custom class": lambda mark: with_call("torch.ops.higher_order.call_torchbind"),
    "a kernel in Triton": lambda mark: with_call("torch.ops.higher_order.triton_kernel_wrapper_functional"),
    "an extension's operator": lambda mark: with_call("#ns:op"),
    "an operator as an argument": lambda mark: with_call(
        "torch.ops.higher_order.cond", {"as_operator": "torch.hub.os.system"}
    ),
    "the metadata's function": lambda mark: set_in_node(target="torch.ops.aten.linear.default.__class__"),
    "the name of an input": lambda mark: lambda p: injected(p, "x", f"x={code(mark)}"),
    "the name of a node": lambda mark: lambda p: injected(p, "linear", f"linear={code(mark)}#"),
    "the name of an argument": lambda mark: (
        lambda p: first_signature(p).update(forward_arg_names=["x", f"more={code(mark)}", "bias"])
    ),
    "a keyword argument's name": lambda mark: in_tree("in_spec", mark, "keyword"),
    "an enumeration to import": lambda mark: in_tree("in_spec", mark, "enum"),
    "a factory to import": lambda mark: in_tree("out_spec", mark, "factory"),
    "the path of a weight": lambda mark: lambda p: injected(p, "fc.weight", f'fc.w", {code(mark)}) or ("'),
    "the path of a weight in Python's own": lambda mark: lambda p: injected(p, "fc.weight", "__class__.forward"),
    "text of an argument": lambda mark: with_call("torch.ops.aten.linear.default", {"as_string": '"\n' + code(mark)}),
    "a custom object": lambda mark: with_call(
        "torch.ops.aten.linear.default", {"as_custom_obj": {"name": "o", "class_fqn": "os.system"}}
    ),
    "a field that is not known": lambda mark: lambda p: p.update(initialization_code=code(mark)),
    "another schema": lambda mark: lambda p: p["schema_version"].update(major=9),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_pt2_program_whose_text_torch_would_evaluate_is_refused(
    exported: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / f"{mark.stem}_module.py").write_text(payloads.mark_module(mark))
    monkeypatch.syspath_prepend(tmp_path)
    path = rewritten(exported, tmp_path / "net.pt2", **{PROGRAM: PROGRAMS[kind](mark)})
    with pytest.raises(ModelError, match="is not opened") as refused:
        open_pt2(path)
    assert refused.value.why.startswith("models/model.json")


def test_notes_and_guards_of_a_program_are_left_out_and_run_nothing(exported: Path, tmp_path: Path, mark: Path) -> None:
    def change(program: Any) -> None:
        program["guards_code"] = [payloads.MARK_CODE(mark), f"L['x'].size()[0] >= {payloads.MARK_CODE(mark)}"]
        program["graph_module"]["metadata"] = {"custom": "{}"}
        nodes(program)[0]["metadata"].update(
            source_fn_stack=f"linear,torch.hub.{mark.stem}", stack_trace=f'"""\n{payloads.MARK_CODE(mark)}', custom="{"
        )

    args, kwargs = call()
    opened = open_pt2(rewritten(exported, tmp_path / "net.pt2", **{PROGRAM: change}))
    assert torch.equal(opened(*args, **kwargs)["y"], torch.export.load(exported).module()(*args, **kwargs)["y"])
    assert not hasattr(opened, "_guards_fn")
    assert mark.stem not in str(opened.graph) + opened.code  # type: ignore[operator]


def shape_of(weight: str, **changed: Any) -> Callable[[Any], None]:
    return lambda config: config["config"][weight]["tensor_meta"].update(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {WEIGHTS: shape_of("fc.weight", sizes=[{"as_int": 10**9}, {"as_int": 10**9}])},
        {WEIGHTS: shape_of("fc.weight", sizes=[{"as_int": -1}, {"as_int": 3}])},
        {WEIGHTS: shape_of("fc.weight", strides=[{"as_int": 10**15}, {"as_int": 1}])},
        {WEIGHTS: shape_of("fc.weight", storage_offset={"as_int": 10**15})},
        {WEIGHTS: shape_of("fc.weight", dtype=99)},
        {"data/weights/weight_0": b"", WEIGHTS: shape_of("fc.weight", sizes=[{"as_int": 10**9}, {"as_int": 10**3}])},
        {WEIGHTS: lambda config: config["config"]["fc.weight"].update(path_name="../../x")},
        {WEIGHTS: lambda config: config["config"]["fc.weight"].update(path_name="weight_77")},
        {PROGRAM: b"[" * 100_000},
        {PROGRAM: b"\xff\xfe"},
        {WEIGHTS: b"[]"},
        {"archive_version": b"7"},
        {"archive_format": b"tar"},
        {"byteorder": b"big"},
        {"../../outside": b"x"},
        {"/etc/x": b"x"},
        {".data/version": b"6" * 5000},
    ],
    ids=[
        *("more elements than bytes", "a negative size", "a stride beyond the bytes", "an offset beyond the bytes"),
        *("an unknown dtype", "an empty weight", "a path out of the archive", "a missing weight"),
        *("a deep program", "a program of no text", "a list of weights", "another version", "another format"),
        *("another byte order", "a member above the archive", "an absolute member", "a long version"),
    ],
)
def test_a_pt2_file_that_declares_what_it_does_not_hold_is_refused(
    exported: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"net\.pt2 (is not|cannot be) opened") as refused:
        open_pt2(rewritten(exported, tmp_path / "net.pt2", **changes))
    assert refused.value.why


def test_a_compressed_or_doubled_member_of_a_pt2_file_is_refused(exported: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("net/data/weights/weight_99", bytes(10**7))
    with pytest.raises(ModelError) as refused:
        open_pt2(tmp_path / "bomb.pt2")
    assert "compressed" in refused.value.why
    rewritten(exported, tmp_path / "twice.pt2")
    with zipfile.ZipFile(tmp_path / "twice.pt2", "a") as again, pytest.warns(UserWarning, match="Duplicate"):
        again.writestr("net/models/model.json", "{}")
    with pytest.raises(ModelError) as refused:
        open_pt2(tmp_path / "twice.pt2")
    assert "twice" in refused.value.why


def test_every_cut_and_flipped_pt2_file_is_opened_or_named(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    for place in range(0, len(whole), len(whole) // 25):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            (tmp_path / "net.pt2").write_bytes(damaged)
            with contextlib.suppress(ModelError):
                open_pt2(tmp_path / "net.pt2")


def program_of(location: str | None, place: str = "initializer") -> bytes:
    """An ONNX program whose one weight is 24 bytes in the file `location`, somewhere in the program."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "24")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2])
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    held = [product] if place == "initializer" else [helper.make_node("Constant", [], ["w"], value=weight), product]
    weights = [weight] if place == "initializer" else []
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3])
    if place == "branch":
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        body = helper.make_graph(held, "body", [], [y])
        choice = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
        held, weights = [choice], [yes]
    graph = helper.make_graph(held, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
@pytest.mark.parametrize(
    "location",
    ["{outside}/w.bin", "../outside/w.bin", "sub/../../outside/w.bin", "link.bin", "links/w.bin", "*/_ORT_MEM_ADDR_/*"],
)
def test_an_onnx_file_whose_weights_lie_outside_its_folder_is_refused_by_every_reader(
    tmp_path: Path, location: str, place: str
) -> None:
    folder, outside = tmp_path / "project", tmp_path / "outside"
    for made in (folder / "sub", outside):
        made.mkdir(parents=True)
    (outside / "w.bin").write_bytes(bytes(24))
    (folder / "link.bin").symlink_to(outside / "w.bin")
    (folder / "links").symlink_to(outside)
    program = folder / "net.onnx"
    program.write_bytes(program_of(location.format(outside=outside), place))
    signature = Signature((InputTensor("x", "float32", (BATCH, 3), False),), "tensor")
    settings = SessionSettings(threads=1, device="cpu", precision="float32")
    readers: list[Callable[[], object]] = [
        lambda: onnx_file.load(program, weights=False),
        lambda: declared_signature(program),
        lambda: artifact._copy_program(program, outside),
        *(lambda engine=engine: ENGINES[engine].open(program, signature, settings) for engine in PROGRAM_ENGINES),
    ]
    for reader in readers:
        with pytest.raises(ModelError, match="its external data lies outside its folder"):
            reader()


def test_an_onnx_file_with_its_weights_beside_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for location in ("w.bin", "sub/w.bin"):
        (tmp_path / location).write_bytes(np.ones((3, 2), np.float32).tobytes())
        (tmp_path / "net.onnx").write_bytes(program_of(location))
        assert declared_signature(tmp_path / "net.onnx").input_names == ["x"]
        assert onnx_file.load(tmp_path / "net.onnx").graph.initializer[0].raw_data
        (tmp_path / "copy").mkdir(exist_ok=True)
        artifact._copy_program(tmp_path / "net.onnx", tmp_path / "copy")
        assert (tmp_path / "copy" / location).is_file()


def of_shape(dims: list[int]) -> bytes:
    import onnx

    model = onnx.load_from_string(program_of(None))
    model.graph.initializer[0].dims[:] = dims
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "content",
    [
        of_shape([3, 10**12]),
        of_shape([10**9, 10**9]),
        of_shape([3, -2]),
        program_of("missing.bin"),
        b"",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a graph of 2 ** 62 bytes
        b"\x0a" * 5000,
        program_of(None)[:-7],
        program_of(None).replace(b"MatMul", b"EvilOp"),
    ],
    ids=["long", "huge", "negative", "absent", "empty", "declared", "noise", "cut", "operator"],
)
def test_an_onnx_file_that_holds_no_program_is_a_named_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"net\.onnx") as error:
        declared_signature(tmp_path / "net.onnx")
    assert error.value.why


def test_no_engine_is_asked_to_load_a_library() -> None:
    sources = [path.read_text() for path in Path(artifact.__file__).parents[1].rglob("*.py")]
    for name in ("register_custom_ops_library", "add_extension", "load_library", "load_inline"):
        assert not any(name in source and "LEFT_OUT" not in source for source in sources), name


CHECKPOINTS: dict[str, Callable[[Path], bytes]] = {
    "reduce.pt": payloads.marking_pickle,
    "inst.pth": lambda mark: payloads.marking_instruction(mark, "inst"),
    "obj.bin": lambda mark: payloads.marking_instruction(mark, "obj"),
    "build.ckpt": lambda mark: payloads.marking_instruction(mark, "build"),
    "nested.pt": lambda mark: payloads.marking_instruction(mark, "nested"),
    "training.ckpt": payloads.marking_checkpoint,
    "legacy.pt": lambda mark: payloads.marking_checkpoint(mark, legacy=True),
    "beside.pt": lambda mark: payloads.marking_checkpoint(mark, nn.Linear(3, 2).state_dict()),
    "tar.pt": lambda mark: tar_of({"pickle": payloads.marking_pickle(mark), "storages": b"", "tensors": b""}),
    "script.pt": lambda mark: zip_of(
        {
            "x/constants.pkl": payloads.marking_pickle(mark),
            "x/data.pkl": payloads.marking_pickle(mark),
            "x/version": b"3",
        }
    ),
    "odd_names.pt": lambda mark: zip_of(
        {"../../x/data.pkl": payloads.marking_pickle(mark), "/x/version": b"3", "x\\data.pkl": b""}
    ),
    "twice.pt": lambda mark: zip_of({"x/data.pkl": payloads.marking_pickle(mark), "y/data.pkl": pickle.dumps({})}),
    "module.pt": lambda mark: saved(nn.Sequential(nn.Linear(3, 2))),
    "empty.pt": lambda mark: b"",
    "cut.pt": lambda mark: saved(nn.Linear(3, 2).state_dict())[:-200],
    "array.pkl.pt": payloads.marking_npz,
    "bomb.safetensors": lambda mark: (2**63 - 1).to_bytes(8, "little") + b"{}",
    "header.safetensors": lambda mark: (10**8).to_bytes(8, "little") + b"{" * 1000,
    "json.safetensors": lambda mark: tensors_of(
        '{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"x" * 4
    ),
    "outside.safetensors": lambda mark: tensors_of(
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615]}}', b"x" * 4
    ),
    "overflow.safetensors": lambda mark: tensors_of(
        '{"w": {"dtype": "F64", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', b""
    ),
    "pickle.safetensors": payloads.marking_pickle,
    "nested.safetensors": lambda mark: tensors_of("[" * 100_000, b""),
}


def tensors_of(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # torch warns of some formats before it refuses them
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_a_named_error(tmp_path: Path, policy: PathPolicy, mark: Path, name: str) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(3, 2)\n")
    (tmp_path / name).write_bytes(CHECKPOINTS[name](mark))
    with pytest.raises(ModelError, match=re.escape(name)) as error:
        load_source("net.py:build", policy, checkpoint=name)
    assert error.value.why


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl"])
def test_a_pickled_model_is_refused_with_a_way_out_that_is_true(
    tmp_path: Path, policy: PathPolicy, mark: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(payloads.marking_pickle(mark))
    with pytest.raises(ModelError, match="is a pickle") as refused:
        load_source(name, policy)
    assert f"`checkpoint={name!r}`" in refused.value.fix
    assert "only if you trust" in refused.value.fix  # to export it, its owner has to open it


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tiny BERT in the folder `bert`."""
    folder = tmp_path_factory.mktemp("hugging")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.BertModel(config).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def bert(hugging_face: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(hugging_face / "bert", tmp_path / "bert"))


OPTIONS: list[dict[str, Any]] = [
    {"trust_remote_code": True},
    {"trust_remote_code": "yes"},
    {"weights_only": False},
    {"use_safetensors": False},
    {"code_revision": "main"},
    {"custom_generate": "someone/code"},
    {"gguf_file": "model.gguf"},
    {"subfolder": "../elsewhere"},
    {"cache_dir": "elsewhere"},
    {"adapter_kwargs": {"subfolder": "x"}},
    {"attn_implementation": "someone/kernels"},
    {"_attn_implementation": "someone/kernels:main"},
    {"attn_implementation": {"text_config": "someone/kernels"}},
    {"use_kernels": True},
    {"quantization_config": {"load_in_8bit": True}},
    {"auto_map": {"AutoModel": "code.Net"}},
    {"text_config": {"auto_map": {"AutoModel": "code.Net"}}},
    {"backbone": "someone/backbone"},
    {"config": "elsewhere"},
    {"device_map": "auto"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_of_transformers_that_runs_code_is_refused(hugging_face: Path, options: dict[str, Any]) -> None:
    policy = PathPolicy.of(hugging_face, [])
    with pytest.raises(ModelError, match="is refused") as refused:
        load_source("hf:bert", policy, kwargs=options)
    assert "--allow-remote-code" in refused.value.fix
    with pytest.raises(ModelError, match="is refused"):  # an artifact's recipe goes the same way
        build(Recipe("hf", str(hugging_face / "bert"), options), policy)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("timm:resnet18", {"checkpoint_path": "x.pth"}),
        ("timm:resnet18", {"pretrained_cfg": {"file": "x.pth"}}),
        ("timm:resnet18", {"pretrained_cfg_overlay": {"url": "https://example.org/x.pth"}}),
        ("timm:hf-hub:someone/model", {}),
        ("timm:local-dir:/tmp", {}),
        ("torchvision:resnet18", {"weights": "/tmp/x.pth"}),
        ("torchvision:../x", {}),
    ],
)
def test_a_name_or_option_of_an_image_library_that_reads_other_files_is_refused(
    policy: PathPolicy, model: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"is refused|is not a model name of") as refused:
        load_source(model, policy, kwargs=options)
    assert "--allow-remote-code" in refused.value.fix


def test_options_that_are_data_are_passed_on(hugging_face: Path) -> None:
    options = {"num_labels": 3, "attn_implementation": "eager", "trust_remote_code": False, "use_safetensors": True}
    source = load_source("hf:bert", PathPolicy.of(hugging_face, []), kwargs=options)
    assert source.module is not None
    assert source.module.config.num_labels == 3
    assert source.module.config._attn_implementation == "eager"


def with_config(bert: Path, **fields: Any) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | fields))


def with_remote_code(bert: Path, mark: Path) -> None:
    (bert / "code.py").write_text(
        f"{payloads.MARK_CODE(mark)}\nfrom transformers import BertModel as Net, BertConfig\n"
    )
    with_config(bert, auto_map={"AutoModel": "code.Net", "AutoConfig": "code.BertConfig"}, model_type="mine")


def test_the_code_of_a_repository_runs_only_where_the_request_allowed_it(
    bert: Path, policy: PathPolicy, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_remote_code(bert, mark)
    with pytest.raises(ModelError, match=r"'auto_map' in the config\.json of folder bert is refused"):
        load_source("hf:bert", policy)
    monkeypatch.setenv(hub_options.REMOTE_CODE_VARIABLE, "1")
    hub_options.check_options("hf", str(bert), {"trust_remote_code": True})
    hub_options.check_folder(bert)
    hub_options.allow_remote_code(False)
    with pytest.raises(ModelError, match="is refused"):
        hub_options.check_folder(bert)


FOLDERS: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda bert, outside: (
        (bert / "model.safetensors").unlink() or (bert / "model.safetensors").symlink_to(outside)
    ),
    "a linked configuration": lambda bert, outside: (bert / "generation_config.json").symlink_to(outside),
    "an index outside": lambda bert, outside: (bert / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": str(outside)}})
    ),
    "an index above": lambda bert, outside: (bert / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.bin"}})
    ),
    "an adapter": lambda bert, outside: (bert / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(outside)})
    ),
    "weights elsewhere": lambda bert, outside: with_config(bert, transformers_weights="../x.safetensors"),
    "kernels": lambda bert, outside: with_config(bert, _attn_implementation="someone/kernels"),
    "kernels within": lambda bert, outside: with_config(bert, text_config={"_attn_implementation": "someone/kernels"}),
    "options of timm": lambda bert, outside: with_config(bert, model_args={"checkpoint_path": "weights"}),
    "a file for timm": lambda bert, outside: with_config(bert, backbone_kwargs={"anything": str(outside)}),
    "a backbone elsewhere": lambda bert, outside: with_config(bert, backbone=str(outside)),
    "an architecture elsewhere": lambda bert, outside: with_config(bert, architecture="local-dir:somewhere"),
    "a nested configuration": lambda bert, outside: (bert / "config.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_hugging_face_that_leads_elsewhere_is_refused(
    bert: Path, policy: PathPolicy, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    shutil.copy(bert / "model.safetensors", outside)
    FOLDERS[kind](bert, outside)
    with pytest.raises(ModelError) as refused:
        load_source("hf:bert", policy)
    assert re.search("is refused|links outside it|outside its folder|cannot be read", refused.value.what)


def test_pickled_weights_of_a_hugging_face_folder_run_nothing(bert: Path, policy: PathPolicy, mark: Path) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(payloads.marking_checkpoint(mark))
    with pytest.raises(OmgoptimError):
        load_source("hf:bert", policy)


def test_an_architecture_that_is_no_model_class_is_not_called(bert: Path, policy: PathPolicy) -> None:
    with_config(bert, architectures=["pipeline", "AutoTokenizer", "BertConfig"])
    source = load_source("hf:bert", policy)
    assert type(source.module).__name__ == "BertModel"


def shell(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omgoptim.cli", *arguments, "--project", str(project), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_shell_refuses_a_pt2_file_with_a_payload(exported: Path, tmp_path: Path, mark: Path) -> None:
    rewritten(exported, tmp_path / "net.pt2", **PICKLES["example inputs"](mark))
    run = shell(tmp_path, "profile", "net.pt2", "--inputs", "2x3", "--python", sys.executable)
    assert run.returncode == 3
    assert "data/sample_inputs/model.pt" in run.stdout + run.stderr


@pytest.mark.slow
def test_the_shell_runs_a_repositorys_code_only_with_its_flag(bert: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with_remote_code(bert, mark)
    asked = ["profile", "hf:bert", "--inputs", "input_ids:int64:1x8", "--timing", "quick", "--python", sys.executable]
    run = shell(tmp_path, *asked)
    assert run.returncode == 3
    assert "--allow-remote-code" in run.stdout + run.stderr
    assert not mark.exists()
    shell(tmp_path, *asked, "--allow-remote-code")
    assert mark.exists()
