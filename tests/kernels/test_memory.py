"""Tensors whose memory does not hold what they say: the op goes by what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_problem import BACKENDS, Problem, make_problem, upstream
from torch import Tensor
from torch.utils._pytree import tree_map

from fedms.kernels import Segments, gated_lora_linear, native


class Wrapped(Tensor):
    """A tensor that stands for another, with no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None) -> Any:
        result = op(*tree_map(_inner, args), **tree_map(_inner, kwargs or {}))
        return tree_map(lambda r: cls(r) if isinstance(r, Tensor) else r, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Wrapped) else value


def _negated(t: Tensor) -> Tensor:
    """As the imaginary part of a conjugate is: its memory holds -t."""
    return torch._neg_view(-t)


def _run(problem: Problem, dy: Tensor, backend: str) -> list[Tensor]:
    """y and the gradients."""
    y = problem.call(gated_lora_linear, backend=backend)
    trained = [problem.x, problem.gates, *problem.A, *problem.B]
    return [_inner(t) for t in (y.detach(), *torch.autograd.grad(y, trained, dy))]


NAMES = ("x", "weight", "bias", "A", "B", "gates", "dy")
IN_TURN = [(backend, (name,)) for backend in BACKENDS if backend != "triton" for name in NAMES]


@pytest.mark.parametrize(
    ("backend", "odd"), [*IN_TURN, *[(backend, NAMES) for backend in BACKENDS]]
)
@pytest.mark.parametrize("form", [_negated, Wrapped])
def test_each_argument(odd, form, backend):
    plain = make_problem(6).to(torch.float32)
    dy = upstream(plain.call(gated_lora_linear).detach())

    def like(t: Any) -> Any:  # the last of several
        if isinstance(t, list):
            return [*t[:-1], like(t[-1])]
        return form(t.detach()).requires_grad_(t.requires_grad)

    other = {name: like(getattr(plain, name)) for name in odd if name != "dy"}
    got = _run(replace(plain, **other), like(dy) if "dy" in odd else dy, backend)
    torch.testing.assert_close(got, _run(plain, dy, backend), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_routes_and_seeds(backend):
    idxs = torch.randint(2, (6, 1))
    offsets, experts, seed = torch.tensor([0, 2, 6]), torch.tensor([0, 1]), torch.tensor(5)
    routes = [{"expert_idxs": idxs}, {"segments": Segments(offsets, experts)}]
    negated = [
        {"expert_idxs": _negated(idxs)},
        {"segments": Segments(_negated(offsets), _negated(experts))},
    ]
    for plain, odd in zip(routes, negated, strict=True):
        problem = make_problem(6, gates=None, **plain, dropout_p=0.4, seed=seed).to(torch.float32)
        same = replace(problem, **odd, seed=_negated(seed))
        got, want = (p.call(gated_lora_linear, backend=backend) for p in (same, problem))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_imaginary_part_of_a_conjugate_in_decoding():
    z, weight = torch.randn(3, 400, dtype=torch.complex64), torch.randn(300, 400)
    A, B = [torch.randn(4, 400)], [torch.randn(300, 4)]
    x = z.conj().imag
    assert x.is_neg()
    got = gated_lora_linear(x, weight, A, B)
    torch.testing.assert_close(got, gated_lora_linear(-z.imag, weight, A, B))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["A", "B", "gates"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("offset", [0, 128])
def test_no_memory_at_all(offset, when, name, backend):
    """As FSDP leaves a weight between two uses, alone or as a part of a flat parameter, which then
    points at its offset: neither is followed.
    """
    shapes = {"A": (2, 4), "B": (5, 2), "gates": (3, 1)}
    given = {
        name: torch.rand(offset + math.prod(shape))[offset:].view(shape)
        for name, shape in shapes.items()
    }
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)

    def call():
        return gated_lora_linear(
            x, weight, [given["A"]], [given["B"]], gates=given["gates"], backend=backend
        )

    y = call()
    given[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"tensors must .*have memory, got a .* without"):
        call() if when == "forward" else y.sum().backward()


def test_no_memory_of_b_where_the_cpu_has_no_bf16(monkeypatch):
    monkeypatch.setattr(native, "_FAST_BF16", False)
    x, weight = torch.randn(80, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    A, B = torch.randn(2, 4), torch.randn(5, 2)
    B.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"tensors must .*have memory, got a .* without"):
        gated_lora_linear(x, weight, [A], [B])
