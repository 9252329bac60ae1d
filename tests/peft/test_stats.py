"""What ran, and why: stats, the report, the reasons in errors, the warning of frozen adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig
from peft_models import IN, mlp, with_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedms


def test_stats_count_calls_by_reason():
    model, x = mlp("one", "two"), torch.randn(3, IN)
    fedms.accelerate(model)
    assert fedms.stats(model) == fedms.peft.Stats(
        0, {}, {f"base_model.model.{name}": {} for name in "ab"}, {}
    )
    model(x)
    with model.disable_adapter():
        model(x)
    with fedms.gated(model, torch.ones(1)):
        model(x)
    model.base_model.model.a.lora_A["one"].register_forward_hook(lambda *args: None)
    model(x)
    found = fedms.stats(model, reset=True)
    hooked = "a module of adapter 'one' has hooks or a forward of its own"
    assert (found.fused, found.fallback) == (5, {"adapters are disabled": 2, hooked: 1})
    assert found.layers["base_model.model.a"] == {"": 2, "adapters are disabled": 1, hooked: 1}
    assert str(found).splitlines()[0] == "5 calls ran fused, 3 did not"
    assert fedms.stats(model).fused == 0
    model(x)
    assert fedms.stats(copy.deepcopy(model)).fused == 0
    fedms.restore(model)
    assert not [key for layer in model.modules() for key in vars(layer) if "fedms" in key]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_stats_tell_what_a_compiled_graph_holds(checkpointed, recorder):
    """Without a guard on it: the graph is one, however often it runs."""
    model, x = mlp("one", "two"), torch.randn(3, IN)
    model.base_model.model.b.lora_A["one"].register_forward_hook(lambda *args: None)
    fedms.accelerate(model)

    def call(x):
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    compiled = torch.compile(call, backend=recorder, fullgraph=True)
    for _ in range(3):
        compiled(x)
    assert len(recorder.graphs) == 1
    found = fedms.stats(model)
    why = "a module of adapter 'one' has hooks or a forward of its own"
    assert found.traced == {"base_model.model.a": {"": 1}, "base_model.model.b": {why: 1}}
    assert (found.fused, found.fallback) == (0, {})
    assert str(found).splitlines()[1:] == [
        "calls of compiled graphs are not counted: 1 layers were traced fused, 1 as peft's own",
        f"  {why}: 1",
    ]
    assert not fedms.stats(copy.deepcopy(model)).traced
    fedms.stats(model, reset=True)
    assert not fedms.stats(model).traced


def test_a_layer_that_a_later_adapter_uses_is_not_idle():
    model = mlp("one", target_modules=["a"])
    model.add_adapter("two", LoraConfig(target_modules=["b"], init_lora_weights=False))
    report = fedms.accelerate(model)
    assert report.fused == ("base_model.model.a",)
    assert report.fallback == {}
    assert report.at_each_call == {"base_model.model.b": "no active adapter"}
    assert "1 are decided at each call\n  no active adapter: base_model.model.b" in str(report)
    model.set_adapter("two")
    model(torch.randn(3, IN))
    assert fedms.stats(model).layers["base_model.model.b"] == {"": 1}


def test_weights_without_data_now_are_decided_at_each_call():
    """As FSDP leaves them between calls: empty, or DTensors."""
    model = mlp(target_modules=["a"])
    weight = model.base_model.model.a.lora_A["default"].weight
    whole, weight.data = weight.data, weight.data[:0]
    report = fedms.accelerate(model)
    assert report.fused == ()
    assert "has no data here" in report.at_each_call["base_model.model.a"]
    weight.data = whole
    model(torch.randn(3, IN))
    assert fedms.stats(model).fused == 1


def test_errors_give_the_reports_reason():
    layers = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    model = with_adapters(layers, target_modules=["0", "1"])
    reason = fedms.accelerate(model).fallback["base_model.model.0"]
    with pytest.raises(ValueError, match=f"also holds \\['default'\\]: {reason}"):
        fedms.set_gates(model, torch.ones(1))
    only = with_adapters(nn.Sequential(nn.Conv1d(4, 4, 1)), target_modules=["0"])
    fedms.accelerate(only)
    with pytest.raises(ValueError, match=f"without any; {reason}"):
        fedms.set_gates(only, torch.ones(1))
    model.add_adapter("two", LoraConfig(target_modules=["1"], use_dora=True))
    reason = fedms.peft.why_not_fused(model.base_model.model[1])
    assert reason is None
    with (
        fedms.gated(model, None, adapters=["two"]),
        pytest.raises(RuntimeError, match="cannot run fused: adapter 'two' is a variant"),
    ):
        model.base_model.model[1](torch.randn(2, 4))


def test_a_gated_adapter_that_is_frozen_is_named_once():
    model = mlp("one", "two", "three")
    fedms.accelerate(model)
    gates = torch.ones(3)
    names = ["one", "two", "three"]
    with pytest.warns(UserWarning, match=r"\['two', 'three'\] are gated but frozen"):
        fedms.set_gates(model, gates, adapters=names)
    with fedms.gated(model, gates, adapters=names):  # a second warning would be an error
        pass
    for make in (
        lambda m: m.eval(),
        lambda m: m.set_requires_grad(["two", "three"], True),
        lambda m: (m.base_model.set_adapter(names), m.set_requires_grad("two", False)),
        lambda m: m.requires_grad_(False),
        lambda m: [setattr(m.peft_config[n], "inference_mode", True) for n in names],
    ):
        other = copy.deepcopy(mlp("one", "two", "three"))
        fedms.accelerate(other)
        make(other)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fedms.set_gates(other, gates, adapters=names)
