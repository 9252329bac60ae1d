"""Causal language modelling: every token of a window but its first is predicted from those before.

B windows, T tokens, P predicted tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedms.fl.data.corpus import Windows
from fedms.fl.tasks.task import Batch, Metric

BITS = Metric("bits per token", -1.0, "bit", 3)


class CausalLMTask:
    """Language modelling of windows of tokens; see :class:`fedms.fl.tasks.task.Task`.

    A class is a token, so two experts are mixed by their distributions of the next token.

    Args:
        windows: the examples.
        output: the model's own head: last hidden states [P, D] -> logits [P, V].
        vocabulary: V.
    """

    metric = BITS

    def __init__(
        self, windows: Windows, output: Callable[[Tensor], Tensor], vocabulary: int
    ) -> None:
        self._windows, self._output = windows, output
        self.num_classes = vocabulary
        self.lengths = windows.lengths

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Windows [B] as ids and mask [B, T], padded behind; the next tokens as targets [P]."""
        lengths = torch.from_numpy(self.lengths[indices])
        places = torch.arange(int(lengths.max()))
        real = places < lengths[:, None]
        ids = torch.zeros(real.shape, dtype=torch.int64)
        rows = [torch.from_numpy(self._windows[i]) for i in indices.tolist()]
        ids[real] = torch.cat(rows).long()
        example, position = (places[:-1] < lengths[:, None] - 1).nonzero(as_tuple=True)
        return Batch(
            {"input_ids": ids, "attention_mask": real.long()},
            ids[example, position + 1],
            example,
            position,
            tuple((lengths - 1).tolist()),
        ).to(device)

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return predicted_tokens(self._windows, indices)

    def prepare(self, hidden: Callable[[Batch], Tensor]) -> None:
        """Nothing: the head is the model's own."""

    def fresh_head(self, width: int) -> Tensor | None:
        return None

    def trainable_head(self, width: int) -> Tensor | None:
        return None

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """States [B, T, D] -> those from which a token is predicted, [P, D]."""
        return hidden[batch.example, batch.position]

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        return self._output(z)

    def score(self, log_p: Tensor, targets: Tensor) -> Tensor:
        """log2 of the probability of the right token."""
        return log_p.gather(1, targets[:, None]).squeeze(1) / math.log(2)


def predicted_tokens(windows: Sequence[np.ndarray], indices: np.ndarray) -> np.ndarray:
    """int64 [P], the tokens of these windows less the first of each; [0] of no windows."""
    nothing = np.zeros(0, dtype=np.int64)  # a server has names of clients and no examples
    return np.concatenate([nothing, *(windows[i][1:] for i in indices.tolist())])
