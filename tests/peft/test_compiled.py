"""A compiled call in a checkpoint that is not compiled with it: the gates are the forward's."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft_models import IN, mlp, nested_may_raise
from test_binding import CHECKPOINTS, WAYS
from torch._dynamo.utils import counters

import fedms

DOUBLE = torch.float64
NAMES = ["one", "two"]
OWN = "a library's own"
KINDS = [kind for kind in CHECKPOINTS if kind != OWN]


@pytest.fixture
def models():
    """One model twice, the second with a compiled layer before one that is not."""
    torch.compiler.reset()
    eager = mlp(*NAMES, dtype=DOUBLE)
    eager.base_model.set_adapter(NAMES)
    fedms.accelerate(eager)
    compiled = copy.deepcopy(eager)
    compiled.base_model.model.a.compile(backend="aot_eager", fullgraph=True)
    return eager, compiled


def _router(model, run, x, gates):
    """Gates that the checkpoint computes, within others and before a call that has none."""

    def routed(x):
        with fedms.gated(model, (x[..., :2] * gates[0]).softmax(-1)):
            y = model(x)
        return y + model(x)

    with fedms.gated(model, gates[1]):
        loss = run(routed, x).square().sum()
    loss.backward()


def _router_alone(model, run, x, gates):
    """The same within no other gates."""

    def routed(x):
        with fedms.gated(model, (x[..., :2] * gates[0]).softmax(-1)):
            y = model(x)
        return y + model(x)

    (run(routed, x).square().sum() + gates[1].sum()).backward()


def _functions(model, run, x, gates):
    losses = []
    for own in gates:
        with fedms.gated(model, lambda h, own=own: own * h.mean(-1, keepdim=True)):
            losses.append(run(model, x).square().sum())
    sum(losses).backward()


def _subsets(model, run, x, gates):
    losses = []
    for names in (["two"], []):
        with fedms.gated(model, None, adapters=names):
            losses.append(run(model, x).square().sum())
    sum(losses).backward()


def _gradients(way, model, run, x, values):
    model.zero_grad()
    x, gates = x.clone().requires_grad_(), [v.clone().requires_grad_() for v in values]
    way(model, run, x, gates)
    fedms.set_gates(model, None)
    return [leaf.grad for leaf in (x, *gates, *model.parameters())]


# without gates in the forward it is an error, below; blocks within blocks are _router's
GATED = [way for way in WAYS if way.__name__ not in ("_ungated_first", "_names_and_gates")]


@pytest.mark.parametrize(
    "way", [*GATED, _router, _router_alone, _functions, _subsets], ids=lambda w: w.__name__
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_recomputation_has_the_gates_of_its_forward(models, way):
    eager, compiled = models
    x, values = torch.randn(3, 4, IN, dtype=DOUBLE), torch.randn(2, 3, 4, 2, dtype=DOUBLE)
    right = _gradients(way, eager, lambda function, x: function(x), x, values)
    for kind in KINDS:
        found = _gradients(way, compiled, CHECKPOINTS[kind], x, values)
        for ours, exact in zip(found, right, strict=True):
            torch.testing.assert_close(ours, exact, msg=lambda text, kind=kind: f"{kind}: {text}")
    assert right[0].abs().max() > 0


def test_gates_changed_in_place_are_noticed(models):
    _, model = models
    x, gates = torch.randn(3, IN, dtype=DOUBLE, requires_grad=True), torch.rand(2, dtype=DOUBLE)
    fedms.set_gates(model, gates)
    for kind in KINDS:
        loss = CHECKPOINTS[kind](model.base_model.model.a, x).sum()
        gates.add_(1)
        with pytest.raises(RuntimeError, match="changed in place between a forward and its recomp"):
            loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_deleted_before_it_is_computed_again(models, kind):
    _, model = models
    x = torch.randn(3, IN, dtype=DOUBLE, requires_grad=True)
    with fedms.gated(model, torch.rand(2, dtype=DOUBLE)):
        loss = CHECKPOINTS[kind](model.base_model.model.a, x).sum()
    model.delete_adapter("two")
    with pytest.raises(RuntimeError, match=r"\['two'\] were deleted between a forward and its"):
        loss.backward()


@nested_may_raise
def test_where_gates_cannot_follow_is_an_error(models):
    """In a checkpoint of a library's own, and where the forward was not gated."""
    _, model = models
    x = torch.randn(3, IN, dtype=DOUBLE, requires_grad=True)
    gates = torch.rand(2, dtype=DOUBLE)
    run = CHECKPOINTS[OWN]
    with fedms.gated(model, gates), pytest.raises(RuntimeError, match="a _OwnBackward may recompu"):
        run(model, x)
    for kind in KINDS:
        y = CHECKPOINTS[kind](model, x)
        with fedms.gated(model, gates), pytest.raises(RuntimeError, match="clear the gates before"):
            y.sum().backward()
    run(model, x).sum().backward()
    assert x.grad.abs().max() > 0


