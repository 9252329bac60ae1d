"""Labelled texts from a table: CSV, JSON lines or Parquet.

A mistake in a file becomes a DataError that names the file and the row. Rows are counted from 1,
header and blank lines apart; JSON lines are counted as an editor counts them.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedms.fl.data.federation import Dataset
from fedms.fl.data.icd10 import load_icd10
from fedms.fl.types import DataError

ClassNames = Sequence[str] | Mapping[str, str]

_Row = tuple[str, dict[str, Any]]
"""Where the row stands, for messages, and its cells by column."""


def load_dataset(
    name_or_path: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    client_column: str | None = None,
    split_column: str | None = None,
    class_names: ClassNames | None = None,
    max_per_category: int = 6,
    seed: int = 0,
) -> Dataset:
    """``"icd10"`` (see load_icd10; needs no file) or the path of a table (see load_table).

    ``max_per_category`` and ``seed`` belong to ``"icd10"``, the columns and names to tables.
    """
    if str(name_or_path) == "icd10":
        return load_icd10(max_per_category=max_per_category, seed=seed)
    return load_table(
        name_or_path,
        text_column=text_column,
        label_column=label_column,
        client_column=client_column,
        split_column=split_column,
        class_names=class_names,
    )


def load_table(
    path: str | Path,
    *,
    text_column: str,
    label_column: str,
    client_column: str | None = None,
    split_column: str | None = None,
    class_names: ClassNames | None = None,
) -> Dataset:
    """Read a .csv, .jsonl or .parquet file (UTF-8) with one example a row.

    Labels and clients are strings or integers. Classes are the distinct labels of the training rows
    (without ``split_column``: of all rows), sorted; as numbers where all of them are integers.

    Args:
        split_column: holds "train" or "test"; without it the whole file can be split at will.
        class_names: names in words, for the zero-shot head: one for each class in sorted order, or
            a mapping from label to name. Default: the labels themselves.

    Raises:
        DataError: the file, a column or a cell is not what it must be; the message says which.
    """
    path = Path(path)
    columns = [c for c in (text_column, label_column, client_column, split_column) if c is not None]
    rows = _read(path, columns)
    if not rows:
        raise DataError(f"{path} must hold at least one row, got an empty file")
    texts = tuple(_cell(path, row, text_column, "a text", str) for row in rows)
    labels = _names(path, rows, label_column, "a label")
    clients = splits = None
    if client_column is not None:
        clients = tuple(_names(path, rows, client_column, "a client"))
    if split_column is not None:
        splits = tuple(_names(path, rows, split_column, "'train' or 'test'"))
        if set(splits) != {"train", "test"}:
            raise DataError(
                f"{path}: column {split_column!r} must hold 'train' and 'test' and nothing else, "
                f"got {sorted(set(splits))[:5]}"
            )
    classes = _classes(path, labels, splits)
    index = {label: i for i, label in enumerate(classes)}
    return Dataset(
        inputs=texts,
        labels=np.array([index[label] for label in labels], dtype=np.int64),
        class_names=_in_words(classes, class_names),
        clients=clients,
        splits=splits,
    )


def _read(path: Path, columns: list[str]) -> list[_Row]:
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"a dataset must be 'icd10' or a file ending in {', '.join(readers)}, got {str(path)!r}"
        )
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        return reader(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, got a byte that is not: {error}") from error


def _read_csv(path: Path, columns: list[str]) -> list[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = [line for line in reader if line]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    if not lines:
        return []
    header = lines[0]
    _check_columns(path, columns, header)
    for column in columns:
        if header.count(column) > 1:
            raise DataError(f"{path}: the header must name column {column!r} once, got it twice")
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise DataError(
                f"{path}, row {number}: expected {len(header)} cells as in the header, "
                f"got {len(line)} (a comma inside a cell needs quotes)"
            )
        rows.append((f"row {number}", dict(zip(header, line, strict=True))))
    return rows


def _read_jsonl(path: Path, columns: list[str]) -> list[_Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(cells, dict):
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, got {type(cells).__name__}"
                )
            rows.append((f"line {number}", cells))
    if rows:
        _check_columns(path, columns, dict.fromkeys(key for _, cells in rows for key in cells))
    return rows


def _read_parquet(path: Path, columns: list[str]) -> list[_Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package pyarrow: pip install 'fedms[parquet]'"
        ) from error
    try:
        file = pq.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        cells = file.read(columns).to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(cells, start=1)]


def _check_columns(path: Path, wanted: list[str], found: Iterable[str]) -> None:
    found = list(found)
    for column in wanted:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{path} has no column {column!r}, its columns are {found}{hint}")


def _cell(path: Path, row: _Row, column: str, what: str, types: Any) -> Any:
    where, cells = row
    value = cells.get(column)
    if value is None or not str(value).strip():
        raise DataError(f"{path}, {where}: column {column!r} must hold {what}, got none")
    if not isinstance(value, types):
        got = type(value).__name__
        raise DataError(f"{path}, {where}: column {column!r} must hold {what}, got type {got}")
    return value


def _names(path: Path, rows: list[_Row], column: str, what: str) -> list[str]:
    what += " (a string or an integer)"
    return [str(_cell(path, row, column, what, str | int)).strip() for row in rows]


def _classes(path: Path, labels: list[str], splits: tuple[str, ...] | None) -> list[str]:
    if len(set(labels)) == 1:
        raise DataError(f"{path} must hold at least 2 classes, got only the label {labels[0]!r}")
    train = {label for i, label in enumerate(labels) if splits is None or splits[i] == "train"}
    unknown = Counter(label for label in labels if label not in train)
    if unknown:
        found = ", ".join(f"{label!r} ({n} rows)" for label, n in unknown.most_common(5))
        raise DataError(f"{path}: every test label must occur in a training row, got {found}")
    if all(re.fullmatch(r"[+-]?\d+", label) for label in train):
        return sorted(train, key=lambda label: (int(label), label))
    return sorted(train)


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
