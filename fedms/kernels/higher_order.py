"""The op's backward in plain differentiable products, for derivatives of derivatives.

Taken where a backward is itself differentiated (`create_graph`: gradient penalties, Hessians) or
its dy is batched (`is_grads_batched`, `jacobian(vectorize=True)`). What it returns can be
differentiated any number of times, by dy, x, A, B and the gates. One expert after the other, and
only on its rows; nothing is written in place, as dy may be batched.

Shape suffixes: M rows, m the rows of one expert, K in, N out, r its rank, E experts, k experts a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedms.kernels.dropout import keep_mask
from fedms.kernels.experts import backward_of_parts, expert_ranks
from fedms.kernels.segments import Run, read_runs


class _Share(NamedTuple):
    """Where one expert acts."""

    rows: Tensor | None  # int64 [m]; None: all of them
    keep: Tensor | float  # what dropout multiplies its input by: [m, K], or 1

    def of(self, t_MC: Tensor) -> Tensor:
        return t_MC if self.rows is None else t_MC.index_select(0, self.rows)

    def added_to(self, sum_M: Tensor, part_m: Tensor) -> Tensor:
        return sum_M + part_m if self.rows is None else sum_M.index_add(0, self.rows, part_m)


def _backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None, offsets: Tensor | None,
    experts: Tensor | None, scale: Sequence[float], dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_dg: bool, need_dA: Sequence[bool], need_dB: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    m, k, dtype = dy.shape[0], A[0].shape[1], torch.promote_types(dy.dtype, A[0].dtype)
    device = A[0].device
    runs = read_runs(offsets, experts, seed, m, len(A))
    gates_ME = gates if expert_idxs is None else _dense(gates, expert_idxs, m, A)
    zeros_M = torch.zeros(m, dtype=dtype, device=device)
    dx_MK = None
    if need_dx:
        dx_MK = dy.new_zeros((m, k)) if weight is None else dy @ weight
        dx_MK = dx_MK.to(dtype)
    dA: list[Tensor | None] = []
    dB: list[Tensor | None] = []
    dg_eM: list[Tensor] = []
    for e in range(len(A)):
        share = _share(e, m, k, expert_idxs, runs, dropout_p, seed, dtype, device)
        A_rK, B_Nr = A[e].to(dtype), B[e].to(dtype)
        dy_mN = share.of(dy).to(dtype)
        x_mK = None if x is None else share.of(x).to(dtype) * share.keep
        h_mr = None if x_mK is None else x_mK @ A_rK.t()
        if h is not None:
            kept_mr = share.of(h)[:, e, : A_rK.shape[0]].to(dtype)
            h_mr = kept_mr if h_mr is None else h_mr + kept_mr
        coef: Tensor | float = scale[e]
        if gates_ME is not None:
            gate = gates_ME[e] if gates_ME.dim() == 1 else share.of(gates_ME[:, e : e + 1])
            coef = (gate * scale[e]).to(dtype)
        u_mr = dy_mN @ B_Nr
        ug_mr = u_mr * coef
        dA.append(ug_mr.t() @ x_mK if need_dA[e] and x_mK is not None else None)
        dB.append(dy_mN.t() @ (h_mr * coef) if need_dB[e] and h_mr is not None else None)
        if dx_MK is not None:
            dx_MK = share.added_to(dx_MK, (ug_mr @ A_rK) * share.keep)
        if need_dg and h_mr is not None:
            dg_eM.append(share.added_to(zeros_M, (h_mr * u_mr).sum(1) * scale[e]))
    dg = None
    if dg_eM and gates is not None:
        dg = torch.stack(dg_eM, 1)
        if expert_idxs is not None:
            dg = dg.gather(1, expert_idxs)
        dg = (dg.sum(0) if gates.dim() == 1 else dg).to(gates.dtype)
    dA = [None if g is None else g.to(a.dtype) for g, a in zip(dA, A, strict=True)]
    dB = [None if g is None else g.to(b.dtype) for g, b in zip(dB, B, strict=True)]
    return None if dx_MK is None else dx_MK.to(dy.dtype), dg, dA, dB


backward = backward_of_parts(_backward)
"""dx, dg, dA and dB of a backend's arguments (fedms.kernels.ops); None where not needed.

