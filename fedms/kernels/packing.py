"""What lies in memory as one matrix: per-expert parameters, without a copy then, and rows of x.

Adjacency is read from data_ptr on every call. Nothing is cached: merging, hot-swapping and loading
write through `.data`, which leaves `_version` as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """[r_e, K] parts as [R, K]: `rows_view`, else torch.cat."""
    view = rows_view(parts)
    return torch.cat(tuple(parts)) if view is None else view


def stack_columns(parts: Sequence[Tensor]) -> Tensor:
    """[N, r_e] parts as [N, R]: `columns_view`, else torch.cat."""
    view = columns_view(parts)
    return torch.cat(tuple(parts), dim=1) if view is None else view


def rows_view(parts: Sequence[Tensor]) -> Tensor | None:
    """[r_e, K] parts as one view [R, K] when part e + 1 starts where part e ends, else None."""
    first = parts[0]
    if len(parts) == 1:
        return first
    expected = first.data_ptr()
    if parts[1].data_ptr() != expected + first.numel() * first.element_size():
        return None  # the usual no, at the least cost
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != expected or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        # Neighbours in memory by chance belong to two storages: a view over both would dangle.
        if part.untyped_storage().data_ptr() != storage:
            return None
        expected += part.numel() * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def columns_view(parts: Sequence[Tensor]) -> Tensor | None:
    """[N, r_e] parts as one view [N, R] when they are slices of one matrix, else None."""
    first = parts[0]
    if len(parts) == 1:
        return first
    itemsize = first.element_size()
    expected = first.data_ptr()
    if parts[1].data_ptr() != expected + first.shape[1] * itemsize:
        return None  # the usual no, at the least cost
    total = sum(part.shape[1] for part in parts)
    end = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    for part in parts:
        same = part.dtype == first.dtype and part.stride() == (total, 1)
        if not same or part.data_ptr() != expected:
            return None
        expected += part.shape[1] * itemsize
    if first.data_ptr() + first.shape[0] * total * itemsize > end:
        return None
    return first.as_strided((first.shape[0], total), (total, 1))


def rows_are_matrix(x: Tensor) -> bool:
    """Whether torch's own linear takes the rows of x as one matrix; else its last bits are others.

    It looks at the strides of dims of size 1 too, although they mean nothing.
    """
    if x.dim() < 3:
        return True
    shape, strides = x.shape, x.stride()
    step = shape[-1]
    for size, stride in zip(shape[-2:0:-1], strides[-2:0:-1], strict=True):
        if stride != step:
            return False
        step *= size
    return strides[-1] == 1 and strides[0] == step


def check_memory(tensors: Iterable[Tensor | None]) -> None:
    """Storage that was freed, as FSDP does between two uses: torch follows the null pointer."""
    for t in tensors:
        if t is None or t.layout is not torch.strided or t._is_zerotensor():
            continue
        if t.numel() and not t.untyped_storage().nbytes():
            raise RuntimeError(
                f"tensors must be strided and have memory, got a {type(t).__name__} {t.layout} "
                f"{list(t.shape)} without"
            )
