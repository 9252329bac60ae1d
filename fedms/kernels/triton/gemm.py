"""gemm: the base GEMM with the mixture in its accumulator, so that y (or dx) is written once.

    y[m, o] = sum over c of x[m, c] w[c, o] + bias[o] + sum over r of p[m, r] b[r, o]

    forward    w = Wᵀ   p = gated h   b = Bᵀ       x [M, K], y [M, N]
    backward   w = W    p = gated u   b = A        x is dy [M, N], y is dx [M, K]

In here C is the width that is summed over and N that of y, whichever direction it is. p comes from
shrink or combine, or, where `a` is given (strategy fused), from this kernel itself: a second
accumulator, x aᵀ, in the GEMM's own loop over C, gated after it. That saves reading x again and a
launch, and costs R / BLOCK_N of the GEMM in repeated work, as every column tile computes p anew.

Bytes beyond the plain GEMM: M R + R N read; fused: R C read and M R written. FLOPs beyond it:
2 M R N, fused 2 M R C N / BLOCK_N more.

Programs walk the tiles in groups of GROUP_M rows for the L2 cache; a grid below the number of tiles
makes the kernel persistent. TMA: x, w and a are tensor descriptors (Hopper and later). Without
segments and dropout, and with R up to BLOCK_R, p and b are loaded before the loop over C, which
hides them. Otherwise the pieces that meet the row tile are added after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedms.kernels.triton.tile import (
    add_pieces,
    coefficients,
    dot,
    gated,
    load_by_rank,
    narrow,
)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, a_ptr, b_ptr, p_ptr, raw_ptr, routing, dropout, where,
    offsets_ptr,
    M, C, N, R, width, stride_xm, stride_wc, stride_wo, stride_ar, stride_ac, stride_br, stride_bo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, W_BY_ROW: tl.constexpr, A_BY_ROW: tl.constexpr,
    TOP_K: tl.constexpr, P_DTYPE: tl.constexpr, PRECISION: tl.constexpr, P_PRECISION: tl.constexpr,
):  # fmt: skip
    FUSED: tl.constexpr = a_ptr is not None
    DENSE: tl.constexpr = where.table is None
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_o, tl.num_programs(0)):
        first_m = tile // (GROUP_M * tiles_o) * GROUP_M
        height = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_m = first_m + (tile % (GROUP_M * tiles_o)) % height
        tile_o = (tile % (GROUP_M * tiles_o)) // height

        row_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row_m < M
        col_o = tile_o * BLOCK_N + tl.arange(0, BLOCK_N)
        col_ok = col_o < N
        rank_r = tl.arange(0, BLOCK_R)
        rank_ok = rank_r < R
        p_offset_mr = row_m[:, None] * width + rank_r[None, :]
        p_ok = row_ok[:, None] & rank_ok[None, :]
        if DENSE:
            b_ro = load_by_rank(
                b_ptr, rank_r, rank_ok, col_o, col_ok, stride_br, stride_bo, P_DTYPE
            )
            if not FUSED:
                p_mr = tl.load(p_ptr + p_offset_mr, mask=p_ok, other=0)
        if FUSED:
            shrunk_mr = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)

        acc_mo = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, C, BLOCK_K):
            col_c = start + tl.arange(0, BLOCK_K)
            col_c_ok = col_c < C
            if TMA:
                x_mc = x_ptr.load([tile_m * BLOCK_M, start])
                if W_BY_ROW:
                    w_co = w_ptr.load([tile_o * BLOCK_N, start]).T
                else:
                    w_co = w_ptr.load([start, tile_o * BLOCK_N])
            else:
                x_mc = tl.load(
                    x_ptr + row_m[:, None] * stride_xm + col_c[None, :],
                    mask=row_ok[:, None] & col_c_ok[None, :], other=0,
                )  # fmt: skip
                w_co = tl.load(
                    w_ptr + col_c.to(tl.int64)[:, None] * stride_wc
                    + col_o.to(tl.int64)[None, :] * stride_wo,
                    mask=col_c_ok[:, None] & col_ok[None, :], other=0,
                )  # fmt: skip
            acc_mo = dot(x_mc, w_co, acc_mo, PRECISION)
            if FUSED:
                if TMA and A_BY_ROW:
                    a_cr = a_ptr.load([0, start]).T.to(P_DTYPE)
                elif TMA:
                    a_cr = a_ptr.load([start, 0]).to(P_DTYPE)
                else:
                    a_rc = load_by_rank(
                        a_ptr, rank_r, rank_ok, col_c, col_c_ok, stride_ar, stride_ac, P_DTYPE
                    )
                    a_cr = tl.trans(a_rc)
                shrunk_mr = dot(x_mc.to(P_DTYPE), a_cr, shrunk_mr, P_PRECISION)

        if FUSED:
            coef_mr, exists_mr = coefficients(routing, rank_r, rank_ok, row_m, row_ok, TOP_K)
            gated_mr = narrow(gated(shrunk_mr, coef_mr, exists_mr, TOP_K), P_DTYPE)
            # blocks are compared: of a scalar's truth 3.9's interpreter makes a mask of integers
            first_r = tl.zeros([BLOCK_R], tl.int32) == tile_o
            first_ok = p_ok & first_r[None, :]
            if raw_ptr is not None:
                raw_mr = narrow(shrunk_mr, raw_ptr.dtype.element_ty)
                tl.store(raw_ptr + p_offset_mr, raw_mr, mask=first_ok)
            if p_ptr is not None:
                tl.store(p_ptr + p_offset_mr, gated_mr, mask=first_ok)
            acc_mo = dot(gated_mr, b_ro, acc_mo, P_PRECISION)
        elif DENSE:
            acc_mo = dot(p_mr, b_ro, acc_mo, P_PRECISION)
        else:
            acc_mo = add_pieces(
                acc_mo, p_ptr, b_ptr, where, offsets_ptr, dropout, tile_m, row_m, col_o, col_ok,
                M, R, width, stride_br, stride_bo, BLOCK_R, P_PRECISION,
            )  # fmt: skip
        if bias_ptr is not None:
            bias_o = tl.load(bias_ptr + col_o, mask=col_ok, other=0)
            acc_mo += bias_o.to(tl.float32)[None, :]
        tl.store(
            y_ptr + row_m[:, None] * N + col_o[None, :], narrow(acc_mo, y_ptr.dtype.element_ty),
            mask=row_ok[:, None] & col_ok[None, :],
        )  # fmt: skip
