# pyright: reportCallIssue=false
# (a launch takes num_warps and num_stages, which a kernel does not declare)
"""The two ops of the Triton backend: which kernels run, in which order, on which buffers.

Shape suffixes: M rows, K in, N out, R stacked ranks, W the ranks that one row uses (R without
segments), E experts, k experts a token. "c" is promote_types(x, A): what the mixture's operands are
cast to; every sum is fp32.

Launches of a call with R <= 128, no segments, no dropout, whose experts are one matrix:

    forward    fused: 1        extend: 2 (shrink, expand)        split: torch's GEMM + 2
    backward   fused: expand (dx, u), outer + outer_sum for dB, the same for dA, combine for dg
               extend: outer (dB, u), outer_sum, combine, expand, outer + outer_sum for dA

h [M, W] in c is what forward keeps: ungated, so that dg is exact at a gate of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from fedms.kernels.packing import stack_columns, stack_rows
from fedms.kernels.segments import read_runs, row_width
from fedms.kernels.tiles import Choice, Tiles, choose
from fedms.kernels.triton.combine import combine_kernel
from fedms.kernels.triton.expand import expand_kernel
from fedms.kernels.triton.layout import Layout, layout, rank_block
from fedms.kernels.triton.outer import outer_kernel, outer_sum_kernel
from fedms.kernels.triton.shrink import shrink_kernel

_SUMMED_AT_ONCE = 8
"""Gradients that one outer_sum launch writes; a compiled kernel for each count up to it."""


@dataclass(frozen=True)
class _Call:
    """What both directions pass to the kernels."""

    layout: Layout
    choice: Choice
    dtype: torch.dtype  # c
    gates: Tensor | None
    expert_idxs: Tensor | None
    dropout_p: float
    seed: Tensor | None
    like: Tensor  # stands in for tensors that a kernel does not read

    @property
    def dense(self) -> bool:
        return self.layout.dense

    def routing(self) -> dict[str, Any]:
        """Gates, top-k and per-rank tables, by the kernels' parameter names."""
        gates, idxs = self.gates, self.expert_idxs
        row = column = 0
        if gates is not None:
            column = gates.stride(-1)
            row = gates.stride(0) if gates.dim() == 2 else 0
        return {
            "gates_ptr": self.like if gates is None else gates,
            "idxs_ptr": self.like if idxs is None else idxs,
            "expert_ptr": self.layout.by_rank.expert,
            "scale_ptr": self.layout.by_rank.scale,
            "stride_gm": row,
            "stride_ge": column,
            "GATES": gates is not None,
            "TOP_K": 0 if idxs is None else idxs.shape[1],
        }

    def dropout(self, applies: bool) -> dict[str, Any]:
        p = self.dropout_p if applies else 0.0
        return {
            "seed_ptr": self.like if self.seed is None else self.seed,
            "threshold": int(p * 2**32),
            "keep_scale": 1.0 / (1.0 - p),
            "DROPOUT": p > 0.0,
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(shape, dtype=dtype or self.dtype)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    scale: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, W] (empty unless save_h). `choice` None: by the table."""
    m, k = x.shape
    n = base.shape[1] if base is not None else weight.shape[0]  # type: ignore[union-attr]
    call = _call(
        x, A, m, k, n, gates, expert_idxs, offsets, experts, scale, dropout_p, seed, choice
    )
    h_MW = call.empty(m, call.layout.width) if save_h else call.empty(0)
    if m == 0 or n == 0:
        return x.new_empty((m, n)), h_MW
    x = x if x.stride(-1) == 1 else x.contiguous()
    strategy = _strategy(call, call.choice.forward, weight)
    A_RK, B_NR = stack_rows(A), stack_columns(B)

    if base is not None:
        y_MN = base.clone(memory_format=torch.contiguous_format)
    elif strategy == "split":
        y_MN, bias = F.linear(x, weight, bias), None  # type: ignore[arg-type]
    else:
        y_MN = x.new_empty((m, n))
    p_MW = None
    if strategy != "fused":
        p_MW = call.empty(m, call.layout.width)
        _shrink(call, x, A_RK, A_RK.stride(), p_MW, h_MW if save_h else None, drop=True)
    _expand(
        call, call.choice.linear, x, weight, bias, y_MN, A_RK, A_RK.stride(), B_NR,
        B_NR.stride()[::-1], p_MW, h_MW if save_h else None,
        base="add" if strategy == "split" else "gemm", fused=strategy == "fused", drop=False,
    )  # fmt: skip
    return y_MN, h_MW


def backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    scale: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dg: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """dx [M, K], dg as gates, dA_e, dB_e; what was not asked for is empty."""
    (m, n), k = dy.shape, A[0].shape[1]
    call = _call(
        dy, A, m, k, n, gates, expert_idxs, offsets, experts, scale, dropout_p, seed, choice
    )
    dx_MK = dy.new_empty((m, k) if need_dx else (0,))
    dA = [a.new_empty(a.shape if need else (0,)) for a, need in zip(A, need_dA, strict=True)]
    dB = [b.new_empty(b.shape if need else (0,)) for b, need in zip(B, need_dB, strict=True)]
    dg = None
    if need_dg and gates is not None:
        columns = len(A) if expert_idxs is None else expert_idxs.shape[1]
        dg = dy.new_zeros((m, columns), dtype=torch.float32)
    if m == 0 or n == 0:
        for grad in (dx_MK, *dA, *dB):
            grad.zero_()
    else:
        _run_backward(call, dy, weight, x, h, A, B, dx_MK, dg, dA, dB, need_dx, need_dA, need_dB)
    if dg is None:
        return dx_MK, dy.new_empty(0), dA, dB
    assert gates is not None
    return dx_MK, (dg.sum(0) if gates.dim() == 1 else dg).to(gates.dtype), dA, dB


def _run_backward(
    call: _Call, dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], dx: Tensor, dg: Tensor | None, dA: list[Tensor],
    dB: list[Tensor], need_dx: bool, need_dA: Sequence[bool], need_dB: Sequence[bool],
) -> None:  # fmt: skip
    """Fill dx, dg, dA and dB. u is made where dy is read anyway: in dx's GEMM or beside dB."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    m, width = len(dy), call.layout.width
    strategy = _strategy(call, call.choice.backward, weight)
    A_RK, B_NR = stack_rows(A), stack_columns(B)
    a_strides, b_strides = A_RK.stride(), B_NR.stride()[::-1]
    need_u = need_dx or dg is not None or any(need_dA)
    u_from_dx = need_dx and strategy == "fused"
    ug_MW = call.empty(m if need_u else 0, width)
    u_MW = call.empty(m, width, dtype=torch.float32) if dg is not None else None

    partial_u = None
    if any(need_dB):
        assert h is not None
        wanted = (B_NR, b_strides) if need_u and not u_from_dx else None
        partial_u = _outer(call, dy, h, dB, need_dB, gate=True, drop=False, b=wanted)
    if partial_u is not None:
        _combine(call, partial_u, ug_MW, h, dg)
    elif need_u and not u_from_dx:
        _shrink(call, dy, B_NR, b_strides, ug_MW, u_MW, drop=False)
    if need_dx:
        base = "gemm"
        if weight is None:
            base = "zero"
        elif strategy == "split":
            base = "add"
            torch.mm(dy, weight, out=dx)
        _expand(
            call, call.choice.dx, dy, None if weight is None else weight.t(), None, dx, B_NR,
            b_strides, A_RK, a_strides, ug_MW, u_MW, base=base, fused=u_from_dx, drop=True,
        )  # fmt: skip
    if partial_u is None and u_MW is not None:
        _combine(call, u_MW, None, h, dg)
    if any(need_dA):
        assert x is not None
        x = x if x.stride(-1) == 1 else x.contiguous()
        _outer(call, x, ug_MW, dA, need_dA, gate=False, drop=True)