def test_a_copy_of_a_gated_model(models):
    """It is known to be gated, as the model is that gates were set on."""
    eager, model = models
    x, gates = torch.randn(3, IN, dtype=DOUBLE), torch.rand(2, dtype=DOUBLE)
    gradients = []
    for one, run in ((eager, lambda function, x: function(x)), (model, CHECKPOINTS["reentrant"])):
        fedms.set_gates(one, gates)
        copied = copy.deepcopy(one)
        if one is model:  # a copy is not compiled
            copied.base_model.model.a.compile(backend="aot_eager", fullgraph=True)
        given = x.clone().requires_grad_()
        y = run(copied, given)
        fedms.set_gates(copied, None)
        y.sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_copy_calls_itself(models):
    """Not the compiled call of the layer that it was copied from."""
    _, model = models
    x = torch.randn(3, IN, dtype=DOUBLE)
    assert model.base_model.model.a(x).abs().max() > 0
    layer = copy.deepcopy(model).base_model.model.a
    for p in layer.parameters():
        p.data.zero_()
    assert not layer(x).any()


def test_biases_of_named_samples_are_one_graph(recorder):
    model = mlp(*NAMES, dtype=DOUBLE, lora_bias=True)
    model.set_adapter("two")
    model.base_model.model.b.delete_adapter("one")  # a layer without one of the named
    model.set_requires_grad(NAMES, True)
    fedms.accelerate(model)
    x = torch.randn(3, 4, IN, dtype=DOUBLE)

    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    for names in (["one", "__base__", "two"], ["two", "one", "one"]):
        with fedms.mixed_adapters(model, names):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(recorder.graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["plain", "gated", "mixed"])
def test_inductor_gives_stock_pefts_means_under_dropout(routing):
    """One adapted layer is linear in its masks: means over calls are peft's values without them."""
    torch.compiler.reset()
    counters.clear()
    model = mlp(*NAMES, dtype=DOUBLE, target_modules=["b"], lora_dropout=0.05)
    model.base_model.set_adapter(NAMES)
    stock = copy.deepcopy(model).eval()
    fedms.accelerate(model)
    x, factor = torch.randn(4, 3, IN, dtype=DOUBLE), model.base_model.model.b.lora_B["one"].weight
    weights = {
        "plain": torch.ones(4, 2), "gated": torch.tensor([[0.3, 1.7]] * 4),
        "mixed": torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 0]]),
    }[routing].to(DOUBLE)  # fmt: skip
    block = {
        "plain": nullcontext(), "gated": fedms.gated(model, weights[0], adapters=NAMES),
        "mixed": fedms.mixed_adapters(model, ["one", "two", "two", "__base__"]),
    }[routing]  # fmt: skip
    with stock.disable_adapter():
        want = base = stock(x)
    for name, weight in zip(NAMES, weights.T, strict=True):
        stock.set_adapter(name)
        stock.set_requires_grad(NAMES, True)
        want = want + weight[:, None, None] * (stock(x) - base)
    first = stock.base_model.model.b.lora_B["one"].weight
    want.square().sum().backward()
    compiled, found, gradients = torch.compile(model, fullgraph=True), [], []
    with block:
        for _ in range(100):
            y = compiled(x)
            found.append(y.detach())
            (2 * want.detach() * y).sum().backward()
            gradients.append(factor.grad)
            factor.grad = None
    assert counters["stats"]["unique_graphs"] == 1
    for draws, right in ((found, want.detach()), (gradients, first.grad)):
        values = torch.stack(draws)
        error = (values.var(0).sum() / len(draws)).sqrt()  # of the mean
        assert 0 < error < 0.05 * right.norm()
        assert (values.mean(0) - right).norm() < 3 * error
