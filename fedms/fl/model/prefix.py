"""Frozen prefix reuse: hidden states below the lowest awake block, computed once and kept.

States are stored per example, without padding, so memory follows the texts' lengths. Past the bound
nothing is stored: those examples run from their token ids every time, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedms.fl.model.backbone import Foundation, Tokens, pad

FILL_BATCH = 64


class PrefixCache:
    """Batches of a dataset, with their hidden states at the foundation's current depth.

    Args:
        foundation: the model; its :attr:`~Foundation.depth` says where a batch starts.
        rows: token ids [T_i] of every example of the dataset.
        max_bytes: bound on what is stored; 0 stores nothing.
    """

    def __init__(self, foundation: Foundation, rows: Sequence[Tensor], max_bytes: int) -> None:
        self._foundation = foundation
        self._rows = rows
        self._max_bytes = max_bytes
        self._states: dict[int, dict[int, Tensor]] = {}
        self.bytes = 0

    def fill(
        self,
        indices: np.ndarray,
        depths: Sequence[int],
        advance: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Store the states at ``depths`` of as many ``indices`` as the bound allows, in one pass.

        ``advance`` hears how many examples each batch has covered.
        """
        depths = sorted({depth for depth in depths if depth > 0})
        if not depths or not self._max_bytes:
            return
        missing = {
            i for depth in depths for i in indices.tolist() if i not in self._states.get(depth, {})
        }
        by_length = sorted(missing, key=lambda i: (len(self._rows[i]), i))
        for start in range(0, len(by_length), FILL_BATCH):
            chosen = by_length[start : start + FILL_BATCH]
            advance(len(chosen))
            hidden = self._foundation.prefix(pad([self._rows[i] for i in chosen]), depths)
            for depth, states in hidden.items():
                stored = self._states.setdefault(depth, {})
                for row, i in enumerate(chosen):
                    if i in stored:
                        continue
                    state = states[row, : len(self._rows[i])].clone()
                    if self.bytes + state.nbytes > self._max_bytes:
                        return
                    stored[i] = state
                    self.bytes += state.nbytes

    def forget_above(self, depth: int) -> None:
        """Free the states at depths that no awake set will start from again."""
        for stale in [known for known in self._states if known > depth]:
            self.bytes -= sum(state.nbytes for state in self._states.pop(stale).values())

    def batch(self, indices: np.ndarray) -> tuple[Tokens, Tensor | None, int]:
        """Tokens, hidden states [B, T, D], their depth; (tokens, None, 0) if still to compute."""
        depth = self._foundation.depth
        tokens = pad([self._rows[i] for i in indices])
        stored = self._states.get(depth, {})
        if depth == 0:
            return tokens, None, 0
        if all(i in stored for i in indices):
            return (
                tokens,
                nn.utils.rnn.pad_sequence([stored[i] for i in indices], batch_first=True),
                depth,
            )
        with torch.no_grad():
            return tokens, self._foundation.prefix(tokens, [depth])[depth], depth
