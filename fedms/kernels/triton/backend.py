"""The two ops of the Triton backend: what a call's signature is, and the steps kept for it.

Everything that a call's signature decides is prepared on its first call and kept: a later call
allocates, and launches compiled kernels (steps.py). Shape suffixes: M rows, K in, N out, R stacked
ranks, W the ranks that one row uses, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedms.kernels.packing import columns_view, rows_view
from fedms.kernels.segments import Run, read_runs, row_width
from fedms.kernels.tables import STORE, stream_state
from fedms.kernels.tiles import Choice, choose
from fedms.kernels.triton.launches import Call
from fedms.kernels.triton.layout import Layout
from fedms.kernels.triton.steps import Backward, Forward, Mixture

_KEPT = 4096
"""Signatures of a direction whose steps are kept; beyond it all are made again."""

_Made = TypeVar("_Made")

_forwards: dict[Hashable, Forward] = {}
_backwards: dict[Hashable, Backward] = {}


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, save_h: bool, choice: Choice | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y [M, N] and h [M, W] (None unless save_h). `choice` None: by the table."""
    if _elsewhere(x):
        with torch.cuda.device(x.device):
            return forward(
                x, weight, bias, base, A, B, gates, expert_idxs, offsets, experts, scale, dropout_p,
                seed, save_h, choice,
            )  # fmt: skip
    x, base = _rows_contiguous(x), _rows_contiguous(base)
    of = _mixture(A, B, gates, expert_idxs, seed)
    runs = None if offsets is None else read_runs(offsets, experts, seed, x.shape[0], len(A))
    if choice is None:
        r = sum([part.shape[0] for part in A])
        choice = choose(x.device, x.dtype, A[0].dtype, *x.shape, B[0].shape[0], r)
    key = (
        bias is None, None if base is None else base.stride(0), save_h,
        *_signature(of, runs, experts, scale, dropout_p, choice, weight, x, bias, base),
    )  # fmt: skip
    steps = _forwards.get(key)
    if steps is None:
        call = _call(x, of, runs, experts, scale, dropout_p, choice)
        steps = Forward(call, x, weight, base, of, dropout_p, save_h)
        _keep(_forwards, key, steps)
    return steps(x, weight, bias, base, of)


def backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool], choice: Choice | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """dx [M, K], dg as gates, dA_e, dB_e; what was not asked for is None."""
    if _elsewhere(dy):
        with torch.cuda.device(dy.device):
            return backward(
                dy, weight, x, h, A, B, gates, expert_idxs, offsets, experts, scale, dropout_p,
                seed, need_dx, need_dg, need_dA, need_dB, choice,
            )  # fmt: skip
    dy, x = _rows_contiguous(dy), _rows_contiguous(x)
    of = _mixture(A, B, gates, expert_idxs, seed)
    m, n = dy.shape
    runs = None if offsets is None else read_runs(offsets, experts, seed, m, len(A))
    if choice is None:
        r = sum([part.shape[0] for part in A])
        choice = choose(dy.device, dy.dtype, A[0].dtype, m, A[0].shape[1], n, r)
    key = (
        None if x is None else x.stride(0), need_dx, need_dg, *need_dA, *need_dB,
        *_signature(of, runs, experts, scale, dropout_p, choice, weight, dy, x),
    )  # fmt: skip
    steps = _backwards.get(key)
    if steps is None:
        call = _call(dy, of, runs, experts, scale, dropout_p, choice)
        needs = (need_dx, need_dg and gates is not None, need_dA, need_dB)
        steps = Backward(call, dy, weight, x, of, dropout_p, *needs)
        _keep(_backwards, key, steps)
    return steps(dy, weight, x, h, of)


def _mixture(
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    seed: Tensor | None,
) -> Mixture:  # fmt: skip
    if expert_idxs is not None:
        expert_idxs = expert_idxs.contiguous()
    return Mixture(A, B, rows_view(A), columns_view(B), gates, expert_idxs, seed)


