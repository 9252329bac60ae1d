"""Images from folders, Parquet and ``datasets``: what comes back, and mistakes by name."""

from __future__ import annotations

import gc
import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedms.fl.data.dataset import load_dataset
from fedms.fl.data.images import Images
from fedms.fl.types import DataError

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(color: str, mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 3), COLORS[color]).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def rows() -> list[dict]:
    return [
        {"image": png(color), "label": color, "site": site, "idea": str(i // 2)}
        for i, (color, site) in enumerate((color, site) for color in COLORS for site in ("a", "b"))
    ]


def pixel(image: Image.Image) -> tuple:
    assert image.mode == "RGB"
    return image.getpixel((1, 1))


def check_colors(data) -> None:
    for index, label in enumerate(data.labels):
        assert pixel(data.inputs[index]) == COLORS[data.class_names[label]]


def write_parquet(path: Path, cells: list[dict], **options) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(cells)
    if options:
        table = table.replace_schema_metadata(options)
    pq.write_table(table, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for color in COLORS:
        (tmp_path / color).mkdir()
        for name in ("1.png", "2.png"):
            (tmp_path / color / name).write_bytes(png(color))
    return tmp_path


def test_class_folders(folder):
    (folder / "blue" / ".DS_Store").write_bytes(b"what a file manager leaves")
    data = load_dataset(folder, image_column="image")
    assert data.class_names == ("blue", "green", "red")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.splits is None
    check_colors(data)


def test_class_folders_under_train_and_test(folder):
    for side in ("train", "test"):
        (folder / side).mkdir()
    for color in COLORS:
        (folder / "test" / color).mkdir()
        (folder / color / "2.png").rename(folder / "test" / color / "2.png")
        (folder / color).rename(folder / "train" / color)
    data = load_dataset(folder, image_column="image")
    assert data.class_names == ("blue", "green", "red")
    assert data.splits == ("test",) * 3 + ("train",) * 3
    check_colors(data)


def test_names_for_class_folders(folder):
    names = {"red": "a red square", "green": "a green square", "blue": "a blue square"}
    data = load_dataset(folder, image_column="image", class_names=names)
    assert data.class_names == ("a blue square", "a green square", "a red square")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("red/3.png", b"no image at all", "must hold an image"),
        ("red/3.png", b"", "must hold an image"),
        ("red/notes.txt", b"remember the milk", "must hold an image"),
    ],
)
def test_a_file_that_is_no_image(folder, name, content, part):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=part) as caught:
        load_dataset(folder, image_column="image")
    assert name in str(caught.value)


def test_folders_without_images(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty must hold the images of a class, got no file"):
        load_dataset(folder, image_column="image")
    with pytest.raises(DataError, match="must hold a folder of images for each class"):
        load_dataset(folder / "empty", image_column="image")
    with pytest.raises(DataError, match=r"ending in .csv, .*or a folder of .parquet files"):
        load_dataset(folder)


@pytest.mark.skipif(sys.platform == "darwin", reason="its disks take text alone as names")
def test_a_class_folder_whose_name_is_no_text(folder):
    os.rename(folder / "red", os.fsencode(folder) + b"/ros\xe9")
    with pytest.raises(DataError, match=r"ros.*names a class and must be UTF-8"):
        load_dataset(folder, image_column="image")


def test_damaged_pixels_are_named_when_they_are_asked_for(folder):
    path = folder / "green" / "1.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    data = load_dataset(folder, image_column="image")
    assert [data.inputs[i].size for i in (0, 1, 3)] == [(4, 3)] * 3
    with pytest.raises(DataError, match=r"green/1.png: the image is damaged"):
        data.inputs[2]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet(tmp_path, form):
    cells = rows()
    if form == "struct":  # as on the hub
        cells = [{**row, "image": {"bytes": row["image"], "path": None}} for row in cells]
    path = write_parquet(tmp_path / "a.parquet", cells)
    data = load_dataset(path, image_column="image", client_column="site", group_column="idea")
    assert data.class_names == ("blue", "green", "red")
    assert data.clients == ("a", "b") * 3
    assert data.groups.tolist() == [0, 0, 1, 1, 2, 2]
    check_colors(data)


def test_a_folder_of_parquet_files(tmp_path):
    cells = rows()
    write_parquet(tmp_path / "part-0.parquet", cells[:2])
    write_parquet(tmp_path / "part-1.parquet", cells[2:])
    data = load_dataset(tmp_path, image_column="image")
    assert len(data) == 6
    check_colors(data)
    bad = [cells[2], {**cells[3], "image": b"nothing"}]
    write_parquet(tmp_path / "part-1.parquet", bad)
    with pytest.raises(DataError, match=r"part-1.parquet, row 2: column 'image' must hold"):
        load_dataset(tmp_path, image_column="image")
    write_parquet(tmp_path / "part-1.parquet", [{"picture": b"", "label": "red"}])
    with pytest.raises(DataError, match=r"part-1.parquet has no column 'image'"):
        load_dataset(tmp_path, image_column="image")


def test_class_names_that_parquet_records(tmp_path):
    features = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    cells = [{"image": png("red"), "label": i % 2} for i in range(4)]
    path = write_parquet(tmp_path / "a.parquet", cells, huggingface=features)
    assert load_dataset(path, image_column="image").class_names == ("cat", "dog")
    named = load_dataset(path, image_column="image", class_names={"0": "a cat", "1": "a dog"})
    assert named.class_names == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("cell", "part"),
    [(None, "got none"), (b"text", "must hold an image"), (b"", "must hold an image")],
)
def test_a_bad_cell(tmp_path, cell, part):
    path = write_parquet(tmp_path / "a.parquet", [*rows()[:3], {**rows()[3], "image": cell}])
    with pytest.raises(DataError, match=part) as caught:
        load_dataset(path, image_column="image")
    assert "a.parquet, row 4: column 'image'" in str(caught.value)


def test_a_column_that_holds_no_images(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"image": 3, "label": "a"}])
    with pytest.raises(DataError, match=r"row 1: column 'image' must hold .* got type int"):
        load_dataset(path, image_column="image")


def test_names_of_files_in_a_table(folder):
    lines = [f"{color}/{n}.png,{color}" for color in COLORS for n in (1, 2)]
    (folder / "list.csv").write_text("\n".join(["image,label", *lines]))
    check_colors(load_dataset(folder / "list.csv", image_column="image"))
    (folder / "list.csv").write_text("\n".join(["image,label", *lines, "red/9.png,red"]))
    with pytest.raises(DataError, match=r"list.csv, row 7: column 'image': no such file: .*9.png"):
        load_dataset(folder / "list.csv", image_column="image")


def test_a_datasets_object():
    datasets = pytest.importorskip("datasets")
    names = sorted(COLORS)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    cells = {
        "image": [{"bytes": row["image"], "path": None} for row in rows()],
        "label": [names.index(row["label"]) for row in rows()],
    }
    table = datasets.Dataset.from_dict(cells, features=features)
    data = load_dataset(table, image_column="image")
    assert data.class_names == ("blue", "green", "red")
    check_colors(data)
    with pytest.raises(DataError, match=r"has no column 'img'.* did you mean 'image'"):
        load_dataset(table, image_column="img")
    with pytest.raises(DataError, match=r"one datasets.Dataset, got a dictionary of \['train'\]"):
        load_dataset(datasets.DatasetDict(train=table), image_column="image")
    texts = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    assert load_dataset(texts).inputs == ("a", "b")
    with pytest.raises(DataError, match=r"the datasets.Dataset, row 2: .*'text'.* got none"):
        load_dataset(datasets.Dataset.from_dict({"text": ["a", None], "label": ["x", "y"]}))


def test_transparent_parts_are_white():
    def read(index: int) -> bytes:
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        image.putpixel((1, 1), (255, 0, 0, 255))
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    image = Images(read, str, 1)[0]
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    assert Images(lambda i: png("red", mode), str, 1)[0].mode == "RGB"


def test_pixels_are_decoded_when_they_are_asked_for_and_not_kept(folder):
    """The same object twice is two images, and what is held does not grow."""
    reads: list[int] = []
    images = Images(lambda i: reads.append(i) or png("red"), str, 3)
    assert reads == [0, 1, 2]  # headers
    first, again = images[0], images[0]
    assert reads == [0, 1, 2, 0, 0]
    assert first is not again
    held = [len(gc.get_objects())]
    for _ in range(50):
        np.asarray(images[1])
    held.append(len(gc.get_objects()))
    assert held[1] - held[0] < 50