x: whenever dA, dB or dg are needed. Beside an h, zeros that stand in x's place in the graph, or
None when x needs no gradient. h: None, or `kept_ranks` where all of A is frozen and x not kept.
"""


def kept_ranks(
    fused: Callable[..., tuple], h: Tensor, m: int, A: Sequence[Tensor],
    expert_idxs: Tensor | None, offsets: Tensor | None, experts: Tensor | None,
) -> Tensor:  # fmt: skip
    """The h of every pair as [M, E, largest r], zero elsewhere, from a backend's own h.

    fused: the backend's backward. As dg is <h, u>, it is h's column j where u is the j-th unit
    vector, which a dy of ones and one row of B make: no layout need be known here.
    """
    ranks = expert_ranks(A)
    columns = len(ranks) if expert_idxs is None else expert_idxs.shape[1]
    gates = A[0].new_ones((m, columns), dtype=torch.promote_types(h.dtype, torch.float32))
    nobody = [False] * len(A)
    found = []
    for j in range(max(ranks)):
        B = [a.new_zeros((*a.shape[:-2], 1, a.shape[-2])) for a in A]
        for unit in B:
            unit[..., j : j + 1] = 1
        found.append(fused(
            A[0].new_ones((m, 1)), None, None, h, A, B, gates, expert_idxs, offsets, experts,
            [1.0] * len(ranks), 0.0, None, False, True, nobody, nobody,
        )[1])  # fmt: skip
    h_Mkr = torch.stack(found, 2)
    if expert_idxs is None:
        return h_Mkr
    where = expert_idxs.unsqueeze(2).expand(h_Mkr.shape)
    return h_Mkr.new_zeros((m, len(ranks), h_Mkr.shape[2])).scatter(1, where, h_Mkr)


def _share(
    e: int, m: int, k: int, expert_idxs: Tensor | None, runs: Sequence[Run] | None,
    dropout_p: float, seed: Tensor | None, dtype: torch.dtype, device: torch.device,
) -> _Share:  # fmt: skip
    mine = [Run(0, m, e, e + 1, 0, 0, e)]
    rows = None
    if runs is not None:
        mine = [run for run in runs if run.expert_begin <= e < run.expert_end]
        spans = [torch.arange(run.row_begin, run.row_end, device=device) for run in mine]
        rows = torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *spans])
    elif expert_idxs is not None:
        rows = (expert_idxs == e).any(1).nonzero().squeeze(1)
    if seed is None:
        return _Share(rows, 1.0)
    none = torch.zeros((0, k), dtype=torch.bool, device=device)
    keep = torch.cat([none, *_masks(mine, e, k, dropout_p, seed)]).to(dtype) / (1.0 - dropout_p)
    return _Share(rows, keep if expert_idxs is None else keep[rows])


def _masks(runs: Sequence[Run], e: int, k: int, dropout_p: float, seed: Tensor) -> Iterator[Tensor]:
    for run in runs:
        yield keep_mask(
            seed if seed.dim() == 0 else seed[run.seed],
            e - run.expert_begin + run.mask_expert,
            run.row_begin - run.mask_row,
            run.row_end - run.mask_row,
            k,
            dropout_p,
            seed.device,
        )


def _dense(gates: Tensor | None, expert_idxs: Tensor, m: int, A: Sequence[Tensor]) -> Tensor:
    """Gates [M, E] of listed pairs; a pair that is listed twice has their sum."""
    ones = A[0].new_ones(expert_idxs.shape) if gates is None else gates
    return ones.new_zeros((m, len(A))).scatter_add(1, expert_idxs, ones)
