from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import Narrow
from omgoptim.techniques.registry import apply_to_module


def test_of_half_the_width_about_a_quarter_of_the_parameters_is_left(run_of: Any, drawn: Any, resnet: Any) -> None:
    """R8(24) has 173,842; R8(4), a sixth of its width, 5,142."""
    teacher = resnet(24)
    assert count_params(teacher)[0] == 173_842
    apply_to_module(teacher, Narrow(width=1 / 6), run_of(teacher, drawn(16, 1, 12, 12)))
    assert count_params(teacher)[0] == 5_142


def test_an_lstm_and_what_is_around_it_get_narrower(run_of: Any, drawn: Any) -> None:
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 32, 2, batch_first=True)
            self.fc, self.out = nn.Linear(32, 16), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.fc(self.rnn(x)[0][:, -1])))

    torch.manual_seed(0)
    teacher = Heard()
    before = count_params(teacher)[0]
    outcome = apply_to_module(teacher, Narrow(width=0.25), run_of(teacher, drawn(16, 6, 3)))
    assert (teacher.rnn.hidden_size, teacher.fc.out_features) == (8, 4)
    assert before / count_params(teacher)[0] > 10
    changes = {(change.path, change.what): (change.before, change.after) for change in outcome.changed}
    assert changes["rnn", "hidden units"] == ("32", "8")


def test_a_model_of_outputs_alone_cannot_be_narrowed(run_of: Any, drawn: Any) -> None:
    teacher = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TechniqueError, match="no layer of this model can be narrowed") as refused:
        apply_to_module(teacher, Narrow(), run_of(teacher, drawn(4, 4)))
    assert "outputs of the model" in refused.value.why
