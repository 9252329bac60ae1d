"""expand: the mixture alone, written once: before the base GEMM that adds to it, or over a base.

    y[m, o] = base[m, o] + bias[o] + sum over r of p[m, r] b[r, o]

    forward    p = gated h   b = Bᵀ   y [M, N]       base: a quantised layer's result, or None
    backward   p = gated u   b = A    y is dx [M, K]  base: None

The strategy split runs it first and torch's GEMM last, with beta = 1: y is then written here and
read and written in the GEMM's epilogue, which a compute-bound GEMM hides. Rows without experts get
base + bias.

Bytes: M N written, as many read with a base; M R + R N read. FLOPs: 2 M R N. Bound by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedms.kernels.triton.tile import add_pieces, narrow


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    base_ptr, bias_ptr, y_ptr, p_ptr, b_ptr, dropout, where, offsets_ptr,
    M, N, R, width, stride_base, stride_br, stride_bo,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_o = tl.cdiv(N, BLOCK_N)  # neighbours share rows, so that DRAM pages are written whole
    tile_m, tile_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    row_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_o = tile_o * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col_o < N
    ok_mo = (row_m < M)[:, None] & col_ok[None, :]
    acc_mo = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_mo = add_pieces(
        acc_mo, p_ptr, b_ptr, where, offsets_ptr, dropout, tile_m, row_m, col_o, col_ok, M, R,
        width, stride_br, stride_bo, BLOCK_R, PRECISION,
    )  # fmt: skip
    if base_ptr is not None:
        base_mo = tl.load(base_ptr + row_m[:, None] * stride_base + col_o[None, :], mask=ok_mo)
        acc_mo += base_mo.to(tl.float32)
    if bias_ptr is not None:
        bias_o = tl.load(bias_ptr + col_o, mask=col_ok, other=0)
        acc_mo += bias_o.to(tl.float32)[None, :]
    y_mo = narrow(acc_mo, y_ptr.dtype.element_ty)
    tl.store(y_ptr + row_m[:, None] * N + col_o[None, :], y_mo, mask=ok_mo)
