from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from omgoptim.measure.size import count_params


def test_parameters_and_those_that_are_not_zero_are_counted():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, -3.0]]))
        layer.bias.copy_(torch.tensor([0.0, -0.0]))
    assert count_params(layer) == (8, 3)


def test_a_tied_weight_counts_once_whether_shared_as_parameter_or_as_memory():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(4, 7, bias=False))
    assert count_params(net)[0] == 84
    net[1].weight = net[0].weight
    assert count_params(net)[0] == 56
    net[2].weight = nn.Parameter(net[0].weight.data)
    assert count_params(net)[0] == 28


def test_views_of_one_memory_with_other_shapes_and_empty_parameters_stay_apart():
    net = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(2))])
    assert count_params(net) == (2, 2)


def test_buffers_are_no_parameters():
    assert count_params(nn.BatchNorm2d(4, affine=False)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_is_counted(dtype):
    net = nn.ParameterList([nn.Parameter(torch.tensor([0, 1, 2], dtype=dtype))])
    assert count_params(net) == (3, 2)


def test_measuring_files_needs_no_torch():
    code = "import sys, omgoptim.measure.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
