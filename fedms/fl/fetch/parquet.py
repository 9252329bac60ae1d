"""Fetched data are Parquet files with the columns that every run of fedms understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "data.parquet"


def write_table(
    folder: Path, columns: Mapping[str, Sequence[Any]], notes: Mapping[str, str]
) -> None:
    """Write columns of equal length, with ``notes`` (source, licence) as the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: list(cells) for name, cells in columns.items()})
    pq.write_table(table.replace_schema_metadata(dict(notes)), folder / FILE)
