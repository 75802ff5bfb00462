"""Small networks with one trap each: `build_NAME()` gives the module, `load_NAME(split)` its data.

The tests copy this file to a project of their own, and name its functions as a user would.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset

SAMPLES = {"train": 64, "calibration": 64, "eval": 96}
SEEDS = {"train": 1, "calibration": 2, "eval": 3}


@dataclass(frozen=True)
class Field:
    """One input: sizes of a sample, dtype, and the name by which `forward` takes it, if it is taken by name."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str = ""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(count, *self.shape, generator=generator, dtype=torch.float32).to(self.dtype)
        return torch.randint(0, 20, (count, *self.shape), generator=generator).to(self.dtype)


class Rows(Dataset):
    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return self.rows[index]


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    load: Callable[[str], Rows]
    fields: tuple[Field, ...]


ENTRIES: dict[str, Entry] = {}
IMAGE, VECTOR, SEQUENCE, TOKENS = Field((3, 8, 8)), Field((16,)), Field((6, 16)), Field((6,), torch.int64)


def add(name: str, make: Callable[[], nn.Module], *fields: Field, labels: int = 0) -> None:
    """Register a network; with `labels` classes its data has integer labels, else none."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make().eval()

    def load(split: str) -> Rows:
        generator = torch.Generator().manual_seed(SEEDS[split])
        count = SAMPLES[split]
        columns = [field.draw(count, generator) for field in fields]
        targets = torch.randint(0, labels, (count,), generator=generator) if labels else [None] * count
        rows = []
        for index in range(count):
            if any(field.name for field in fields):
                inputs = {field.name: column[index] for field, column in zip(fields, columns, strict=True)}
            elif len(fields) > 1:
                inputs = tuple(column[index] for column in columns)
            else:
                inputs = columns[0][index]
            rows.append((inputs, targets[index]))
        return Rows(rows)

    ENTRIES[name] = Entry(build, load, fields)
    globals()[f"build_{name}"], globals()[f"load_{name}"] = build, load


class Of(nn.Module):
    """Layers under their names, and a function of them and the inputs as the forward."""

    def __init__(self, call: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> object:
        return self.call(self, *inputs)


def head(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 4))


def convs(*layers: nn.Module, width: int = 16) -> nn.Sequential:
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


# Structures of outputs

Pair = namedtuple("Pair", ["boxes", "scores"])


@dataclasses.dataclass
class Answer:
    boxes: Tensor
    scores: Tensor


def two(wrap: Callable[[Tensor, Tensor], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return Of(
            lambda m, x: wrap(m.boxes(m.body(x)), m.scores(m.body(x)).softmax(1)),
            body=nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
            boxes=nn.Linear(32, 4),
            scores=nn.Linear(32, 3),
        )

    return make


add("tuple_out", two(lambda a, b: (a, b)), VECTOR, labels=3)
add("list_out", two(lambda a, b: [a, b]), VECTOR)
add("dict_out", two(lambda a, b: {"boxes": a, "scores": b}), VECTOR, labels=3)
add("namedtuple_out", two(Pair), VECTOR)
add("dataclass_out", two(Answer), VECTOR)
add("nested_out", two(lambda a, b: {"first": (a, [b]), "second": a * 2}), VECTOR)
add("none_in_tuple", two(lambda a, b: (a, None, b)), VECTOR)
add("single_tuple", lambda: Of(lambda m, x: (m.net(x),), net=head()), VECTOR)
add("integer_output", lambda: Of(lambda m, x: (m.net(x), m.net(x).argmax(1)), net=head()), VECTOR)
add("alias_of_input", lambda: Of(lambda m, x: (m.net(x), x), net=head()), VECTOR)
add("same_output_twice", lambda: Of(lambda m, x: (lambda y: (y, y))(m.net(x)), net=head()), VECTOR)
add("zero_size_output", lambda: Of(lambda m, x: (m.net(x), x[:, :0]), net=head()), VECTOR)
add("scalar_beside", lambda: Of(lambda m, x: (m.net(x), m.net(x).mean()), net=head()), VECTOR)
add("constant_output", lambda: Of(lambda m, x: (m.net(x), torch.ones_like(x[:, :3])), net=head()), VECTOR)
add("single_number", lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)), VECTOR)
add("flat_number", lambda: Of(lambda m, x: m.net(x)[:, 0], net=head()), VECTOR)
add("segmentation", lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)), IMAGE)
add("batch_second", lambda: Of(lambda m, x: m.net(x).transpose(0, 1), net=nn.Linear(16, 32)), SEQUENCE)
add("string_output", lambda: Of(lambda m, x: (m.net(x), "text"), net=head()), VECTOR)


# Inputs


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = head()

    def forward(self, *, image: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.net(image if extra is None else image + extra)


add("several_inputs", lambda: Of(lambda m, a, b: m.net(a * b), net=head()), VECTOR, VECTOR)
add("keyword_only", Keywords, Field((16,), name="image"), Field((16,), name="extra"))
add("optional_input", Keywords, Field((16,), name="image"))
add("unused_input", lambda: Of(lambda m, a, b: m.net(a), net=head()), VECTOR, VECTOR)
add("token_ids", lambda: nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8)), TOKENS)
add("embedding_bag", lambda: nn.Sequential(nn.EmbeddingBag(20, 16), nn.Linear(16, 4)), TOKENS)
add("float64", lambda: head().double(), Field((16,), torch.float64))
add("bfloat16", lambda: head().bfloat16(), Field((16,), torch.bfloat16))
add("float16", lambda: head().half(), Field((16,), torch.float16))
add(
    "mixed_precision",
    lambda: Of(lambda m, x: m.b(m.a(x).bfloat16()), a=nn.Linear(16, 32), b=head(32).bfloat16()),
    VECTOR,
)
add("mask_input", lambda: Of(lambda m, x, k: m.net(x * k), net=head()), VECTOR, Field((16,), torch.bool))


# Weights


def tied() -> nn.Module:
    net = Of(lambda m, x: m.last(m.first(x)), first=nn.Embedding(20, 16), last=nn.Linear(16, 20, bias=False))
    net.last.weight = net.first.weight
    return net


def frozen() -> nn.Module:
    net = head()
    net.requires_grad_(False)
    return net


class OneParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()) * 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = head()
        self.register_buffer("mean", torch.randn(16), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.mean)


class RawWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).relu()
        return x


add("no_parameters", lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), IMAGE)
add("one_parameter", OneParameter, VECTOR)
add("identity", nn.Identity, VECTOR)
add("raw_parameters", RawWeights, VECTOR)
add("tied_weights", tied, TOKENS)
add("frozen", frozen, VECTOR)
add(
    "shared_module",
    lambda: Of(lambda m, x: m.out(m.mid(m.mid(x).relu()).relu()), mid=nn.Linear(16, 16), out=head()),
    VECTOR,
)
add("unused_layer", lambda: Of(lambda m, x: m.net(x), net=head(), spare=nn.Linear(7, 9)), VECTOR)
add("unsaved_buffer", Buffered, VECTOR)
add("lazy", lambda: nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(4)), VECTOR)
add(
    "weight_norm",
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 4)),
    VECTOR,
)
add("spectral_norm", lambda: convs(parametrizations.spectral_norm(nn.Conv2d(3, 16, 3))), IMAGE)
add(
    "orthogonal",
    lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)),
    VECTOR,
)
add(
    "old_weight_norm",
    lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 4)),
    VECTOR,
)


# Layers

add("grouped", lambda: convs(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4)), IMAGE)
add("depthwise", lambda: convs(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)), IMAGE)
add("dilated", lambda: convs(nn.Conv2d(3, 16, 3, dilation=2, padding="same", padding_mode="reflect")), IMAGE)
add(
    "transposed",
    lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3, 2, groups=2)),
    IMAGE,
)
add("conv1d", lambda: nn.Sequential(nn.Conv1d(6, 16, 3), nn.GELU(), nn.Conv1d(16, 8, 3), nn.Flatten()), SEQUENCE)
add(
    "conv3d", lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)), Field((3, 4, 4, 4))
)
add("batch_norm", lambda: convs(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)), IMAGE, labels=4)
add("norm_without_stats", lambda: convs(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)), IMAGE)
add("group_norm", lambda: convs(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)), IMAGE)
add("instance_norm", lambda: convs(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True)), IMAGE)
add(
    "attention",
    lambda: Of(lambda m, x: m.attend(x, x, x), attend=nn.MultiheadAttention(16, 4, batch_first=True)),
    SEQUENCE,
)
add("encoder", lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), SEQUENCE)
add("lstm", lambda: nn.LSTM(16, 24, batch_first=True), SEQUENCE)
add(
    "lstm_projected", lambda: Of(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(16, 24, proj_size=8, batch_first=True)), SEQUENCE
)
add(
    "lstm_both_ways",
    lambda: Of(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(16, 24, 2, bidirectional=True, batch_first=True)),
    SEQUENCE,
)
add("gru_time_first", lambda: Of(lambda m, x: m.rnn(x.transpose(0, 1))[0][-1], rnn=nn.GRU(16, 24)), SEQUENCE)
add("plain_rnn", lambda: Of(lambda m, x: m.rnn(x)[1][0], rnn=nn.RNN(16, 24, batch_first=True)), SEQUENCE)
add(
    "gru_cell_with_state",
    lambda: Of(lambda m, x, h: (m.out(m.cell(x, h)), m.cell(x, h)), cell=nn.GRUCell(16, 24), out=nn.Linear(24, 1)),
    VECTOR,
    Field((24,)),
)
add("bilinear", lambda: nn.Bilinear(16, 16, 6), VECTOR, VECTOR)


# Forwards


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2


def branching(m: nn.Module, x: Tensor) -> Tensor:
    return m.bright(x) if x.mean() > 0 else m.dark(x)


def printing(m: nn.Module, x: Tensor) -> Tensor:
    print("forward of", tuple(x.shape))
    return m.net(x)


def hooked() -> nn.Module:
    net = head()
    net[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    return net


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"in": nn.Linear(16, 16), "middle": nn.Linear(16, 16)})
        self.stack = nn.ModuleList([nn.Sequential(nn.Sequential(nn.Linear(16, 16)), nn.ReLU()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        for part in self.stack:
            x = x + part(x)
        return x


add(
    "residual",
    lambda: Of(
        lambda m, x: m.out((x + m.b(m.a(x).relu())).relu()),
        a=nn.Linear(16, 24),
        b=nn.Linear(24, 16),
        out=nn.Linear(16, 4),
    ),
    VECTOR,
)
add(
    "concatenated",
    lambda: Of(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1).relu()),
        a=nn.Linear(16, 12),
        b=nn.Linear(16, 20),
        out=nn.Linear(32, 4),
    ),
    VECTOR,
)
add("nested", Deep, VECTOR)
add("branches", lambda: Of(branching, bright=head(), dark=head()), VECTOR)
add("custom_function", lambda: Of(lambda m, x: Doubled.apply(m.net(x)), net=head()), VECTOR)
add("complex_inside", lambda: Of(lambda m, x: torch.fft.rfft(m.net(x)).abs(), net=head()), VECTOR)
add("complex_output", lambda: Of(lambda m, x: torch.fft.rfft(m.net(x)), net=head()), VECTOR)
add("printing", lambda: Of(printing, net=head()), VECTOR)
add("hooked", hooked, VECTOR)
add("random_in_eval", lambda: Of(lambda m, x: nn.functional.dropout(m.net(x), 0.5), net=head()), VECTOR)
add(
    "in_place",
    lambda: Of(lambda m, x: m.net(x).add_(1).relu_(), net=nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True))),
    VECTOR,
)
add("changes_its_input", lambda: Of(lambda m, x: m.net(x.mul_(2)), net=head()), VECTOR)
add("numpy_inside", lambda: Of(lambda m, x: m.net(torch.from_numpy(x.detach().numpy() * 2)), net=head()), VECTOR)
add("raises", lambda: Of(lambda m, x: m.net(x[:, :3]), net=head()), VECTOR)
add("sparse_mask", lambda: Of(lambda m, x: m.net(x.masked_fill(x < 0, 0)), net=head()), VECTOR)
add("infinite", lambda: Of(lambda m, x: torch.where(m.net(x) > 0, m.net(x), -torch.inf), net=head()), VECTOR)
