"""What stays the same from round to round, kept per example: the frozen prefix and frozen outputs.

Rows are stored without padding, so memory follows the examples' lengths. Past the bound nothing is
stored: those examples are computed every time, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedms.fl.model.backbone import Backbone
from fedms.fl.tasks.task import Batch, Task

FILL_BATCH = 64


class Prefix:
    """Hidden states below the lowest awake block, computed when they are first asked for.

    Examples are computed in groups that do not depend on who asks or when, so a run that was
    stopped and resumed rounds as one that was not.

    Args:
        backbone, task: the model, and what its batches are.
        groups: examples that are computed together, e.g. each client's own.
        max_bytes: bound on what is stored; 0 stores nothing.

    Attributes:
        bytes: what is stored now.
    """

    def __init__(
        self, backbone: Backbone, task: Task, groups: Sequence[np.ndarray], max_bytes: int
    ) -> None:
        self._backbone, self._task, self._max_bytes = backbone, task, max_bytes
        self._chunks: list[np.ndarray] = []
        for group in groups:
            by_length = group[np.argsort(task.lengths[group], kind="stable")]
            self._chunks += [
                by_length[start : start + FILL_BATCH]
                for start in range(0, len(by_length), FILL_BATCH)
            ]
        self._chunk_of = {
            i: number for number, chunk in enumerate(self._chunks) for i in chunk.tolist()
        }
        self._states: dict[int, dict[int, Tensor]] = {}
        self._kept_chunks = 0
        self.bytes = 0

    def keep(self, depths: Sequence[int]) -> None:
        """From now on batches may start at these depths and at no others."""
        wanted = {depth for depth in depths if depth > 0}
        if wanted == self._states.keys():
            return
        for stale in self._states.keys() - wanted:
            self.bytes -= sum(state.nbytes for state in self._states.pop(stale).values())
        for depth in wanted:
            self._states.setdefault(depth, {})
        a_position = len(wanted) * self._backbone.width * self._backbone.dtype.itemsize
        sizes = [int(self._task.lengths[chunk].sum()) * a_position for chunk in self._chunks]
        self._kept_chunks = int(np.searchsorted(np.cumsum(sizes), self._max_bytes, side="right"))

    def entry(self, indices: np.ndarray, batch: Batch, depth: int) -> Tensor | None:
        """Hidden states [B, T, D] of a batch at ``depth``; None at 0, where ids are as good."""
        if depth == 0:
            return None
        stored = self._states.get(depth, {})
        wanted = indices.tolist()
        missing = {self._chunk_of.get(i, self._kept_chunks) for i in wanted if i not in stored}
        if any(chunk >= self._kept_chunks for chunk in missing) or depth not in self._states:
            return self._backbone.entering(batch, [depth])[depth]
        for chunk in sorted(missing):
            self._fill(self._chunks[chunk])
        return nn.utils.rnn.pad_sequence([stored[i] for i in wanted], batch_first=True)

    def _fill(self, chunk: np.ndarray) -> None:
        batch = self._task.batch(chunk, self._backbone.device)
        for depth, states in self._backbone.entering(batch, sorted(self._states)).items():
            for row, i in enumerate(chunk.tolist()):
                state = states[row, : self._task.lengths[i]].clone()
                self.bytes += state.nbytes - (
                    old.nbytes if (old := self._states[depth].get(i)) is not None else 0
                )
                self._states[depth][i] = state


class Outputs:
    """Features of paths that are frozen for everybody, by path and example.

    Args:
        enabled: False computes them every time.
        max_bytes: past it, all are forgotten and the next are kept.
    """

    def __init__(self, enabled: bool = True, max_bytes: int = 2**30) -> None:
        self._enabled, self._max_bytes, self._bytes = enabled, max_bytes, 0
        self._frozen: frozenset[tuple[str, ...]] = frozenset()
        self._owner: object = None
        self._known: dict[tuple[str, ...], dict[int, Tensor]] = {}

    def keep(self, paths: Sequence[tuple[str, ...]], owner: object) -> None:
        """From now on keep what these paths give; forget all that another ``owner`` had kept.

        An owner's parameters on these paths do not change.
        """
        if owner == self._owner:
            return
        self._owner = owner
        self._frozen = frozenset(paths) if self._enabled else frozenset()
        self._forget()

    def missing(self, path: tuple[str, ...], indices: np.ndarray) -> np.ndarray | None:
        """Which of these examples are not known; None if this path is not kept at all."""
        if path not in self._frozen:
            return None
        if self._bytes > self._max_bytes:
            self._forget()
        known = self._known[path]
        return np.array([i for i in indices.tolist() if i not in known], dtype=np.int64)

    def put(self, path: tuple[str, ...], indices: np.ndarray, features: Sequence[Tensor]) -> None:
        """Keep each example's features [answers, D]."""
        self._known[path].update(zip(indices.tolist(), features, strict=True))
        self._bytes += sum(each.nbytes for each in features)

    def _forget(self) -> None:
        self._known = {path: {} for path in self._frozen}
        self._bytes = 0

    def get(self, path: tuple[str, ...], indices: np.ndarray) -> Tensor:
        """Features [P, D] of examples, in their order."""
        known = self._known[path]
        return torch.cat([known[i] for i in indices.tolist()])
