"""Derivatives of derivatives through an accelerated model equal those through peft's own, fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fedms

Model = nn.Module


def _gradients(model: Model, loss: Callable[[Model, Tensor], Tensor]) -> list[Tensor]:
    """Of everything that is trained, and of the input."""
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(loss(model, x), leaves))


def _one_layer(model: Model, z: Tensor) -> Tensor:
    y = model.base_model.model[0](z)
    (g,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    return y.sum() + g.pow(2).sum()


def _by_parameters(model: Model, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in found)


def _by_input(model: Model, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return g.norm(dim=-1).sub(1).square().mean()


def _backward_to_inputs(model: Model, x: Tensor) -> Tensor:
    """`.backward(inputs=)` leaves a gradient that has a graph; its square is the penalty."""
    model(x).square().sum().backward(inputs=[x], create_graph=True)
    penalty, x.grad = x.grad.square().sum(), None
    return penalty


PENALTIES = [_one_layer, _by_parameters, _by_input, _backward_to_inputs]


def _net(*names: str, **config: Any) -> Model:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    config = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **config}
    model = get_peft_model(base, LoraConfig(**config), adapter_name=(names or ("default",))[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    return model.double()


def _both(model: Model) -> tuple[Model, Model]:
    fused = copy.deepcopy(model)
    assert fedms.accelerate(fused).fused
    return model, fused


def _assert_equal(ours: list[Tensor], pefts: list[Tensor]) -> None:
    for a, b in zip(ours, pefts, strict=True):
        assert b.abs().max() > 0
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("frozen", ["", "lora_A", "two"], ids=["trained", "FFA", "one adapter"])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_gradient_penalties(penalty, frozen):
    model = _net("one", "two")
    model.base_model.set_adapter(["one", "two"])
    for name, p in model.named_parameters():
        if frozen and frozen in name:
            p.requires_grad_(False)
    stock, fused = _both(model)
    if penalty is _one_layer:
        for m in (stock, fused):
            m.base_model.model[2].requires_grad_(False)
    _assert_equal(_gradients(fused, penalty), _gradients(stock, penalty))


def _functional(model: Model) -> dict[str, Tensor]:
    """What torch.autograd.functional and batched gradients make of the model."""
    source = torch.Generator().manual_seed(2)
    x, v = torch.randn(2, 3, 8, dtype=torch.float64, generator=source)

    def loss(t: Tensor) -> Tensor:
        return model(t).sin().sum()

    functional = torch.autograd.functional
    y = model(x.requires_grad_())
    dy = torch.randn(5, *y.shape, dtype=torch.float64, generator=source)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {
        "hessian": functional.hessian(loss, x.detach()),
        "hvp": functional.hvp(loss, x.detach(), v)[1],
        "vhp": functional.vhp(loss, x.detach(), v)[1],
        "vectorised hessian": functional.hessian(loss, x.detach(), vectorize=True),
        "vectorised jacobian": functional.jacobian(model, x.detach(), vectorize=True),
    }
    batched = torch.autograd.grad(y, [x, *trained], dy, is_grads_batched=True)
    return found | {f"batched {i}": g for i, g in enumerate(batched)}


def test_functional_and_batched_gradients():
    stock, fused = map(_functional, _both(_net()))
    _assert_equal(list(fused.values()), list(stock.values()))


def test_a_penalty_on_gates():
    """peft has no gates in training: against the same arithmetic, written out."""
    model = _net("one", "two")
    model.base_model.set_adapter(["one", "two"])
    stock, fused = _both(model)
    gates = torch.rand(4, 2, dtype=torch.float64)

    def gated(model: Model, x: Tensor, g: Tensor) -> Tensor:
        if model is fused:
            with fedms.gated(model, g, adapters=["one", "two"]):
                return model(x)
        for layer in (model.base_model.model[0], model.base_model.model[2]):
            y = layer.base_layer(x)
            for e, name in enumerate(["one", "two"]):
                delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
                y = y + delta * g[:, e : e + 1]
            x = y.tanh() if layer is model.base_model.model[0] else y
        return x

    results = []
    for model in (fused, stock):
        x, g = (
            torch.ones(4, 8, dtype=torch.float64).requires_grad_(),
            gates.clone().requires_grad_(),
        )
        leaves = [x, g, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(gated(model, x, g).square().sum(), leaves, create_graph=True)
        results.append(list(torch.autograd.grad(sum(f.square().sum() for f in first), leaves)))
    _assert_equal(*results)
