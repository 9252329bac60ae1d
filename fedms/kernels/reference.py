"""The definition of the op in plain PyTorch: one expert at a time, any dtype, autograd.

Shape suffixes: M rows of the flattened x, K in, N out, E experts, k experts a token, r one rank.

    y[m] = base(x)[m] + sum over the pairs (m, e) that exist of
           g[m, e] * s_e * (drop_e(x[m]) A_eᵀ) B_eᵀ

Every backend is tested against this in float64. It is not fast and saves everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels.dropout import as_seed, keep_mask
from fedms.kernels.experts import unstack
from fedms.kernels.segments import Run, Segments, read_runs


def gated_lora_linear_reference(
    x: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    lora_A: Sequence[Tensor] | Tensor,
    lora_B: Sequence[Tensor] | Tensor,
    *,
    gates: Tensor | None = None,
    expert_idxs: Tensor | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
    scaling: float | Sequence[float] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Frozen linear plus gated LoRA experts; arguments as in `fedms.kernels.gated_lora_linear`.

    x [..., K] -> [..., N] in the base result's dtype. Products and the sum are taken in the widest
    of x's, the adapters' and the gates' dtypes and rounded once. No validation.
    """
    A, B = unstack(lora_A), unstack(lora_B)
    y = weight(x) if callable(weight) else F.linear(x, weight, bias)
    x_MK = x.reshape(-1, x.shape[-1])
    scales = _scales(scaling, len(A))
    seeds = as_seed(seed, x.device) if dropout_p > 0.0 else None

    y_MN = y.reshape(-1, y.shape[-1])
    for e, (A_rK, B_Nr) in enumerate(zip(A, B, strict=True)):
        dtype = torch.promote_types(x.dtype, A_rK.dtype)
        for run in _runs(segments, seeds, x_MK.shape[0], len(A)):
            if not run.expert_begin <= e < run.expert_end:
                continue
            begin, end = run.row_begin, run.row_end
            xs_MK = x_MK[begin:end].to(dtype)
            if seeds is not None:
                key = seeds if seeds.dim() == 0 else seeds[run.seed]
                own, before = e - run.expert_begin + run.mask_expert, run.mask_row
                keep = keep_mask(key, own, begin - before, end - before, xs_MK.shape[1], dropout_p,
                                 x.device)  # fmt: skip
                xs_MK = xs_MK * keep / (1.0 - dropout_p)
            h_Mr = xs_MK @ A_rK.to(dtype).t()
            delta_MN = (h_Mr * scales[e]) @ B_Nr.to(dtype).t()
            g_M = _gate(gates, expert_idxs, e, begin, end)
            if g_M is not None:
                delta_MN = delta_MN * g_M
            rows = torch.arange(begin, end, device=x.device)
            y_MN = y_MN.index_add(0, rows, delta_MN) if dtype == y.dtype == delta_MN.dtype else (
                y_MN.to(delta_MN.dtype).index_add(0, rows, delta_MN)
            )  # fmt: skip
    return y_MN.to(y.dtype).reshape(y.shape)


def _scales(scaling: float | Sequence[float] | None, num_experts: int) -> list[float]:
    if scaling is None:
        return [1.0] * num_experts
    if isinstance(scaling, (int, float)):
        return [float(scaling)] * num_experts
    return [float(s) for s in scaling]


def _runs(
    segments: Segments | None, seed: Tensor | None, m: int, num_experts: int
) -> Sequence[Run]:
    offsets, experts = (None, None) if segments is None else segments.tensors
    runs = read_runs(offsets, experts, seed, m, num_experts)
    return [Run(0, m, 0, num_experts, 0, 0, 0)] if runs is None else runs


def _gate(
    gates: Tensor | None, expert_idxs: Tensor | None, expert: int, begin: int, end: int
) -> Tensor | None:
    """The expert's gate as [rows, 1], a 0-dim tensor, or None for ones."""
    if expert_idxs is not None:
        *lead, k = expert_idxs.shape
        listed = expert_idxs.reshape(math.prod(lead), k) == expert
        g_Mk = listed if gates is None else gates.reshape(listed.shape)
        return torch.where(listed, g_Mk, 0).sum(-1, keepdim=True)
    if gates is None:
        return None
    if gates.dim() == 1:
        return gates[expert]
    return gates.reshape(-1, gates.shape[-1])[begin:end, expert].unsqueeze(1)
