"""Device functions that more than one kernel uses: a dot, a pair's coefficient, the mask, pieces.

Shape suffixes: m rows, r stacked ranks, c columns of a tile; all rows are int64, so that M K may
pass 2^31. What a call has not is None, which Triton compiles away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter (of triton 3.7) multiplies bf16 operands as the integers that hold them and
# truncates fp32 to bf16: there `dot` widens its operands, which changes no product, and `narrow`
# rounds to nearest even itself.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


class Routing(NamedTuple):
    """What a pair's coefficient comes from.

    gates: of (m, e) at m * stride_m + e * stride_e; with idxs [M, TOP_K], of row m's j-th listed
    expert at m * stride_m + j * stride_e. expert, scale: of every stacked rank [R].
    """

    gates: Any
    idxs: Any
    expert: Any
    scale: Any
    stride_m: Any
    stride_e: Any


class Dropout(NamedTuple):
    """seed: int64 [] or [S]. An element stays when its hash reaches `threshold`."""

    seed: Any
    threshold: Any
    keep_scale: Any


class Where(NamedTuple):
    """Which rows and ranks a program works on; layout.py has the tables [entries, 8].

    table None: all ranks, no dropout. count None: every entry has rows of its own. Else the table
    has `count` pieces, each for all rows, and rows come by arithmetic.
    """

    table: Any
    count: Any


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
def load_piece(table, index):
    """A line of a table: rows and ranks from and to, column in h, expert, seed, its first row."""
    at = table + index * 8
    row_begin, row_end = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    rank_begin, rank_end, column = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return (
        row_begin, row_end, rank_begin, rank_end, column,
        tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
    )  # fmt: skip


@triton.jit
def locate(where, item, M, R, rows):
    """`load_piece` of a program: where rows come by arithmetic, `rows` of them an item."""
    if where.table is None:
        begin = item.to(tl.int64) * rows
        return begin, tl.minimum(begin + rows, M), 0, R, 0, 0, 0, 0
    elif where.count is None:
        return load_piece(where.table, item)
    else:
        begin = (item // where.count).to(tl.int64) * rows
        piece = load_piece(where.table, item % where.count)
        end = tl.minimum(begin + rows, M)
        return begin, end, piece[2], piece[3], piece[4], piece[5], piece[6], piece[7]


@triton.jit
def load_by_rank(ptr, rank_r, rank_ok, col_c, col_ok, stride_r, stride_c, DTYPE: tl.constexpr):
    """A tile [r, c] of A or B (strides over ranks and columns), zero outside, as DTYPE."""
    offset_rc = rank_r.to(tl.int64)[:, None] * stride_r + col_c.to(tl.int64)[None, :] * stride_c
    return tl.load(ptr + offset_rc, mask=rank_ok[:, None] & col_ok[None, :], other=0).to(DTYPE)


@triton.jit
def coefficients(routing, rank_r, rank_ok, row_m, row_ok, TOP_K: tl.constexpr):
    """gate * scale of every (row, rank) pair as [m, r] fp32, and which pairs exist.

    A pair that `idxs` lists twice counts twice. TOP_K is 0 without idxs.
    """
    expert_r = tl.load(routing.expert + rank_r, mask=rank_ok, other=0)
    scale_r = tl.load(routing.scale + rank_r, mask=rank_ok, other=0.0)
    zero_mr = tl.zeros([row_m.shape[0], rank_r.shape[0]], tl.float32)
    exists_mr = zero_mr == 0.0
    if TOP_K > 0:
        coef_mr = zero_mr
        exists_mr = zero_mr != 0.0
        for j in tl.static_range(TOP_K):
            idx_m = tl.load(routing.idxs + row_m * TOP_K + j, mask=row_ok, other=-1)
            listed_mr = idx_m[:, None] == expert_r[None, :]
            exists_mr = exists_mr | listed_mr
            if routing.gates is None:
                coef_mr += tl.where(listed_mr, 1.0, 0.0)
            else:
                gate_m = tl.load(
                    routing.gates + row_m * routing.stride_m + j * routing.stride_e,
                    mask=row_ok, other=0,
                )  # fmt: skip
                coef_mr += tl.where(listed_mr, gate_m.to(tl.float32)[:, None], 0.0)
        coef_mr = coef_mr * scale_r[None, :]
    elif routing.gates is None:
        coef_mr = zero_mr + scale_r[None, :]
    else:
        gate_mr = tl.load(
            routing.gates + row_m[:, None] * routing.stride_m
            + expert_r[None, :] * routing.stride_e,
            mask=row_ok[:, None], other=0,
        )  # fmt: skip
        coef_mr = gate_mr.to(tl.float32) * scale_r[None, :]
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
def keep_mask(dropout, seed, expert, row_m, column_c):
    """Which elements dropout keeps, [m, c]: the definition in fedms.kernels.dropout."""
    start = tl.load(dropout.seed + seed).to(tl.uint64, bitcast=True)
    key = _mix64(start + (expert + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    z_m = _mix64(key + (row_m + 1).to(tl.uint64) * 0xD1B54A32D192ED03)
    low_m = (z_m & 0xFFFFFFFF).to(tl.uint32)
    high_m = (z_m >> 32).to(tl.uint32)
    v = column_c.to(tl.uint32)[None, :] * 0x9E3779B1 + low_m[:, None]
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = ((v ^ (v >> 15)) ^ high_m[:, None]) * 0x846CA68B
    return (v ^ (v >> 16)) >= dropout.threshold.to(tl.uint32)


@triton.jit
def add_piece(
    acc_mo, p_ptr, b_ptr, piece, dropout, row_m, col_o, col_ok, width, stride_br, stride_bo,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + p b of the rows and ranks of a piece; dropout acts on the product's columns."""
    row_begin, row_end, rank_begin, rank_end, column, expert, seed, seed_row = piece
    rank_r = tl.arange(0, BLOCK_R)
    rank_ok = rank_begin + rank_r < rank_end
    row_ok = (row_m >= row_begin) & (row_m < row_end)
    p_mr = tl.load(
        p_ptr + row_m[:, None] * width + (column + rank_r)[None, :],
        mask=row_ok[:, None] & rank_ok[None, :], other=0,
    )  # fmt: skip
    b_ro = load_by_rank(
        b_ptr, rank_begin + rank_r, rank_ok, col_o, col_ok, stride_br, stride_bo,
        p_ptr.dtype.element_ty,
    )  # fmt: skip
    if dropout is None:
        return dot(p_mr, b_ro, acc_mo, PRECISION)
    else:
        zero_mo = tl.zeros([row_m.shape[0], col_o.shape[0]], tl.float32)
        part_mo = dot(p_mr, b_ro, zero_mo, PRECISION)
        keep_mo = keep_mask(dropout, seed, expert, row_m - seed_row, col_o)
        return acc_mo + tl.where(keep_mo, part_mo * dropout.keep_scale, 0.0)


