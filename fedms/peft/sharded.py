"""Factors that FSDP (version 1) wraps one by one, as peft's `fsdp_auto_wrap_policy` has it.

Such a unit holds its weight whole within its own forward alone, and its backward hooks hang on what
that forward returns. So it is called with a forward that gives a copy of the weight: it gathers the
shards, and in the backward pass spreads the copy's gradient over them. All ranks take part in both,
so they must use the same adapters in the same order, as on peft's own layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel


def is_unit(factor: nn.Module) -> bool:
    """Whether it is a linear without bias, or lora_B, that FSDP wraps."""
    return isinstance(factor, FullyShardedDataParallel) and type(factor.module) is nn.Linear


def gathered(unit: nn.Module) -> nn.Linear:
    """A linear on copies of the unit's weight and bias, whole; gradients reach the shards."""
    linear: Any = unit.module
    whole: Any = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(whole)

    def copies() -> tuple[Tensor, Tensor | None]:
        return linear.weight.clone(), None if linear.bias is None else linear.bias.clone()

    linear.forward = copies
    try:
        whole.weight, whole.bias = unit()
    finally:
        del linear.forward
    return whole
