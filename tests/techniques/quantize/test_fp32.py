from __future__ import annotations

import onnx
import pytest

from omgoptim.errors import ModelError
from omgoptim.requests.quantize import Fp32
from omgoptim.techniques.registry import technique_of


def test_the_program_is_copied_byte_for_byte_and_no_change_is_reported(program, apply):
    target, outcome = apply(program("mlp"), Fp32())
    assert target.read_bytes() == program("mlp").path.read_bytes()
    assert outcome.changed == []
    assert outcome.skipped == []


def test_no_torch_engine_stands_in_for_it():
    assert technique_of(Fp32()).torch_precision is None


def test_external_weights_are_copied_with_it(program, apply, tmp_path, cosine):
    folder = tmp_path / "source"
    folder.mkdir()
    source = type(program("mlp"))(folder / "mlp.onnx", program("mlp").sample)
    model = onnx.load(str(program("mlp").path))
    onnx.save_model(model, str(source.path), save_as_external_data=True, location="mlp.weights", size_threshold=0)
    target, _ = apply(source, Fp32())
    assert (target.parent / "mlp.weights").read_bytes() == (folder / "mlp.weights").read_bytes()
    assert cosine(source, target) > 0.999999


def test_weights_outside_the_models_folder_are_refused(program, apply, tmp_path):
    model = onnx.load(str(program("mlp").path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    source = type(program("mlp"))(tmp_path / "bad.onnx", program("mlp").sample)
    source.path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside its folder"):
        apply(source, Fp32())
