"""combine: add the partial products of shrink or of the outer kernel, gate them, and make dg.

    partial [S, M, width] fp32 -> raw [M, width]      p = sum over s, in order of s
                                  gated [M, width]    p * gate * scale, 0 where the pair is not
                                  dg [M, E | k] fp32  s_e * sum over the ranks of e of h p

One item is BLOCK_M rows and one expert, so that dg needs no second pass. Two runs give the same
bits. Bytes: S M R * 4 read, up to 2 M R written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedms.kernels.triton.tile import coefficients, gated, locate, narrow


@triton.jit
def combine_item(
    item, partial_ptr, raw_ptr, gated_ptr, h_ptr, dg_ptr, routing, where, M, width, splits,
    stride_dg, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """raw, gated and dg of one item; what is None is not made. `where` has whole experts."""
    row_begin, row_end, rank_begin, rank_end, column, expert, _, _ = locate(
        where, item, M, 0, BLOCK_M
    )
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
        if raw_ptr is not None:
            raw_mr = narrow(sum_mr, raw_ptr.dtype.element_ty)
            tl.store(raw_ptr + offset_mr, raw_mr, mask=ok_mr)
        if gated_ptr is not None:
            coef_mr, exists_mr = coefficients(routing, rank_r, rank_ok, row_m, row_ok, TOP_K)
            gated_mr = gated(sum_mr, coef_mr, exists_mr, TOP_K)
            gated_mr = narrow(gated_mr, gated_ptr.dtype.element_ty)
            tl.store(gated_ptr + offset_mr, gated_mr, mask=ok_mr)
        if dg_ptr is not None:
            scale_r = tl.load(routing.scale + rank_r, mask=rank_ok, other=0.0)
            h_mr = tl.load(h_ptr + offset_mr, mask=ok_mr, other=0).to(tl.float32)
            dot_m += tl.sum(h_mr * sum_mr * scale_r[None, :], 1)
    if dg_ptr is not None:
        if TOP_K > 0:
            for j in tl.static_range(TOP_K):
                idx_m = tl.load(routing.idxs + row_m * TOP_K + j, mask=row_ok, other=-1)
                tl.store(dg_ptr + row_m * stride_dg + j, dot_m, mask=row_ok & (idx_m == expert))
        else:
            tl.store(dg_ptr + row_m * stride_dg + expert, dot_m, mask=row_ok)


@triton.jit(do_not_specialize=["M", "splits"])
def combine_kernel(
    partial_ptr, raw_ptr, gated_ptr, h_ptr, dg_ptr, routing, where, M, width, splits, stride_dg,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    combine_item(
        tl.program_id(0), partial_ptr, raw_ptr, gated_ptr, h_ptr, dg_ptr, routing, where, M, width,
        splits, stride_dg, BLOCK_M, BLOCK_R, TOP_K,
    )  # fmt: skip
