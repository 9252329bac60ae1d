"""Gates belong to the call they were set for: checkpoints, copies, threads, compiled blocks."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from peft_models import IN, fused_calls, mlp, nested_may_raise, small_llama, with_adapters
from torch import Tensor, nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fedms

DOUBLE = torch.float64
NAMES = ["one", "two"]


@pytest.fixture
def model():
    made = mlp(*NAMES, dtype=DOUBLE)
    made.base_model.set_adapter(NAMES)
    fedms.accelerate(made)
    return made


def _reentrant(function, x):
    return checkpoint(function, x, use_reentrant=True)


def _not_reentrant(function, x):
    return checkpoint(function, x, use_reentrant=False)


class _Own(torch.autograd.Function):
    """A checkpoint as libraries write their own."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


def _nested(function, x):
    """Checkpoints within checkpoints, of both kinds in either order."""
    for outer, inner in ((_not_reentrant, _reentrant), (_reentrant, _not_reentrant)):
        function = _within(outer, _within(inner, function))
    return function(x)


def _within(run, function):
    return lambda x: run(function, x)


class _Block(nn.Module):
    """A function as a module, for checkpoints of modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CHECKPOINTS: dict[str, Callable[[Callable, Tensor], Tensor]] = {
    "reentrant": _reentrant,
    "not reentrant": _not_reentrant,
    "a library's own": _Own.apply,
    "nested": _nested,
    "composable": lambda function, x: composable(_Block(function))(x),
    "a wrapper": lambda function, x: checkpoint_wrapper(_Block(function))(x),
}


def _set_between(model, run, x, gates):
    """Two passes, each with its own gates or names, or none; the sum of their losses."""
    losses = []
    for own in gates:
        fedms.set_gates(model, own)
        losses.append(run(model, x).square().sum())
    fedms.set_gates(model, None)
    sum(losses).backward()


def _blocks_closed(model, run, x, gates):
    losses = []
    for own in gates:
        with fedms.gated(model, own):
            losses.append(run(model, x).square().sum())
    sum(losses).backward()


def _backward_in_the_second(model, run, x, gates):
    with fedms.gated(model, gates[0]):
        loss = run(model, x).square().sum()
    with fedms.gated(model, gates[1]):
        (loss + run(model, x).square().sum()).backward()


def _no_grad_between(model, run, x, gates):
    fedms.set_gates(model, gates[0])
    loss = run(model, x).square().sum()
    fedms.set_gates(model, gates[1])
    with torch.no_grad():
        model(x)
    loss.backward()


def _ungated_first(model, run, x, gates):
    loss = run(model, x).square().sum()
    with fedms.gated(model, gates[1]):
        (loss + run(model, x).square().sum()).backward()


def _names(model, run, x, gates):
    losses = []
    for names in (["one", "two", "two"], ["__base__", "one", "two"]):
        fedms.set_adapter_names(model, names)
        losses.append(run(model, x).square().sum())
    sum(losses).backward()


def _names_and_gates(model, run, x, gates):
    with fedms.mixed_adapters(model, ["one", "two", "__base__"]):
        loss = run(model, x).square().sum()
        with fedms.gated(model, gates[0]):
            loss = loss + run(model, x).square().sum()
            with fedms.gated(model, None):
                loss = loss + run(model, x).square().sum()
    loss.backward()


WAYS = [
    _set_between, _blocks_closed, _backward_in_the_second, _no_grad_between, _ungated_first,
    _names, _names_and_gates,
]  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__[1:])
def test_recomputation_has_the_gates_of_its_forward(model, way, kind):
    x = torch.randn(3, 4, IN, dtype=DOUBLE)
    values = [torch.randn(3, 4, 2, dtype=DOUBLE), torch.randn(2, dtype=DOUBLE)]
    gradients, calls = [], []
    for run in (lambda model, x: model(x), CHECKPOINTS[kind]):
        model.zero_grad()
        given, gates = x.clone().requires_grad_(), [v.clone().requires_grad_() for v in values]
        with fused_calls() as made:
            way(model, run, given, gates)
        calls.append(len(made))
        gradients.append([given.grad, *(g.grad for g in gates), *(p.grad for p in _trained(model))])
        fedms.set_gates(model, None)
    assert calls[1] > calls[0]  # it did recompute
    for found, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, right)
    assert gradients[0][0].abs().max() > 0


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@nested_may_raise
@pytest.mark.parametrize("part", ["gates", "expert_idxs"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gates_changed_in_place_are_noticed(model, kind, part):
    """One tensor for all batches: autograd refuses that without checkpoints, too."""
    gates, idxs = torch.rand(3, 4, 1, dtype=DOUBLE), torch.zeros(3, 4, 1, dtype=torch.int64)
    fedms.set_gates(model, (gates, idxs))
    loss = CHECKPOINTS[kind](model, torch.randn(3, 4, IN, dtype=DOUBLE).requires_grad_()).sum()
    (gates if part == "gates" else idxs).add_(1)
    with pytest.raises(RuntimeError, match="changed in place between a forward and its recomp"):
        loss.backward()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gates_that_a_checkpoint_computes_itself(model, kind):
    """A router within the checkpoint: the recomputation's own gates are the ones to use."""
    router, x = nn.Linear(IN, 2, dtype=DOUBLE), torch.randn(3, IN, dtype=DOUBLE)

    def routed(x):
        with fedms.gated(model, router(x).softmax(-1)):
            return model(x)

    gradients = []
    for run in (lambda function, x: function(x), CHECKPOINTS[kind]):
        router.zero_grad()
        given = x.clone().requires_grad_()
        with fedms.gated(model, torch.zeros(2, dtype=DOUBLE)):
            y = run(routed, given)
        y.square().sum().backward()
        gradients.append([given.grad, router.weight.grad])
    for found, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, right)
    assert gradients[0][1].abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_transformers_checkpointing(use_reentrant, inside):
    model = with_adapters(small_llama(), *NAMES, target_modules=["q_proj", "down_proj"]).train()
    model.base_model.set_adapter(NAMES)
    fedms.accelerate(model)
    ids = torch.arange(12).reshape(2, 6)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        gates = [torch.rand(2, 6, 2).requires_grad_() for _ in range(2)]
        with fused_calls() as calls:
            with fedms.gated(model, gates[0]):
                loss = model(input_ids=ids, labels=ids).loss
            with fedms.gated(model, gates[1]):
                loss = loss + model(input_ids=ids, labels=ids).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        assert len(calls) == 8 * (1 + checkpointed)
        gradients.append([p.grad.clone() for p in [*gates, *_trained(model)]])
    for found, right in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)
    assert min(g.abs().max() for g in gradients[0]) > 0


