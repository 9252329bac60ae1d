"""The two ops of the Triton backend: which kernels run, in which order, on which buffers.

Shape suffixes: M rows, K in, N out, R stacked ranks, W the ranks that one row uses (R without
segments), E experts, k experts a token. "c" is promote_types(x, A): what the mixture's operands are
cast to; every sum is fp32. h [M, W] in c is what forward keeps: ungated, so that dg is exact at a
gate of zero.

Launches of a call whose experts are one matrix, torch's GEMM counted:

    forward    fused   gemm
               extend  shrink, gemm
               split   shrink, expand, torch's GEMM adding to y (beta = 1)
    backward   fused   gemm (dx, u), outer (dA, dB), outer_sum (dA, dB, dg)
               extend  u, gemm, outer, outer_sum
               split   u, expand, torch's GEMM adding to dx, outer, outer_sum

where u is a shrink of dy, or with `one_pass` outer (dB, u) and combine (u, dg), and then outer has
dA alone. Few rows of many columns share a shrink among programs: one combine more.

Everything that a call's signature decides is prepared on its first call and kept: a later call
allocates, and launches compiled kernels (launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fedms.kernels.packing import stack_columns, stack_rows
from fedms.kernels.segments import Run, read_runs, row_width
from fedms.kernels.tables import STORE, stream_state
from fedms.kernels.tiles import Choice, choose
from fedms.kernels.triton.launches import (
    Call,
    Combine,
    Expand,
    Gemm,
    Outer,
    OuterSum,
    Partials,
    Shrink,
)
from fedms.kernels.triton.layout import Layout
from fedms.kernels.triton.tile import Dropout, Routing

_KEPT = 4096
"""Signatures of a direction whose steps are kept; beyond it all are made again."""

_NONE = (0,)
"""The shape of what was not asked for."""

_forwards: dict[Any, _Forward] = {}
_backwards: dict[Any, _Backward] = {}


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, save_h: bool, choice: Choice | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [M, N] and h [M, W] (empty unless save_h). `choice` None: by the table."""
    if _elsewhere(x):
        with torch.cuda.device(x.device):
            return forward(
                x, weight, bias, base, A, B, gates, expert_idxs, offsets, experts, scale, dropout_p,
                seed, save_h, choice,
            )  # fmt: skip
    x, base = _rows_contiguous(x), _rows_contiguous(base)
    expert_idxs = None if expert_idxs is None else expert_idxs.contiguous()
    a, b = stack_rows(A), stack_columns(B)
    runs = None if offsets is None else read_runs(offsets, experts, seed, x.shape[0], len(A))
    if choice is None:
        choice = choose(x.device, x.dtype, a.dtype, *x.shape, b.shape[0], a.shape[0])
    key = (
        bias is None, None if base is None else base.stride(0), save_h,
        _alignment(x, weight, bias, base, a, b, gates, expert_idxs, seed),
        *_signature(x, weight, A, a, b, gates, expert_idxs),
        *_rest(runs, experts, scale, dropout_p, choice, x),
    )  # fmt: skip
    steps = _forwards.get(key)
    if steps is None:
        width = row_width([part.shape[0] for part in A], experts)
        call = _call(x, a, A, runs, width, scale, dropout_p, choice, expert_idxs)
        steps = _kept(_forwards, key, _Forward(call, x, weight, base, a, b, dropout_p, save_h))
    return steps(x, weight, bias, base, a, b, gates, expert_idxs, seed)


def backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool], choice: Choice | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """dx [M, K], dg as gates, dA_e, dB_e; what was not asked for is empty."""
    if _elsewhere(dy):
        with torch.cuda.device(dy.device):
            return backward(
                dy, weight, x, h, A, B, gates, expert_idxs, offsets, experts, scale, dropout_p,
                seed, need_dx, need_dg, need_dA, need_dB, choice,
            )  # fmt: skip
    dy, x = _rows_contiguous(dy), _rows_contiguous(x)
    expert_idxs = None if expert_idxs is None else expert_idxs.contiguous()
    a, b = stack_rows(A), stack_columns(B)
    m, n = dy.shape
    runs = None if offsets is None else read_runs(offsets, experts, seed, m, len(A))
    if choice is None:
        choice = choose(dy.device, dy.dtype, a.dtype, m, a.shape[1], n, a.shape[0])
    key = (
        None if x is None else x.stride(0), need_dx, need_dg, *need_dA, *need_dB,
        _alignment(dy, weight, x, a, b, gates, expert_idxs, seed),
        *_signature(dy, weight, A, a, b, gates, expert_idxs),
        *_rest(runs, experts, scale, dropout_p, choice, dy),
    )  # fmt: skip
    steps = _backwards.get(key)
    if steps is None:
        width = row_width([part.shape[0] for part in A], experts)
        call = _call(dy, a, A, runs, width, scale, dropout_p, choice, expert_idxs)
        needs = (need_dx, need_dg and gates is not None, need_dA, need_dB)
        steps = _kept(
            _backwards, key, _Backward(call, dy, weight, x, a, b, gates, dropout_p, *needs)
        )
    return steps(dy, weight, x, h, a, b, A, B, gates, expert_idxs, seed)


class _Steps:
    """What both directions keep of a signature."""

    def __init__(self, call: Call, dropout_p: float) -> None:
        self._call = call
        self._dropout = (int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p))

    def _operands(
        self, gates: Tensor | None, expert_idxs: Tensor | None, seed: Tensor | None
    ) -> tuple[Routing, Dropout | None]:
        row = column = 0
        if gates is not None:
            column = gates.stride(-1)
            row = gates.stride(0) if gates.dim() == 2 else 0
        layout = self._call.layout
        routing = Routing(gates, expert_idxs, layout.expert, layout.scale, row, column)
        return routing, Dropout(seed, *self._dropout) if self._call.dropout else None


class _Forward(_Steps):
    def __init__(
        self, call: Call, x: Tensor, weight: Tensor | None, base: Tensor | None, a: Tensor,
        b: Tensor, dropout_p: float, save_h: bool,
    ) -> None:  # fmt: skip
        super().__init__(call, dropout_p)
        self._strategy = _strategy(call, call.choice.forward, weight)
        m, n, width = len(x), len(b), call.layout.width
        self._y, self._p, self._h = (m, n), (m, width), (m, width) if save_h else (0,)
        fused = self._strategy == "fused"
        b_strides = b.stride()[::-1]
        self._shrink = self._gemm = self._expand = None
        if m and not fused:
            self._shrink = Shrink(call, x, a.stride(), 0)
        if m and self._strategy == "split":
            stride = 0 if base is None else base.stride(0)
            self._expand = Expand(call, self._y, stride, b_strides, masked=False)
        elif m:
            assert weight is not None
            self._gemm = Gemm(call, call.choice.gemm, x, weight, a if fused else None, a.stride(),
                              b_strides, masked=False)  # fmt: skip

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
        a: Tensor, b: Tensor, gates: Tensor | None, expert_idxs: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = self._call.dtype
        y_MN, h_MW = x.new_empty(self._y), x.new_empty(self._h, dtype=dtype)
        raw = h_MW if len(self._h) == 2 else None
        routing, dropout = self._operands(gates, expert_idxs, seed)
        p_MW = None
        if self._shrink is not None:
            p_MW = x.new_empty(self._p, dtype=dtype)
            self._shrink(x, a, p_MW, raw, routing, dropout)
        if self._gemm is not None:
            assert weight is not None
            fused = p_MW is None
            self._gemm(x, weight, bias, y_MN, a if fused else None, b, p_MW,
                       raw if fused else None, routing, None)  # fmt: skip
        elif self._expand is not None:
            assert p_MW is not None
            self._expand(base, bias, y_MN, p_MW, b, None)
            if weight is not None:
                y_MN.addmm_(x, weight.t())
        return y_MN, h_MW