def _call(
    x: Tensor, A: Sequence[Tensor], m: int, k: int, n: int, gates: Tensor | None,
    expert_idxs: Tensor | None, offsets: Tensor | None, experts: Tensor | None,
    scale: Sequence[float], dropout_p: float, seed: Tensor | None, choice: Choice | None,
) -> _Call:  # fmt: skip
    ranks = tuple(a.shape[0] for a in A)
    if choice is None:
        choice = choose(x.device, x.dtype, A[0].dtype, m, k, n, sum(ranks))
    width = row_width(ranks, experts)
    runs = read_runs(offsets, experts, seed, m, len(ranks))
    return _Call(
        layout=layout(m, ranks, tuple(scale), width, runs, dropout_p > 0.0, x.device),
        choice=choice,
        dtype=torch.promote_types(x.dtype, A[0].dtype),
        gates=gates,
        expert_idxs=None if expert_idxs is None else expert_idxs.contiguous(),
        dropout_p=dropout_p,
        seed=seed,
        like=x,
    )


def _strategy(call: _Call, wanted: str, weight: Tensor | None) -> str:
    """The wanted strategy where this call allows it."""
    if weight is None:
        return "split"
    return "extend" if wanted == "fused" and not call.dense else wanted


def _shrink(
    call: _Call, x: Tensor, a: Tensor, a_strides: Sequence[int], gated: Tensor,
    raw: Tensor | None, *, drop: bool,
) -> None:  # fmt: skip
    """gated (and raw): p = drop(x) aᵀ, a read by (rank, column) strides."""
    tiles, (m, c) = call.choice.shrink, x.shape
    items = None if call.dense else call.layout.items(tiles.block_m)
    count = _ceil_div(m, tiles.block_m) if items is None else len(items)
    if count == 0:
        return
    idle = _multiprocessors(x.device) // count
    split = max(1, min(idle, c // (4 * tiles.block_k)))
    partial = call.empty(split, m, call.layout.width, dtype=torch.float32) if split > 1 else gated
    shrink_kernel[(count, split)](
        x_ptr=x, a_ptr=a, raw_ptr=gated if raw is None else raw, gated_ptr=gated,
        partial_ptr=partial, items_ptr=x if items is None else items, M=m, C=c,
        R=call.layout.total, width=call.layout.width, stride_xm=x.stride(0),
        stride_ar=a_strides[0], stride_ac=a_strides[1], BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_k, BLOCK_R=call.layout.block_r, SPLIT=split, DENSE=call.dense,
        RAW=raw is not None, PRECISION=_mixture_precision(call, x),
        num_warps=tiles.warps, num_stages=tiles.stages, **call.routing(), **call.dropout(drop),
    )  # fmt: skip
    if split > 1:
        _combine(call, partial, gated, None, None, raw=raw)


def _expand(
    call: _Call, tiles: Tiles, x: Tensor, w: Tensor | None, bias: Tensor | None, y: Tensor,
    a: Tensor, a_strides: Sequence[int], b: Tensor, b_strides: Sequence[int], p: Tensor | None,
    raw: Tensor | None, *, base: str, fused: bool, drop: bool,
) -> None:  # fmt: skip
    """y [M, O] = base + p b. w [O, C]; fused: p and raw are made here from a."""
    (m, o), c = y.shape, x.shape[1]
    dropout = call.dropout(drop)
    if not call.dense:  # the pieces' loop, and a dropped product of its own, need the registers
        tiles = replace(tiles, block_n=min(tiles.block_n, 64 if dropout["DROPOUT"] else 128))
    by_row = w is not None and w.stride(1) == 1
    rows_of_w = w if by_row or w is None else w.t()
    tma = tiles.tma and base == "gemm" and rows_of_w is not None and _describable(x, rows_of_w)
    if fused:
        tma = tma and _describable(a)
    pieces, offsets = (x, x) if call.dense else call.layout.tiles(tiles.block_m)
    x_arg, w_arg, a_arg = x, x if w is None else w, a
    if tma:
        assert rows_of_w is not None
        k, n, r = tiles.block_k, tiles.block_n, call.layout.block_r
        x_arg = TensorDescriptor.from_tensor(x, [tiles.block_m, k])
        w_arg = TensorDescriptor.from_tensor(rows_of_w, [n, k] if by_row else [k, n])
        if fused:
            a_arg = TensorDescriptor.from_tensor(a, [r, k] if a_strides[1] == 1 else [k, r])
    grid = _ceil_div(m, tiles.block_m) * _ceil_div(o, tiles.block_n)
    if tiles.persistent:
        grid = min(grid, _multiprocessors(x.device))
    expand_kernel[(grid,)](
        x_ptr=x_arg, w_ptr=w_arg, bias_ptr=x if bias is None else bias, y_ptr=y, a_ptr=a_arg,
        b_ptr=b, raw_ptr=y if raw is None else raw, p_ptr=call.empty(0) if p is None else p,
        piece_ptr=pieces, piece_offset_ptr=offsets, M=m, C=c, N=o, R=call.layout.total,
        width=call.layout.width, stride_xm=x.stride(0),
        stride_wc=0 if w is None else w.stride(1), stride_wo=0 if w is None else w.stride(0),
        stride_ar=a_strides[0], stride_ac=a_strides[1], stride_br=b_strides[0],
        stride_bo=b_strides[1], BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k, BLOCK_R=call.layout.block_r, GROUP_M=8, BASE=base, SHRINK=fused,
        DENSE=call.dense, BIAS=bias is not None, TMA=tma, W_BY_ROW=by_row,
        A_BY_ROW=a_strides[1] == 1, RAW=fused and raw is not None,
        SAVE_P=fused and p is not None,
        PRECISION=_base_precision(x), P_PRECISION=_mixture_precision(call, x),
        num_warps=tiles.warps, num_stages=tiles.stages, **call.routing(), **dropout,
    )  # fmt: skip


def _outer(
    call: _Call, d: Tensor, p: Tensor, grads: list[Tensor], need: Sequence[bool], *, gate: bool,
    drop: bool, b: tuple[Tensor, Sequence[int]] | None = None,
) -> Tensor | None:  # fmt: skip
    """Fill grads[e] = p_eᵀ drop(d) (of dB: its transpose, as gate is set) where needed.

    Returns the partial sums of d b [c tiles, M, W] when b is given.
    """
    tiles, (m, c) = call.choice.outer, d.shape
    width = call.layout.width
    block_c = tiles.block_n if call.layout.block_r <= 64 else min(64, tiles.block_n)
    tiles_c = _ceil_div(c, block_c)
    chunks = max(1, 2 * _multiprocessors(d.device) // tiles_c)
    rows = tiles.block_m * _ceil_div(m, tiles.block_m * chunks)
    items = call.layout.gradient_items(rows, need)
    partial_w = call.empty(items.count * items.block_s, c, dtype=torch.float32)
    partial_u = None if b is None else call.empty(tiles_c, m, width, dtype=torch.float32)
    b_tensor, b_strides = (d, (0, 0)) if b is None else b
    precision = _mixture_precision(call, d)
    if items.count:
        outer_kernel[(items.count, tiles_c)](
            d_ptr=d, p_ptr=p, b_ptr=b_tensor, partial_w_ptr=partial_w,
            partial_u_ptr=partial_w if partial_u is None else partial_u, items_ptr=items.items,
            M=m, C=c, width=width, stride_dm=d.stride(0), stride_br=b_strides[0],
            stride_bc=b_strides[1], BLOCK_M=tiles.block_m, BLOCK_C=block_c,
            BLOCK_R=call.layout.block_r, BLOCK_S=items.block_s, GATE=gate, SHRINK=b is not None,
            PRECISION=precision, num_warps=tiles.warps, num_stages=tiles.stages,
            **call.routing(), **call.dropout(drop),
        )  # fmt: skip
    outs = [grad for grad, wanted in zip(grads, need, strict=True) if wanted]
    for first in range(0, len(outs), _SUMMED_AT_ONCE):
        group = tuple(outs[first : first + _SUMMED_AT_ONCE])
        outer_sum_kernel[(_ceil_div(c, 128), len(group))](
            partial_w, group, items.ranks, items.entries, items.entry_offsets, first, c,
            BLOCK_S=items.block_s, BLOCK_R=min(64, rank_block([items.max_rank])), BLOCK_C=128,
            COUNT=len(group), TRANSPOSE=gate, num_warps=4,
        )  # fmt: skip
    return partial_u


def _combine(
    call: _Call, partial: Tensor, gated: Tensor | None, h: Tensor | None, dg: Tensor | None,
    *, raw: Tensor | None = None,
) -> None:  # fmt: skip
    """gated, raw and dg from partial sums [S, M, W] (or a single [M, W])."""
    splits, m = (1, len(partial)) if partial.dim() == 2 else partial.shape[:2]
    block_m = 32
    items = None if call.dense else call.layout.expert_items(block_m)
    if items is not None and len(items) == 0:
        return
    ranks = call.layout.ranks
    grid = (_ceil_div(m, block_m), len(ranks)) if items is None else (len(items), 1)
    combine_kernel[grid](
        partial_ptr=partial, raw_ptr=partial if raw is None else raw,
        gated_ptr=partial if gated is None else gated, h_ptr=partial if h is None else h,
        dg_ptr=partial if dg is None else dg, rank_offset_ptr=call.layout.by_rank.offset,
        items_ptr=partial if items is None else items, M=m, width=call.layout.width,
        splits=splits, stride_dg=0 if dg is None else dg.stride(0), BLOCK_M=block_m,
        BLOCK_R=min(64, rank_block(ranks)), DENSE=call.dense, RAW=raw is not None,
        GATED=gated is not None, DG=dg is not None, num_warps=4, **call.routing(),
    )  # fmt: skip


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def _describable(*matrices: Tensor) -> bool:
    """What a tensor descriptor needs: 16-byte rows and base, columns side by side, no overlap."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def _base_precision(x: Tensor) -> str:
    """fp32 as torch would: TF32 where the user allowed it, else three TF32 products."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _mixture_precision(call: _Call, x: Tensor) -> str:
    """16-bit x with fp32 adapters: one TF32 product, exact in x and 8 times finer than y's bf16."""
    if call.dtype == torch.float32 and x.dtype != torch.float32 and not torch.version.hip:
        return "tf32"
    return _base_precision(x)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter's programs run one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count
