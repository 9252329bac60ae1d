"""Device functions that more than one kernel uses: a dot, the coefficient of a pair, the mask.

Shape suffixes: m rows, r stacked ranks, c columns of a tile; all rows are int64, so that M K may
pass 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter (of triton 3.7) multiplies bf16 operands as the integers that hold them and
# truncates fp32 to bf16: there `dot` widens its operands, which changes no product, and `narrow`
# rounds to nearest even itself.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right in fp32; PRECISION is what fp32 operands get (tf32, tf32x3, ieee)."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """fp32 as DTYPE, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def load_piece(table_ptr, index, WIDTH: tl.constexpr):
    """The first numbers of a table's row, layout.Piece: rows, ranks, column, expert."""
    at = table_ptr + index * WIDTH
    row_begin, row_end = tl.load(at).to(tl.int64), tl.load(at + 1)
    rank_begin, rank_end = tl.load(at + 2), tl.load(at + 3)
    return row_begin, row_end, rank_begin, rank_end, tl.load(at + 4), tl.load(at + 5)


@triton.jit
def load_mask(table_ptr, index, seed_ptr, WIDTH: tl.constexpr):
    """What a piece's dropout mask is a function of: seed; the row that counts as 0; expert."""
    at = table_ptr + index * WIDTH
    return tl.load(seed_ptr + tl.load(at + 6)), tl.load(at + 7), tl.load(at + 8)


@triton.jit
def load_by_rank(ptr, rank_r, rank_ok, col_c, col_ok, stride_r, stride_c, DTYPE: tl.constexpr):
    """A tile [r, c] of A or B (strides over ranks and columns), zero outside, as DTYPE."""
    offset_rc = rank_r.to(tl.int64)[:, None] * stride_r + col_c.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + offset_rc, mask=rank_ok[:, None] & col_ok[None, :], other=0).to(DTYPE)


@triton.jit
def coefficients(
    gates_ptr, idxs_ptr, expert_r, scale_r, row_m, row_ok, stride_gm, stride_ge,
    GATES: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """gate * scale of every (row, rank) pair as [m, r] fp32, and which pairs exist.

    Without TOP_K the gate of (m, e) is at m * stride_gm + e * stride_ge. With it, column j of row m
    holds the gate of the j-th listed expert; a pair listed twice counts twice.
    """
    zero_mr = tl.zeros([row_m.shape[0], expert_r.shape[0]], tl.float32)
    exists_mr = zero_mr == 0.0
    if TOP_K > 0:
        coef_mr = zero_mr
        exists_mr = zero_mr != 0.0
        for j in tl.static_range(TOP_K):
            idx_m = tl.load(idxs_ptr + row_m * TOP_K + j, mask=row_ok, other=-1)
            listed_mr = idx_m[:, None] == expert_r[None, :]
            exists_mr = exists_mr | listed_mr
            if GATES:
                gate_m = tl.load(
                    gates_ptr + row_m * stride_gm + j * stride_ge, mask=row_ok, other=0
                )
                coef_mr += tl.where(listed_mr, gate_m.to(tl.float32)[:, None], 0.0)
            else:
                coef_mr += tl.where(listed_mr, 1.0, 0.0)
        coef_mr = coef_mr * scale_r[None, :]
    elif GATES:
        gate_mr = tl.load(
            gates_ptr + row_m[:, None] * stride_gm + expert_r[None, :] * stride_ge,
            mask=row_ok[:, None], other=0,
        )  # fmt: skip
        coef_mr = gate_mr.to(tl.float32) * scale_r[None, :]
    else:
        coef_mr = zero_mr + scale_r[None, :]
    return coef_mr, exists_mr


@triton.jit
def gated(value_mr, coef_mr, exists_mr, TOP_K: tl.constexpr):
    """value * coef, and zero where the pair does not exist, whatever the value (inf, NaN) is."""
    if TOP_K > 0:
        return tl.where(exists_mr, value_mr * coef_mr, 0.0)
    return value_mr * coef_mr


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep_mask(seed, expert, row_m, column_c, threshold):
    """Which elements dropout keeps, [m, c]: the definition in fedms.kernels.dropout."""
    start_m = tl.zeros([row_m.shape[0]], tl.uint64) + seed.to(tl.uint64)
    key_m = _mix64(start_m + (expert + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    z_m = _mix64(key_m + (row_m + 1).to(tl.uint64) * 0xD1B54A32D192ED03)
    low_m = (z_m & 0xFFFFFFFF).to(tl.uint32)
    high_m = (z_m >> 32).to(tl.uint32)
    v = column_c.to(tl.uint32)[None, :] * 0x9E3779B1 + low_m[:, None]
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = ((v ^ (v >> 15)) ^ high_m[:, None]) * 0x846CA68B
    return (v ^ (v >> 16)) >= threshold.to(tl.uint32)
