"""Values and gradients against peft's own layers in float64, and beside peft's own error."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from peft_models import IN, assert_same, fused_calls, in_float64, mlp, relative_error, step
from torch import nn

import fedms

BF16 = torch.bfloat16


def _both(model, x, context=contextlib.nullcontext):
    """Errors against float64 of peft's own layers and of the fused ones, by tensor."""
    truth = in_float64(model, x)
    with context():
        stock = step(model, x)
    fedms.accelerate(model)
    with fused_calls() as calls, context():
        fused = step(model, x)
    assert len(calls) == 2
    assert fused["y"].dtype == stock["y"].dtype
    errors = [
        {name: relative_error(tensors[name], right) for name, right in truth.items()}
        for tensors in (stock, fused)
    ]
    closeness = {name: relative_error(fused[name], stock[name]) for name in truth}
    return *errors, closeness


@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize(
    ("base", "autocast_adapter_dtype", "limit"),
    [(torch.float32, True, 1e-6), (BF16, True, 1e-2), (BF16, False, 2e-2)],
    ids=["fp32", "bf16 with fp32 adapters", "bf16"],
)
def test_error_is_not_worse_than_pefts(base, autocast_adapter_dtype, limit, active):
    model = mlp("one", "two", "three", dtype=base)
    if not autocast_adapter_dtype:
        model.to(base)
    model.base_model.set_adapter(["one", "two", "three"][:active])
    stock, fused, closeness = _both(model, torch.randn(64, IN).to(base))
    for name, error in fused.items():
        assert error <= 1.5 * stock[name] + 1e-7, f"{name}: {error:.1e}, peft {stock[name]:.1e}"
    assert max(closeness.values()) < 2 * limit
    assert max(fused.values()) < limit


@pytest.mark.parametrize("active", [1, 2])
def test_autocast(active):
    model = mlp("one", "two")
    model.base_model.set_adapter(["one", "two"][:active])
    stock, fused, closeness = _both(
        model, torch.randn(64, IN), lambda: torch.autocast("cpu", dtype=BF16)
    )
    for name, error in fused.items():
        assert error <= 1.5 * stock[name] + 1e-7, f"{name}: {error:.1e}, peft {stock[name]:.1e}"
    assert max(closeness.values()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_autocast_to_another_type_than_the_biases(dtype, scaling):
    """autocast's list of ops to run in the widest type takes no other 16-bit type than its own."""
    model = mlp("one", "two", lora_bias=True).to(dtype)
    model.base_model.set_adapter(["one", "two"])
    if scaling == "tensor":
        for layer in (model.base_model.model.a, model.base_model.model.b):
            layer.scaling = {k: torch.tensor(v, dtype=dtype) for k, v in layer.scaling.items()}
    stock, fused, closeness = _both(
        model, torch.randn(64, IN, dtype=dtype), lambda: torch.autocast("cpu", dtype=BF16)
    )
    assert fused["y"] <= stock["y"]
    assert max(closeness.values()) < 4e-2


@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_float64_agrees(scaling):
    model, x = mlp("one", "two", dtype=torch.float64), torch.randn(3, 5, IN, dtype=torch.float64)
    model.base_model.set_adapter(["two", "one", "two"])  # a name listed twice counts twice
    want = in_float64(model, x)
    fedms.accelerate(model)
    if scaling == "tensor":  # as hot-swapping leaves them
        for layer in (model.base_model.model.a, model.base_model.model.b):
            layer.scaling = {k: torch.tensor(v, dtype=x.dtype) for k, v in layer.scaling.items()}
    with fused_calls() as calls:
        assert_same(step(model, x), want, 1e-12)
    assert len(calls[0]["gates"] if scaling == "tensor" else calls[0]["scaling"]) == 3


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN), (2, 3, 4, IN)], ids=str)
def test_shapes_of_x(shape):
    model, x = mlp(), torch.randn(shape)
    want = step(model, x)
    fedms.accelerate(model)
    with fused_calls() as calls:
        got = step(model, x)
    assert len(calls) == 2
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_of_x(layout):
    model = mlp()
    x = {
        "transposed": torch.randn(IN, 5).t(),
        "strided": torch.randn(5, 2 * IN)[:, ::2],
        "expanded": torch.randn(1, IN).expand(5, IN),
    }[layout]
    want = model(x)
    fedms.accelerate(model)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def _dropout_model(p):
    """`b` adds drop(x) itself: x of ones shows the mask, scaled by 1 / (1 - p)."""
    torch.manual_seed(0)
    model = mlp("one", "two", target_modules=["a"], lora_dropout=p, r=IN, lora_alpha=IN)
    layer = model.base_model.model.a
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        for name, first in (("one", 0), ("two", 8)):
            layer.lora_A[name].weight.copy_(torch.eye(IN))
            layer.lora_B[name].weight.zero_()
            layer.lora_B[name].weight[first : first + 8, :8] = torch.eye(8)
    return model, layer


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_has_pefts_distribution(p):
    """Kept with probability 1 - p and scaled by its inverse; a mask of its own per adapter."""
    rows = 40_000
    model, layer = _dropout_model(p)
    model.base_model.set_adapter(["one", "two"])
    fedms.accelerate(model)
    seen = {}
    for kind in ("fused", "stock"):
        if kind == "stock":
            fedms.restore(model)
        with fused_calls() as calls:
            y = layer(torch.ones(rows, IN))
        assert len(calls) == (kind == "fused")
        values = y[:, :16].detach()
        kept = values != 0
        torch.testing.assert_close(
            values[kept], torch.full_like(values[kept], 1 / (1 - p)), rtol=1e-5, atol=0
        )
        both = (kept[:, :8] & kept[:, 8:]).double().mean()
        neighbours = (kept[1:] & kept[:-1]).double().mean()
        seen[kind] = torch.stack([kept.double().mean(), both, neighbours])
    expected = torch.tensor([1 - p, (1 - p) ** 2, (1 - p) ** 2], dtype=torch.float64)
    for kind, found in seen.items():
        # five standard deviations of a mean over rows x 8 or more Bernoulli draws
        assert (found - expected).abs().max() < 5 * 0.5 / (rows * 8) ** 0.5, (kind, found)


def test_dropout_gradient_uses_the_forwards_mask_and_eval_has_none():
    model, layer = _dropout_model(0.5)
    fedms.accelerate(model)
    x = torch.ones(50, IN, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad[:, :8], y[:, :8].detach())
    model.eval()
    assert torch.equal(layer(x)[:, :8], x[:, :8])


def test_different_dropout_takes_a_call_each_in_training_only():
    model = mlp("one", lora_dropout=0.1)
    model.add_adapter("two", copy.deepcopy(model.peft_config["one"]))
    for layer in (model.base_model.model.a, model.base_model.model.b):
        layer.lora_dropout["two"] = nn.Dropout(0.3)
    model.base_model.set_adapter(["one", "two"])
    assert len(fedms.accelerate(model).fused) == 2
    with fused_calls() as calls:
        model(torch.randn(2, IN))
        assert [call["dropout_p"] for call in calls] == [0.1, 0.3, 0.1, 0.3]
        model.eval()(torch.randn(2, IN))
    assert len(calls) == 4 + 2


def test_bad_shape_is_an_error():
    model = mlp()
    fedms.accelerate(model)
    with pytest.raises(ValueError, match=r"must be \[N, K\] with K = 7"):
        model(torch.randn(2, 7))