def _call(
    x: Tensor, of: Mixture, runs: tuple[Run, ...] | None, experts: Tensor | None,
    scale: Sequence[float], dropout_p: float, choice: Choice,
) -> Call:  # fmt: skip
    stream, capturing = stream_state(x.device)

    def table(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return STORE.values(values, dtype, x.device, stream, capturing)

    ranks, drops = tuple(part.shape[0] for part in of.A), dropout_p > 0.0
    dtype = torch.promote_types(x.dtype, of.A[0].dtype)
    return Call(
        layout=Layout(len(x), row_width(ranks, experts), ranks, tuple(scale), runs, drops, table),
        choice=choice,
        dtype=dtype,
        top_k=0 if of.expert_idxs is None else of.expert_idxs.shape[1],
        dropout=drops,
        multiprocessors=_multiprocessors(x.device),
        stream=stream,
        base_precision=_base_precision(x.dtype),
        precision=_mixture_precision(x.dtype, dtype),
    )


def _signature(
    of: Mixture, runs: tuple[Run, ...] | None, experts: Tensor | None, scale: Sequence[float],
    dropout_p: float, choice: Choice, weight: Tensor | None, x: Tensor, *others: Tensor | None,
) -> tuple[Hashable, ...]:  # fmt: skip
    """What both directions' launches are prepared for and specialised on, what a shape check
    relates to the rest left out; with what a direction adds to it, it is the key.

    x: dy in backward. others: more tensors that kernels read. The steps keep the choice, so its id
    is its own.
    """
    A, B, a, b, gates, expert_idxs, seed = of
    tensors = [x, weight, *others, gates, expert_idxs, seed]
    shapes: list[Hashable] = []
    if a is None or b is None:
        tensors += A
        tensors += B
        for part_a, part_b in zip(A, B, strict=True):
            shapes += (part_a.shape, part_a.stride(), part_b.stride())
    else:
        shapes += (a.stride(), b.stride(), *[part.shape for part in A])
        tensors += (a, b)
    return (
        x.shape, x.stride(), x.dtype, x.device, *stream_state(x.device), B[0].shape, A[0].dtype,
        a is None, b is None, *shapes, _alignment(tensors),
        None if weight is None else weight.stride(),
        None if gates is None else (gates.stride(), gates.dtype),
        None if expert_idxs is None else expert_idxs.shape[1],
        runs, None if experts is None else experts.shape[1], tuple(scale), dropout_p, id(choice),
        _base_precision(x.dtype) if x.dtype == torch.float32 else None,
    )  # fmt: skip


def _alignment(tensors: Sequence[Tensor | None]) -> Hashable:
    """0 when all begin at multiples of 16 bytes, as nearly all do; else where each begins."""
    together = 0
    for t in tensors:
        if t is not None:
            address = t.data_ptr()
            if not address and t.numel() and t.device.type != "meta":  # compiled for, never run
                raise RuntimeError(f"tensors must have memory, got a {list(t.shape)} without")
            together |= address
    if together & 15 == 0:
        return 0
    return tuple(0 if t is None else t.data_ptr() & 15 for t in tensors)


def _keep(steps: dict[Hashable, _Made], key: Hashable, made: _Made) -> None:
    if len(steps) >= _KEPT:
        steps.clear()
    steps[key] = made


def _elsewhere(x: Tensor) -> bool:
    """True when x is on another GPU than the current one, where its kernels must not go."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _rows_contiguous(t: Tensor | None) -> Any:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _base_precision(x: torch.dtype) -> str:
    """fp32 as torch would: TF32 where the user allowed it, else three TF32 products."""
    if x != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _mixture_precision(x: torch.dtype, c: torch.dtype) -> str:
    """16-bit x with fp32 adapters: one TF32 product, exact in x and 8 times finer than y's bf16."""
    if c == torch.float32 and x != torch.float32 and not torch.version.hip:
        return "tf32"
    return _base_precision(x)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter's programs run one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count
