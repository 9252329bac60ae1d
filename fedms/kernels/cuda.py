"""The compiled CUDA module: a forward for few rows. Not in the plan: it has not run on a GPU yet.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedms.kernels.packing import stack_columns, stack_rows


def available() -> bool:
    """True when fedms.kernels._C_cuda was built."""
    return find_spec("fedms.kernels._C_cuda") is not None


def add_mixture(
    y_MN: Tensor,
    x_MK: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gates: Tensor | None,
    scaling: Sequence[float],
) -> Tensor:
    """y += sum over e of g_e * s_e * (x A_eᵀ) B_eᵀ in place, on the current stream; no autograd.

    x [M, K], y [M, N] (the base result): fp32 or bf16, contiguous; A_e [r_e, K], B_e [N, r_e] fp32;
    gates None, [E] or [M, E], fp32. Sums in fp32. Returns y.
    Raises ImportError when the module was not built and RuntimeError when no GPU can run it.
    """
    module: Any = import_module("fedms.kernels._C_cuda")

    if not (x_MK.is_contiguous() and y_MN.is_contiguous()) or x_MK.dtype != y_MN.dtype:
        raise ValueError(
            f"x and y must be contiguous with one dtype, got {x_MK.dtype}, {y_MN.dtype}"
        )
    A_RK, B_NR = stack_rows(lora_A).contiguous(), stack_columns(lora_B).contiguous()
    sizes = torch.tensor([a.shape[0] for a in lora_A], device=x_MK.device)
    experts = torch.arange(len(lora_A), device=x_MK.device, dtype=torch.int32)
    expert_of_rank = experts.repeat_interleave(sizes)
    scale_of_rank = torch.tensor(scaling, device=x_MK.device).repeat_interleave(sizes)
    h_MR = x_MK.new_empty((x_MK.shape[0], A_RK.shape[0]), dtype=torch.float32)
    stream = torch.cuda.current_stream(x_MK.device).cuda_stream if x_MK.is_cuda else 0
    row = gates.stride(0) if gates is not None and gates.dim() == 2 else 0
    module.forward(
        stream, x_MK.data_ptr(), y_MN.data_ptr(), A_RK.data_ptr(), B_NR.data_ptr(),
        h_MR.data_ptr(), 0 if gates is None else gates.data_ptr(), row,
        0 if gates is None else gates.stride(-1), expert_of_rank.data_ptr(),
        scale_of_rank.data_ptr(), x_MK.shape[0], x_MK.shape[1], y_MN.shape[1], A_RK.shape[0],
        x_MK.dtype == torch.bfloat16,
    )  # fmt: skip
    return y_MN
