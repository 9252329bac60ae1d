"""The backend's steps, prepared for one call signature: tiles, grids, tables and fixed arguments.

Each class is made from the first call's tensors, of which it reads shapes, strides and alignment,
and is then called with any tensors of the same signature (backend.py). Shape suffixes: M rows,
C columns in, O columns out, R stacked ranks, W the ranks that one row of h holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fedms.kernels.tiles import Choice, GemmTiles
from fedms.kernels.triton.combine import combine_kernel
from fedms.kernels.triton.expand import expand_kernel
from fedms.kernels.triton.gemm import gemm_kernel
from fedms.kernels.triton.launch import Launch
from fedms.kernels.triton.layout import Layout, rank_block
from fedms.kernels.triton.outer import Side, Sum, outer_kernel, outer_sum_kernel
from fedms.kernels.triton.shrink import shrink_kernel
from fedms.kernels.triton.tile import Dropout, Routing

_SUMMED_AT_ONCE = 8
"""Gradients of a side that one launch of outer_sum writes; a compiled kernel for each count."""

_SPLIT_PAYS = 125_000
"""Bytes that a multiprocessor reads while a launch more takes place (50 GB/s, 2.5 us: a guess)."""

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Call:
    """What all launches of a call signature share.

    dtype: of the mixture's operands (c). precision: of products of them, base_precision: of the
    base GEMM, where they are fp32.
    """

    layout: Layout
    choice: Choice
    dtype: torch.dtype
    top_k: int
    dropout: bool
    multiprocessors: int
    stream: int
    base_precision: str
    precision: str


class Combine:
    """gated, raw and dg from partial sums [S, M, W]."""

    def __init__(self, call: Call, splits: int, dg_columns: int) -> None:
        layout, block_m = call.layout, 32
        self._where, count = layout.by_expert(block_m)
        self._launch = Launch(
            combine_kernel, (count,), 4, 3, call.stream, M=layout.m, width=layout.width,
            splits=splits, stride_dg=dg_columns, BLOCK_M=block_m,
            BLOCK_R=min(64, rank_block(layout.ranks)), TOP_K=call.top_k,
        )  # fmt: skip

    def __call__(
        self, partial: Tensor, raw: Tensor | None, gated: Tensor | None, h: Tensor | None,
        dg: Tensor | None, routing: Routing,
    ) -> None:  # fmt: skip
        self._launch(partial, raw, gated, h, dg, routing, self._where)


class Shrink:
    """p = drop(x) aᵀ, gated and raw; a is read by (rank, column) strides.

    combines: more than one program shares a row's columns, so a second launch adds their sums and
    makes dg as well.
    """

    def __init__(self, call: Call, x: Tensor, a_strides: Sequence[int], dg_columns: int) -> None:
        tiles, layout, (m, c) = call.choice.shrink, call.layout, x.shape
        self._where, count = layout.where(tiles.block_m)
        program = (tiles.block_m + layout.block_r) * c * x.element_size()
        self._split = min(call.multiprocessors // max(1, count), c // (4 * tiles.block_c))
        if self._split < 2 or program * (1 - 1 / self._split) < _SPLIT_PAYS:
            self._split = 1
        self.combines = self._split > 1
        self._combine = Combine(call, self._split, dg_columns) if self.combines else None
        self._launch = Launch(
            shrink_kernel, (count, self._split), tiles.warps, tiles.stages, call.stream, M=m, C=c,
            R=layout.total, width=layout.width, stride_xm=x.stride(0), stride_ar=a_strides[0],
            stride_ac=a_strides[1], BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c,
            BLOCK_R=layout.block_r, SPLIT=self._split, TOP_K=call.top_k, PRECISION=call.precision,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, a: Tensor, gated: Tensor, raw: Tensor | None, routing: Routing,
        dropout: Dropout | None, h: Tensor | None = None, dg: Tensor | None = None,
    ) -> None:  # fmt: skip
        if self._combine is None:
            self._launch(x, a, raw, gated, None, routing, dropout, self._where)
            return
        partial = gated.new_empty((self._split, *gated.shape), dtype=torch.float32)
        self._launch(x, a, None, gated, partial, routing, dropout, self._where)
        self._combine(partial, raw, gated, h, dg, routing)


class Gemm:
    """y [M, O] = x wᵀ + bias + p b in one kernel; with `a`, p and raw are made in it.

    masked: dropout acts on p b, as it does in dx.
    """

    def __init__(
        self, call: Call, tiles: GemmTiles, x: Tensor, w_OC: Tensor, a: Tensor | None,
        a_strides: Sequence[int], b_strides: Sequence[int], *, masked: bool,
    ) -> None:  # fmt: skip
        layout, (m, c), o = call.layout, x.shape, w_OC.shape[0]
        if not layout.dense:  # the pieces' loop, and a dropped product of its own, need registers
            tiles = replace(tiles, block_n=min(tiles.block_n, 64 if masked else 128))
        by_row, a_by_row = w_OC.stride(1) == 1, a_strides[1] == 1
        rows_of_w = w_OC if by_row else w_OC.t()
        self._boxes: tuple[list[int], ...] | None = None
        matrices = (x, rows_of_w) if a is None else (x, rows_of_w, a)
        if tiles.tma and all(map(_describable, matrices)):
            k, n, r = tiles.block_k, tiles.block_n, layout.block_r
            boxes = ([tiles.block_m, k], [n, k] if by_row else [k, n])
            self._boxes = boxes if a is None else (*boxes, [r, k] if a_by_row else [k, r])
        self._w_by_row = by_row
        self._where, self._offsets = layout.of_tiles(tiles.block_m)
        grid = _ceil_div(m, tiles.block_m) * _ceil_div(o, tiles.block_n)
        if tiles.persistent:
            grid = min(grid, call.multiprocessors)
        self._launch = Launch(
            gemm_kernel, (grid,), tiles.warps, tiles.stages, call.stream, M=m, C=c, N=o,
            R=layout.total, width=layout.width, stride_xm=x.stride(0), stride_wc=w_OC.stride(1),
            stride_wo=w_OC.stride(0), stride_ar=a_strides[0], stride_ac=a_strides[1],
            stride_br=b_strides[0], stride_bo=b_strides[1], BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_R=layout.block_r, GROUP_M=8,
            TMA=self._boxes is not None, W_BY_ROW=by_row, A_BY_ROW=a_by_row, TOP_K=call.top_k,
            P_DTYPE=_TRITON[call.dtype], PRECISION=call.base_precision,
            P_PRECISION=call.precision,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, w_OC: Tensor, bias: Tensor | None, y: Tensor, a: Tensor | None, b: Tensor,
        p: Tensor | None, raw: Tensor | None, routing: Routing, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        arguments: list[Any] = [x, w_OC, a]
        if self._boxes is not None:
            rows_of_w = w_OC if self._w_by_row else w_OC.t()
            pairs = zip((x, rows_of_w, a), self._boxes, strict=False)
            described = [TensorDescriptor.from_tensor(t, box) for t, box in pairs]
            arguments[: len(described)] = described
        self._launch(
            arguments[0], arguments[1], bias, y, arguments[2], b, p, raw, routing, dropout,
            self._where, self._offsets,
        )  # fmt: skip


class Expand:
    """y [M, O] = base + bias + p b, the mixture by itself; masked: dropout acts on p b."""

    def __init__(
        self, call: Call, y_shape: tuple[int, int], base_stride: int, b_strides: Sequence[int], *,
        masked: bool,
    ) -> None:  # fmt: skip
        tiles, layout, (m, o) = call.choice.expand, call.layout, y_shape
        self._where, self._offsets = layout.of_tiles(tiles.block_m)
        block_n = min(tiles.block_c, 64) if masked else tiles.block_c
        self._launch = Launch(
            expand_kernel, (_ceil_div(m, tiles.block_m) * _ceil_div(o, block_n),), tiles.warps,
            tiles.stages, call.stream, M=m, N=o, R=layout.total, width=layout.width,
            stride_base=base_stride, stride_br=b_strides[0], stride_bo=b_strides[1],
            BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_R=layout.block_r,
            PRECISION=call.precision,
        )  # fmt: skip

    def __call__(
        self, base: Tensor | None, bias: Tensor | None, y: Tensor, p: Tensor, b: Tensor,
        dropout: Dropout | None,
    ) -> None:  # fmt: skip
        self._launch(base, bias, y, p, b, dropout, self._where, self._offsets)


class Partials:
    """One side's partial weight gradients: items, programs, and the buffer that they fill.

    d: the first call's x (side A) or dy (side B). need: of every expert, whether it is asked for.
    """

    def __init__(self, call: Call, d: Tensor, need: Sequence[bool], *, u: bool) -> None:
        tiles, layout, (m, c) = call.choice.outer, call.layout, d.shape
        # u takes a tile of b beside the sums: registers for 32 ranks, so fewer columns for more
        self.block_c = tiles.block_c * 32 // max(32, layout.block_r) if u else tiles.block_c
        self.columns, self.stride = c, d.stride(0)
        self.tiles_c = _ceil_div(c, self.block_c)
        programs = call.multiprocessors * max(1, 8 // tiles.warps)
        chunks = max(1, programs // self.tiles_c)
        self.rows = tiles.block_m * _ceil_div(m, tiles.block_m * chunks)
        self.gradient = layout.gradient(self.rows, need)
        self.programs = self.gradient.count * self.tiles_c

    def side(
        self, d: Tensor, p: Tensor, b: Tensor | None, b_strides: Sequence[int],
        partial_u: Tensor | None,
    ) -> Side:  # fmt: skip
        items = self.gradient.count * self.gradient.block_s
        partial_w = p.new_empty((items, self.columns), dtype=torch.float32)
        return Side(
            d, p, b, partial_w, partial_u, self.gradient.where, self.gradient.spans, self.rows,
            self.columns, self.stride, *b_strides,
        )  # fmt: skip


class Outer:
    """The partial sums of one side or of both in one launch; of side B with u on the way."""

    def __init__(self, call: Call, a: Partials | None, b: Partials | None) -> None:
        tiles, layout = call.choice.outer, call.layout
        self._a, self._b = a, b
        one = a or b
        assert one is not None
        blocks = {f"BLOCK_S_{n}": 0 if p is None else p.gradient.block_s
                  for n, p in (("A", a), ("B", b))}  # fmt: skip
        programs = [0 if p is None else p.programs for p in (a, b)]
        self._launch = Launch(
            outer_kernel, (sum(programs),), tiles.warps, tiles.stages, call.stream, M=layout.m,
            width=layout.width, programs_a=programs[0], BLOCK_M=tiles.block_m, BLOCK_C=one.block_c,
            BLOCK_R=layout.block_r, TOP_K=call.top_k, PRECISION=call.precision, **blocks,
        )  # fmt: skip

    def __call__(
        self, x: Tensor | None, u: Tensor | None, dy: Tensor | None, h: Tensor | None,
        routing: Routing, dropout: Dropout | None, *, b: Tensor | None = None,
        b_strides: Sequence[int] = (0, 0),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Partial dA, dB and u; side A reads x and the gated u, side B dy, h and at wish b."""
        side_a = side_b = partial_u = None
        if self._a is not None:
            assert x is not None
            assert u is not None
            side_a = self._a.side(x, u, None, (0, 0), None)
        if self._b is not None:
            assert dy is not None
            assert h is not None
            if b is not None:
                shape = (self._b.tiles_c, *h.shape)
                partial_u = h.new_empty(shape, dtype=torch.float32)
            side_b = self._b.side(dy, h, b, b_strides, partial_u)
        self._launch(side_a, side_b, routing, dropout)
        return (
            None if side_a is None else side_a.partial_w,
            None if side_b is None else side_b.partial_w,
            partial_u,
        )


