"""From a source, whatever it is, to labelled examples.

A source is ``"icd10"`` or a name that ``fedms fetch`` brought; a .csv, .jsonl or .parquet file; a
folder of .parquet files, or of a folder of images for each class; a ``datasets.Dataset`` object.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedms.fl.data.duplicates import contents
from fedms.fl.data.federation import Dataset
from fedms.fl.data.icd10 import load_icd10
from fedms.fl.data.images import images_in, read_class_folders
from fedms.fl.data.parquet import parquet_files, read_datasets, read_parquet
from fedms.fl.data.table import Table, read_csv, read_jsonl
from fedms.fl.fetch import fetched
from fedms.fl.types import DataError

ClassNames = Sequence[str] | Mapping[str, str]

ENDINGS = (".csv", ".jsonl", ".parquet")


def load_dataset(
    source: Any,
    *,
    text_column: str = "text",
    image_column: str | None = None,
    label_column: str | None = "label",
    client_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    class_names: ClassNames | None = None,
    every_class: bool = False,
    max_per_category: int = 6,
    seed: int = 0,
) -> Dataset:
    """Read a source with one example a row.

    Labels, clients and groups are strings or integers. Classes are the distinct labels of the
    training rows (without ``split_column``: of all rows), sorted; as numbers where all of them are
    integers.

    Args:
        source: see the top of this file; a ``datasets.Dataset`` is given as it is.
        image_column: the examples are the images of this column (bytes, or names of files beside
            the table) and ``text_column`` is not read; of a folder of class folders, its images.
        label_column: None: the rows have no classes, all are of one.
        split_column: holds "train" or "test"; without it Parquet files named as on the hub,
            ``train-00000-of-00001.parquet``, say it, or the whole can be split at will.
        group_column: rows of one group never stand on both sides of a split. Without it, and
            without ``split_column``, rows of the same text, or of the same image, are one group.
        class_names: names in words, for the class-name head: one for each class in sorted order, or
            a mapping from label to name. Default: what the file records, else the labels.
        every_class: the classes are all that ``class_names``, a mapping, has, and no label beside
            them is taken: a source that is a part of the whole counts classes as the whole does.
        max_per_category, seed: of "icd10", which needs no column.

    Raises:
        DataError: the source, a column or a cell is not what it must be; the message says which.
    """
    if isinstance(source, str) and source == "icd10":
        return load_icd10(max_per_category=max_per_category, seed=seed)
    if isinstance(source, str):
        source = fetched(source, "data") or Path(source)
    path = source if isinstance(source, Path) else None
    if path is not None and image_column and path.is_dir() and not parquet_files(path):
        images, folders, splits = read_class_folders(path)
        groups = images.digests if splits is None else None
        return _dataset(str(path), images, folders, None, splits, groups, class_names, every_class)
    example = image_column or text_column
    chosen = (example, label_column, client_column, split_column, group_column)
    columns = list(dict.fromkeys(column for column in chosen if column is not None))
    table = _read(source, columns, image_column, by_name=split_column is None)
    if not table.rows:
        raise DataError(f"{table.origin} must hold at least one row, got an empty file")

    def names(column: str | None, what: str) -> tuple[str, ...] | None:
        return None if column is None else tuple(table.names(column, what))

    labels = names(label_column, "a label")
    clients = names(client_column, "a client")
    splits = names(split_column, "'train' or 'test'") or table.splits
    groups = names(group_column, "a group")
    inputs: Sequence[Any]
    if image_column:
        inputs = images_in(table, image_column)
    else:
        inputs = tuple(table.cells(text_column, "a text", str))
    if groups is None and splits is None:
        groups = contents(inputs)
    if splits is not None and set(splits) != {"train", "test"}:
        raise DataError(
            f"{table.origin}: column {split_column!r} must hold 'train' and 'test' and nothing "
            f"else, got {sorted(set(splits))[:5]}"
        )
    if class_names is None and label_column is not None:
        class_names = _as_recorded(table, label_column)
    return _dataset(table.origin, inputs, labels, clients, splits, groups, class_names, every_class)


def _read(
    source: Path | Any, columns: Sequence[str], image_column: str | None, by_name: bool
) -> Table:
    if not isinstance(source, Path):
        if not hasattr(source, "column_names"):
            raise DataError(
                "a dataset must be a name, a path or a datasets.Dataset, "
                f"got {type(source).__name__}"
            )
        return read_datasets(source, columns, image_column)
    if source.is_dir() and parquet_files(source):
        return read_parquet(source, columns, image_column, splits=by_name)
    readers = {".csv": read_csv, ".jsonl": read_jsonl}
    ending = source.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(
            f"a dataset must be 'icd10' or a file ending in {', '.join(ENDINGS)}, or a folder of "
            f".parquet files, got {str(source)!r}"
        )
    if not source.is_file():
        raise DataError(f"no such file: {source}")
    if ending == ".parquet":
        return read_parquet(source, columns, image_column)
    return readers[ending](source, columns)


def _dataset(
    origin: str,
    inputs: Sequence[Any],
    labels: Sequence[str] | None,
    clients: tuple[str, ...] | None = None,
    splits: tuple[str, ...] | None = None,
    groups: Sequence[str] | None = None,
    class_names: ClassNames | None = None,
    every_class: bool = False,
) -> Dataset:
    if labels is None:
        return Dataset(
            inputs, np.zeros(len(inputs), np.int64), ("all",), _grouped(groups), clients, splits
        )
    if every_class and isinstance(class_names, Mapping):
        classes = _all_of(origin, class_names, labels)
    else:
        classes = _classes(origin, labels, splits)
    index = {label: i for i, label in enumerate(classes)}
    return Dataset(
        inputs=inputs,
        labels=np.array([index[label] for label in labels], dtype=np.int64),
        class_names=_in_words(classes, class_names),
        class_labels=tuple(classes),
        groups=_grouped(groups),
        clients=clients,
        splits=splits,
    )


def _grouped(names: Sequence[str] | None) -> np.ndarray | None:
    """int64 [N], numbered in the order in which the names appear; None if no two are equal."""
    if names is None:
        return None
    number: dict[str, int] = {}
    groups = np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)
    return None if len(number) == len(names) else groups


def _classes(origin: str, labels: Sequence[str], splits: Sequence[str] | None) -> list[str]:
    if len(set(labels)) == 1:
        raise DataError(f"{origin} must hold at least 2 classes, got only the label {labels[0]!r}")
    train = {label for i, label in enumerate(labels) if splits is None or splits[i] == "train"}
    unknown = Counter(label for label in labels if label not in train)
    if unknown:
        found = ", ".join(f"{label!r} ({n} rows)" for label, n in unknown.most_common(5))
        raise DataError(f"{origin}: every test label must occur in a training row, got {found}")
    return in_order(train)


def _all_of(origin: str, class_names: Mapping[str, str], labels: Sequence[str]) -> list[str]:
    unknown = Counter(label for label in labels if label not in class_names)
    if unknown:
        found = ", ".join(f"{label!r} ({n} rows)" for label, n in unknown.most_common(5))
        raise DataError(
            f"{origin}: every label must be one that data.class_names names, got {found}"
        )
    return in_order(class_names)


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order in which classes are numbered."""
    labels = list(labels)
    if all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _as_recorded(table: Table, column: str) -> ClassNames | None:
    """Names that the file gives to labels 0, 1, ..., which are not always all in use."""
    names = table.class_names.get(column)
    return None if names is None else {str(i): name for i, name in enumerate(names)}


def _in_words(classes: list[str], names: ClassNames | None) -> tuple[str, ...]:
    if names is None:
        return tuple(classes)
    if isinstance(names, Mapping):
        missing = [label for label in classes if label not in names]
        if missing:
            raise DataError(f"class_names must name every label, got none for {missing}")
        return tuple(names[label] for label in classes)
    if len(names) != len(classes):
        raise DataError(
            f"class_names must hold {len(classes)} names, for {classes}, got {len(names)} names"
        )
    return tuple(names)
