"""Students and teachers with layers to learn from: convolutional, of transformer blocks, and what runs them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from small_training import signature_of
from torch import Tensor, nn

from omgoptim.training.feature_losses import FeatureLoss
from omgoptim.training.layer_trace import Trace, trace


class Conv(nn.Module):
    """Two stages of maps, 8x8 and 4x4, an embedding and its classes; in-place activations, as many nets have them."""

    def __init__(self, width: int = 4, depth: int = 1, classes: int = 3) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for number in range(depth):
                layers += [
                    nn.Conv2d(inputs if number == 0 else outputs, outputs, 3, stride if number == 0 else 1, 1),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
            return nn.Sequential(*layers)

        self.stage1, self.stage2 = stage(1, width, 1), stage(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = (q @ k.transpose(1, 2) / x.shape[-1] ** 0.5).masked_fill(attention_mask[:, None] == 0, -1e9)
        return scores.softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.ff, self.norm = Attention(width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        x = x + self.attention(x, attention_mask)
        return (self.norm(x + self.ff(x).relu()),)


class Encoder(nn.Module):
    """Token ids to one embedding: what sentence transformers are."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layer = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.layer:
            (x,) = block(x, attention_mask)
        kept = attention_mask.unsqueeze(-1)
        return (x * kept).sum(1) / kept.sum(1)


def made(kind: type[nn.Module], seed: int, **arguments: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind(**arguments).eval()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sentences(count: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(0, 20, (count, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def named(module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """A batch by input name."""
    return inputs if isinstance(inputs, dict) else {signature_of(module, inputs).input_names[0]: inputs}


def traced(module: nn.Module, inputs: Any) -> Trace:
    return trace(module, signature_of(module, inputs), named(module, inputs))


def features_of(method: str, student: nn.Module, teacher: nn.Module, inputs: Any, *pairs: str) -> FeatureLoss:
    signature, batch = signature_of(student, inputs), named(student, inputs)
    return FeatureLoss.of(method, 1.0, pairs, trace(student, signature, batch), trace(teacher, signature, batch))


def heard_by(loss: FeatureLoss, student: nn.Module, teacher: nn.Module, inputs: Any) -> Tensor:
    """The distance of both on a batch, with the student's gradient."""
    args, kwargs = signature_of(student, inputs).to_call(named(student, inputs))
    with loss.capturing(student, teacher) as heard:
        student(*args, **kwargs)
        with torch.no_grad():
            teacher(*args, **kwargs)
    return loss(heard, kwargs.get("attention_mask"))


def inner_state(module: nn.Module) -> list[Any]:
    """All that a layer is, beside its tensors: attributes, hooks, modes, gradients."""
    return [
        {name: copy.copy(value) for name, value in vars(layer).items() if name not in ("_parameters", "_buffers")}
        for layer in module.modules()
    ] + [(p.requires_grad, p.grad) for p in module.parameters()]
