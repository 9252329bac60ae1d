"""shrink: p[m, r] = sum over c of drop(x[m, c]) a[r, c], with the gate in the epilogue.

Forward: x is x and a is A, giving h. Backward: x is dy and a is B read as [R, N], giving u.

    x [M, C], a (rank, column) by strides -> raw [M, width], gated [M, width]   (SPLIT == 1)
                                          -> partial [SPLIT, M, width] fp32     (SPLIT > 1)

Bytes: M C + R C read (x once for every `BLOCK_R` ranks, and once an expert with dropout), 2 M R
written. FLOPs: 2 M C R. Bound by x's bandwidth up to R of about 200 in bf16 on an H100.
Few rows leave multiprocessors idle: SPLIT programs then share a row tile's columns, and combine.py
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
    load_mask,
    load_piece,
    narrow,
)


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x_ptr, a_ptr, raw_ptr, gated_ptr, partial_ptr,
    gates_ptr, idxs_ptr, expert_ptr, scale_ptr, items_ptr,
    M, C, R, width,
    stride_xm, stride_ar, stride_ac, stride_gm, stride_ge,
    seed_ptr, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    DENSE: tl.constexpr, RAW: tl.constexpr,
    GATES: tl.constexpr, TOP_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, split = tl.program_id(0), tl.program_id(1)
    if DENSE:
        row_begin, row_end = item.to(tl.int64) * BLOCK_M, M
        rank_begin, rank_end, column, _expert = 0, R, 0, 0
    else:
        row_begin, row_end, rank_begin, rank_end, column, _expert = load_piece(items_ptr, item, 9)
    row_m = row_begin + tl.arange(0, BLOCK_M)
    row_ok = row_m < row_end
    rank_r = rank_begin + tl.arange(0, BLOCK_R)
    rank_ok = rank_r < rank_end
    expert_r = tl.load(expert_ptr + rank_r, mask=rank_ok, other=0)
    scale_r = tl.load(scale_ptr + rank_r, mask=rank_ok, other=0.0)
    coef_mr, exists_mr = coefficients(
        gates_ptr, idxs_ptr, expert_r, scale_r, row_m, row_ok, stride_gm, stride_ge, GATES, TOP_K
    )

    end = C
    if TOP_K > 0:  # no row of the tile lists any expert of these ranks
        wanted = exists_mr & row_ok[:, None] & rank_ok[None, :]
        end = tl.where(tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0, C, 0)
    acc_mr = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if DROPOUT:
        seed, mask_row, mask_expert = load_mask(items_ptr, item, seed_ptr, 9)
    for start in range(split * BLOCK_C, end, BLOCK_C * SPLIT):
        col_c = start + tl.arange(0, BLOCK_C)
        col_ok = col_c < C
        x_mc = tl.load(
            x_ptr + row_m[:, None] * stride_xm + col_c[None, :],
            mask=row_ok[:, None] & col_ok[None, :], other=0,
        ).to(gated_ptr.dtype.element_ty)  # fmt: skip
        if DROPOUT:
            keep_mc = keep_mask(seed, mask_expert, row_m - mask_row, col_c, threshold)
            x_mc = tl.where(keep_mc, x_mc, 0.0)
        a_rc = load_by_rank(
            a_ptr, rank_r, rank_ok, col_c, col_ok, stride_ar, stride_ac, gated_ptr.dtype.element_ty
        )
        acc_mr = dot(x_mc, tl.trans(a_rc), acc_mr, PRECISION)
    if DROPOUT:
        acc_mr = acc_mr * keep_scale

    offset_mr = row_m[:, None] * width + (column + tl.arange(0, BLOCK_R))[None, :]
    ok_mr = row_ok[:, None] & rank_ok[None, :]
    if SPLIT > 1:
        offset_mr += split.to(tl.int64) * M * width
        tl.store(partial_ptr + offset_mr, acc_mr, mask=ok_mr)
    else:
        if RAW:
            raw_mr = narrow(acc_mr, raw_ptr.dtype.element_ty)
            tl.store(raw_ptr + offset_mr, raw_mr, mask=ok_mr)
        gated_mr = gated(acc_mr, coef_mr, exists_mr, TOP_K)
        gated_mr = narrow(gated_mr, gated_ptr.dtype.element_ty)
        tl.store(gated_ptr + offset_mr, gated_mr, mask=ok_mr)
