"""Derivatives of derivatives, and backwards of a batch of dy, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_problem import BACKENDS, Problem, assert_close, make_problem
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, gated_lora_linear_reference

M, K, N, RANKS = 5, 4, 3, (2, 1, 2)
IDXS = torch.tensor([[0, 1], [1, 1], [2, 0], [0, 0], [2, 1]])
RANGES = Segments([0, 2, 4, 5], [1, (2, 0), ()])


def _small(**options: Any) -> Problem:
    return make_problem(M, K, N, RANKS, **options)


def _frozen(problem: Problem, names: str) -> Problem:
    """The problem with x, the gates or single experts (as in "A0 B1 x") frozen."""
    cut = set(names.split())
    return replace(
        problem,
        x=problem.x.detach() if "x" in cut else problem.x,
        gates=problem.gates.detach() if "gates" in cut and problem.gates is not None
        else problem.gates,
        A=[a.detach() if f"A{e}" in cut else a for e, a in enumerate(problem.A)],
        B=[b.detach() if f"B{e}" in cut else b for e, b in enumerate(problem.B)],
    )  # fmt: skip


def _stacked(problem: Problem) -> Problem:
    """Experts 0 and 2 (of one rank) as a stack beside expert 1."""

    def parts(of: list[Tensor]) -> list[Tensor]:
        return [torch.stack([of[0], of[2]]).detach().requires_grad_(), of[1]]

    return replace(problem, A=parts(problem.A), B=parts(problem.B))


FORMS: dict[str, Callable[[], Problem]] = {
    "no gates": lambda: _small(gates=None),
    "layer gates": lambda: _small(gates="layer"),
    "token gates": _small,
    "top-k": lambda: _small(gates="listed", expert_idxs=IDXS),
    "top-k without gates": lambda: _small(gates=None, expert_idxs=IDXS),
    "segments": lambda: _small(segments=RANGES),
    "segments, layer gates": lambda: _small(segments=RANGES, gates="layer"),
    "segments of tensors": lambda: _small(segments=Segments(*RANGES.tensors)),
    "dropout": lambda: _small(dropout_p=0.4),
    "dropout, top-k": lambda: _small(gates="listed", expert_idxs=IDXS, dropout_p=0.4),
    "dropout, a seed a segment": lambda: _small(
        segments=RANGES, dropout_p=0.4, seed=torch.tensor([3, 4, 5])
    ),
    "a frozen expert": lambda: _frozen(_small(), "A0 B0"),
    "all of A frozen": lambda: _frozen(_small(dropout_p=0.4), "A0 A1 A2"),
    "all of A frozen, top-k": lambda: _frozen(_small(gates="listed", expert_idxs=IDXS), "A0 A1 A2"),
    "all of A frozen, segments": lambda: _frozen(_small(segments=RANGES), "A0 A1 A2"),
    "all of A and x frozen": lambda: _frozen(_small(), "A0 A1 A2 x"),
    "gates alone": lambda: _frozen(_small(), "A0 A1 A2 B0 B1 B2 x"),
    "gates and x": lambda: _frozen(_small(), "A0 A1 A2 B0 B1 B2"),
    "x alone": lambda: _frozen(_small(), "A0 A1 A2 B0 B1 B2 gates"),
    "stacks": lambda: _stacked(_small()),
    "stacks, dropout and segments": lambda: _stacked(_small(segments=RANGES, dropout_p=0.4)),
    "a frozen stack": lambda: _frozen(_stacked(_small(segments=RANGES)), "A0 A1"),
}


def _learnt(problem: Problem) -> list[Tensor]:
    inputs = [problem.x, *([] if problem.gates is None else [problem.gates]), *problem.A,
              *problem.B]  # fmt: skip
    return [t for t in inputs if t.requires_grad]


def _as_function(
    problem: Problem, op: Callable[..., Tensor], **kwargs: Any
) -> Callable[..., Tensor]:
    """The op as a function of what is learnt."""
    learnt = _learnt(problem)

    def function(*values: Tensor) -> Tensor:
        new = dict(zip(map(id, learnt), values, strict=True))
        return replace(
            problem,
            x=new.get(id(problem.x), problem.x),
            gates=new.get(id(problem.gates), problem.gates),
            A=[new.get(id(a), a) for a in problem.A],
            B=[new.get(id(b), b) for b in problem.B],
        ).call(op, **kwargs)

    return function


@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form):
    problem = FORMS[form]()
    function = _as_function(problem, gated_lora_linear, backend="stacked")
    assert torch.autograd.gradgradcheck(function, tuple(_learnt(problem)))


@pytest.mark.parametrize("trained", [True, False])
def test_gradgradcheck_of_a_callable_base(trained):
    problem = _small() if trained else _frozen(_small(), "A0 A1 A2")
    weight = problem.weight.clone().requires_grad_()

    def function(w, *values):
        base = replace(problem, weight=lambda x: F.linear(x, w, problem.bias).tanh(), bias=None)
        return _as_function(base, gated_lora_linear, backend="stacked")(*values)

    assert torch.autograd.gradgradcheck(function, (weight, *_learnt(problem)))


def _penalised(problem: Problem, op: Callable[..., Tensor] | str) -> dict[str, Tensor | None]:
    """Gradients of a loss with the square of its own gradients in it."""
    learnt = _learnt(problem)
    kwargs = {"backend": op} if isinstance(op, str) else {}
    y = problem.call(gated_lora_linear if isinstance(op, str) else op, **kwargs)
    first = torch.autograd.grad(y.square().mean(), learnt, create_graph=True, allow_unused=True)
    penalty = sum(g.square().mean() for g in first if g is not None)
    second = torch.autograd.grad(y.mean() + penalty, learnt, allow_unused=True)
    return {f"d{i}": g for i, g in enumerate(second)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_penalty(backend, form):
    """Every backend's own h is read where x is not kept; an unused expert's None may be zeros."""
    problem = FORMS[form]()
    want = _penalised(problem, gated_lora_linear_reference)
    got = _penalised(problem.to(torch.float32), backend)
    for name, value in want.items():
        if value is not None and got[name] is None:
            assert not value.any()
            want[name] = None
    assert_close(got, want, 1e-5)
    if backend == "stacked":
        assert_close(_penalised(problem, backend), want, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["token gates", "top-k", "all of A frozen", "stacks",
                                  "dropout, a seed a segment"])  # fmt: skip
def test_a_batch_of_dy(backend, form):
    problem = FORMS[form]().to(torch.float32)
    learnt = _learnt(problem)
    y = problem.call(gated_lora_linear, backend=backend)
    dy = torch.randn(6, *y.shape)
    batched = torch.autograd.grad(y, learnt, dy, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, learnt, one, retain_graph=True) for one in dy]
    for got, *want in zip(batched, *one_by_one, strict=True):
        assert torch.allclose(got, torch.stack(want), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_functional(backend):
    problem = _small().to(torch.float32)
    exact = problem.to(torch.float64)

    def loss(p: Problem, op: Callable[..., Tensor], **kwargs: Any) -> Callable[..., Tensor]:
        return lambda x, a: replace(p, x=x, A=[a, *p.A[1:]]).call(op, **kwargs).sin().sum()

    ours, true = loss(problem, gated_lora_linear, backend=backend), loss(
        exact, gated_lora_linear_reference
    )  # fmt: skip
    at, at_exact = (problem.x, problem.A[0]), (exact.x, exact.A[0])
    v = tuple(torch.randn_like(t) for t in at)
    v_exact = tuple(t.double() for t in v)
    F_ = torch.autograd.functional
    pairs = [
        (F_.hessian(ours, at), F_.hessian(true, at_exact)),
        (F_.hessian(ours, at, vectorize=True), F_.hessian(true, at_exact)),
        (F_.hvp(ours, at, v)[1], F_.hvp(true, at_exact, v_exact)[1]),
        (F_.vhp(ours, at, v)[1], F_.vhp(true, at_exact, v_exact)[1]),
        (F_.jacobian(ours, at, vectorize=True), F_.jacobian(true, at_exact)),
    ]
    for got, want in pairs:
        flat = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want),
                   strict=True)  # fmt: skip
        for a, b in flat:
            assert b.abs().max() > 0
            assert torch.allclose(a.double(), b, atol=1e-5)


@pytest.mark.parametrize("frozen", ["", "A0 A1 A2"])
def test_third_derivatives(frozen):
    problem = _frozen(_small(), frozen)

    def third(op: Callable[..., Tensor]) -> list[Tensor]:
        total = problem.call(op).pow(3).sum()
        for _ in range(2):
            total = sum(
                g.square().sum()
                for g in torch.autograd.grad(total, _learnt(problem), create_graph=True)
            )
        return list(torch.autograd.grad(total, _learnt(problem)))

    for a, b in zip(third(gated_lora_linear), third(gated_lora_linear_reference), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()
