"""peft's own operations on fused layers give what they give on peft's layers.

Every case runs the same operations on a stock and on an accelerated copy of one model, compares the
step after it, and says how often the op ran: a case that fell back by accident fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from peft_models import IN, Mlp, assert_same, fused_calls, mlp, small_llama, step, with_adapters
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

import fedms


class Case(NamedTuple):
    """Operations on a model with the adapters one and two, and how often the op runs after."""

    change: Callable[[PeftModel], object]
    calls: int
    config: dict = {}  # noqa: RUF012  (read only)


def _layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def _hotswap(model):
    other = mlp("one", r=4)
    for p in other.parameters():
        p.data.mul_(1.7)
    swapped = {name: value for name, value in other.state_dict().items() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, swapped, "one", other.peft_config["one"])


def _add_later(model):
    torch.manual_seed(7)
    model.add_adapter("three", LoraConfig(target_modules=["b"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["one", "three"])


def _weighted(kind):
    def change(model):
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=kind)
        model.set_adapter("sum")

    return change


def _scale(model):
    for layer in _layers(model):
        layer.set_scale("one", 3.0)
        layer.scale_layer(0.5)


def _frozen_and_trained(model):
    model.base_model.set_adapter(["one", "two"])
    model.set_requires_grad("two", False)


def _merge_and_back(model):
    model.merge_adapter(["two"])
    model.unmerge_adapter()


CASES = {
    "second adapter": Case(lambda m: m.set_adapter("two"), 2),
    "both": Case(lambda m: m.base_model.set_adapter(["one", "two"]), 2),
    "one of them frozen": Case(_frozen_and_trained, 2),
    "deleted": Case(lambda m: (m.set_adapter("two"), m.delete_adapter("one")), 2),
    "added later, other layers and rank": Case(_add_later, 2),
    "scaling": Case(_scale, 2),
    "rslora": Case(lambda m: None, 2, {"use_rslora": True, "lora_alpha": 7}),
    "rank and alpha patterns": Case(
        lambda m: m.base_model.set_adapter(["one", "two"]), 2,
        {"rank_pattern": {"a": 7}, "alpha_pattern": {"b": 5}},
    ),
    "bias all": Case(lambda m: None, 2, {"bias": "all"}),
    "bias lora_only": Case(lambda m: None, 2, {"bias": "lora_only"}),
    "modules_to_save": Case(
        lambda m: None, 1, {"target_modules": ["a"], "modules_to_save": ["b"]}
    ),
    "disabled": Case(lambda m: m.base_model.disable_adapter_layers(), 0),
    "disabled and enabled": Case(
        lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()), 2
    ),
    "merged": Case(lambda m: m.merge_adapter(), 0),
    "merged safely": Case(lambda m: m.merge_adapter(safe_merge=True), 0),
    "merged and unmerged": Case(_merge_and_back, 2),
    "weighted linear": Case(_weighted("linear"), 2),
    "weighted cat": Case(_weighted("cat"), 2),
    "weighted svd": Case(_weighted("svd"), 2),
    "hot-swapped": Case(_hotswap, 2),
    "lora_bias": Case(lambda m: None, 2, {"lora_bias": True}),
    "dora": Case(lambda m: None, 0, {"use_dora": True}),
    "pissa": Case(lambda m: None, 2, {"init_lora_weights": "pissa"}),
    "olora": Case(lambda m: None, 2, {"init_lora_weights": "olora"}),
    "orthogonal": Case(lambda m: None, 2, {"init_lora_weights": "orthogonal"}),
    "no casting of the input": Case(
        lambda m: [setattr(layer, "cast_input_dtype_enabled", False) for layer in _layers(m)], 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operation(name):
    case = CASES[name]
    stock = mlp("one", "two", **case.config)
    fused, x = copy.deepcopy(stock), torch.randn(3, 5, IN)
    fedms.accelerate(fused)
    results = []
    for model in (stock, fused):
        torch.manual_seed(3)
        case.change(model)
        with fused_calls() as calls:
            results.append(step(model, x))
        assert len(calls) == (case.calls if model is fused else 0)
    assert_same(results[1], results[0], 1e-5)
    for (key, ours), (_, theirs) in zip(
        fused.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=key)


def test_the_operations_change_something():
    """Negative control: a case compared with the untouched model differs by more than the bound."""
    model, x = mlp("one", "two"), torch.randn(3, 5, IN)
    fedms.accelerate(model)
    before = model(x)
    for change in (CASES["both"].change, _scale, _hotswap):
        other = copy.deepcopy(model)
        change(other)
        assert (other(x) - before).norm() > 1e-2 * before.norm()


def test_switching_off_in_a_block():
    model, x = mlp(), torch.randn(3, IN)
    fedms.accelerate(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), Mlp.forward(_base(model), x))
    assert not torch.allclose(model(x), _base(model)(x))


def _base(model):
    plain = Mlp()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()
         if "lora_" not in k}
    )  # fmt: skip
    return plain


def test_merge_and_unload_gives_the_same_linears():
    model, x = mlp(), torch.randn(3, IN)
    fedms.accelerate(model)
    want = model(x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.a) is nn.Linear
    torch.testing.assert_close(merged(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [["two", "__base__", "one", "two"], ["__base__"] * 4])
def test_adapter_names_in_evaluation(names):
    model, x = mlp("one", "two", lora_bias=True).eval(), torch.randn(4, 3, IN)
    want = model(x, adapter_names=names)
    fedms.accelerate(model)
    with fused_calls() as calls:
        torch.testing.assert_close(model(x, adapter_names=names), want, rtol=1e-5, atol=1e-5)
    assert len(calls) == (2 if "one" in names else 0)
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        model(x, adapter_names=names[:3])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(x, adapter_names=names)


def test_checkpoints_go_both_ways(tmp_path):
    model, x = mlp("one", "two"), torch.randn(3, IN)
    model.set_adapter("two")
    want = model(x)
    fedms.accelerate(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(Mlp(), str(tmp_path / "two"), adapter_name="two")
    assert torch.equal(stock(x), want)
    fedms.accelerate(stock)
    assert torch.equal(stock(x), model(x))
    assert stock.load_adapter(str(tmp_path / "one"), "one")
    set_peft_model_state_dict(
        stock, get_peft_model_state_dict(model, adapter_name="one"), adapter_name="one"
    )
    model.set_adapter("one")
    stock.set_adapter("one")
    assert torch.equal(stock(x), model(x))


class Half(nn.Linear):
    """Stands for a quantised base: its weight is stored halved, and only its forward knows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight.data = linear.weight.data / 2
        self.bias.data = linear.bias.data

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


