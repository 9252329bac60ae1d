"""The buffers that live as long as one call, in one allocation.

An allocation costs the host 1 us and so does a view; an address and an offset cost nothing. So a
launch takes its buffers by address once it is compiled, and as tensors before and in the
interpreter, which know dtypes.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes: what Triton and tensor descriptors want, and whole cache lines, at either end."""


class Buffer(NamedTuple):
    """offset: in bytes from the workspace's begin."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def at(self, memory: Tensor | int) -> Tensor | int:
        """The buffer in a workspace, as what `memory` is: a tensor or an address."""
        return memory + self.offset if isinstance(memory, int) else self.tensor(memory)

    def tensor(self, memory: Tensor) -> Tensor:
        """The buffer as a view of a workspace's tensor."""
        end = self.offset + prod(self.shape) * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).view(self.shape)


class Workspace:
    """Buffers are added while a signature is prepared; each call then takes memory for all."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        buffer = Buffer(self._bytes, shape, dtype)
        self._bytes += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return buffer

    def new(self, like: Tensor) -> Tensor:
        """Memory for the buffers on the device of `like`, uint8."""
        return like.new_empty(self._bytes, dtype=torch.uint8)