def test_a_call_in_backward_that_no_checkpoint_explains_is_an_error(model):
    x = torch.randn(3, IN, dtype=DOUBLE, requires_grad=True)
    y = model(x)
    y.register_hook(lambda dy: dy * model(x.detach()).mean())
    with (
        fedms.gated(model, torch.ones(2, dtype=DOUBLE)),
        pytest.raises(RuntimeError, match="not by activation checkpointing"),
    ):
        y.sum().backward(retain_graph=True)
    y.sum().backward()  # without gates there is nothing to mistake


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_graph_lives_no_longer_than_it_is_used(model, use_reentrant):
    """After the block and the backward pass, or when the loss is dropped, the router is free."""
    router = nn.Linear(IN, 2, dtype=DOUBLE)
    x = torch.randn(3, IN, dtype=DOUBLE, requires_grad=True)

    def routed(x):
        inner = router(x).softmax(-1)
        freed.append(weakref.ref(inner))
        with fedms.gated(model, inner):
            return model(x)

    for backward in (True, False):
        freed: list[weakref.ref] = []
        gates = router(x).softmax(-1)
        freed.append(weakref.ref(gates))
        with fedms.gated(model, gates):
            y = checkpoint(model, x, use_reentrant=use_reentrant)
        with torch.no_grad(), fedms.gated(model, gates):
            model(x)
        y = y + checkpoint(routed, x, use_reentrant=use_reentrant)
        if backward:
            y.sum().backward()
        del gates, y
        gc.collect()
        assert [ref() for ref in freed] == [None] * len(freed)


