"""torch.library schemas and fakes. A backend calls `define_backend` once, when it is imported.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks, E experts, k experts a token.

    fedms::<backend>_forward   (x_MK, W_NK | base_MN, A_e, B_e, gates) -> y_MN, h
    fedms::<backend>_backward  (dy_MN, W_NK, x_MK, h, A_e, B_e, gates) -> dx_MK, dg, dA_e, dB_e

A and B are parts (fedms.kernels.experts), dA and dB one gradient a part. offsets and experts are
`Segments.tensors` (None: every row uses every expert). seed (None: no dropout) is int64 [], or [S]
with one a segment. An output that was not asked for is an empty tensor, where a backend's function
gives None. h is the backend's own: its layout and dtype are read by its backward alone, and its
entries of pairs that do not exist are never written.
One op per direction, and one autograd.Function around them (functional.py), because a call through
`torch.library.custom_op` with `register_autograd` costs about 31 us and this costs about 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ROUTING = (
    "Tensor[] A, Tensor[] B, Tensor? gates, Tensor? expert_idxs, Tensor? offsets, Tensor? experts, "
    "float[] scale, float dropout_p, Tensor? seed"
)
_FORWARD = (
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, {_ROUTING}, bool save_h)"
    " -> (Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor? weight, Tensor? x, Tensor? h, {_ROUTING}, bool need_dx, bool need_dg,"
    " bool[] need_dA, bool[] need_dB) -> (Tensor, Tensor, Tensor[], Tensor[])"
)
_LIBRARY = torch.library.Library("fedms", "FRAGMENT")

Grads = Sequence[Tensor | None]


def define_backend(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor | None]],
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Grads, Grads]],
    *,
    dispatch_key: str,
    h_like: Callable[
        [Tensor, Sequence[Tensor], Tensor | None, Tensor | None], tuple[int, torch.dtype]
    ],
) -> None:
    """Register a backend's two ops and their fakes.

    dispatch_key: "CPU", "CUDA", or "CompositeExplicitAutograd" for any device.
    h_like(x, A, expert_idxs, experts) -> (row width, dtype) of the h this backend saves.
    """

    def fake_forward(
        x: Tensor, weight: Tensor | None, bias: Any, base: Tensor | None, A: Sequence[Tensor],
        B: Sequence[Tensor], gates: Any, expert_idxs: Tensor | None, offsets: Any,
        experts: Tensor | None, scale: Any, dropout_p: float, seed: Any, save_h: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        like = weight if base is None else base
        assert like is not None
        n = like.shape[0] if base is None else like.shape[1]
        width, dtype = h_like(x, A, expert_idxs, experts)
        h = x.new_empty((x.shape[0], width) if save_h else (0,), dtype=dtype)
        return like.new_empty((x.shape[0], n)), h

    def fake_backward(
        dy: Tensor, weight: Any, x: Any, h: Any, A: Sequence[Tensor], B: Sequence[Tensor],
        gates: Tensor | None, expert_idxs: Any, offsets: Any, experts: Any, scale: Any,
        dropout_p: float, seed: Any, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
        need_dB: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        dx = dy.new_empty((dy.shape[0], A[0].shape[-1]) if need_dx else (0,))
        dg = dy.new_empty(0) if gates is None or not need_dg else gates.new_empty(gates.shape)
        dA = [a.new_empty(a.shape if need else (0,)) for a, need in zip(A, need_dA, strict=True)]
        dB = [b.new_empty(b.shape if need else (0,)) for b, need in zip(B, need_dB, strict=True)]
        return dx, dg, dA, dB

    def forward_op(
        x: Tensor, weight: Any, bias: Any, base: Any, A: Sequence[Tensor], B: Any, gates: Any,
        expert_idxs: Tensor | None, offsets: Any, experts: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, h = forward(
            x, weight, bias, base, A, B, gates, expert_idxs, offsets, experts, *rest
        )  # fmt: skip
        if h is None:
            h = x.new_empty(0, dtype=h_like(x, A, expert_idxs, experts)[1])
        return y, h

    def backward_op(
        dy: Tensor, weight: Any, x: Any, h: Any, A: Sequence[Tensor], B: Sequence[Tensor],
        gates: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        dx, dg, dA, dB = backward(dy, weight, x, h, A, B, gates, *rest)
        return _filled(dx, dy), _filled(dg, dy), [*map(_filled, dA, A)], [*map(_filled, dB, B)]

    for suffix, schema, kernel, fake in (
        ("forward", _FORWARD, forward_op, fake_forward),
        ("backward", _BACKWARD, backward_op, fake_backward),
    ):
        _LIBRARY.define(f"{name}_{suffix}{schema}")
        _LIBRARY.impl(f"{name}_{suffix}", kernel, dispatch_key)
        torch.library.register_fake(f"fedms::{name}_{suffix}", fake, lib=_LIBRARY)


def _filled(result: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if result is None else result
