"""Long texts to windows of tokens, for language modelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from fedms.fl.data.federation import Dataset
from fedms.fl.types import DataError

TEXTS_AT_A_TIME = 256


class Windows(Sequence[np.ndarray]):
    """N windows, int32 [T_i] each, over one array of all tokens.

    Args:
        tokens: int32, the documents one after the other.
        spans: int64 [N, 2], where each window begins and ends.
    """

    def __init__(self, tokens: np.ndarray, spans: np.ndarray) -> None:
        self._tokens, self._spans = tokens, spans

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens in each window."""
        return self._spans[:, 1] - self._spans[:, 0]

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self._spans[index]
        return self._tokens[begin:end]


def cut_to_windows(
    dataset: Dataset, encode: Callable[[Sequence[str]], Sequence[Sequence[int]]], length: int
) -> Dataset:
    """The same data with windows of at most ``length`` tokens as its examples.

    A window begins with the last token of the one before, so that every token of a text but its
    first is predicted exactly once. All windows of a text are one group, or of its group.

    Args:
        dataset: texts.
        encode: texts -> token ids of each.
        length: at least 2.

    Raises:
        DataError: a text of fewer than 2 tokens, in which there is nothing to predict.
    """
    pieces: list[np.ndarray] = []
    for start in range(0, len(dataset), TEXTS_AT_A_TIME):
        rows = encode(dataset.inputs[start : start + TEXTS_AT_A_TIME])
        pieces += [np.asarray(row, dtype=np.int32) for row in rows]
    sizes = np.array([len(piece) for piece in pieces])
    if (sizes < 2).any():
        index = int(np.argmax(sizes < 2))
        raise DataError(
            f"text {index + 1} of the data must have at least 2 tokens, one to read and one to "
            f"predict, got {sizes[index]}: {dataset.inputs[index][:40]!r}"
        )
    ends = sizes.cumsum()
    spans: list[tuple[int, int]] = []
    owner: list[int] = []
    for text, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        for first in range(begin, end - 1, length - 1):
            spans.append((first, min(first + length, end)))
            owner.append(text)
    of = np.array(owner)
    return replace(
        dataset,
        inputs=Windows(np.concatenate(pieces), np.array(spans)),
        labels=dataset.labels[of],
        groups=of if dataset.groups is None else dataset.groups[of],
        clients=_taken(dataset.clients, owner),
        splits=_taken(dataset.splits, owner),
    )


def _taken(names: tuple[str, ...] | None, indices: list[int]) -> tuple[str, ...] | None:
    return None if names is None else tuple(names[i] for i in indices)
