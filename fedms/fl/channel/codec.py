"""How a state is written in fewer bits: fp16, int8 in blocks, or its largest entries alone.

A codec sees one vector, the tensors of a state one after the other. What is lost on the way up is
kept by the client and added to what it sends next (error feedback: Seide et al., Interspeech 2014;
Karimireddy et al., arXiv 1901.09847), so it is late, not lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedms.fl.channel.message import MessageError
from fedms.fl.types import State

Shapes = dict[str, list[int]]
"""Names and shapes, in the order in which the values stand."""


class Codec(Protocol):
    """One vector to a few arrays and back.

    ``decode`` gets arrays that somebody else has written: it checks names, dtypes and sizes before
    it makes anything of them.
    """

    @property
    def feedback(self) -> bool:
        """Whether so much is lost that a sender keeps it for its next message."""
        ...

    def encode(self, values: Tensor) -> State:
        """fp32 [n] -> the arrays that are sent."""
        ...

    def decode(self, arrays: State, size: int) -> Tensor:
        """The arrays -> fp32 [size].

        Raises:
            MessageError: these are not the arrays of ``size`` values.
        """
        ...


@dataclass(frozen=True)
class Fp16:
    """Half precision; a value beyond 65,504 becomes infinite, and its sender is refused."""

    feedback: bool = False

    def encode(self, values: Tensor) -> State:
        return {"values": values.half()}

    def decode(self, arrays: State, size: int) -> Tensor:
        (values,) = _checked(arrays, {"values": (torch.float16, size)})
        return values.float()


@dataclass(frozen=True)
class Int8:
    """Each block of values as whole numbers in [-127, 127] times one fp32 scale, max |x| / 127."""

    block: int = 128
    feedback: bool = True

    def encode(self, values: Tensor) -> State:
        blocks = self._blocks(values)
        scales = blocks.abs().amax(dim=1) / 127
        whole = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0).round()
        return {"values": whole.to(torch.int8).flatten()[: len(values)], "scales": scales}

    def decode(self, arrays: State, size: int) -> Tensor:
        count = math.ceil(size / self.block)
        values, scales = _checked(
            arrays, {"values": (torch.int8, size), "scales": (torch.float32, count)}
        )
        return (self._blocks(values.float()) * scales[:, None]).flatten()[:size]

    def _blocks(self, values: Tensor) -> Tensor:
        """[n] -> [ceil(n / block), block], zeros at the end."""
        missing = -len(values) % self.block
        return torch.nn.functional.pad(values, (0, missing)).view(-1, self.block)


@dataclass(frozen=True)
class TopK:
    """The largest ``share`` of the values in fp16, and where they stand; the rest is zero."""

    share: float
    feedback: bool = True

    def encode(self, values: Tensor) -> State:
        indices = values.abs().topk(self._count(len(values)), sorted=False).indices.sort().values
        return {"indices": indices.to(torch.int32), "values": values[indices].half()}

    def decode(self, arrays: State, size: int) -> Tensor:
        count = self._count(size)
        indices, values = _checked(
            arrays, {"indices": (torch.int32, count), "values": (torch.float16, count)}
        )
        if count and (indices[0] < 0 or indices[-1] >= size or (indices.diff() <= 0).any()):
            raise MessageError(f"its indices do not rise within [0, {size})")
        return torch.zeros(size).index_copy_(0, indices.long(), values.float())

    def _count(self, size: int) -> int:
        return math.ceil(self.share * size)


def flatten(state: State) -> tuple[Shapes, Tensor]:
    """Names and shapes, and all values as one fp32 vector."""
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    parts = [tensor.detach().flatten().float() for tensor in state.values()]
    return shapes, torch.cat(parts) if parts else torch.zeros(0)


def unflatten(values: Tensor, shapes: Shapes) -> State:
    """What :func:`flatten` was given, in fp32."""
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def decode(codec: Codec, arrays: State, shapes: Shapes, expected: State) -> State:
    """What a message holds, in fp32.

    Args:
        shapes: what it says of itself. Nothing is allocated unless ``expected`` agrees.

    Raises:
        MessageError: unknown names, other shapes, or arrays that do not fit them.
    """
    check_shapes(shapes, expected)
    size = sum(expected[name].numel() for name in shapes)
    return unflatten(codec.decode(arrays, size), shapes)


def check_shapes(found: Mapping[str, list[int]], expected: State) -> None:
    """Refuse names that nobody expects and other shapes.

    Raises:
        MessageError: the first that is wrong.
    """
    for name, shape in found.items():
        if name not in expected:
            raise MessageError(f"it sent {name[:200]}, which is not expected")
        if shape != list(expected[name].shape):
            raise MessageError(
                f"it sent {name} of shape {shape}, expected {list(expected[name].shape)}"
            )


def _checked(arrays: State, expected: dict[str, tuple[torch.dtype, int]]) -> tuple[Tensor, ...]:
    if arrays.keys() != expected.keys():
        raise MessageError(f"it sent the arrays {sorted(arrays)}, expected {sorted(expected)}")
    for name, (dtype, size) in expected.items():
        array = arrays[name]
        if array.dtype != dtype or list(array.shape) != [size]:
            raise MessageError(
                f"its array {name} is {array.dtype} {list(array.shape)}, expected {dtype} [{size}]"
            )
    return tuple(arrays[name] for name in expected)
