"""combine: sum the partial products of shrink or of the outer kernel, gate them, and make dg.

    partial [S, M, width] fp32 -> raw [M, width]      p = sum over s, in order of s
                                  gated [M, width]    p * gate * scale, 0 where the pair is not
                                  dg [M, E | k] fp32  s_e * sum over the ranks of e of h p

One program for BLOCK_M rows and one expert, so that dg needs no second pass. Two runs give the
same bits. Bytes: S M R * 4 read, up to 2 M R written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedms.kernels.triton.tile import coefficients, gated, load_piece, narrow


@triton.jit(do_not_specialize=["M", "splits"])
def combine_kernel(
    partial_ptr, raw_ptr, gated_ptr, h_ptr, dg_ptr,
    gates_ptr, idxs_ptr, expert_ptr, scale_ptr, rank_offset_ptr, items_ptr,
    M, width, splits, stride_gm, stride_ge, stride_dg,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, DENSE: tl.constexpr,
    RAW: tl.constexpr, GATED: tl.constexpr, DG: tl.constexpr,
    GATES: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if DENSE:
        row_begin, row_end, expert = item.to(tl.int64) * BLOCK_M, M, tl.program_id(1)
        rank_begin = tl.load(rank_offset_ptr + expert)
        rank_end = tl.load(rank_offset_ptr + expert + 1)
        column = rank_begin
    else:
        row_begin, row_end, rank_begin, rank_end, column, expert = load_piece(items_ptr, item, 9)
    row_m = row_begin + tl.arange(0, BLOCK_M)
    row_ok = row_m < row_end

    dot_m = tl.zeros([BLOCK_M], tl.float32)
    for start in range(rank_begin, rank_end, BLOCK_R):
        rank_r = start + tl.arange(0, BLOCK_R)
        rank_ok = rank_r < rank_end
        offset_mr = row_m[:, None] * width + (column + rank_r - rank_begin)[None, :]
        ok_mr = row_ok[:, None] & rank_ok[None, :]
        sum_mr = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for s in range(splits):
            at_mr = offset_mr + s * width * M.to(tl.int64)
            sum_mr += tl.load(partial_ptr + at_mr, mask=ok_mr, other=0)
        if RAW:
            raw_mr = narrow(sum_mr, raw_ptr.dtype.element_ty)
            tl.store(raw_ptr + offset_mr, raw_mr, mask=ok_mr)
        if GATED:
            expert_r = tl.load(expert_ptr + rank_r, mask=rank_ok, other=0)
            scale_r = tl.load(scale_ptr + rank_r, mask=rank_ok, other=0.0)
            coef_mr, exists_mr = coefficients(
                gates_ptr, idxs_ptr, expert_r, scale_r, row_m, row_ok, stride_gm, stride_ge,
                GATES, TOP_K,
            )  # fmt: skip
            gated_mr = gated(sum_mr, coef_mr, exists_mr, TOP_K)
            gated_mr = narrow(gated_mr, gated_ptr.dtype.element_ty)
            tl.store(gated_ptr + offset_mr, gated_mr, mask=ok_mr)
        if DG:
            scale_r = tl.load(scale_ptr + rank_r, mask=rank_ok, other=0.0)
            h_mr = tl.load(h_ptr + offset_mr, mask=ok_mr, other=0).to(tl.float32)
            dot_m += tl.sum(h_mr * sum_mr * scale_r[None, :], 1)
    if DG:
        if TOP_K > 0:
            for j in tl.static_range(TOP_K):
                idx_m = tl.load(idxs_ptr + row_m * TOP_K + j, mask=row_ok, other=-1)
                tl.store(dg_ptr + row_m * stride_dg + j, dot_m, mask=row_ok & (idx_m == expert))
        else:
            tl.store(dg_ptr + row_m * stride_dg + expert, dot_m, mask=row_ok)
