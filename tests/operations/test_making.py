from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from omgoptim.models.check import TOLERANCE
from omgoptim.models.samples import Samples
from omgoptim.operations import splits
from omgoptim.operations.candidates import Option, Proposal
from omgoptim.operations.making import PRECISIONS, precision_of
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import WeightOnly


def test_every_scheme_has_a_precision_that_an_artifact_may_have():
    schemes = [*(params() for params in PRECISIONS), WeightOnly(num_bits=4), WeightOnly(num_bits=8)]
    assert {precision_of(params) for params in schemes} <= set(TOLERANCE)
    assert precision_of(WeightOnly(num_bits=4)) == "int4"


@pytest.mark.parametrize("real", [True, False])
def test_weight_only_is_given_calibration_samples_where_there_are_real_ones(monkeypatch, real):
    rows = np.zeros((400, 3), np.float32)
    given = Samples([{"x": rows[i : i + 50]} for i in range(0, 400, 50)], [None] * 8)
    subject = SimpleNamespace(samples=lambda split, count: given, data=SimpleNamespace(real=real), macs=None)
    monkeypatch.setattr(splits, "overlap_notes", lambda *_: [])
    params = WeightOnly()
    request = QuantizeRequest(model="net.py:build", scheme=params)
    found = splits.splits_of(request, subject, Proposal([Option(params, "onnxruntime")], []))
    assert (found.calibration.count > 0) == real
    assert found.selection.count > 0
