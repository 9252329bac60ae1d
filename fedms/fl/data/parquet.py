"""Parquet files and ``datasets.Dataset`` objects to tables.

Labels and texts are read whole. Encoded images are not: their bytes go, a few rows at a time, to a
temporary file of which the first 64 MB stay in memory.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, overload

from fedms.fl.data.table import Table, check_columns
from fedms.fl.types import DataError

IN_MEMORY = 64 * 2**20
ROWS_AT_A_TIME = 64
SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}")


class Blobs(Sequence[bytes | None]):
    """Byte strings of any total size, in a temporary file that goes with this object."""

    def __init__(self, values: Iterable[bytes | None]) -> None:
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._spans: list[tuple[int, int] | None] = []
        start = 0
        for value in values:
            if value is None:
                self._spans.append(None)
                continue
            self._file.write(value)
            self._spans.append((start, len(value)))
            start += len(value)

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes | None]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        span = self._spans[index]
        if span is None:
            return None
        self._file.seek(span[0])
        return self._file.read(span[1])


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder by name: its own, or those of its one folder that has any, as
    data sets on the hub have them in ``data`` or in a folder a configuration.

    Raises:
        DataError: several folders in it have some.
    """
    if own := sorted(folder.glob("*.parquet")):
        return own
    below = sorted(folder.glob("*/*.parquet"))
    places = sorted({file.parent.name for file in below})
    if len(places) > 1:
        raise DataError(
            f"{folder} must have .parquet files in one folder, got {', '.join(places)}: name one "
            f"of them, e.g. {folder / places[0]}"
        )
    return below


def _by_split(files: list[Path]) -> tuple[list[Path], list[str] | None]:
    """Of files that are all named as on the hub, ``<split>-00000-of-00002.parquet``, those for
    training and for testing, and which of the two each is for.

    Testing is "test", or "validation" where there is none; other splits are left out. As they came,
    and None, where the names do not tell training from testing.
    """
    found = [SHARD.fullmatch(file.stem) for file in files]
    splits = [match["split"] if match else "" for match in found]
    tests = next((name for name in ("test", "validation") if name in splits), None)
    if "" in splits or "train" not in splits or tests is None:
        return files, None
    parts = {"train": "train", tests: "test"}
    chosen = [(file, parts[s]) for file, s in zip(files, splits, strict=True) if s in parts]
    return [file for file, _ in chosen], [part for _, part in chosen]


def read_parquet(
    path: Path, columns: Sequence[str], images: str | None = None, *, splits: bool = True
) -> Table:
    """Read a Parquet file, or a folder of them in the order of their names.

    Args:
        columns: to be read.
        images: the one of them that holds images: bytes, or a struct with a field ``bytes``, as
            data sets on the hub have it.
        splits: whether names as on the hub, ``train-00000-of-00001.parquet``, say which rows are
            for training and which for testing.

    Raises:
        DataError: no Parquet, a column is missing, or the files do not agree on a column's type.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"reading {path} needs the package pyarrow: pip install 'fedms[parquet]'"
        ) from error
    files, parts = parquet_files(path) if path.is_dir() else [path], None
    if splits:
        files, parts = _by_split(files)
    split_of_rows: list[str] = []
    plain = [column for column in columns if column != images]
    cells: dict[str, list[Any]] = {column: [] for column in plain}
    rows: list[str] = []
    class_names: dict[str, tuple[str, ...]] = {}
    sources = []
    for number, file in enumerate(files):
        try:
            parquet = pq.ParquetFile(file)
            check_columns(file, columns, parquet.schema_arrow.names)
            found = parquet.read(plain).to_pydict() if plain else {}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error
        sources.append(parquet)
        for column in plain:
            cells[column] += found[column]
        if parts is not None:
            split_of_rows += [parts[number]] * parquet.metadata.num_rows
        prefix = f"{file.name}, " if path.is_dir() else ""
        rows += [f"{prefix}row {n + 1}" for n in range(parquet.metadata.num_rows)]
        class_names |= _recorded_names(parquet.schema_arrow.metadata or {})
    table: dict[str, Sequence[Any]] = dict(cells)
    if images is not None:
        table[images] = Blobs(
            _encoded(cell, f"{path}, {rows[number]}: column {images!r}")
            for number, cell in enumerate(_stream(sources, images))
        )
    return Table(str(path), path, table, rows, class_names, tuple(split_of_rows) or None)


def read_datasets(data: Any, columns: Sequence[str], images: str | None = None) -> Table:
    """Columns of a ``datasets.Dataset``; its images stay in its own files until they are asked for.

    The package is not imported: whoever has such an object has it.
    """
    origin = "the datasets.Dataset"
    if isinstance(data, Mapping):
        raise DataError(
            f"the data must be one datasets.Dataset, got a dictionary of {sorted(data)}: "
            "pass one of them"
        )
    check_columns(origin, columns, data.column_names)
    cells: dict[str, Sequence[Any]] = {
        column: list(data[column]) for column in columns if column != images
    }
    if images is not None:
        feature = data.features[images]
        if hasattr(feature, "decode"):  # its Image, which would decode whole columns
            data = data.cast_column(images, type(feature)(decode=False))
        cells[images] = _Column(data, images)
    class_names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if hasattr(feature, "names")
    }
    rows = [f"row {n + 1}" for n in range(len(data))]
    return Table(origin, Path(), cells, rows, class_names)


class _Column(Sequence[Any]):
    """One column of a ``datasets.Dataset``, a cell at a time."""

    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data.select_columns([name]), name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        cell = self._data[int(index)][self._name]
        if isinstance(cell, Mapping):  # {"bytes": ..., "path": ...}, one of them None
            return cell["path"] if cell["bytes"] is None else cell["bytes"]
        return cell


def _stream(sources: Iterable[Any], column: str) -> Iterable[Any]:
    for parquet in sources:
        for batch in parquet.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[column]):
            yield from batch.column(0).to_pylist()


def _encoded(cell: Any, where: str) -> bytes | None:
    value = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if value is None or isinstance(value, bytes):
        return value
    raise DataError(f"{where} must hold an image's bytes, got type {type(value).__name__}")


def _recorded_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Class names by column, as the package ``datasets`` writes them into Parquet's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }
