"""Gates and adapters per sample: against the definition in float64, in training."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft_models import IN, OUT, assert_same, fused_calls, mlp, step, with_adapters
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fedms
from fedms.peft import FusedLinear

DOUBLE = torch.float64


@pytest.fixture
def model():
    """One layer of width OUT with three adapters, ranks 4, 4 and 7; two is frozen."""
    made = mlp("one", "two", dtype=DOUBLE, target_modules=["b"])
    made.add_adapter("three", LoraConfig(r=7, target_modules=["b"], init_lora_weights=False))
    made.base_model.set_adapter(["one", "two", "three"])
    made.set_requires_grad("two", False)
    made.to(DOUBLE)
    fedms.accelerate(made)
    return made


def _deltas(model, x):
    """What each adapter of layer `b` adds, [B, T, E, OUT], and the layer's input."""
    layer = model.base_model.model.b
    h = F.gelu(model.base_model.model.a(x))
    parts = [
        layer.lora_B[name](layer.lora_A[name](h)) * layer.scaling[name]
        for name in ("one", "two", "three")
    ]
    return torch.stack(parts, dim=-2), layer.base_layer(h)


def _gates(shape):
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=["adapter", "sample", "token"])
def test_gates_against_the_definition(model, lead):
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), _gates((*lead, 3))
    dy = torch.randn(2, 5, OUT, dtype=DOUBLE)
    parts, base = _deltas(model, x)
    wide = gates.view(*lead, *[1] * (3 - len(lead) - 1), 3)
    want = base + (parts * wide.unsqueeze(-1)).sum(-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    right = torch.autograd.grad(want, [gates, *trained], dy)
    with fedms.gated(model, gates), fused_calls() as calls:
        y = model(x)
    assert len(calls) == 1
    found = torch.autograd.grad(y, [gates, *trained], dy)
    torch.testing.assert_close(y, want)
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours, exact)
    assert len(trained) == 4  # the frozen adapter took part and has no gradient


def test_a_zero_gate_gets_its_gradient(model):
    gates = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(2, 5, IN, dtype=DOUBLE)
    fedms.set_gates(model, gates)
    y = model(x)
    torch.testing.assert_close(y, _deltas(model, x)[1])
    y.sum().backward()
    torch.testing.assert_close(gates.grad, _deltas(model, x)[0].sum((0, 1, 3)))


def test_listed_adapters_only(model):
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), _gates((2, 5, 1))
    idxs = torch.randint(0, 2, (2, 5, 1))
    idxs[idxs == 1] = 2  # adapter two is never listed
    parts, base = _deltas(model, x)
    chosen = parts.gather(2, idxs.unsqueeze(-1).expand(-1, -1, -1, OUT)).squeeze(2)
    fedms.set_gates(model, (gates, idxs))
    y = model(x)
    torch.testing.assert_close(y, base + chosen * gates)
    model.set_requires_grad("two", True)
    model.zero_grad()
    model(x).sum().backward()
    grad = model.base_model.model.b.lora_B["two"].weight.grad
    assert grad is None or not grad.any()


def test_named_adapters_take_part_whatever_is_active(model):
    model.base_model.set_adapter(["one"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), torch.tensor([2.0, -1.0], dtype=DOUBLE)
    parts, base = _deltas(model, x)
    with fedms.gated(model, gates, adapters=["three", "two"]):
        torch.testing.assert_close(model(x), base + 2 * parts[:, :, 2] - parts[:, :, 1])
    with fedms.gated(model, None, adapters=["three", "two"]):
        torch.testing.assert_close(model(x), base + parts[:, :, 2] + parts[:, :, 1])
    torch.testing.assert_close(model(x), base + parts[:, :, 0])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


FORMS = ["none", "adapter", "sample", "token", "listed", "function", "names"]


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_other_dropout_and_with_biases(model, form):
    """Each in its own call of the op: dropout on A's input alone, the bias gated and scaled."""
    layer = model.base_model.model.b
    layer.lora_dropout["two"] = nn.Dropout(0.999999)  # drops all, but not its bias
    for name in ("two", "three"):
        layer.lora_B[name].bias = nn.Parameter(torch.randn(OUT, dtype=DOUBLE))
    x = torch.randn(2, 5, IN, dtype=DOUBLE)
    parts, base = _deltas(model, x)
    scale = torch.tensor([layer.scaling[name] for name in ("one", "two", "three")], dtype=DOUBLE)
    bias = torch.stack([torch.zeros(OUT, dtype=DOUBLE), *(
        layer.lora_B[name].bias for name in ("two", "three"))])  # fmt: skip
    parts = parts.detach().clone()
    parts[:, :, 1] = bias[1] * scale[1]
    wide = torch.randn(2, 5, 3, dtype=DOUBLE)
    pairs = wide[..., :2], torch.tensor([2, 1]).expand(2, 5, 2)
    gates, names = {
        "none": (None, None), "adapter": (wide[0, 0], None), "sample": (wide[:, 0], None),
        "token": (wide, None), "listed": (pairs, None),
        "function": (lambda h: wide, None), "names": (None, ["two", ["three", "one"]]),
    }[form]  # fmt: skip
    weights = {
        "none": torch.ones(3, dtype=DOUBLE), "adapter": wide[0, 0],
        "sample": wide[:, :1].expand(2, 5, 3), "token": wide, "function": wide,
        "listed": torch.stack([0 * wide[..., 0], wide[..., 1], wide[..., 0]], -1),
        "names": torch.tensor([[0.0, 1, 0], [1, 0, 1]], dtype=DOUBLE)[:, None].expand(2, 5, 3),
    }[form]  # fmt: skip
    want = base + (parts * weights.unsqueeze(-1)).sum(-2)
    adapters = ["one", "two", "three"]
    if names is not None:
        block = fedms.mixed_adapters(model, names)
    else:
        block = fedms.gated(model, gates, adapters=adapters)
    with block, fused_calls() as calls:
        y = model(x)
    assert len(calls) == 2
    torch.testing.assert_close(y, want)
    (grad,) = torch.autograd.grad(y.sum(), layer.lora_B["three"].bias)
    total = weights[..., 2].sum() * (10 if weights.dim() == 1 else 1)
    torch.testing.assert_close(grad, total * scale[2] * torch.ones_like(grad))


@pytest.mark.parametrize("training", [True, False])
def test_adapter_names_per_sample(model, training):
    model.train(training)
    model.set_requires_grad(["one", "two", "three"], True)
    x = torch.randn(5, 4, IN, dtype=DOUBLE)
    names = ["three", "__base__", "one", "one", ("one", "three")]
    parts, base = _deltas(model, x)
    want = base.clone()
    for i, chosen in enumerate(([2], [], [0], [0], [0, 2])):
        want[i] += parts[i, :, chosen].sum(1)
    trained = [p for n, p in model.named_parameters() if "three" in n or "one" in n]
    right = torch.autograd.grad(want.square().sum(), trained)
    with fedms.mixed_adapters(model, names), fused_calls() as calls:
        y = model(x)
    torch.testing.assert_close(y, want)
    assert calls[0]["segments"].offsets == (0, 4, 8, 16, 20)
    y.square().sum().backward()
    for ours, exact in zip(trained, right, strict=True):
        torch.testing.assert_close(ours.grad, exact)
    assert all(p.grad is None for n, p in model.named_parameters() if "two" in n)


def test_mixed_batch_agrees_with_pefts_in_eval():
    model, x = mlp("one", "two").eval(), torch.randn(4, 3, IN)
    names = ["two", "__base__", "one", "two"]
    want = model(x, adapter_names=names)
    fedms.accelerate(model)
    with fedms.mixed_adapters(model, names):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_gates_through_torch_compile(model):
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), _gates((2, 5, 3))
    fedms.set_gates(model, gates)
    want = step(model, x)
    wanted = gates.grad.clone()
    gates.grad = None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = step(compiled, x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in got.items()}, want, 1e-12)
    torch.testing.assert_close(gates.grad, wanted)
    fedms.set_gates(model, gates.detach() * 2)
    torch.testing.assert_close(compiled(x), model(x))
    assert (compiled(x) - want["y"]).norm() > 1e-2 * want["y"].norm()


def test_dropout_and_gates(model):
    for name in ("one", "two", "three"):
        model.base_model.model.b.lora_dropout[name] = nn.Dropout(0.5)
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), torch.tensor([1.0, 0, 0], dtype=DOUBLE)
    fedms.set_gates(model, gates)
    assert not torch.equal(model(x), model(x))
    model.eval()
    parts, base = _deltas(model, x)
    torch.testing.assert_close(model(x), base + parts[:, :, 0])


def test_what_cannot_be_gated_is_an_error(model):
    x = torch.randn(2, 5, IN, dtype=DOUBLE)
    fedms.set_gates(model, torch.ones(3, dtype=DOUBLE))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), _deltas(model, x)[1])
    model.merge_adapter(["one"])
    with pytest.raises(RuntimeError, match=r"cannot run fused: adapters are merged"):
        model(x)
    model.unmerge_adapter()
    fedms.set_gates(model, torch.ones(3, 3, dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"one row a sample \[2, E\].*got \[3, 3\]"):
        model(x)
    fedms.set_adapter_names(model, ["one"])
    with pytest.raises(ValueError, match=r"each of the layer's 2 samples, got 1"):
        model(x)


def test_bad_gates_are_errors(model):
    three = torch.ones(3)
    cases = [
        (lambda: fedms.set_gates(model, torch.ones(2)), ValueError, r"one column for each"),
        (lambda: fedms.set_gates(model, torch.ones(3).long()), TypeError, r"floating point"),
        (lambda: fedms.set_gates(model, (three,)), TypeError, r"or a pair \(gates, expert_idxs\)"),
        (lambda: fedms.set_gates(model, three, adapters=["x", "y", "z"]), ValueError, r"among"),
        (lambda: fedms.set_gates(model, three, adapters=["one"] * 3), ValueError, r"distinct"),
        (lambda: fedms.set_gates(model, {"nowhere": three}), ValueError, r"name fused layers"),
        (lambda: fedms.set_gates(model, {}), ValueError, r"name at least one layer"),
        (lambda: fedms.set_gates(model, (three, three)), TypeError, r"int64 Tensor, got .*float32"),
        (lambda: fedms.set_adapter_names(model, ["four"]), ValueError, r"among.*'four'"),
        (lambda: fedms.set_gates(mlp(), three), ValueError, r"must have fused layers"),
    ]
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()


def test_a_function_of_gates_must_give_some(model):
    """None would be read as no gates: every adapter in full."""
    fedms.set_gates(model, lambda x: None)
    with pytest.raises(TypeError, match=r"gates must be .* got NoneType"):
        model(torch.randn(2, IN, dtype=DOUBLE))


def test_gates_do_not_pass_over_layers_they_cannot_reach():
    layers = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    model = with_adapters(layers, target_modules=["0", "1"])
    fedms.accelerate(model)
    with pytest.raises(ValueError, match=r"Conv1d\) also holds \['default'\]"):
        fedms.set_gates(model, torch.ones(1))
    fedms.set_gates(model, {"1": torch.ones(1)})
    assert isinstance(model.base_model.model[1], FusedLinear)


def test_compiled_graphs_draw_masks_and_take_any_order_of_names(recorder):
    """One fused graph in training with dropout: other masks each call, other names as data."""
    model = mlp("one", "two", dtype=DOUBLE, lora_dropout=0.01)
    model.set_requires_grad(["one", "two"], True)
    fedms.accelerate(model)
    x = torch.randn(4, 3, IN, dtype=DOUBLE)

    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    names = ["one", "two", "__base__", "two"]
    for shift in range(4):
        with fedms.mixed_adapters(model, names[shift:] + names[:shift]):
            y = compiled(x)
            assert not torch.equal(y, compiled(x))
            y.sum().backward()
            model.eval()
            want = model(x)
            assert (y - want).norm() < 0.3 * want.norm()
            model.train()
    assert len(recorder.graphs) == 1
    assert "fwd_body_0" in repr(recorder.graphs[0])  # the op's autograd.Function is in it
    with fedms.gated(model, torch.ones(2, dtype=DOUBLE), adapters=["one", "two"]):
        assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("how", ["set_gates", "gated", "mixed_adapters"])
def test_an_adapter_that_was_deleted_is_named(model, how):
    """Its column of the gates would be left out in silence; added again, it takes part again."""
    x = torch.randn(2, 5, IN, dtype=DOUBLE)
    config, gates = model.peft_config["three"], torch.rand(3, dtype=DOUBLE)

    def check():
        model.delete_adapter("three")
        with pytest.raises(RuntimeError, match=r"set for adapters \['three'\], which were deleted"):
            model(x)
        with fedms.gated(model, gates[:2], adapters=["one", "two"]):
            model(x)
        model.add_adapter("three", config)
        model.to(DOUBLE)
        model(x)

    if how == "set_gates":
        fedms.set_gates(model, gates)
        check()
        model.delete_adapter("three")
        fedms.set_gates(model, None)
        model(x)
        return
    names = ["one", "three"]
    block = fedms.gated(model, gates) if how == "gated" else fedms.mixed_adapters(model, names)
    with block:
        check()


def test_a_layer_without_one_of_the_gated_adapters(model):
    """It had none when the gates were set: nothing was deleted since."""
    x, gates = torch.randn(2, 5, IN, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE)
    model.add_adapter("four", LoraConfig(r=2, target_modules=["a"]))
    model.set_requires_grad("four", True)
    fedms.accelerate(model)
    model.to(DOUBLE)
    with fedms.gated(model, gates, adapters=["one", "two", "four"]):
        model(x)
        model.delete_adapter("four")
        with pytest.raises(RuntimeError, match=r"\['four'\], which were deleted"):
            model(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_adapter_deleted_before_it_is_computed_again(model, use_reentrant):
    x = torch.randn(2, IN, dtype=DOUBLE, requires_grad=True)
    with fedms.gated(model, torch.rand(3, dtype=DOUBLE)):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    model.delete_adapter("three")
    with pytest.raises(RuntimeError, match=r"\['three'\] were deleted between a forward and its"):
        y.sum().backward()
