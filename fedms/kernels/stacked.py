"""The plain-torch backend: all experts as one [R, K] and one [N, R] matrix. Any device, any dtype.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks, E experts, k experts a token.
Products are taken in c = promote_types(x, A), and rounded once into the base result's dtype.

Where that is c already and every row has experts, the base GEMM comes last: the expand writes y
(and dx), and the GEMM adds to it with beta = 1. That saves a pass over y, as the GEMM reads it in
its epilogue. Otherwise the base comes first and the expand adds to it; rows without experts then
hold the base's own bits.

Each `Segments` run is a slice of rows and of ranks, so a pair that does not exist costs nothing.
Top-k routing is the dense form with zero gates here: E * r columns are cheap against the gathers
that torch would need to skip them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels.dropout import keep_mask
from fedms.kernels.experts import expert_ranks, takes_stacks
from fedms.kernels.ops import define_backend
from fedms.kernels.packing import stack_columns, stack_rows
from fedms.kernels.segments import Run, read_runs, row_width
from fedms.kernels.tables import constant


def _h_like(
    x: Tensor, A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None
) -> tuple[int, torch.dtype]:
    return row_width(expert_ranks(A), experts), torch.promote_types(x.dtype, A[0].dtype)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    scale: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    width, dtype = _h_like(x, A, expert_idxs, experts)
    runs = read_runs(offsets, experts, seed, x.shape[0], len(A))
    whole = runs is None  # one run of all rows, so y is written and not added to
    base_last = whole and weight is not None and dtype == x.dtype
    y_MN = None
    if weight is not None and not base_last:
        y_MN = F.linear(x, weight, bias)
    elif base is not None and not whole:
        y_MN = base.clone()  # a custom op's output must not be its input
    h_MR = x.new_empty((x.shape[0], width), dtype=dtype)
    coef = _coefficients(gates, expert_idxs, scale, x)
    ranks = _rank_offsets(A)
    for run, columns in _walk(runs, x.shape[0], ranks):
        rows, first, last = slice(run.row_begin, run.row_end), run.expert_begin, run.expert_end
        xs_MK = x[rows].to(dtype)
        if dropout_p > 0.0:
            for e in range(first, last):
                dropped = _drop(xs_MK, seed, e, run, dropout_p)
                at = columns.start + ranks[e] - ranks[first]
                h_MR[rows, at : at + len(A[e])] = dropped @ A[e].to(dtype).t()
        else:
            A_RK = stack_rows(A[first:last]).to(dtype)
            torch.mm(xs_MK, A_RK.t(), out=h_MR[rows, columns])
        hg_MR = _gated(h_MR[rows, columns], coef, rows, first, last, ranks)
        B_NR = stack_columns(B[first:last]).to(dtype)
        if y_MN is not None:
            _accumulate(y_MN[rows], hg_MR, B_NR.t())
        elif base is not None:
            y_MN = _sum(base, hg_MR, B_NR.t())
        else:
            assert weight is not None
            y_MN = hg_MR @ B_NR.t() if bias is None else torch.addmm(bias, hg_MR, B_NR.t())
            y_MN.addmm_(x, weight.t())
    assert y_MN is not None
    return y_MN, h_MR if save_h else h_MR.new_empty(0)


def _backward(
    dy: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    scale: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dg: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    m, k = dy.shape[0], A[0].shape[1]
    dtype = torch.promote_types(dy.dtype, A[0].dtype)
    ranks = _rank_offsets(A)
    coef = _coefficients(gates, expert_idxs, scale, dy)
    runs = read_runs(offsets, experts, seed, m, len(A))
    # Written whole where one product is all of the experts' part.
    base_last = need_dx and runs is None and dropout_p == 0.0 and dtype == dy.dtype
    dx_MK = dy.new_empty(0)
    if need_dx and not base_last:
        dx_MK = dy.new_zeros((m, k)) if weight is None else dy @ weight
    dg_ME = dy.new_zeros((m, len(A)), dtype=dtype) if need_dg else None
    need_u = need_dx or need_dg or any(need_dA)
    # Several runs add into one expert's gradient; a single one writes it.
    dA: list[Tensor | None] = [None] * len(A)
    dB: list[Tensor | None] = [None] * len(A)

    for run, columns in _walk(runs, m, ranks):
        rows, first, last = slice(run.row_begin, run.row_end), run.expert_begin, run.expert_end
        dys_MN = dy[rows].to(dtype)
        local = [r - ranks[first] for r in ranks[first : last + 1]]
        h_MR = None if h is None else h[rows, columns]
        if h_MR is not None and any(need_dB[first:last]):
            hg_MR = _gated(h_MR, coef, rows, first, last, ranks)
            # (hᵀ dy)ᵀ: MKL's dyᵀ h with n = 8 columns is about 3x slower than the roles swapped
            for e, part in _products(need_dB, hg_MR, dys_MN, local, first, last):
                dB[e] = _plus(dB[e], part.t())
        if not need_u:
            continue
        B_NR = stack_columns(B[first:last]).to(dtype)
        u_MR = dys_MN @ B_NR
        if dg_ME is not None and h_MR is not None:
            products = h_MR * u_MR
            for e in range(first, last):
                span = slice(local[e - first], local[e - first + 1])
                dg_ME[rows, e] = products[:, span].sum(1) * scale[e]
        ug_MR = _gated(u_MR, coef, rows, first, last, ranks)
        if x is not None and any(need_dA[first:last]):
            xs_MK = x[rows].to(dtype)
            if dropout_p > 0.0:
                for e in filter(need_dA.__getitem__, range(first, last)):
                    part = ug_MR[:, local[e - first] : local[e - first + 1]]
                    dropped = _drop(xs_MK, seed, e, run, dropout_p)
                    dA[e] = _plus(dA[e], part.t() @ dropped)
            else:
                for e, part in _products(need_dA, ug_MR, xs_MK, local, first, last):
                    dA[e] = _plus(dA[e], part)
        if need_dx and dropout_p > 0.0:
            for e in range(first, last):
                span = slice(local[e - first], local[e - first + 1])
                part_MK = ug_MR[:, span] @ A[e].to(dtype)
                dx_MK[rows] += _drop(part_MK, seed, e, run, dropout_p)
        elif base_last:
            dx_MK = ug_MR @ stack_rows(A[first:last])
            if weight is not None:
                dx_MK.addmm_(dy, weight)
        elif need_dx:
            _accumulate(dx_MK[rows], ug_MR, stack_rows(A[first:last]).to(dtype))

    dg = dy.new_empty(0)
    if dg_ME is not None and gates is not None:
        if expert_idxs is not None:
            dg = dg_ME.gather(1, expert_idxs)
        else:
            dg = dg_ME.sum(0) if gates.dim() == 1 else dg_ME
        dg = dg.to(gates.dtype)
    return (
        dx_MK,
        dg,
        [_result(g, a, need) for g, a, need in zip(dA, A, need_dA, strict=True)],
        [_result(g, b, need) for g, b, need in zip(dB, B, need_dB, strict=True)],
    )


def _walk(runs: Sequence[Run] | None, m: int, ranks: Sequence[int]) -> Iterator[tuple[Run, slice]]:
    """Runs with their columns of h, whose rows hold only the ranks that they use."""
    column, before = 0, None
    for run in (Run(0, m, 0, len(ranks) - 1, 0, 0, 0),) if runs is None else runs:
        if before != (run.row_begin, run.row_end):
            column, before = 0, (run.row_begin, run.row_end)
        width = ranks[run.expert_end] - ranks[run.expert_begin]
        yield run, slice(column, column + width)
        column += width


def _rank_offsets(A: Sequence[Tensor]) -> list[int]:
    offsets = [0]
    for a in A:
        offsets.append(offsets[-1] + a.shape[0])
    return offsets


def _coefficients(
    gates: Tensor | None, expert_idxs: Tensor | None, scale: Sequence[float], like: Tensor
) -> Tensor | list[float]:
    """gate * scale as [M, E] or [E]; a list of floats when there are no gates."""
    if expert_idxs is not None:
        ones = like.new_ones(expert_idxs.shape) if gates is None else gates
        dense = ones.new_zeros((expert_idxs.shape[0], len(scale)))
        gates = dense.scatter_add_(1, expert_idxs, ones)
    if gates is None:
        return list(scale)
    return gates * constant(tuple(scale), gates.dtype, gates.device)


def _gated(
    h_MR: Tensor, coef: Tensor | list[float], rows: slice, first: int, last: int, ranks: list[int]
) -> Tensor:
    """h times expand(gate * scale), for the rows and experts of one run, in h's dtype."""
    sizes = [ranks[e + 1] - ranks[e] for e in range(first, last)]
    if isinstance(coef, list):
        if len(set(coef[first:last])) == 1:
            return h_MR if coef[first] == 1.0 else h_MR * coef[first]
        row = [c for c, size in zip(coef[first:last], sizes, strict=True) for _ in range(size)]
        return h_MR * constant(tuple(row), h_MR.dtype, h_MR.device)
    part = coef[first:last] if coef.dim() == 1 else coef[rows, first:last]
    if len(set(sizes)) == 1:  # a broadcast view instead of repeat_interleave's copy
        shape = (h_MR.shape[0], last - first, sizes[0])
        return (h_MR.reshape(shape) * part.unsqueeze(-1)).reshape(h_MR.shape).to(h_MR.dtype)
    repeats = constant(tuple(sizes), torch.int64, coef.device)
    wide = part.repeat_interleave(repeats, dim=-1, output_size=sum(sizes))
    return (h_MR * wide).to(h_MR.dtype)


