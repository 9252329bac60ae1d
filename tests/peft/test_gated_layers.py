"""Gates on layers that differ: by layer, by the layer's input, where a layer lacks an adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft_models import IN, mlp
from torch import nn

import fedms

DOUBLE = torch.float64


def test_gates_by_layer_and_as_functions_of_the_input():
    model = mlp("one", "two", dtype=DOUBLE)
    model.base_model.set_adapter(["one", "two"])
    x = torch.randn(6, IN, dtype=DOUBLE)
    stock = copy.deepcopy(model)
    layer = stock.base_model.model.a
    router = nn.Linear(IN, 2, dtype=DOUBLE)
    gates = router(x).softmax(-1)
    for i, name in enumerate(("one", "two")):  # the gate of layer `a` by hand, `b` ungated
        layer.lora_B[name].register_forward_hook(lambda m, a, y, i=i: y * gates[:, i : i + 1])
    want = stock(x)
    fedms.accelerate(model)
    with fedms.gated(model, {"a": lambda h: router(h).softmax(-1)}):
        y = model(x)
    torch.testing.assert_close(y, want)
    right = torch.autograd.grad(want.sum(), router.weight)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), router.weight), right)


def test_a_layer_without_an_adapter_takes_the_other_columns():
    model = mlp("one", dtype=DOUBLE, target_modules=["a", "b"])
    model.add_adapter("two", LoraConfig(target_modules=["b"], init_lora_weights=False))
    model.to(DOUBLE)
    stock = copy.deepcopy(model)
    for layer in (stock.base_model.model.a, stock.base_model.model.b):
        layer.scaling = {k: v * {"one": 3.0, "two": -2.0}[k] for k, v in layer.scaling.items()}
    stock.base_model.set_adapter(["one", "two"])
    x = torch.randn(6, IN, dtype=DOUBLE)
    fedms.accelerate(model)
    model.eval()
    gates = torch.tensor([-2.0, 3.0], dtype=DOUBLE)
    with fedms.gated(model, gates, adapters=["two", "one"]):
        torch.testing.assert_close(model(x), stock(x))
    wide = gates.expand(6, 2)
    pairs = wide.flip(1), torch.tensor([1, 0]).expand(6, 2)
    with fedms.gated(model, pairs, adapters=["two", "one"]):
        torch.testing.assert_close(model(x), stock(x))


def _two_layers():
    """One adapter on both layers, and one on `b` alone."""
    model = mlp("one", dtype=DOUBLE)
    model.add_adapter("two", LoraConfig(r=4, target_modules=["b"], init_lora_weights=False))
    model.set_requires_grad("two", True)
    fedms.accelerate(model.to(DOUBLE))
    return model.eval()


@pytest.mark.parametrize("wrong", [-1, 2])
@pytest.mark.parametrize("where", ["lacks an adapter", "own dropouts", "scales in tensors"])
def test_an_index_of_no_adapter_is_an_error_everywhere(where, wrong):
    """Also where the call's adapters are not those that the indices count: none is wrapped."""
    model = _two_layers()
    target, b = "b", model.base_model.model.b
    if where == "lacks an adapter":
        target = "a"
    elif where == "own dropouts":
        b.lora_dropout["two"] = nn.Dropout(0.5)
        model.train()
    else:
        b.scaling = {name: torch.tensor(scale) for name, scale in b.scaling.items()}
    pairs = torch.ones(6, 1, dtype=DOUBLE), torch.full((6, 1), wrong)
    with (
        fedms.gated(model, {target: pairs}, adapters=["one", "two"]),
        pytest.raises(ValueError, match=rf"expert_idxs must be in \[0, .* {wrong}"),
    ):
        model(torch.randn(6, IN, dtype=DOUBLE))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_gate_of_an_absent_adapter_reaches_no_other(value):
    model, x = _two_layers(), torch.randn(6, IN, dtype=DOUBLE)
    gates = torch.tensor([2.0, value], dtype=DOUBLE).expand(6, 2).clone().requires_grad_()
    both = torch.tensor([0, 1]).expand(6, 2)
    with fedms.gated(model, {"a": gates[:, :1]}, adapters=["one"]):
        want = model(x)
    with fedms.gated(model, {"a": (gates, both)}, adapters=["one", "two"]):
        got = model(x)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), gates)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), gates)[0])


def test_a_name_is_that_layer_alone_where_it_ends_anothers():
    def stage():
        return nn.ModuleDict({"linear": nn.Linear(4, 4, dtype=DOUBLE)})

    net = nn.ModuleDict({"stage": stage(), "outer": nn.ModuleDict({"stage": stage()})})
    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    model = inject_adapter_in_model(config, net)
    fedms.accelerate(model)
    inner, outer = model["stage"]["linear"], model["outer"]["stage"]["linear"]
    x = torch.randn(3, 4, dtype=DOUBLE)
    ungated = [layer(x) for layer in (inner, outer)]
    with fedms.gated(model, {"stage.linear": torch.zeros(1, dtype=DOUBLE)}):
        torch.testing.assert_close(inner(x), inner.base_layer(x))
        torch.testing.assert_close(outer(x), ungated[1])
    routers = fedms.LayerRouters(model, ["default"])  # softmax over one: ones
    with fedms.gated(model, routers.gates(), adapters=["default"]):
        torch.testing.assert_close([layer(x) for layer in (inner, outer)], ungated)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["listed", "names"])
def test_under_a_default_device(form, compiled, recorder):
    """Such as "meta", which transformers sets while it loads: indices stay where they are read."""
    model, x = _two_layers(), torch.randn(6, IN, dtype=DOUBLE)
    for layer in (model.base_model.model.a, model.base_model.model.b):
        layer.lora_B["one"].bias = nn.Parameter(torch.randn(layer.out_features, dtype=DOUBLE))
    call = torch.compile(model, backend=recorder) if compiled else model
    pairs = torch.ones(6, 2, dtype=DOUBLE), torch.tensor([0, 1]).expand(6, 2)

    def block():
        if form == "names":
            return fedms.mixed_adapters(model, ["one", "two", "__base__"] * 2)
        return fedms.gated(model, pairs, adapters=["one", "two"])

    with block():
        want = model(x)
    with torch.device("meta"), block():
        torch.testing.assert_close(call(x), want)
