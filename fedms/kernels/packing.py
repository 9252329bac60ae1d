"""Per-expert parameters as one matrix, without a copy where their storage is already adjacent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """[r_e, K] parts as [R, K]: a view when part e + 1 starts where part e ends, else torch.cat.

    Adjacency is read from data_ptr on every call. Nothing is cached: merging, hot-swapping and
    loading write through `.data`, which leaves `_version` as it was.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if not _adjacent(parts):
        return torch.cat(tuple(parts))
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def stack_columns(parts: Sequence[Tensor]) -> Tensor:
    """[N, r_e] parts as [N, R]: a view when they are slices of one matrix, else torch.cat."""
    first = parts[0]
    if len(parts) == 1:
        return first
    itemsize = first.element_size()
    expected = first.data_ptr()
    if parts[1].data_ptr() != expected + first.shape[1] * itemsize:
        return torch.cat(tuple(parts), dim=1)  # the usual no, at the least cost
    total = sum(part.shape[1] for part in parts)
    end = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    for part in parts:
        same = part.dtype == first.dtype and part.stride() == (total, 1)
        if not same or part.data_ptr() != expected:
            return torch.cat(tuple(parts), dim=1)
        expected += part.shape[1] * itemsize
    if first.data_ptr() + first.shape[0] * total * itemsize > end:
        return torch.cat(tuple(parts), dim=1)
    return first.as_strided((first.shape[0], total), (total, 1))


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """True when the contiguous parts lie one behind the other in one storage."""
    first = parts[0]
    expected = first.data_ptr()
    if parts[1].data_ptr() != expected + first.numel() * first.element_size():
        return False  # the usual no, at the least cost
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != expected or not part.is_contiguous() or part.dtype != first.dtype:
            return False
        # Neighbours in memory by chance belong to two storages: a view over both would dangle.
        if part.untyped_storage().data_ptr() != storage:
            return False
        expected += part.numel() * part.element_size()
    return True
