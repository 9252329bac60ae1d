"""shrink: p[m, r] = sum over c of drop(x[m, c]) a[r, c], with the gate in the epilogue.

Forward: x is x and a is A, giving h. Backward: x is dy and a is B read as [R, N], giving u.

    x [M, C], a (rank, column) by strides -> raw [M, width], gated [M, width]   (SPLIT == 1)
                                          -> partial [SPLIT, M, width] fp32     (SPLIT > 1)

Bytes: M C + R C read (x once for every `BLOCK_R` ranks, and once an expert with dropout), 2 M R
written. FLOPs: 2 M C R. Bound by x's bandwidth up to R of about 200 in bf16 on an H100.
Few rows leave multiprocessors idle: SPLIT programs then share a row tile's columns, and combine
adds what they found.
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
    locate,
    narrow,
)


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x_ptr, a_ptr, raw_ptr, gated_ptr, partial_ptr, routing, dropout, where,
    M, C, R, width, stride_xm, stride_ar, stride_ac,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, split = tl.program_id(0), tl.program_id(1)
    P_DTYPE: tl.constexpr = gated_ptr.dtype.element_ty
    row_begin, row_end, rank_begin, rank_end, column, expert, seed, seed_row = locate(
        where, item, M, R, BLOCK_M
    )
    row_m = row_begin + tl.arange(0, BLOCK_M)
    row_ok = row_m < row_end
    rank_r = rank_begin + tl.arange(0, BLOCK_R)
    rank_ok = rank_r < rank_end
    coef_mr, exists_mr = coefficients(routing, rank_r, rank_ok, row_m, row_ok, TOP_K)

    end = C
    if TOP_K > 0:  # no row of the tile lists any expert of these ranks
        wanted = exists_mr & row_ok[:, None] & rank_ok[None, :]
        end = tl.where(tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0, C, 0)
    acc_mr = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * BLOCK_C, end, BLOCK_C * SPLIT):
        col_c = start + tl.arange(0, BLOCK_C)
        col_ok = col_c < C
        x_mc = tl.load(
            x_ptr + row_m[:, None] * stride_xm + col_c[None, :],
            mask=row_ok[:, None] & col_ok[None, :], other=0,
        ).to(P_DTYPE)  # fmt: skip
        if dropout is not None:
            keep_mc = keep_mask(dropout, seed, expert, row_m - seed_row, col_c)
            x_mc = tl.where(keep_mc, x_mc, 0.0)
        a_rc = load_by_rank(
            a_ptr, rank_r, rank_ok, col_c, col_ok, stride_ar, stride_ac, P_DTYPE
        )  # fmt: skip
        acc_mr = dot(x_mc, tl.trans(a_rc), acc_mr, PRECISION)
    if dropout is not None:
        acc_mr = acc_mr * dropout.keep_scale

    offset_mr = row_m[:, None] * width + (column + tl.arange(0, BLOCK_R))[None, :]
    ok_mr = row_ok[:, None] & rank_ok[None, :]
    if SPLIT > 1:
        offset_mr += split.to(tl.int64) * M * width
        tl.store(partial_ptr + offset_mr, acc_mr, mask=ok_mr)
    else:
        if raw_ptr is not None:
            raw_mr = narrow(acc_mr, raw_ptr.dtype.element_ty)
            tl.store(raw_ptr + offset_mr, raw_mr, mask=ok_mr)
        gated_mr = narrow(gated(acc_mr, coef_mr, exists_mr, TOP_K), P_DTYPE)
        tl.store(gated_ptr + offset_mr, gated_mr, mask=ok_mr)