def _copied(model):
    return copy.deepcopy(model)


def _averaged(model):
    return AveragedModel(model)


def _pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [_copied, _averaged, _pickled])
def test_nothing_of_a_block_is_on_the_model_or_its_copies(model, duplicate):
    x = torch.randn(3, IN, dtype=DOUBLE)
    want, keys = model(x), [*map(vars, model.modules())]
    keys = [[*held] for held in keys]
    gates = torch.rand(2, dtype=DOUBLE, requires_grad=True) * 2
    with fedms.gated(model, gates):
        assert not torch.equal(model(x), want)
        assert torch.equal(duplicate(model)(x), want)
    with fedms.gated(model, lambda h: h[..., :2]):
        model(x)
    assert torch.equal(duplicate(model)(x), want)
    assert [[*held] for held in map(vars, model.modules())] == keys


def test_copies_keep_what_was_set(model):
    """set_gates is state of the model, also with gates that have a graph."""
    x = torch.randn(3, IN, dtype=DOUBLE)
    gates = torch.rand(2, dtype=DOUBLE, requires_grad=True) * 2
    fedms.set_gates(model, gates)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    fedms.set_gates(model, None)
    assert not [layer for layer in model.modules() if "_fedms_set" in vars(layer)]


def test_threads_have_their_own_blocks(model):
    x = torch.randn(3, IN, dtype=DOUBLE)
    gates = [torch.randn(2, dtype=DOUBLE) for _ in range(3)] + [None]
    right = []
    for own in gates:
        with fedms.gated(model, own):
            right.append(model(x))
    start, wrong = threading.Barrier(len(gates)), []

    def work(i):
        start.wait()
        for _ in range(20):
            with fedms.gated(model, gates[i]):
                y = model(x)
                with fedms.gated(model, gates[i - 1]):
                    other = model(x)
            if not (torch.equal(y, right[i]) and torch.equal(other, right[i - 1])):
                wrong.append(i)

    _run_in_threads(*[lambda i=i: work(i) for i in range(len(gates))])
    assert not wrong


def test_a_thread_without_a_block_beside_one_is_an_error(model):
    x, found = torch.randn(3, IN, dtype=DOUBLE), []

    def plain():
        try:
            found.append(model(x))
        except RuntimeError as error:
            found.append(str(error))

    with fedms.gated(model, torch.zeros(2, dtype=DOUBLE)):
        _run_in_threads(plain)
    assert "open a `gated` block in every thread" in found.pop()
    fedms.set_gates(model, torch.zeros(2, dtype=DOUBLE))
    _run_in_threads(plain)
    assert torch.equal(found.pop(), model(x))


def _run_in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_compiled_blocks_share_a_graph_and_threads_their_gates(recorder):
    """Blocks compiled one by one: one graph without gates and one with, whatever is set later."""
    models = [mlp(*NAMES, dtype=DOUBLE) for _ in range(4)]
    for one in models:
        fedms.accelerate(one)
        one.base_model.set_adapter(NAMES)
        one.base_model.model.a.compile(backend=recorder)
    x, found = torch.randn(3, IN, dtype=DOUBLE), []

    def both(gates):
        for one in models:
            layer = one.base_model.model.a
            with fedms.gated(one, gates):
                found.append((layer(x), layer._call_impl(x)))

    both(None)
    plain = len(recorder.graphs)
    for _ in range(3):
        both(torch.randn(2, dtype=DOUBLE))
    assert len(recorder.graphs) == plain + 1
    _run_in_threads(lambda: both(torch.randn(2, dtype=DOUBLE)), lambda: both(None))
    for compiled, eager in found:
        torch.testing.assert_close(compiled, eager)
    assert len(found) == 6 * len(models)
