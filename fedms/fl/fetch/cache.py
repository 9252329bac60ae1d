"""The user's cache folder, where fetched models and data lie: ``<cache>/<name>/``.

A name is built in a folder of its own beside it and then renamed, so that what stands under a name
is whole, whenever a fetch was stopped and however many run at once.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where this system keeps caches, in it ``fedms``: ``$XDG_CACHE_HOME`` or ``~/.cache``,
    ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedms"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "fedms"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "fedms"


@contextmanager
def built_whole(place: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes ``place`` at the end of the block, or vanishes.

    If ``place`` has been made meanwhile, by another fetch, that one stays.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield building
        building.chmod(0o755)  # mkdtemp's folders are their owner's alone
        try:
            building.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
