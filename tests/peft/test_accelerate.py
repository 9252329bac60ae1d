"""accelerate, restore and enable_peft: what they change and what they leave."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft_models import IN, Mlp, assert_same, fused_calls, mlp, small_llama, step
from torch import nn

import fedms
from fedms.peft import FusedLinear


@pytest.fixture
def _enabled():
    fedms.enable_peft()
    yield
    fedms.disable_peft()


def test_same_step_and_the_op_ran():
    model, x = mlp(), torch.randn(3, 5, IN)
    want = step(model, x)
    report = fedms.accelerate(model)
    assert report.fused == ("base_model.model.a", "base_model.model.b")
    assert report.fallback == {}
    with fused_calls() as calls:
        got = step(model, x)
    assert len(calls) == 2
    assert_same(got, want, 1e-5)


def test_tree_parameters_and_keys_stay():
    model = mlp()
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    fedms.accelerate(model)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert isinstance(model.base_model.model.a, lora.Linear)


def test_an_optimiser_made_before_still_trains():
    model, x = mlp(), torch.randn(4, IN)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    fedms.accelerate(model)
    step(model, x)
    optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("lora_" in name), name


def test_restore_gives_pefts_layers_back():
    model, x = mlp("one", "two"), torch.randn(4, IN)
    want = step(model, x)
    fedms.accelerate(model)
    fedms.set_gates(model, torch.zeros(1), adapters=["one"])
    fedms.restore(model)
    layer = model.base_model.model.a
    assert type(layer) is lora.Linear
    assert not [name for name in vars(layer) if "fedms" in name]
    with fused_calls() as calls:
        got = step(model, x)
    assert not calls
    assert_same(got, want, 0.0)


def test_accelerate_twice_is_harmless_and_takes_over_new_layers():
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["a"]))
    assert len(fedms.accelerate(model).fused) == 1
    model.add_adapter("wider", LoraConfig(target_modules=["a", "b"]))
    model.set_adapter("wider")
    assert type(model.base_model.model.b) is lora.Linear
    assert len(fedms.accelerate(model).fused) == 2
    assert type(model.base_model.model.b) is FusedLinear


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match=r"must hold LoRA layers of peft.*got a Mlp"):
        fedms.accelerate(Mlp())
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        fedms.accelerate("model")


@pytest.mark.usefixtures("_enabled", "_transformers_takes_this_peft")
def test_enable_peft_covers_every_way_a_model_is_made(tmp_path):
    model, x = mlp(), torch.randn(4, IN)
    assert type(model.base_model.model.a) is FusedLinear
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), str(tmp_path))
    assert type(loaded.base_model.model.a) is FusedLinear
    with fused_calls() as calls:
        assert torch.equal(loaded(x), model(x))
    assert len(calls) == 4
    plain = small_llama()
    plain.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert type(plain.model.layers[0].self_attn.q_proj) is FusedLinear
    fedms.enable_peft()
    fedms.disable_peft()
    assert type(mlp().base_model.model.a) is lora.Linear
    assert type(model.base_model.model.a) is FusedLinear


@pytest.mark.usefixtures("_enabled")
def test_enable_peft_leaves_pefts_other_layers():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(5, 6), nn.Linear(4, 4))
    model = get_peft_model(layers, LoraConfig(target_modules=["0", "1", "2"]))
    kinds = [type(model.base_model.model[i]) for i in range(3)]
    assert kinds == [lora.Conv2d, lora.Embedding, FusedLinear]


@pytest.mark.usefixtures("_transformers_takes_this_peft")
def test_a_transformers_model_with_add_adapter():
    model = small_llama()
    model.add_adapter(LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    ids = torch.arange(12).reshape(2, 6)
    want = model(ids).logits
    assert len(fedms.accelerate(model).fused) == 14
    with fused_calls() as calls:
        got = model(ids).logits
    assert len(calls) == 14
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, small_llama()(ids).logits)


def test_deepcopy_and_pickle_keep_the_class():
    model, x = mlp(), torch.randn(4, IN)
    fedms.accelerate(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(other.base_model.model.a) is FusedLinear
        assert torch.equal(other(x), model(x))
        other.base_model.model.a.lora_A["default"].weight.data.zero_()
        assert not torch.equal(other(x), model(x))


def test_the_report_gives_reasons():
    layers = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(layers, LoraConfig(target_modules=["0", "1"]))
    model.add_adapter("dora", LoraConfig(target_modules=["2"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    report = fedms.accelerate(model)
    assert report.fused == ("base_model.model.1",)
    assert "Conv1d has no fused form" in report.fallback["base_model.model.0"]
    assert "DoraLinearVariant" in report.fallback["base_model.model.2"]
    assert str(report).startswith("1 LoRA layers run fused, 2 do not\n")