class _Backward(_Steps):
    """u is made where dy is read anyway (dx's GEMM, or beside dB), or by a shrink of its own."""

    def __init__(
        self, call: Call, dy: Tensor, weight: Tensor | None, x: Tensor | None, a: Tensor,
        b: Tensor, gates: Tensor | None, dropout_p: float, need_dx: bool, need_dg: bool,
        need_dA: Sequence[bool], need_dB: Sequence[bool],
    ) -> None:  # fmt: skip
        super().__init__(call, dropout_p)
        m, k, layout = len(dy), a.shape[1], call.layout
        self._wanted = (tuple(need_dA), tuple(need_dB))
        self._dx = (m, k) if need_dx else (0,)
        self._p = (m, layout.width)
        self._dg = (0,)
        self._dg_dtype = torch.float32
        # Pairs that do not exist get zeros, all others are written.
        self._dg_zeros = layout.runs is not None or call.top_k > 0
        if need_dg:
            assert gates is not None
            self._dg = (m, call.top_k or len(layout.ranks))
            self._dg_dtype = gates.dtype if gates.dim() == 2 else torch.float32
        self._a_strides, self._b_strides = a.stride(), b.stride()[::-1]
        self._shrink = self._outer_b = self._combine = self._outer = self._sum = None
        self._gemm = self._expand = None
        self._keep_u = False
        if m == 0:
            return

        strategy = _strategy(call, call.choice.backward, weight)
        self._need_u = need_dx or need_dg or any(need_dA)
        fused = need_dx and strategy == "fused"
        one_pass = self._need_u and any(need_dB) and not fused and call.choice.one_pass
        side_a = side_b = None
        if any(need_dA):
            assert x is not None
            side_a = Partials(call, x, need_dA, u=False)
        if any(need_dB):
            side_b = Partials(call, dy, need_dB, u=one_pass)
        columns = self._dg[-1]
        if one_pass:
            self._outer_b = Outer(call, None, side_b)
            assert side_b is not None
            self._combine = Combine(call, side_b.tiles_c, columns)
        elif self._need_u and not fused:
            self._shrink = Shrink(call, dy, self._b_strides, columns)
        made_dg = self._combine is not None or (self._shrink is not None and self._shrink.combines)
        self._keep_u = need_dg and not made_dg
        if need_dx and strategy == "split":
            self._expand = Expand(call, (m, k), 0, self._a_strides, masked=call.dropout)
        elif need_dx:
            assert weight is not None
            self._gemm = Gemm(call, call.choice.dx_gemm, dy, weight.t(), b if fused else None,
                              self._b_strides, self._a_strides, masked=call.dropout)  # fmt: skip
        rest_b = None if one_pass else side_b
        if side_a is not None or rest_b is not None:
            self._outer = Outer(call, side_a, rest_b)
        if side_a is not None or side_b is not None or self._keep_u:
            self._sum = OuterSum(call, side_a, side_b, columns if self._keep_u else 0)

    def __call__(
        self, dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, a: Tensor,
        b: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None,
        expert_idxs: Tensor | None, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        dx_MK = dy.new_empty(self._dx)
        empty = dy.new_zeros if self._dg_zeros else dy.new_empty
        dg = empty(self._dg, dtype=self._dg_dtype)
        need_dA, need_dB = self._wanted
        dA = [t.new_empty(t.shape if need else _NONE) for t, need in zip(A, need_dA, strict=True)]
        dB = [t.new_empty(t.shape if need else _NONE) for t, need in zip(B, need_dB, strict=True)]
        if self._p[0]:
            self._run(dy, weight, x, h, a, b, gates, expert_idxs, seed, dx_MK,
                      dg if len(self._dg) == 2 else None, dA, dB)  # fmt: skip
        else:
            for grad in (*dA, *dB):
                grad.zero_()
        if len(self._dg) == 2 and gates is not None and gates.dim() == 1:
            dg = dg.sum(0).to(gates.dtype)
        return dx_MK, dg, dA, dB

    def _run(
        self, dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, a: Tensor,
        b: Tensor, gates: Tensor | None, expert_idxs: Tensor | None, seed: Tensor | None,
        dx_MK: Tensor, dg: Tensor | None, dA: Sequence[Tensor], dB: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Fill dx, dg, dA and dB."""
        routing, dropout = self._operands(gates, expert_idxs, seed)
        ug_MW = dy.new_empty(self._p, dtype=self._call.dtype) if self._need_u else None
        u_MW = dy.new_empty(self._p, dtype=torch.float32) if self._keep_u else None
        part_a = part_b = None
        if self._combine is not None:
            assert self._outer_b is not None
            _, part_b, part_u = self._outer_b(
                None, None, dy, h, routing, None, b=b, b_strides=self._b_strides
            )
            assert part_u is not None
            self._combine(part_u, None, ug_MW, h, dg, routing)
        elif self._shrink is not None:
            assert ug_MW is not None
            self._shrink(dy, b, ug_MW, u_MW, routing, None, h, dg)
        if self._expand is not None:
            assert ug_MW is not None
            self._expand(None, None, dx_MK, ug_MW, a, dropout)
            if weight is not None:
                dx_MK.addmm_(dy, weight)
        elif self._gemm is not None:
            assert weight is not None
            fused = self._shrink is None and self._combine is None
            self._gemm(dy, weight.t(), None, dx_MK, b if fused else None, a, ug_MW,
                       u_MW if fused else None, routing, dropout)  # fmt: skip
        if self._outer is not None:
            part_a, other, _ = self._outer(x, ug_MW, dy, h, routing, dropout)
            part_b = part_b if other is None else other
        if self._sum is not None:
            need_dA, need_dB = self._wanted
            self._sum(part_a, list(compress(dA, need_dA)), part_b, list(compress(dB, need_dB)),
                      u_MW, h, dg if self._keep_u else None, routing)  # fmt: skip


def _call(
    x: Tensor, a: Tensor, A: Sequence[Tensor], runs: tuple[Run, ...] | None, width: int,
    scale: Sequence[float], dropout_p: float, choice: Choice, expert_idxs: Tensor | None,
) -> Call:  # fmt: skip
    stream, capturing = stream_state(x.device)

    def table(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return STORE.values(values, dtype, x.device, stream, capturing)

    ranks = tuple(part.shape[0] for part in A)
    dtype = torch.promote_types(x.dtype, a.dtype)
    return Call(
        layout=Layout(len(x), width, ranks, tuple(scale), runs, dropout_p > 0.0, table),
        choice=choice,
        dtype=dtype,
        top_k=0 if expert_idxs is None else expert_idxs.shape[1],
        dropout=dropout_p > 0.0,
        multiprocessors=_multiprocessors(x.device),
        stream=stream,
        base_precision=_base_precision(x.dtype),
        precision=_mixture_precision(x.dtype, dtype),
    )


def _signature(
    x: Tensor, weight: Tensor | None, A: Sequence[Tensor], a: Tensor, b: Tensor,
    gates: Tensor | None, expert_idxs: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What launches are specialised on of a call's tensors, those that a shape check relates to
    others left out. With `_alignment` and `_rest`, and what a direction adds, it is the key."""
    return (
        x.shape, x.stride(), x.dtype, a.shape, a.stride(), a.dtype, b.shape, b.stride(),
        *[part.shape[0] for part in A],
        None if weight is None else weight.stride(),
        None if gates is None else (gates.stride(), gates.dtype),
        None if expert_idxs is None else expert_idxs.shape[1],
    )  # fmt: skip


def _alignment(*tensors: Tensor | None) -> Any:
    """0 when all begin at multiples of 16 bytes, as nearly all do; else where each begins."""
    together = 0
    for t in tensors:
        if t is not None:
            together |= t.data_ptr()
    if together & 15 == 0:
        return 0
    return tuple(0 if t is None else t.data_ptr() & 15 for t in tensors)


def _rest(
    runs: tuple[Run, ...] | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    choice: Choice, x: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """What a signature has besides its tensors. The steps keep the choice, so its id is its own."""
    fp32 = _base_precision(x.dtype) if x.dtype == torch.float32 else None
    width = None if experts is None else experts.shape[1]
    return (
        runs,
        width,
        tuple(scale),
        dropout_p,
        id(choice),
        x.device,
        *stream_state(x.device),
        fp32,
    )


def _kept(steps: dict[Any, Any], key: Any, made: Any) -> Any:
    if len(steps) >= _KEPT:
        steps.clear()
    steps[key] = made
    return made


def _elsewhere(x: Tensor) -> bool:
    """True when x is on another GPU than the current one, where its kernels must not go."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def _rows_contiguous(t: Tensor | None) -> Any:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _strategy(call: Call, wanted: str, weight: Tensor | None) -> str:
    """The wanted strategy where this call allows it."""
    if weight is None:
        return "split"
    if wanted == "fused" and (not call.layout.dense or call.top_k):  # lists spill beside two sums
        return "extend"
    return wanted


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
