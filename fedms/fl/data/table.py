"""Tables: CSV and JSON lines to columns; Parquet and ``datasets.Dataset`` are in parquet.py.

A mistake in a file becomes a DataError that names the file and the row. Rows are counted from 1,
header and blank lines apart; JSON lines are counted as an editor counts them.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedms.fl.types import DataError


@dataclass(frozen=True)
class Table:
    """Columns of one length.

    Attributes:
        origin: what messages call the table, e.g. its path.
        folder: what file names within its cells are relative to.
        columns: cells by column; as many as there are ``rows``.
        rows: where each row stands, for messages: "row 3", "line 7".
        class_names: by column, names that the file itself gives to the labels 0, 1, ...
        splits: "train" or "test" a row, or None where the table's files do not say.
    """

    origin: str
    folder: Path
    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[str]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None

    def where(self, index: int) -> str:
        """The row as messages name it, with the table."""
        return f"{self.origin}, {self.rows[index]}"

    def cells(self, column: str, what: str, types: Any) -> Iterator[Any]:
        """The cells of a column, each of which must be there and of these types.

        Raises:
            DataError: one that is not; the message names row, column and ``what`` it must hold.
        """
        for index, value in enumerate(self.columns[column]):
            if value is None or (isinstance(value, str) and not value.strip()):
                got = "none"
            elif not isinstance(value, types):
                got = f"type {type(value).__name__}"
            elif isinstance(value, str) and not is_unicode(value):
                got = f"half of a surrogate pair: {value[:40]!r}"
            else:
                yield value
                continue
            raise DataError(f"{self.where(index)}: column {column!r} must hold {what}, got {got}")

    def names(self, column: str, what: str) -> list[str]:
        """The same for strings and integers, as strings without blanks around them."""
        what += " (a string or an integer)"
        return [str(value).strip() for value in self.cells(column, what, str | int)]


def read_csv(path: Path, columns: Sequence[str]) -> Table:
    """Read a CSV file (UTF-8, header) with these columns."""
    with _utf8(path), path.open(encoding="utf-8-sig", newline="") as file, _any_cell_size():
        reader = csv.reader(file, strict=True)
        try:
            lines = [line for line in reader if line]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    if not lines:
        return Table(str(path), path.parent, {}, ())
    header, *lines = lines
    check_columns(path, columns, header)
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise DataError(
                f"{path}, row {number}: expected {len(header)} cells as in the header, "
                f"got {len(line)} (a comma inside a cell needs quotes)"
            )
    cells = {name: [line[header.index(name)] for line in lines] for name in columns}
    return Table(str(path), path.parent, cells, [f"row {n + 1}" for n in range(len(lines))])


def read_jsonl(path: Path, columns: Sequence[str]) -> Table:
    """Read a file of one JSON object a line (UTF-8) with these columns."""
    rows: list[str] = []
    objects: list[dict[str, Any]] = []
    with _utf8(path), path.open(encoding="utf-8-sig") as file:
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
            rows.append(f"line {number}")
            objects.append(cells)
    if rows:
        check_columns(path, columns, dict.fromkeys(key for cells in objects for key in cells))
    found = {name: [cells.get(name) for cells in objects] for name in columns}
    return Table(str(path), path.parent, found, rows)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON's escapes and a console's bytes may be no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_columns(origin: Path | str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Refuse a table that lacks a column, or has two of the name; the message has the nearest."""
    found = list(found)
    for column in wanted:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{origin} has no column {column!r}, its columns are {found}{hint}")
        if found.count(column) > 1:
            raise DataError(f"{origin} must have column {column!r} once, got {found}")


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Within the block a cell may be of any length; Python's own limit is 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)  # the largest that a C long holds everywhere
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text, got a byte that is not: {error}") from error
