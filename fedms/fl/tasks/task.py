"""What an example is and how an answer is judged: the Task that every part of the loop asks.

Shapes: B examples of a batch, P answers that are judged, T positions of a hidden state, D its
width, C classes (or the vocabulary). A classifier has P = B, one answer an example; a language
model has an answer a predicted token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from fedms.fl.settings import Section


class TaskConfig(Section):
    kind: Literal["text", "images", "causal_lm"] = "text"
    """Classes of texts, classes of images, or the next token of texts."""
    head: Literal["names", "linear"] = "names"
    """What classifies: the class names in words, or a linear layer that is trained."""
    text_model: str = "minilm"
    """Reads the class names where images are seen by a model that has no text tower."""

    @model_validator(mode="after")
    def _has_no_head_of_its_own_for_tokens(self) -> Self:
        if self.kind == "causal_lm" and self.head == "linear":
            raise ValueError(
                'head = "linear" is for classes; the head of kind = "causal_lm" is the model\'s '
                "output embedding: leave task.head out"
            )
        return self


@dataclass(frozen=True)
class Batch:
    """B examples of one call, padded, on the backbone's device.

    Attributes:
        inputs: the keyword arguments of the transformers model (``input_ids``,
            ``attention_mask``, ``pixel_values``); the first dimension of each is B.
        targets: int64 [P], the right answers.
        example: int64 [P], ascending: the row of the batch that each answer belongs to.
        position: int64 [P] or None: the position in the row's hidden state that each answer is read
            from; None where an answer is read from the whole row (P = B).
        answers: how many answers each row has, [B], known to the host, so that nobody has to wait
            for the device; None: one each.
        outline: what a forward from a later block takes in place of ``inputs``, where those are
            dear to make: of their shapes, with any values. None: the inputs.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    example: Tensor
    position: Tensor | None = None
    answers: tuple[int, ...] | None = None
    outline: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        """B, the number of examples."""
        return len(next(iter((self.outline or self.inputs).values())))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy does not wait for it."""
        return Batch(
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            self.targets.to(device, non_blocking=True),
            self.example.to(device, non_blocking=True),
            None if self.position is None else self.position.to(device, non_blocking=True),
            self.answers,
        )


@dataclass(frozen=True)
class Metric:
    """How a mean of :meth:`Task.score` is shown to people.

    Attributes:
        name: "accuracy", "bits per token".
        factor: what a mean score is multiplied by to be shown; below 0 where less is better. 100
            for an accuracy in %, -1 for the bits of a log2 p.
        unit: "%", "bit".
        digits: decimals shown.
    """

    name: str
    factor: float
    unit: str
    digits: int = 1

    def shown(self, score: float | None) -> str:
        """A mean score for people, without the unit; a dash for none."""
        return "–" if score is None else f"{self.factor * score:.{self.digits}f}"

    def spread(self, deviation: float) -> str:
        """The same for a standard deviation, which has no sign."""
        return f"{abs(self.factor) * deviation:.{self.digits}f}"


class Task(Protocol):
    """What an example is and how an answer is judged. Knows no client, no expert and no round.

    The head turns features [P, D] into logits [P, C]. Either it is frozen and the task's own
    (class names in words, a language model's output embedding), or it is trained: then every expert
    has its own, a parameter ``<expert>.head.weight`` [C, D], which starts from :meth:`fresh_head`.

    A task that asks whether texts are of even length, as a whole::

        class Parity:
            num_classes, metric = 2, Metric("accuracy", 100.0, "%")

            def __init__(self, rows):  # token ids [T_i] of each example
                self.rows, self.lengths = rows, np.array([len(row) for row in rows])

            def batch(self, indices, device):
                ids = pad_sequence([self.rows[i] for i in indices], batch_first=True)
                odd = torch.from_numpy(self.targets(indices))
                return Batch({"input_ids": ids}, odd, torch.arange(len(ids))).to(device)

            def targets(self, indices):
                return self.lengths[indices] % 2

            def prepare(self, hidden):  # a trained head: nothing frozen to compute
                pass

            def fresh_head(self, width):
                return torch.zeros(2, width)

            def trainable_head(self, width):
                return self.fresh_head(width)

            def pool(self, hidden, batch):
                return hidden[:, 0]

            def logits(self, z, head):
                return z @ head.T

            def score(self, log_p, targets):
                return (log_p.argmax(-1) == targets).float()

    Attributes:
        num_classes: C.
        lengths: int64 [N]: the length T_i of each example's hidden state (tokens; patches and the
            class token). The frozen prefix keeps that many positions; batches group examples of
            like length.
        metric: how scores are shown.
    """

    @property
    def num_classes(self) -> int: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def metric(self) -> Metric: ...

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """The examples ``indices`` [B] as one padded batch on ``device``.

        Everything is put together on the CPU and copied once: nothing here may wait for a device.
        """
        ...

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """The right answers of these examples one after the other, int64 [P], on the host."""
        ...

    def prepare(self, hidden: Callable[[Batch], Tensor]) -> None:
        """Compute what the frozen head needs; called once, before anything else.

        Args:
            hidden: the untuned backbone: a batch -> its last hidden state [B, T, D], no gradient.
        """
        ...

    def fresh_head(self, width: int) -> Tensor | None:
        """What a trained head [C, D] starts from, the same on every client; None for a frozen one.

        ``width`` is D.
        """
        ...

    def trainable_head(self, width: int) -> Tensor | None:
        """What a head starts from where a method trains one whatever the task's is.

        :meth:`fresh_head`, or the frozen head if :meth:`logits` takes one of its shape; None: this
        task has no head that could be trained.
        """
        ...

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The last hidden state [B, T, D] -> features [P, D], what the head reads."""
        ...

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        """Features [P, D] -> logits [P, C] by an expert's ``head`` [C, D]; None: the frozen one.

        P may be a part of a batch's answers: logits of a large vocabulary are made in pieces.
        """
        ...

    def score(self, log_p: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities [P, C] and right answers [P] -> scores [P], more is better.

        1 or 0 for a hit or a miss; log2 of the probability of the right token.
        """
        ...
