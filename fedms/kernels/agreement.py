"""Whether results agree with the truth, each row of an output by itself as well as the whole.

One wrong row in 40,000 is 0.5 to 1 % of an output's norm and would pass for rounding; so would a
tile of zeros at the edge of a large matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest relative L2 error of a right output, by x's dtype."""

ROW = 5
"""How many times the bound one row may be off, relative to the root mean square row."""


@torch.no_grad()
def difference(found: Iterable[Tensor], truth: Iterable[Tensor], bound: float) -> str:
    """The first output that is off and by how much; empty when all agree.

    found and truth: outputs in the same order, an empty one was not asked for. Rows are those of
    the first dimension. What is not finite never agrees.
    """
    for i, (value, right) in enumerate(zip(found, truth, strict=True)):
        if value.shape != right.shape:
            return f"output {i} has shape {list(value.shape)}, must have {list(right.shape)}"
        if right.numel() == 0:
            continue
        off = (value.to(right.dtype) - right).reshape(len(right), -1)
        size = right.norm().clamp(min=torch.finfo(right.dtype).tiny)
        error = float(off.norm() / size)
        if not error <= bound:
            return f"output {i} is off by {error:.1e}, allowed is {bound:.0e}"
        worst = float(off.norm(dim=1).max() / size) * len(right) ** 0.5
        if not worst <= ROW * bound:
            return f"a row of output {i} is off by {worst:.1e}, allowed is {ROW * bound:.0e}"
    return ""
