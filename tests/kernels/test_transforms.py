"""The op under torch.func's transforms and forward-mode differentiation, which see no kernel.

Held against the formula written out here, not against the reference, which is what runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vmap

from fedms.kernels import Segments, gated_lora_linear

SCALING = [0.5, 2.0]
W, BIAS = torch.randn(5, 7), torch.randn(5)


def _inputs(m: int = 6) -> dict[str, Tensor]:
    """x, A, B of two experts of ranks 2 and 3, and gates a token."""
    return {
        "x": torch.randn(m, 7), "A0": torch.randn(2, 7), "A1": torch.randn(3, 7),
        "B0": torch.randn(5, 2), "B1": torch.randn(5, 3), "gates": torch.rand(m, 2),
    }  # fmt: skip


def _op(x: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor, gates: Tensor) -> Tensor:
    return gated_lora_linear(
        x, W, [A0, A1], [B0, B1], bias=BIAS, gates=gates, scaling=SCALING
    )  # fmt: skip


def _formula(x: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor, gates: Tensor) -> Tensor:
    first, second = x @ A0.T @ B0.T * SCALING[0], x @ A1.T @ B1.T * SCALING[1]
    return x @ W.T + BIAS + gates[..., :1] * first + gates[..., 1:] * second


@pytest.fixture
def given() -> list[Tensor]:
    return [*_inputs().values()]


def test_jvp_along_every_input(given):
    tangents = [torch.randn_like(t) for t in given]
    got, want = (jvp(f, tuple(given), tuple(tangents)) for f in (_op, _formula))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", _inputs())
@pytest.mark.parametrize("trained", [False, True])
def test_a_tangent_of_one_input(name, trained):
    """A tensor with a tangent is no wrapper: a kernel would read its values and drop the rest."""
    inputs = {key: t.requires_grad_(trained) for key, t in _inputs().items()}
    tangent = torch.randn_like(inputs[name])

    def tangent_of(f) -> Tensor:
        with forward_ad.dual_level():
            y = f(**{**inputs, name: forward_ad.make_dual(inputs[name], tangent)})
            return forward_ad.unpack_dual(y).tangent

    torch.testing.assert_close(tangent_of(_op), tangent_of(_formula))


def test_forward_over_reverse(given):
    """dy alone has a tangent: the graph was made before."""
    x, *rest = given
    x.requires_grad_()
    dy, tangent = torch.randn(2, 6, 5)

    def tangent_of_dx(f) -> Tensor:
        y = f(x, *rest)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
            return forward_ad.unpack_dual(dx).tangent

    torch.testing.assert_close(tangent_of_dx(_op), tangent_of_dx(_formula))


def test_a_gradient_a_sample():
    given = _inputs(4)
    x, gates = given.pop("x"), given.pop("gates")

    def gradients(f) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor, gates: Tensor) -> Tensor:
            return f(x=x, gates=gates, **parameters).square().sum()

        return vmap(grad(loss), (None, 0, 0))(given, x[:, None], gates[:, None])

    torch.testing.assert_close(gradients(_op), gradients(_formula))


@pytest.mark.parametrize("transform", [jacfwd, jacrev, functionalize])
def test_of_x(transform, given):
    x, *rest = given
    got, want = (transform(lambda t, f=f: f(t, *rest))(x) for f in (_op, _formula))
    torch.testing.assert_close(got, want)


def test_listed_pairs_and_segments_in_a_batch():
    x, A, B = torch.randn(3, 6, 7), torch.randn(2, 2, 7), torch.randn(2, 5, 2)
    idxs, gates = torch.randint(2, (3, 6, 1)), torch.rand(3, 6, 1)
    listed = vmap(lambda x, i, g: gated_lora_linear(x, W, A, B, expert_idxs=i, gates=g))
    want = gated_lora_linear(x, W, A, B, expert_idxs=idxs, gates=gates)
    torch.testing.assert_close(listed(x, idxs, gates), want)
    halves = Segments([0, 3, 6], [0, 1])
    got = vmap(lambda x: gated_lora_linear(x, W, A, B, segments=halves))(x)
    want = torch.stack([gated_lora_linear(part, W, A, B, segments=halves) for part in x])
    torch.testing.assert_close(got, want)


def test_a_named_backend_is_refused(given):
    x, A0, _, B0, *_ = given
    with pytest.raises(ValueError, match=r"backend must be None under torch.func.*got 'stacked'"):
        vmap(lambda row: gated_lora_linear(row, W, [A0], [B0], backend="stacked"))(x)