@triton.jit
def add_pieces(
    acc_mo, p_ptr, b_ptr, where, offsets_ptr, dropout, tile_m, row_m, col_o, col_ok, M, R, width,
    stride_br, stride_bo, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + p b over every piece that meets the row tile.

    `offsets` [tiles + 1] into the table where entries have rows of their own, else None.
    """
    if where.table is None:
        piece = (0, M, 0, R, 0, 0, 0, 0)
        acc_mo = add_piece(
            acc_mo, p_ptr, b_ptr, piece, dropout, row_m, col_o, col_ok, width, stride_br,
            stride_bo, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        first, last = 0, where.count
        if where.count is None:
            first, last = tl.load(offsets_ptr + tile_m), tl.load(offsets_ptr + tile_m + 1)
        for i in range(first, last):
            row_begin, row_end, rank_begin, rank_end, column, expert, seed, seed_row = load_piece(
                where.table, i
            )
            if where.count is not None:
                row_begin, row_end = 0, M
            piece = (row_begin, row_end, rank_begin, rank_end, column, expert, seed, seed_row)
            acc_mo = add_piece(
                acc_mo, p_ptr, b_ptr, piece, dropout, row_m, col_o, col_ok, width, stride_br,
                stride_bo, BLOCK_R, PRECISION,
            )  # fmt: skip
    return acc_mo