def _half_base(model):
    model.a = Half(model.a)


def _hooked_base(model):
    model.a.register_forward_hook(lambda module, args, y: y * 2)


def _parametrized_base(model):
    nn.utils.parametrizations.weight_norm(model.a)


@pytest.mark.parametrize("prepare", [_half_base, _hooked_base, _parametrized_base])
def test_a_base_that_is_no_plain_linear_is_called(prepare):
    torch.manual_seed(0)
    base, x = Mlp(), torch.randn(3, IN)
    plain = with_adapters(copy.deepcopy(base), target_modules=["a"])
    prepare(base)
    model = with_adapters(base, target_modules=["a"])
    want = step(model, x)
    fedms.accelerate(model)
    with fused_calls() as calls:
        got = step(model, x)
    assert len(calls) == 1
    assert_same(got, want, 1e-5)
    if prepare is _hooked_base:  # the hook's factor shows, so the base was really called
        assert not torch.allclose(got["y"], plain(x))


def test_conv1d_of_gpt2_is_fused():
    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model = with_adapters(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True).eval()
    assert isinstance(model.base_model.model.h[0].mlp.c_fc.base_layer, Conv1D)
    ids = torch.arange(8).reshape(2, 4)
    want = model(ids).last_hidden_state
    assert len(fedms.accelerate(model).fused) == 2
    with fused_calls() as calls:
        torch.testing.assert_close(model(ids).last_hidden_state, want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


class Layers(nn.Module):
    """An embedding, a convolution, attention and a linear, each with LoRA of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def test_other_layers_stay_pefts():
    torch.manual_seed(0)
    targets = ["embedding", "conv", "attention", "linear"]
    model = with_adapters(Layers(), target_modules=targets)
    ids = torch.arange(10).reshape(2, 5)
    want = model(ids)
    report = fedms.accelerate(model)
    assert report.fused == ("base_model.model.linear",)
    assert len(report.fallback) == 3
    with fused_calls() as calls:
        torch.testing.assert_close(model(ids), want)
    assert len(calls) == 1


def test_tied_adapters():
    model = small_llama(tie_word_embeddings=True)
    config = LoraConfig(
        target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False
    )
    model = get_peft_model(model, config)
    layer = model.base_model.model.lm_head
    assert not layer.lora_A["default"].weight.is_contiguous()  # a view of the embedding's
    ids = torch.arange(6).reshape(2, 3)
    want = model(ids).logits
    assert len(fedms.accelerate(model).fused) == 1
    with fused_calls() as calls:
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