class OuterSum:
    """dA and dB from the partial sums, and dg from u and h: one launch for up to 8 + 8 experts."""

    def __init__(
        self, call: Call, a: Partials | None, b: Partials | None, dg_columns: int
    ) -> None:  # fmt: skip
        layout, block_c, block_m = call.layout, 128, 32
        self._where, items = layout.by_expert(block_m)
        self._groups: list[tuple[list[tuple[Any, ...] | None], Launch]] = []
        sides = [p for p in (a, b) if p is not None]
        ranks = [p.gradient.max_rank for p in sides]
        most = max((len(p.gradient.wanted) for p in sides), default=1)
        for first in range(0, most, _SUMMED_AT_ONCE):
            numbers: dict[str, int] = {}
            parts: list[tuple[Any, ...] | None] = []
            for name, p in (("a", a), ("b", b)):
                count = 0 if p is None else len(p.gradient.wanted[first : first + _SUMMED_AT_ONCE])
                block_s = 16
                if p is None or count == 0:
                    parts.append(None)
                    programs = 0
                else:
                    block_s, gradient = p.gradient.block_s, p.gradient
                    parts.append((
                        slice(first, first + count), gradient.sums(first, first + count),
                        3 * count, gradient.entries, gradient.chunks, p.columns,
                    ))  # fmt: skip
                    programs = _ceil_div(p.columns, block_c) * count
                numbers |= {f"programs_{name}": programs, f"COUNT_{name.upper()}": count,
                            f"BLOCK_S_{name.upper()}": block_s}  # fmt: skip
            dg_items = items if dg_columns and first == 0 else 0
            grid = numbers["programs_a"] + numbers["programs_b"] + dg_items
            launch = Launch(
                outer_sum_kernel, (grid,), 4, 3, call.stream, M=layout.m, width=layout.width,
                stride_dg=dg_columns, BLOCK_R=min(64, rank_block(ranks or layout.ranks)),
                BLOCK_C=block_c, BLOCK_M=block_m, TOP_K=call.top_k, **numbers,
            )  # fmt: skip
            self._groups.append((parts, launch))

    def __call__(
        self, partial_a: Tensor | None, dA: Sequence[Tensor], partial_b: Tensor | None,
        dB: Sequence[Tensor], u: Tensor | None, h: Tensor | None, dg: Tensor | None,
        routing: Routing,
    ) -> None:  # fmt: skip
        """dA, dB: of the experts asked for. u: ungated, fp32."""
        for (a, b), launch in self._groups:
            launch(
                None if a is None else Sum(partial_a, tuple(dA[a[0]]), *a[1:]),
                None if b is None else Sum(partial_b, tuple(dB[b[0]]), *b[1:]),
                u, h, dg, routing, self._where,
            )  # fmt: skip
            u = h = dg = None


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def _describable(t: Tensor) -> bool:
    """What a tensor descriptor needs: 16-byte rows and base, columns side by side, no overlap."""
    return (
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )
