"""Files that a kill leaves whole, in a folder that one process at a time works on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedms.fl.types import FedMSError


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}")
    write_synced(temporary, content)
    temporary.replace(path)


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """An object in JSON with these keys, one of the files that a run begins with.

    Raises:
        FedMSError: it is not there, damaged, or lacks a key.
    """
    try:
        record = json.loads(path.read_bytes())
        missing = [key for key in keys if key not in record]
    except (OSError, ValueError, TypeError) as error:
        reason = str(getattr(error, "strerror", None) or error)
    else:
        if not missing:
            return record
        reason = f"it has no {missing[0]!r}"
    raise FedMSError(
        f"{path} cannot be read: {reason}; another version of fedms began the run, or the file is "
        "damaged"
    )


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from working on a folder within the block.

    The lock is the open folder's: it leaves no file behind and ends with the process, however that
    ends. ``warn`` hears of a disk that knows no locks.

    Raises:
        FedMSError: another process works on it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FedMSError(
                f"another process works on {folder}; wait for its end, or stop it first"
            ) from None
        except OSError as error:
            warn(f"{folder} cannot be locked ({error.strerror}); let no other process work on it")
        yield
    finally:
        os.close(handle)
