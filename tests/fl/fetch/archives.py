"""Small packages of the registries' own formats."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path


def npm(path: Path, files: Mapping[str, str]) -> Path:
    """A tarball as ``npm pack`` leaves it."""
    with tarfile.open(path, "w:gz") as tarball:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content.encode())
            tarball.addfile(info, BytesIO(content.encode()))
    return path


def wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    """A wheel as ``pip download`` leaves it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
