"""What the log says of texts that occur more than once."""

from __future__ import annotations

import numpy as np
import pytest

from fedms.fl.data.dataset import load_dataset
from fedms.fl.data.duplicates import repeated_texts
from fedms.fl.data.federation import Dataset
from fedms.fl.data.partition import Fractions, split_dataset

ROWS = ["a,x", "b,y", "a,x", "c,x", "c,y", "c,x", "d,y", "e,x"]


def table(tmp_path, rows=ROWS, header="text,label", **options) -> Dataset:
    path = tmp_path / "t.csv"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return load_dataset(path, **options)


def test_equal_texts_are_counted_and_stay_together(tmp_path):
    data = table(tmp_path)
    assert repeated_texts(data) == (
        "5 of 8 texts occur more than once; equal ones stay on one side of the split"
    )
    for seed in range(5):
        parts = split_dataset(data, Fractions(0.5, 0.1, 0.1, 0.3), seed=seed)
        sides = [{data.inputs[i] for i in part} for part in parts]
        assert sum(map(len, sides)) == 5


def test_a_given_split_stands_and_what_it_leaks_is_said(tmp_path):
    rows = ["a,x,train", "b,y,train", "a,x,test", "b,y,test", "b,y,test", "e,x,test", "e,x,test"]
    data = table(tmp_path, rows, "text,label,split", split_column="split")
    assert repeated_texts(data) == "3 of 5 test texts stand in training rows as well"
    rows = ["a,x,train", "b,y,train", "e,x,test", "e,x,test"]
    assert repeated_texts(table(tmp_path, rows, "text,label,split", split_column="split")) is None


def test_groups_of_another_kind_may_tear_them(tmp_path):
    rows = ["a,x,1", "a,x,2", "b,y,3"]
    data = table(tmp_path, rows, "text,label,patient", group_column="patient")
    assert repeated_texts(data) == (
        "2 of 3 texts occur more than once; equal ones may stand on both sides of the split"
    )


@pytest.mark.parametrize("inputs", [("a", "b"), (), tuple(np.zeros((2, 3)))])
def test_nothing_to_say(inputs):
    assert repeated_texts(Dataset(inputs, np.zeros(len(inputs), np.int64), ("x",))) is None