def _accumulate(out_MN: Tensor, left_MR: Tensor, right_RN: Tensor) -> None:
    """out += left @ right in place, with one rounding into out's dtype."""
    if out_MN.dtype == left_MR.dtype:
        out_MN.addmm_(left_MR, right_RN)
    else:
        out_MN.add_(left_MR @ right_RN)


def _sum(base_MN: Tensor, left_MR: Tensor, right_RN: Tensor) -> Tensor:
    """base + left @ right as a new tensor, with one rounding into base's dtype."""
    if base_MN.dtype == left_MR.dtype:
        return torch.addmm(base_MN, left_MR, right_RN)
    return torch.add(base_MN, left_MR @ right_RN, out=torch.empty_like(base_MN))


def _drop(x_MK: Tensor, seed: Tensor | None, expert: int, run: Run, p: float) -> Tensor:
    """x of the run's rows with the mask of one of its experts."""
    assert seed is not None
    begin, end = run.row_begin - run.mask_row, run.row_end - run.mask_row
    own = expert - run.expert_begin + run.mask_expert
    key = seed if seed.dim() == 0 else seed[run.seed]
    keep = keep_mask(key, own, begin, end, x_MK.shape[1], p, x_MK.device)
    return x_MK * keep * (1.0 / (1.0 - p))


def _products(
    need: Sequence[bool],
    left_MR: Tensor,
    right_MC: Tensor,
    local: list[int],
    first: int,
    last: int,
) -> Iterator[tuple[int, Tensor]]:
    """left_eᵀ @ right for each expert that asks for it, in one product when all of them do."""
    whole = left_MR.t() @ right_MC if all(need[first:last]) else None
    for e in range(first, last):
        span = slice(local[e - first], local[e - first + 1])
        if whole is not None:  # a copy, because an op's outputs must not share storage
            yield e, whole if last - first == 1 else whole[span].clone()
        elif need[e]:
            yield e, left_MR[:, span].t() @ right_MC


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _result(grad: Tensor | None, like: Tensor, need: bool) -> Tensor:
    if not need:
        return like.new_empty(0)
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype).contiguous()


forward, backward = takes_stacks(_forward, _backward)
define_backend(
    "stacked", forward, backward, dispatch_key="CompositeExplicitAutograd", h_like=_h_like
)
