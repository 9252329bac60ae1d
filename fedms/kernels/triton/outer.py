"""outer: one pass over d [M, C] for the weight gradients and, at wish, for u.

    partial_w[item, r, c] = sum over the item's rows of p[m, r] drop(d[m, c])    (outer_kernel)
    dw_e[r, c] = sum over the items that have e, in their order                  (outer_sum_kernel)
    partial_u[c tile, m, r] = sum over the tile's columns of d[m, c] b[c, r]     (combine.py)

    dB and u from dy:  d = dy, p = h gated here, b = B; dw is dBᵀ and is transposed on the way out
    dA from x:         d = x, p = the gated u

d is read once. Only ranks `span_begin:span_end` of an item are computed for dw: from its first to
its last trainable expert. Nothing is added atomically, so two runs give the same bits; the price
is the partial sums: 4 C R bytes an item, and 4 M R bytes a column tile for u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedms.kernels.triton.tile import (
    coefficients,
    dot,
    gated,
    keep_mask,
    load_by_rank,
    load_mask,
    load_piece,
    narrow,
)


@triton.jit(do_not_specialize=["M", "threshold"])
def outer_kernel(
    d_ptr, p_ptr, b_ptr, partial_w_ptr, partial_u_ptr,
    gates_ptr, idxs_ptr, expert_ptr, scale_ptr, items_ptr,
    M, C, width, stride_dm, stride_br, stride_bc, stride_gm, stride_ge,
    seed_ptr, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    GATE: tl.constexpr, SHRINK: tl.constexpr, GATES: tl.constexpr, TOP_K: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, tile_c = tl.program_id(0), tl.program_id(1)
    P_DTYPE: tl.constexpr = p_ptr.dtype.element_ty
    row_begin, row_end, rank_begin, rank_end, column, _expert = load_piece(items_ptr, item, 11)
    span_begin, span_end = tl.load(items_ptr + item * 11 + 9), tl.load(items_ptr + item * 11 + 10)

    col_c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col_c < C
    span_s = span_begin + tl.arange(0, BLOCK_S)
    span_ok = span_s < span_end
    expert_s = tl.load(expert_ptr + span_s, mask=span_ok, other=0)
    scale_s = tl.load(scale_ptr + span_s, mask=span_ok, other=0.0)
    rank_r = rank_begin + tl.arange(0, BLOCK_R)
    rank_ok = rank_r < rank_end
    if SHRINK:
        b_rc = load_by_rank(b_ptr, rank_r, rank_ok, col_c, col_ok, stride_br, stride_bc, P_DTYPE)
        b_cr = tl.trans(b_rc)

    if DROPOUT:
        seed, mask_row, mask_expert = load_mask(items_ptr, item, seed_ptr, 11)
    acc_sc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(row_begin, row_end, BLOCK_M):
        row_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        row_ok = row_m < row_end
        d_mc = tl.load(
            d_ptr + row_m[:, None] * stride_dm + col_c[None, :],
            mask=row_ok[:, None] & col_ok[None, :], other=0,
        ).to(P_DTYPE)  # fmt: skip
        if SHRINK:
            zero_mr = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            u_mr = dot(d_mc, b_cr, zero_mr, PRECISION)
            u_offset_mr = row_m[:, None] * width + (column + tl.arange(0, BLOCK_R))[None, :]
            tl.store(
                partial_u_ptr + tile_c.to(tl.int64) * M * width + u_offset_mr, u_mr,
                mask=row_ok[:, None] & rank_ok[None, :],
            )  # fmt: skip
        p_ms = tl.load(
            p_ptr + row_m[:, None] * width + (column + span_s - rank_begin)[None, :],
            mask=row_ok[:, None] & span_ok[None, :], other=0,
        )  # fmt: skip
        if GATE:
            coef_ms, exists_ms = coefficients(
                gates_ptr, idxs_ptr, expert_s, scale_s, row_m, row_ok, stride_gm, stride_ge,
                GATES, TOP_K,
            )  # fmt: skip
            p_ms = narrow(gated(p_ms.to(tl.float32), coef_ms, exists_ms, TOP_K), P_DTYPE)
        if DROPOUT:
            keep_mc = keep_mask(seed, mask_expert, row_m - mask_row, col_c, threshold)
            d_mc = tl.where(keep_mc, d_mc, 0.0)
        acc_sc = dot(tl.trans(p_ms), d_mc, acc_sc, PRECISION)
    if DROPOUT:
        acc_sc = acc_sc * keep_scale
    row_s = item.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    tl.store(
        partial_w_ptr + row_s[:, None] * C + col_c[None, :], acc_sc,
        mask=span_ok[:, None] & col_ok[None, :],
    )  # fmt: skip


@triton.jit
def outer_sum_kernel(
    partial_w_ptr, out_ptrs, rank_ptr, entry_ptr, entry_offset_ptr, first, C,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Sum each expert's entries (item, row in the item, first rank, last rank) into its tensor.

    One launch writes COUNT tensors: `out_ptrs` is a tuple, because the gradients are tensors of
    their own. Program (c tile, expert). An expert without entries gets zeros.
    """
    slot = tl.program_id(1)
    col_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col_c < C
    begin = tl.load(entry_offset_ptr + first + slot)
    end = tl.load(entry_offset_ptr + first + slot + 1)
    rank = tl.load(rank_ptr + first + slot)
    for start in range(0, rank, BLOCK_R):
        rank_r = start + tl.arange(0, BLOCK_R)
        acc_rc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for entry in range(begin, end):
            at = entry_ptr + entry * 4
            rank_begin, rank_end = tl.load(at + 2), tl.load(at + 3)
            row_r = tl.load(at).to(tl.int64) * BLOCK_S + tl.load(at + 1) + rank_r - rank_begin
            here_r = (rank_r >= rank_begin) & (rank_r < rank_end)
            acc_rc += tl.load(
                partial_w_ptr + row_r[:, None] * C + col_c[None, :],
                mask=here_r[:, None] & col_ok[None, :], other=0,
            )  # fmt: skip
        if TRANSPOSE:
            offset_rc = col_c.to(tl.int64)[None, :] * rank + rank_r[:, None]
        else:
            offset_rc = rank_r.to(tl.int64)[:, None] * C + col_c[None, :]
        for e in tl.static_range(COUNT):
            if slot == e:
                ok_rc = (rank_r < rank)[:, None] & col_ok[None, :]
                out_rc = narrow(acc_rc, out_ptrs[e].dtype.element_ty)
                tl.store(out_ptrs[e] + offset_rc, out_rc, mask=ok_rc)
