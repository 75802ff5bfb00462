from __future__ import annotations

import pytest
import torch
from learning_pairs import Conv, Encoder, images, inner_state, made, sentences, traced
from small_training import same, signature_of, state
from torch import Tensor, nn

from omgoptim.training.layer_trace import capture_outputs, trace


def test_a_trace_tells_shapes_channels_and_the_layer_that_answers() -> None:
    found = traced(made(Conv, 0), images())
    stage, embedding = found.by_path["stage2"], found.by_path["fc"]
    assert (stage.shape, stage.channels, stage.grid, stage.sequence) == ((6, 8, 4, 4), 8, (4, 4), False)
    assert (embedding.shape, embedding.grid, embedding.final) == ((6, 3), (), True)
    assert (found.head, found.output) == ("fc", (6, 3))
    assert [seen.path for seen in found.layers][-1] == ""


def test_channels_of_sequences_are_last_and_those_of_one_dimensional_convolutions_second() -> None:
    tokens = traced(made(Encoder, 0), sentences())
    assert tokens.head is None
    block = tokens.by_path["layer.1"]
    assert (block.shape, block.channels, block.grid, block.sequence) == ((6, 5, 16), 16, (5,), True)

    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.rnn = nn.Conv1d(2, 4, 3), nn.ReLU(), nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.act(self.conv(x)).transpose(1, 2))[0].sum(1)

    found = traced(Signal().eval(), torch.randn(5, 2, 9))
    assert {path: (found.by_path[path].channels, found.by_path[path].grid) for path in ("conv", "act", "rnn")} == {
        "conv": (4, (7,)),
        "act": (4, (7,)),
        "rnn": (3, (7,)),
    }


def test_tracing_and_listening_leave_a_module_as_it_was() -> None:
    module = made(Conv, 0)
    signature = signature_of(module, images())
    module.stage2.train()
    before, tensors = inner_state(module), state(module)
    trace(module, signature, {"x": images()})
    with capture_outputs(module, [("stage1", "output"), ("fc", "input")]):
        pass
    with pytest.raises(ZeroDivisionError), capture_outputs(module, [("stage1", "output")]):
        raise ZeroDivisionError
    with pytest.raises(AttributeError), capture_outputs(module, [("stage1", "output"), ("stage9", "output")]):
        pass
    assert inner_state(module) == before
    assert same(state(module), tensors)


def test_what_is_heard_is_what_a_layer_gave_before_others_worked_in_place() -> None:
    module, x = made(Conv, 0), images()
    with capture_outputs(module, [("stage1.1", "output"), ("fc", "input")]) as heard:
        module(x)
    of_norm = module.stage1[1](module.stage1[0](x))
    torch.testing.assert_close(heard["stage1.1", "output"], of_norm)
    assert (of_norm < 0).any()
    torch.testing.assert_close(module.fc(heard["fc", "input"]), module(x))
    assert heard["fc", "input"].requires_grad
