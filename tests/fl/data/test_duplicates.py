"""What the log says of examples that occur more than once, and that equal ones stay together."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fedms.fl.data.dataset import load_dataset
from fedms.fl.data.duplicates import repeated_examples
from fedms.fl.data.federation import Dataset
from fedms.fl.data.images import Images
from fedms.fl.data.partition import Fractions, split_dataset

ROWS = ["a,x", "b,y", "a,x", "c,x", "c,y", "c,x", "d,y", "e,x"]


def table(tmp_path, rows=ROWS, header="text,label", **options) -> Dataset:
    path = tmp_path / "t.csv"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return load_dataset(path, **options)


def test_equal_texts_are_counted_and_stay_together(tmp_path):
    data = table(tmp_path)
    assert repeated_examples(data) == (
        "5 of 8 texts occur more than once; equal ones stay on one side of the split"
    )
    for seed in range(5):
        parts = split_dataset(data, Fractions(0.5, 0.1, 0.1, 0.3), seed=seed)
        sides = [{data.inputs[i] for i in part} for part in parts]
        assert sum(map(len, sides)) == 5


def test_a_given_split_stands_and_what_it_leaks_is_said(tmp_path):
    rows = ["a,x,train", "b,y,train", "a,x,test", "b,y,test", "b,y,test", "e,x,test", "e,x,test"]
    data = table(tmp_path, rows, "text,label,split", split_column="split")
    assert repeated_examples(data) == "3 of 5 test texts stand in training rows as well"
    rows = ["a,x,train", "b,y,train", "e,x,test", "e,x,test"]
    assert (
        repeated_examples(table(tmp_path, rows, "text,label,split", split_column="split")) is None
    )


def test_groups_of_another_kind_may_tear_them(tmp_path):
    rows = ["a,x,1", "a,x,2", "b,y,3"]
    data = table(tmp_path, rows, "text,label,patient", group_column="patient")
    assert repeated_examples(data) == (
        "2 of 3 texts occur more than once; equal ones may stand on both sides of the split"
    )


def pictures(folder, colors: str) -> None:
    """An image of two pixels a letter, in a folder of one of two classes."""
    for i, color in enumerate(colors):
        place = folder / "xy"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 1), {"a": "red", "b": "blue"}.get(color, (i, 0, 9))).save(
            place / f"{i:02d}.png"
        )


@pytest.mark.parametrize("where", ["folders", "bytes", "files", "decoded"])
def test_equal_images_stay_together(tmp_path, where):
    pictures(tmp_path, "aabb?a??")
    files = sorted(tmp_path.rglob("*.png"))
    labels = [file.parent.name for file in files]
    if where == "folders":
        data = load_dataset(tmp_path, image_column="image")
    elif where == "bytes":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        columns = {"image": [file.read_bytes() for file in files], "label": labels}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        data = load_dataset(tmp_path / "t.parquet", image_column="image")
    elif where == "files":
        rows = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
        data = table(tmp_path, rows, "image,label", image_column="image")
    else:
        decoded = [Image.open(file) for file in files]
        images = Images(decoded.__getitem__, str, 8)
        groups = np.unique(images.digests, return_inverse=True)[1]
        data = Dataset(images, np.arange(8) % 2, ("x", "y"), groups)
    assert repeated_examples(data) == (
        "5 of 8 images occur more than once; equal ones stay on one side of the split"
    )
    for seed in range(5):
        parts = split_dataset(data, Fractions(0.5, 0.1, 0.1, 0.3), seed=seed)
        sides = [{data.inputs.digests[i] for i in part} for part in parts]
        assert sum(map(len, sides)) == 5


@pytest.mark.parametrize("inputs", [("a", "b"), (), tuple(np.zeros((2, 3)))])
def test_nothing_to_say(inputs):
    assert repeated_examples(Dataset(inputs, np.zeros(len(inputs), np.int64), ("x",))) is None
