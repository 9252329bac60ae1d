"""`lora_A` and `lora_B` as parts: one expert a tensor, or a stack of experts in one.

A part of lora_A is one expert [r, K] or a stack [S, r, K] of S experts, of lora_B [N, r] or
[S, N, r], S at least 1. Experts are counted through the parts. A part is one leaf and has one
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def counts(parts: Sequence[Tensor]) -> list[int]:
    """How many experts each part holds."""
    return [part.shape[0] if part.dim() == 3 else 1 for part in parts]


def expert_ranks(A: Sequence[Tensor]) -> list[int]:
    """r_e of every expert."""
    if 3 not in [part.dim() for part in A]:
        return [part.shape[0] for part in A]
    ranks: list[int] = []
    for part in A:
        shape = part.shape
        ranks += [shape[1]] * shape[0] if len(shape) == 3 else [shape[0]]
    return ranks


def unstack(parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """One matrix an expert: a part itself, or views of it. A Tensor is one stack."""
    experts: list[Tensor] = []
    for part in parts:
        experts += part.unbind() if part.dim() == 3 else (part,)
    return experts


def takes_stacks(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of a backend that knows single experts only, made to take stacks."""

    def forward_of_parts(
        x: Any, weight: Any, bias: Any, base: Any, A: Sequence[Tensor], B: Sequence[Tensor],
        *rest: Any,
    ) -> Any:  # fmt: skip
        if not _stacked(A):
            return forward(x, weight, bias, base, A, B, *rest)
        return forward(x, weight, bias, base, unstack(A), unstack(B), *rest)

    return forward_of_parts, backward_of_parts(backward)


def backward_of_parts(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's backward made to take stacks.

    A stack's gradient is copied together from those of its experts.
    """

    def of_parts(
        dy: Any, weight: Any, x: Any, h: Any, A: Sequence[Tensor], B: Sequence[Tensor], *rest: Any
    ) -> Any:
        if not _stacked(A):
            return backward(dy, weight, x, h, A, B, *rest)
        *middle, need_dA, need_dB = rest
        sizes = counts(A)
        dx, dg, dA, dB = backward(
            dy, weight, x, h, unstack(A), unstack(B), *middle, _repeat(need_dA, sizes),
            _repeat(need_dB, sizes),
        )  # fmt: skip
        return dx, dg, _restack(dA, A, need_dA), _restack(dB, B, need_dB)

    return of_parts


def _stacked(parts: Sequence[Tensor]) -> bool:
    """Whether any part is a stack; most calls have none, and pay for nothing here."""
    return 3 in [part.dim() for part in parts]


def _repeat(values: Sequence[bool], sizes: Sequence[int]) -> list[bool]:
    return [v for v, size in zip(values, sizes, strict=True) for _ in range(size)]


def _restack(
    grads: Sequence[Any], parts: Sequence[Tensor], need: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient a part from one an expert; None for a stack that is asked for none."""
    out: list[Tensor | None] = []
    first = 0
    for part, size, wanted in zip(parts, counts(parts), need, strict=True):
        mine = tuple(grads[first : first + size])
        first += size
        if part.dim() == 2:
            out += mine
        elif wanted:
            out.append(torch.stack(mine))
        else:
            out.append(None)
    return out
