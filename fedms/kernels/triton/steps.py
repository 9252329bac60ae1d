"""The two directions, prepared for one call signature: which kernels run, on which buffers.

Launches of a call, torch's GEMM counted; `pack` comes first where the experts lie apart:

    forward    fused   gemm
               extend  shrink, gemm
               split   shrink, expand, torch's GEMM adding to y (beta = 1)
    backward   fused   gemm (dx, u), outer (dA, dB), outer_sum (dA, dB, dg)
               extend  u, gemm, outer, outer_sum
               split   u, expand, torch's GEMM adding to dx, outer, outer_sum

where u is a shrink of dy, or with `one_pass` outer (dB, u) and combine (u, dg), and then outer has
dA alone. Few rows of many columns share a shrink among programs: one combine more.

Shape suffixes: M rows, K in, N out, W the ranks that one row uses (R without segments). "c" is the
dtype that the mixture's operands are cast to; every sum is fp32. h [M, W] in c is what forward
keeps: ungated, so that dg is exact at a gate of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs

from fedms.kernels.triton.launches import (
    Call,
    Combine,
    Expand,
    Gemm,
    Outer,
    OuterSum,
    Pack,
    Partials,
    Shrink,
)
from fedms.kernels.triton.tile import Dropout, Routing
from fedms.kernels.triton.workspace import Workspace


class Mixture(NamedTuple):
    """A call's tensors that are the mixture's. a [R, K], b [N, R]: views of A and B, or None."""

    A: Sequence[Tensor]
    B: Sequence[Tensor]
    a: Tensor | None
    b: Tensor | None
    gates: Tensor | None
    expert_idxs: Tensor | None
    seed: Tensor | None


class Steps:
    """What both directions keep of a signature."""

    def __init__(self, call: Call, of: Mixture, dropout_p: float) -> None:
        self._call = call
        self._workspace = Workspace()
        self._pack = Pack(call, self._workspace, of.A, of.B, of.a, of.b)
        self._by_address = False
        row = column = 0
        if of.gates is not None:
            column = of.gates.stride(-1)
            row = of.gates.stride(0) if of.gates.dim() == 2 else 0
        self._routing = (call.layout.expert, call.layout.scale, row, column)
        self._dropout = (int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p))

    def _operands(self, of: Mixture) -> tuple[Routing, Dropout | None]:
        routing = Routing(of.gates, of.expert_idxs, *self._routing)
        return routing, Dropout(of.seed, *self._dropout) if self._call.dropout else None

    def _memory(self, workspace: Tensor) -> Tensor | int:
        """The workspace as what is compiled takes it; the caller keeps it until all is launched."""
        return workspace.data_ptr() if self._by_address else workspace

    def _launched(self, gemm: Gemm | None) -> None:
        """All kernels of this signature are compiled now (the interpreter's never are)."""
        # a copy of `a` that a descriptor is made of stays a tensor
        self._by_address = not (knobs.runtime.interpret or (gemm is not None and gemm.describes))


class Forward(Steps):
    def __init__(
        self, call: Call, x: Tensor, weight: Tensor | None, base: Tensor | None, of: Mixture,
        dropout_p: float, save_h: bool,
    ) -> None:  # fmt: skip
        super().__init__(call, of, dropout_p)
        strategy = _strategy(call, call.choice.forward, weight)
        a, b = _matrices(of)
        m, width = len(x), call.layout.width
        self._y, self._h = (m, len(b)), (m, width) if save_h else None
        fused = strategy == "fused"
        b_strides = b.stride()[::-1]
        self._p = self._shrink = self._gemm = self._expand = None
        if m and not fused:
            self._p = self._workspace.add((m, width), call.dtype)
            self._shrink = Shrink(call, self._workspace, x, a.stride(), 0)
        if m and strategy == "split":
            stride = 0 if base is None else base.stride(0)
            self._expand = Expand(call, self._y, stride, b_strides, masked=False)
        elif m:
            assert weight is not None
            self._gemm = Gemm(call, call.choice.gemm, x, weight, a if fused else None, a.stride(),
                              b_strides, masked=False)  # fmt: skip

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
        of: Mixture,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y_MN = x.new_empty(self._y)
        h_MW = x.new_empty(self._h, dtype=self._call.dtype) if self._h is not None else None
        if self._gemm is None and self._expand is None:
            return y_MN, h_MW
        workspace = self._workspace.new(x)
        memory = self._memory(workspace)
        routing, dropout = self._operands(of)
        a, b = self._pack(of.A, of.B, of.a, of.b, memory)
        p_MW = None if self._p is None else self._p.at(memory)
        if self._shrink is not None:
            self._shrink(x, a, p_MW, h_MW, routing, dropout, memory)
        if self._gemm is not None:
            fused = p_MW is None
            self._gemm(x, weight, bias, y_MN, a if fused else None, b, p_MW,
                       h_MW if fused else None, routing, None)  # fmt: skip
        elif self._expand is not None:
            self._expand(base, bias, y_MN, p_MW, b, None)
            if weight is not None:
                y_MN.addmm_(x, weight.t())
        if not self._by_address:
            self._launched(self._gemm)
        return y_MN, h_MW


class Backward(Steps):
    """u is made where dy is read anyway (dx's GEMM, or beside dB), or by a shrink of its own."""

    def __init__(
        self, call: Call, dy: Tensor, weight: Tensor | None, x: Tensor | None, of: Mixture,
        dropout_p: float, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
        need_dB: Sequence[bool],
    ) -> None:  # fmt: skip
        super().__init__(call, of, dropout_p)
        a, b = _matrices(of)
        m, k, layout, workspace = len(dy), a.shape[1], call.layout, self._workspace
        self._wanted = (tuple(need_dA), tuple(need_dB))
        self._dx = (m, k)
        self._needs = (need_dx, need_dg)
        # Pairs that do not exist get zeros, all others are written.
        self._dg_zeros = layout.runs is not None or call.top_k > 0
        self._dg, self._dg_dtype = (m, call.top_k or len(layout.ranks)), torch.float32
        self._gate_a_layer = of.gates is not None and of.gates.dim() == 1
        if of.gates is not None and not self._gate_a_layer:
            self._dg_dtype = of.gates.dtype
        a_strides, b_strides = a.stride(), b.stride()[::-1]
        self._ug = self._u = None
        self._shrink = self._outer_b = self._combine = self._outer = self._sum = None
        self._gemm = self._expand = None
        if m == 0:
            return

        strategy = _strategy(call, call.choice.backward, weight)
        need_u = need_dx or need_dg or any(need_dA)
        fused = need_dx and strategy == "fused"
        one_pass = need_u and any(need_dB) and not fused and call.choice.one_pass
        side_a = side_b = None
        if any(need_dA):
            assert x is not None
            side_a = Partials(call, workspace, x, need_dA)
        if any(need_dB):
            side_b = Partials(call, workspace, dy, need_dB, b_strides if one_pass else None)
        columns = self._dg[1] if need_dg else 0
        if one_pass:
            assert side_b is not None
            self._outer_b = Outer(call, None, side_b)
            self._partial_u = side_b.u
            self._combine = Combine(call, side_b.tiles_c, columns)
        elif need_u and not fused:
            self._shrink = Shrink(call, workspace, dy, b_strides, columns)
        makes_dg = self._combine is not None or (self._shrink is not None and self._shrink.combines)
        if need_u:
            self._ug = workspace.add((m, layout.width), call.dtype)
        if need_dg and not makes_dg:
            self._u = workspace.add((m, layout.width), torch.float32)
        if need_dx and strategy == "split":
            self._expand = Expand(call, self._dx, 0, a_strides, masked=call.dropout)
        elif need_dx:
            assert weight is not None
            self._gemm = Gemm(call, call.choice.dx_gemm, dy, weight.t(), b if fused else None,
                              b_strides, a_strides, masked=call.dropout)  # fmt: skip
        rest_b = None if one_pass else side_b
        if side_a is not None or rest_b is not None:
            self._outer = Outer(call, side_a, rest_b)
        if side_a is not None or side_b is not None or self._u is not None:
            self._sum = OuterSum(call, side_a, side_b, columns if self._u is not None else 0)

    def __call__(
        self, dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, of: Mixture
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
        need_dx, need_dg = self._needs
        dx_MK = dy.new_empty(self._dx) if need_dx else None
        dg = None
        if need_dg:
            empty = dy.new_zeros if self._dg_zeros else dy.new_empty
            dg = empty(self._dg, dtype=self._dg_dtype)
        need_dA, need_dB = self._wanted
        dA = [_new(t) if need else None for t, need in zip(of.A, need_dA, strict=True)]
        dB = [_new(t) if need else None for t, need in zip(of.B, need_dB, strict=True)]
        asked_dA = tuple([t for t in dA if t is not None])
        asked_dB = tuple([t for t in dB if t is not None])
        if self._dx[0]:
            self._run(dy, weight, x, h, of, dx_MK, dg, asked_dA, asked_dB)
        else:
            for grad in (*asked_dA, *asked_dB):
                grad.zero_()
        if dg is not None and self._gate_a_layer and of.gates is not None:
            dg = dg.sum(0).to(of.gates.dtype)
        return dx_MK, dg, dA, dB

    def _run(
        self, dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, of: Mixture,
        dx_MK: Tensor | None, dg: Tensor | None, dA: tuple[Tensor, ...], dB: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        """Fill dx, dg, and dA and dB of the experts asked for."""
        workspace = self._workspace.new(dy)
        memory = self._memory(workspace)
        routing, dropout = self._operands(of)
        a, b = self._pack(of.A, of.B, of.a, of.b, memory)
        ug_MW = None if self._ug is None else self._ug.at(memory)
        u_MW = None if self._u is None else self._u.at(memory)
        if self._combine is not None and self._outer_b is not None:
            assert self._partial_u is not None
            self._outer_b(None, None, dy, h, b, routing, None, memory)
            self._combine(self._partial_u.at(memory), None, ug_MW, h, dg, routing)
        elif self._shrink is not None:
            self._shrink(dy, b, ug_MW, u_MW, routing, None, memory, h, dg)
        if self._expand is not None:
            self._expand(None, None, dx_MK, ug_MW, a, dropout)
            if weight is not None and dx_MK is not None:
                dx_MK.addmm_(dy, weight)
        elif self._gemm is not None:
            fused = self._shrink is None and self._combine is None
            self._gemm(dy, weight, None, dx_MK, b if fused else None, a, ug_MW,
                       u_MW if fused else None, routing, dropout)  # fmt: skip
        if self._outer is not None:
            self._outer(x, ug_MW, dy, h, None, routing, dropout, memory)
        if self._sum is not None:
            self._sum(dA, dB, u_MW, h, None if u_MW is None else dg, routing, memory)
        if not self._by_address:
            self._launched(self._gemm)


def _matrices(of: Mixture) -> tuple[Tensor, Tensor]:
    """a and b; where they are copies, tensors that are like these."""
    total = sum(part.shape[0] for part in of.A)
    a = of.A[0].new_empty((total, of.A[0].shape[1])) if of.a is None else of.a
    b = of.B[0].new_empty((len(of.B[0]), total)) if of.b is None else of.b
    return a, b


def _strategy(call: Call, wanted: str, weight: Tensor | None) -> str:
    """The wanted strategy where this call allows it."""
    if weight is None:
        return "split"
    if wanted == "fused" and (not call.layout.dense or call.top_k):  # lists spill beside two sums
        return "extend"
    return wanted


def _new(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)
