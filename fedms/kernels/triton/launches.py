"""Launches prepared for one call signature: tiles, grids, tables, buffers and fixed arguments.

Each class is made from the first call's tensors, of which it reads shapes, strides and alignment,
and is then called with any tensors of the same signature (steps.py). Arguments are tensors or
addresses (launch.py), `memory` is the call's workspace. Shape suffixes: M rows, C columns in,
O columns out, R stacked ranks, W the ranks that one row of h holds.
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
from fedms.kernels.triton.pack import pack_kernel
from fedms.kernels.triton.shrink import shrink_kernel
from fedms.kernels.triton.tile import Dropout, Routing
from fedms.kernels.triton.workspace import Workspace

Argument = Tensor | int | None

_PACKED_AT_ONCE = 16
"""Matrices that one launch of pack copies; a compiled kernel for each count."""

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


class Pack:
    """A as one matrix [R, K], B as one [N, R]: the views a and b, or copies where they are None."""

    def __init__(
        self, call: Call, workspace: Workspace, A: Sequence[Tensor], B: Sequence[Tensor],
        a: Tensor | None, b: Tensor | None,
    ) -> None:  # fmt: skip
        total, dtype, k, n = call.layout.total, A[0].dtype, A[0].shape[1], B[0].shape[0]
        self._a = workspace.add((total, k), dtype) if a is None else None
        self._b = workspace.add((n, total), dtype) if b is None else None
        lines: list[tuple[int, ...]] = []
        for e, first in enumerate(call.layout.offsets[:-1] if a is None else ()):
            lines.append((A[e].numel(), k, *A[e].stride(), first * k, k))
        count_a = len(lines)
        for e, first in enumerate(call.layout.offsets[:-1] if b is None else ()):
            lines.append((B[e].numel(), max(1, B[e].shape[1]), *B[e].stride(), first, total))
        self._groups: list[tuple[slice, Tensor, Launch]] = []
        for first in range(0, len(lines), _PACKED_AT_ONCE):
            some = lines[first : first + _PACKED_AT_ONCE]
            blocks = max(1, *(_ceil_div(elements, 1024) for elements, *_ in some))
            launch = Launch(
                pack_kernel, (blocks, len(some)), 4, 3, call.stream, COUNT=len(some),
                COUNT_A=min(max(0, count_a - first), len(some)), BLOCK=1024,
            )  # fmt: skip
            self._groups.append((slice(first, first + len(some)), call.layout.table(some), launch))

    def __call__(
        self, A: Sequence[Tensor], B: Sequence[Tensor], a: Tensor | None, b: Tensor | None,
        memory: Tensor | int,
    ) -> tuple[Argument, Argument]:  # fmt: skip
        """a and b."""
        copy_a = None if self._a is None else self._a.at(memory)
        copy_b = None if self._b is None else self._b.at(memory)
        sources = (*(A if a is None else ()), *(B if b is None else ()))
        for some, table, launch in self._groups:
            launch(sources[some], copy_a, copy_b, table)
        return copy_a if a is None else a, copy_b if b is None else b


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
        self, partial: Argument, raw: Argument, gated: Argument, h: Argument, dg: Argument,
        routing: Routing,
    ) -> None:  # fmt: skip
        self._launch(partial, raw, gated, h, dg, routing, self._where)


class Shrink:
    """p = drop(x) aᵀ, gated and raw; a is read by (rank, column) strides.

    combines: more than one program shares a row's columns, so a second launch adds their sums and
    makes dg as well.
    """

    def __init__(
        self, call: Call, workspace: Workspace, x: Tensor, a_strides: Sequence[int], dg_columns: int
    ) -> None:
        tiles, layout, (m, c) = call.choice.shrink, call.layout, x.shape
        self._where, count = layout.where(tiles.block_m)
        program = (tiles.block_m + layout.block_r) * c * x.element_size()
        self._split = min(call.multiprocessors // max(1, count), c // (4 * tiles.block_c))
        if self._split < 2 or program * (1 - 1 / self._split) < _SPLIT_PAYS:
            self._split = 1
        self.combines = self._split > 1
        self._partial = self._combine = None
        if self.combines:
            self._partial = workspace.add((self._split, m, layout.width), torch.float32)
            self._combine = Combine(call, self._split, dg_columns)
        self._launch = Launch(
            shrink_kernel, (count, self._split), tiles.warps, tiles.stages, call.stream, M=m, C=c,
            R=layout.total, width=layout.width, stride_xm=x.stride(0), stride_ar=a_strides[0],
            stride_ac=a_strides[1], BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c,
            BLOCK_R=layout.block_r, SPLIT=self._split, TOP_K=call.top_k, PRECISION=call.precision,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, a: Argument, gated: Argument, raw: Argument, routing: Routing,
        dropout: Dropout | None, memory: Tensor | int, h: Argument = None, dg: Argument = None,
    ) -> None:  # fmt: skip
        if self._combine is None or self._partial is None:
            self._launch(x, a, raw, gated, None, routing, dropout, self._where)
            return
        partial = self._partial.at(memory)
        self._launch(x, a, None, gated, partial, routing, dropout, self._where)
        self._combine(partial, raw, gated, h, dg, routing)


class Described:
    """Descriptors of tensors of one shape and box. Triton's checks are made once, of the first."""

    def __init__(self, first: Tensor, box: list[int]) -> None:
        self._fields = vars(TensorDescriptor.from_tensor(first, box)) | {"base": None}

    def __call__(self, t: Any) -> Any:
        fresh = object.__new__(TensorDescriptor)
        vars(fresh).update(self._fields, base=t)
        return fresh


