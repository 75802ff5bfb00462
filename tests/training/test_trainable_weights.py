"""Trainable weights: low-rank adapters, and masks that keep pruned weights at zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import batches_of, blobs, evaluator_of, fit, net, same, signature_of, source, state
from torch import nn

from omgoptim.blocks.lora import LoRAConv, LoRALinear
from omgoptim.blocks.low_rank import LowRankLinear
from omgoptim.errors import RequestError, TechniqueError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.loop import TrainingResult
from omgoptim.training.losses import loss_of
from omgoptim.training.trainable_weights import ZeroMasks, adaptable, recovering

X, Y = blobs()
PLAN = TrainingConfig(epochs=3, batch=16, learning_rate=1e-2)


def recovered(module: nn.Module, masks: ZeroMasks | None = None, **more: Any) -> TrainingResult:
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), module(X[:8]).detach(), Y[:8])
    evaluator = evaluator_of(module, X, Y)
    with recovering(module, "lora", 2, 8.0, masks) as trainable:
        fitted = fit(trainable, batches_of(trainable, X, Y), loss, PLAN, evaluator, masks=masks, **more)
        inside = evaluator.score(trainable)
    assert evaluator.score(module) == inside == fitted.quality
    return fitted


def test_adapters_learn_merge_and_leave_the_module_as_it_was_built() -> None:
    module = net()
    kinds, before = [type(layer) for layer in module.modules()], state(module)
    fitted = recovered(module)
    after = state(module)
    assert [type(layer) for layer in module.modules()] == kinds
    assert list(after) == list(before)
    assert fitted.quality is not None
    assert fitted.quality_before is not None
    assert fitted.quality > fitted.quality_before
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        "fc.weight", "out.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    rank = torch.linalg.matrix_rank(after["fc.weight"] - before["fc.weight"], rtol=1e-4)
    assert rank <= 2
    assert fitted.trained_params == 2 * (4 + 16) + 2 * (16 + 3) + 2 * 16
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_zeros_stay_zero_after_merging() -> None:
    module = net()
    with torch.no_grad():
        module.fc.weight[:, 1] = 0
    before = module.fc.weight.detach().clone()
    recovered(module, ZeroMasks.of(module, ["fc"]))
    assert torch.equal(module.fc.weight == 0, before == 0)
    assert not torch.equal(module.fc.weight, before)


def test_the_same_seed_draws_the_same_adapters_and_no_global_one() -> None:
    random_state = torch.get_rng_state()
    one, other = net(), net()
    recovered(one)
    recovered(other)
    assert same(state(one), state(other))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_training_with_adapters_resumes(tmp_path: Path) -> None:
    module = net()
    calls: list[int] = []

    class Stop(Exception):
        pass

    def stop(_text: str, done: float | None) -> None:
        calls.append(0)
        if done is not None and done > 0.5:
            raise Stop

    cut = net()
    before = state(cut)
    recovered(module)
    with pytest.raises(Stop):
        recovered(cut, checkpoints=tmp_path, progress=stop)
    assert same(
        {n: t for n, t in state(cut).items() if "norm" not in n}, {n: t for n, t in before.items() if "norm" not in n}
    )
    again = net()
    assert recovered(again, checkpoints=tmp_path).resumed == 1
    assert same(state(again), state(module))


def test_adapters_are_dropped_when_training_fails() -> None:
    def fail(_changed: torch.Tensor) -> None:
        raise RuntimeError("no")

    module = net()
    before, kinds = state(module), [type(layer) for layer in module.modules()]
    with pytest.raises(RuntimeError, match="no"), recovering(module, "lora"), torch.no_grad():
        fail(module.fc.lora_b.fill_(1.0))
    assert same(state(module), before)
    assert [type(layer) for layer in module.modules()] == kinds
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_layers_whose_weight_is_not_theirs_alone_are_left_out_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.twice = self.again = nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.conv = nn.Conv2d(4, 4, 3)
            self.low = LowRankLinear(4, 4, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    found = adaptable(Odd())
    assert list(found.layers) == ["conv", "low.a", "low.b"]
    reasons = found.skipped
    assert set(reasons) == {"head", "twice", "frozen", "attention.out_proj", "depthwise", "normed"}
    assert "shared" in reasons["head"]
    assert "shared" in reasons["twice"]
    assert "frozen" in reasons["frozen"]
    assert "depthwise" in reasons["depthwise"]


def test_attention_that_reads_weights_itself_works_with_adapters_around_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).eval()
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    with recovering(model, "lora", 2, 8.0):
        assert isinstance(layer.linear1, LoRALinear)
        with torch.no_grad():
            layer.linear1.lora_b.add_(0.5)
            fast = model(x)  # torch's fast path reads linear1.weight
        slow = model(x).detach()
        torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(model(x), slow)


def test_convolutions_and_batch_norm_are_recovered() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = X.reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2)
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), model(x[:8]).detach(), Y[:8])
    with recovering(model, "lora", 2, 8.0) as trainable:
        assert isinstance(model[0], LoRAConv)
        fitted = fit(trainable, batches_of(trainable, x, Y), loss, PLAN, None)
    assert type(model[0]) is nn.Conv2d
    assert fitted.epochs[-1].loss < fitted.epochs[0].loss


def test_full_and_none_change_nothing_but_what_is_trained() -> None:
    module = net()
    module.fc.bias.requires_grad_(False)
    with recovering(module, "full") as trainable:
        assert [p.requires_grad for p in trainable.fc.parameters()] == [True, False]
    with recovering(module, "none"):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [p.requires_grad for p in module.fc.parameters()] == [True, False]
    with pytest.raises(RequestError, match="full, lora or none"), recovering(module, "partial"):
        pass


def test_a_model_without_a_layer_to_adapt_is_refused_and_left_alone() -> None:
    for module in (nn.Sequential(nn.LSTM(4, 4)), nn.Linear(4, 4)):
        with pytest.raises(TechniqueError) as error, recovering(module, "lora"):
            pass
        assert "full" in error.value.fix
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_transformers_model_gets_pefts_adapters_and_is_plain_again_afterwards() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module = transformers.BertForSequenceClassification(config).eval()
    before, kinds, attributes = copy.deepcopy(module), [type(m) for m in module.modules()], set(vars(module))
    ids = torch.arange(24).reshape(8, 3) % 20
    labels = ids[:, 0] % 3
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), module(ids), labels, module=module)
    batches = Batches(
        source([{"input_ids": ids, "labels": labels}] * 3), module, signature_of(module, {"input_ids": ids})
    )
    with recovering(module, "lora", 2, 8.0) as trainable:
        assert any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in module.modules())
        fitted = fit(trainable, batches, loss, TrainingConfig(epochs=4, learning_rate=1e-2), None)
        inside = module(ids).logits.detach()
    assert [type(m) for m in module.modules()] == kinds
    assert set(vars(module)) == attributes
    assert list(module.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(module(ids).logits, inside)
    assert fitted.epochs[-1].loss < fitted.epochs[0].loss
    assert fitted.loss.startswith("BertForSequenceClassification's own loss")
    norm = "bert.embeddings.LayerNorm.weight"
    assert not torch.equal(module.state_dict()[norm], before.state_dict()[norm])
    assert all(parameter.requires_grad for parameter in module.parameters())


def made() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        module[0].bias.zero_()
    return module


def test_zeros_are_held_as_positive_zero_and_biases_are_free() -> None:
    module = made()
    masks = ZeroMasks.of(module, ["0"])
    assert masks.count() == 2
    with torch.no_grad():
        module[0].weight.fill_(-5.0)
        module[0].bias.fill_(3.0)
    masks.apply()
    assert module[0].weight.tolist() == [[0.0, -5.0], [-5.0, 0.0]]
    assert not torch.signbit(module[0].weight).diagonal().any()
    assert module[0].bias.tolist() == [3.0, 3.0]


def test_gradients_of_zeros_are_dropped() -> None:
    module = made()
    masks = ZeroMasks.of(module, ["0.weight"])
    module(torch.ones(1, 2)).sum().backward()
    masks.drop_gradients()
    assert module[0].weight.grad is not None
    assert (module[0].weight.grad == 0).tolist() == [[True, False], [False, True]]


def test_a_shared_weight_counts_once_and_layers_without_zeros_hold_nothing() -> None:
    module = made()
    module[1].weight = module[0].weight
    masks = ZeroMasks.of(module, ["0", "1"])
    assert masks.count() == 2
    kept = masks.free_entries(module[1].weight)
    assert kept is not None
    assert kept.tolist() == [[False, True], [True, False]]
    assert ZeroMasks().count() == 0


def test_recurrent_weights_are_held_too() -> None:
    module = nn.Sequential(nn.LSTM(2, 3))
    with torch.no_grad():
        module[0].weight_hh_l0[0, 0] = 0
    assert ZeroMasks.of(module, ["0"]).count() == 1


def test_a_path_that_is_nothing_is_refused() -> None:
    with pytest.raises(TechniqueError, match="'fc'"):
        ZeroMasks.of(made(), ["fc"])
