"""outer: one pass over d [M, C] for a side's weight gradients and, at wish, for u.

    partial_w[item, s, c] = sum over the item's rows of p[m, s] drop(d[m, c])    (outer_kernel)
    dw_e[r, c] = sum over the items that have e, in their order                  (outer_sum_kernel)
    partial_u[c tile, m, r] = sum over the tile's columns of d[m, c] b[c, r]     (combine.py)

    side A, dA from x:          d = x, p = the gated u
    side B, dB and u from dy:   d = dy, p = h gated here, b = B; dw is dBᵀ, transposed in its sum

d is read once. Only ranks `span_begin:span_end` of an item are computed for dw: from its first to
its last trainable expert. Nothing is added atomically, so two runs give the same bits; the price
is the partial sums: 4 C R bytes an item, and 4 M R bytes a column tile for u, which is why these
are wide. Both sides may be one launch; sums of both sides and dg always are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fedms.kernels.triton.combine import combine_item
from fedms.kernels.triton.tile import (
    coefficients,
    dot,
    gated,
    keep_mask,
    load_by_rank,
    locate,
    narrow,
)


class Side(NamedTuple):
    """What outer_kernel reads and writes of one side.

    spans [entries of where, 2]: span_begin, span_end. rows: of an item that has none of its own.
    b, partial_u: None where u is not wanted. partial_w [items, BLOCK_S, C].
    """

    d: Any
    p: Any
    b: Any
    partial_w: Any
    partial_u: Any
    where: Any
    spans: Any
    rows: Any
    C: Any
    stride_d: Any
    stride_br: Any
    stride_bc: Any


class Sum(NamedTuple):
    """What outer_sum_kernel reads and writes of one side.

    table: for each gradient (first part, last part, rank), then the parts (entry, row in its span,
    first and last of the expert's ranks there). An item is an entry plus `entries` times a chunk.
    """

    partial_w: Any
    outs: Any
    table: Any
    parts: Any  # where they begin in the table
    entries: Any
    chunks: Any
    C: Any


@triton.jit
def _outer_side(
    side, program, routing, dropout, M, width,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    GATE: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    P_DTYPE: tl.constexpr = side.p.dtype.element_ty
    tiles_c = tl.cdiv(side.C, BLOCK_C)  # neighbours share rows
    item, tile_c = program // tiles_c, program % tiles_c
    row_begin, row_end, rank_begin, rank_end, column, expert, seed, seed_row = locate(
        side.where, item, M, 0, side.rows
    )
    entry = item
    if side.where.count is not None:
        entry = item % side.where.count
    span_begin, span_end = tl.load(side.spans + entry * 2), tl.load(side.spans + entry * 2 + 1)

    col_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col_c < side.C
    span_s = span_begin + tl.arange(0, BLOCK_S)
    span_ok = span_s < span_end
    rank_r = rank_begin + tl.arange(0, BLOCK_R)
    rank_ok = rank_r < rank_end
    if side.b is not None:
        b_rc = load_by_rank(
            side.b, rank_r, rank_ok, col_c, col_ok, side.stride_br, side.stride_bc, P_DTYPE
        )
        b_cr = tl.trans(b_rc)

    acc_sc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(row_begin, row_end, BLOCK_M):
        row_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        row_ok = row_m < row_end
        d_mc = tl.load(
            side.d + row_m[:, None] * side.stride_d + col_c[None, :],
            mask=row_ok[:, None] & col_ok[None, :], other=0,
        ).to(P_DTYPE)  # fmt: skip
        if side.b is not None:
            u_mr = dot(d_mc, b_cr, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            u_offset_mr = row_m[:, None] * width + (column + tl.arange(0, BLOCK_R))[None, :]
            tl.store(
                side.partial_u + tile_c.to(tl.int64) * M * width + u_offset_mr, u_mr,
                mask=row_ok[:, None] & rank_ok[None, :],
            )  # fmt: skip
        p_ms = tl.load(
            side.p + row_m[:, None] * width + (column + span_s - rank_begin)[None, :],
            mask=row_ok[:, None] & span_ok[None, :], other=0,
        )  # fmt: skip
        if GATE:
            coef_ms, exists_ms = coefficients(routing, span_s, span_ok, row_m, row_ok, TOP_K)
            p_ms = narrow(gated(p_ms.to(tl.float32), coef_ms, exists_ms, TOP_K), P_DTYPE)
        if dropout is not None:
            keep_mc = keep_mask(dropout, seed, expert, row_m - seed_row, col_c)
            d_mc = tl.where(keep_mc, d_mc, 0.0)
        acc_sc = dot(tl.trans(p_ms), d_mc, acc_sc, PRECISION)
    if dropout is not None:
        acc_sc = acc_sc * dropout.keep_scale
    row_s = item.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    tl.store(
        side.partial_w + row_s[:, None] * side.C + col_c[None, :], acc_sc,
        mask=span_ok[:, None] & col_ok[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "programs_a"])
def outer_kernel(
    a, b, routing, dropout, M, width, programs_a,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S_A: tl.constexpr, BLOCK_S_B: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first `programs_a` programs are side A's. A side that is not wanted has BLOCK_S 0.

    (Triton 3.6 cannot ask whether a tuple that holds None is None, nor stop at the first `and`.)
    """
    program = tl.program_id(0)
    if BLOCK_S_A > 0:  # noqa: SIM102
        if program < programs_a:
            _outer_side(
                a, program, routing, dropout, M, width, BLOCK_M, BLOCK_C, BLOCK_R, BLOCK_S_A,
                False, TOP_K, PRECISION,
            )  # fmt: skip
    if BLOCK_S_B > 0:  # noqa: SIM102
        if program >= programs_a:
            _outer_side(
                b, program - programs_a, routing, None, M, width, BLOCK_M, BLOCK_C, BLOCK_R,
                BLOCK_S_B, True, TOP_K, PRECISION,
            )  # fmt: skip


@triton.jit
def _sum_side(
    side, program, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """One gradient's columns. `outs` is a tuple, as the gradients are tensors of their own."""
    slot = program % COUNT
    col_c = program // COUNT * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col_c < side.C
    begin, end = tl.load(side.table + slot * 3), tl.load(side.table + slot * 3 + 1)
    rank = tl.load(side.table + slot * 3 + 2)
    for start in range(0, rank, BLOCK_R):
        rank_r = start + tl.arange(0, BLOCK_R)
        acc_rc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for chunk in range(side.chunks):
            for part in range(begin, end):
                at = side.table + side.parts + part * 4
                item = tl.load(at) + chunk * side.entries
                rank_begin, rank_end = tl.load(at + 2), tl.load(at + 3)
                row_r = item.to(tl.int64) * BLOCK_S + tl.load(at + 1) + rank_r - rank_begin
                here_r = (rank_r >= rank_begin) & (rank_r < rank_end)
                acc_rc += tl.load(
                    side.partial_w + row_r[:, None] * side.C + col_c[None, :],
                    mask=here_r[:, None] & col_ok[None, :], other=0,
                )  # fmt: skip
        if TRANSPOSE:
            offset_rc = col_c.to(tl.int64)[None, :] * rank + rank_r[:, None]
        else:
            offset_rc = rank_r.to(tl.int64)[:, None] * side.C + col_c[None, :]
        ok_rc = (rank_r < rank)[:, None] & col_ok[None, :]
        for e in tl.static_range(COUNT):
            if slot == e:
                out_rc = narrow(acc_rc, side.outs[e].dtype.element_ty)
                tl.store(side.outs[e] + offset_rc, out_rc, mask=ok_rc)


@triton.jit(do_not_specialize=["M", "programs_a", "programs_b"])
def outer_sum_kernel(
    a, b, u_ptr, h_ptr, dg_ptr, routing, where, M, width, stride_dg, programs_a, programs_b,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S_A: tl.constexpr, BLOCK_S_B: tl.constexpr, COUNT_A: tl.constexpr,
    COUNT_B: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """dA, dB and dg: programs of side A, then of side B, then items of combine.

    A side that is not wanted has COUNT 0; without dg its pointer is None. A gradient whose expert
    has no rows gets zeros.
    """
    program = tl.program_id(0)
    if COUNT_A > 0:  # noqa: SIM102
        if program < programs_a:
            _sum_side(a, program, BLOCK_S_A, BLOCK_R, BLOCK_C, COUNT_A, False)
    program -= programs_a
    if COUNT_B > 0:  # noqa: SIM102
        if (program >= 0) & (program < programs_b):
            _sum_side(b, program, BLOCK_S_B, BLOCK_R, BLOCK_C, COUNT_B, True)
    program -= programs_b
    if dg_ptr is not None:  # noqa: SIM102
        if program >= 0:
            combine_item(
                program, u_ptr, None, None, h_ptr, dg_ptr, routing, where, M, width, 1, stride_dg,
                BLOCK_M, BLOCK_R, TOP_K,
            )  # fmt: skip
