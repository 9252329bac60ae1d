"""Windows: every token of a text but its first is predicted exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedms.fl.data.corpus import cut_to_windows
from fedms.fl.data.federation import Dataset
from fedms.fl.types import DataError


def numbers(texts: Sequence[str]) -> list[list[int]]:
    return [[int(word) for word in text.split()] for text in texts]


def documents(*sizes: int, **more) -> Dataset:
    """Texts of so many numbers, each number its place in the whole."""
    ends = np.cumsum(sizes)
    texts = [" ".join(map(str, range(e - n, e))) for n, e in zip(sizes, ends, strict=True)]
    return Dataset(tuple(texts), np.zeros(len(sizes), np.int64), ("all",), **more)


def test_by_hand():
    data = cut_to_windows(documents(6, 2, 3), numbers, 3)
    windows = [window.tolist() for window in data.inputs]
    assert windows == [[0, 1, 2], [2, 3, 4], [4, 5], [6, 7], [8, 9, 10]]
    assert data.groups.tolist() == [0, 0, 0, 1, 2]
    assert data.inputs.lengths.tolist() == [3, 3, 2, 2, 3]
    assert data.inputs[0].dtype == np.int32


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_every_token_but_the_first_is_predicted_once(length):
    sizes = (2, 3, 17, 300, 8)
    data = cut_to_windows(documents(*sizes), numbers, length)
    predicted = np.concatenate([window[1:] for window in data.inputs])
    firsts = np.cumsum((0, *sizes[:-1]))
    assert predicted.tolist() == np.setdiff1d(np.arange(sum(sizes)), firsts).tolist()
    assert all(2 <= len(window) <= length for window in data.inputs)
    assert all((np.diff(window) == 1).all() for window in data.inputs)  # none spans two texts


def test_what_a_text_has_its_windows_have():
    data = documents(4, 3, clients=("a", "b"), splits=("train", "test"), groups=np.array([7, 7]))
    windows = cut_to_windows(data, numbers, 2)
    assert windows.clients == ("a", "a", "a", "b", "b")
    assert windows.splits == ("train", "train", "train", "test", "test")
    assert windows.groups.tolist() == [7] * 5


def test_a_text_with_nothing_to_predict():
    with pytest.raises(DataError, match=r"text 2 of the data must have at least 2 tokens.* got 1"):
        cut_to_windows(documents(4, 1, 3), numbers, 8)