class Gemm:
    """y [M, O] = x wᵀ + bias + p b in one kernel; with `a`, p and raw are made in it.

    masked: dropout acts on p b, as it does in dx. describes: a must be a tensor, as x and w are.
    """

    def __init__(
        self, call: Call, tiles: GemmTiles, x: Tensor, w_OC: Tensor, a: Tensor | None,
        a_strides: Sequence[int], b_strides: Sequence[int], *, masked: bool,
    ) -> None:  # fmt: skip
        layout, (m, c), o = call.layout, x.shape, w_OC.shape[0]
        if not layout.dense:  # the pieces' loop, and a dropped product of its own, need registers
            tiles = replace(tiles, block_n=min(tiles.block_n, 64 if masked else 128))
        by_row, a_by_row = w_OC.stride(1) == 1, a_strides[1] == 1
        k, n, r = tiles.block_k, tiles.block_n, layout.block_r
        boxed = [(x, [tiles.block_m, k])]
        boxed.append((w_OC, [n, k]) if by_row else (w_OC.t(), [k, n]))
        if a is not None:
            boxed.append((a, [r, k] if a_by_row else [k, r]))
        self.describes = tiles.tma and all(_describable(t) for t, _ in boxed)
        self._described = [Described(t, box) for t, box in boxed] if self.describes else []
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
            TMA=self.describes, W_BY_ROW=by_row, A_BY_ROW=a_by_row, TOP_K=call.top_k,
            P_DTYPE=_TRITON[call.dtype], PRECISION=call.base_precision,
            P_PRECISION=call.precision,
        )  # fmt: skip

    def __call__(
        self, x: Argument, w: Argument, bias: Argument, y: Argument, a: Argument, b: Argument,
        p: Argument, raw: Argument, routing: Routing, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        """w: the weight, whichever way it is stored."""
        read = [x, w, a]
        for i, described in enumerate(self._described):
            read[i] = described(read[i])
        self._launch(
            read[0], read[1], bias, y, read[2], b, p, raw, routing, dropout, self._where,
            self._offsets,
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
        self, base: Argument, bias: Argument, y: Argument, p: Argument, b: Argument,
        dropout: Dropout | None,
    ) -> None:  # fmt: skip
        self._launch(base, bias, y, p, b, dropout, self._where, self._offsets)


class Partials:
    """One side's partial weight gradients: items, programs, and the buffers that they fill.

    d: the first call's x (side A) or dy (side B). need: of every expert, whether it is asked for.
    b_strides: side B's where u is made on the way.
    """

    def __init__(
        self, call: Call, workspace: Workspace, d: Tensor, need: Sequence[bool],
        b_strides: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        tiles, layout, (m, c) = call.choice.outer, call.layout, d.shape
        # u takes a tile of b beside the sums: registers for 32 ranks, so fewer columns for more
        of_32 = max(32, layout.block_r) if b_strides is not None else 32
        self.block_c = tiles.block_c * 32 // of_32
        self.columns, self.stride = c, d.stride(0)
        self.tiles_c = _ceil_div(c, self.block_c)
        programs = call.multiprocessors * max(1, 8 // tiles.warps)
        chunks = max(1, programs // self.tiles_c)
        self.rows = tiles.block_m * _ceil_div(m, tiles.block_m * chunks)
        self.gradient = layout.gradient(self.rows, need)
        self.programs = self.gradient.count * self.tiles_c
        items = self.gradient.count * self.gradient.block_s
        self.w = workspace.add((items, c), torch.float32)
        self.u = None
        if b_strides is not None:
            self.u = workspace.add((self.tiles_c, m, layout.width), torch.float32)
        self._rest = (
            self.gradient.where, self.gradient.spans, self.rows, c, self.stride,
            *(b_strides or (0, 0)),
        )  # fmt: skip

    def side(self, d: Argument, p: Argument, b: Argument, memory: Tensor | int) -> Side:
        """b: where u is made."""
        u = None if self.u is None else self.u.at(memory)
        return Side(d, p, b, self.w.at(memory), u, *self._rest)


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
        self, x: Argument, u: Argument, dy: Argument, h: Argument, b: Argument, routing: Routing,
        dropout: Dropout | None, memory: Tensor | int,
    ) -> None:  # fmt: skip
        """Side A reads x and the gated u, side B dy, h and, where it makes u, b."""
        self._launch(
            None if self._a is None else self._a.side(x, u, None, memory),
            None if self._b is None else self._b.side(dy, h, b, memory),
            routing, dropout,
        )  # fmt: skip


class OuterSum:
    """dA and dB from the partial sums, and dg from u and h: one launch for up to 8 + 8 experts."""

    def __init__(
        self, call: Call, a: Partials | None, b: Partials | None, dg_columns: int
    ) -> None:  # fmt: skip
        layout, block_c, block_m = call.layout, 128, 32
        self._where, items = layout.by_expert(block_m)
        self._a, self._b = a, b
        self._groups: list[tuple[tuple[Any, ...], tuple[Any, ...], Launch]] = []
        sides = [p for p in (a, b) if p is not None]
        ranks = [p.gradient.max_rank for p in sides]
        most = max((len(p.gradient.wanted) for p in sides), default=1)
        for first in range(0, most, _SUMMED_AT_ONCE):
            numbers: dict[str, int] = {}
            parts: list[tuple[Any, ...]] = []
            for name, p in (("a", a), ("b", b)):
                some = [] if p is None else p.gradient.wanted[first : first + _SUMMED_AT_ONCE]
                count, programs, block_s = len(some), 0, 16
                parts.append(())
                if p is not None and count:
                    gradient, last = p.gradient, first + count
                    block_s = gradient.block_s
                    programs = _ceil_div(p.columns, block_c) * count
                    parts[-1] = (
                        slice(first, last), gradient.sums(first, last), 3 * count,
                        gradient.entries, gradient.chunks, p.columns,
                    )  # fmt: skip
                numbers |= {f"programs_{name}": programs, f"COUNT_{name.upper()}": count,
                            f"BLOCK_S_{name.upper()}": block_s}  # fmt: skip
            dg_items = items if dg_columns and first == 0 else 0
            grid = numbers["programs_a"] + numbers["programs_b"] + dg_items
            launch = Launch(
                outer_sum_kernel, (grid,), 4, 3, call.stream, M=layout.m, width=layout.width,
                stride_dg=dg_columns, BLOCK_R=min(64, rank_block(ranks or layout.ranks)),
                BLOCK_C=block_c, BLOCK_M=block_m, TOP_K=call.top_k, **numbers,
            )  # fmt: skip
            self._groups.append((parts[0], parts[1], launch))

    def __call__(
        self,
        dA: tuple[Tensor, ...],
        dB: tuple[Tensor, ...],
        u: Argument,
        h: Argument,
        dg: Argument,
        routing: Routing,
        memory: Tensor | int,
    ) -> None:
        """dA, dB: of the experts asked for. u: ungated, fp32."""
        w_a = None if self._a is None else self._a.w.at(memory)
        w_b = None if self._b is None else self._b.w.at(memory)
        for a, b, launch in self._groups:
            launch(
                Sum(w_a, dA[a[0]], *a[1:]) if a else None,
                Sum(w_b, dB[b[0]], *b[1:]) if b else None,
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
