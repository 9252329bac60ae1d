"""Images that are decoded when they are asked for: from class folders, or a table's column.

What is held is where an image lies, never its pixels. Every header is read once at the start, so a
file that is no image is named before anything is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fedms.fl.data.table import Table, is_unicode
from fedms.fl.types import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

SPLITS = ("train", "test")


class Images(Sequence["Image"]):
    """N images by index, decoded anew every time: PIL images in RGB, what is transparent white.

    Args:
        read: index -> a file, a file's content, or an image that is decoded already.
        where: index -> what a message calls it, e.g. "photos.parquet, row 7".
        size: N.

    Raises:
        DataError: one is missing or no image; the message names the first. Pixels that are damaged
            behind a good header are found when they are asked for.
    """

    def __init__(self, read: Callable[[int], Any], where: Callable[[int], str], size: int) -> None:
        self._read, self._where, self._size = read, where, size
        for index in range(size):
            self._opened(index, lambda image: image.size)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image]: ...
    def __getitem__(self, index: int | slice) -> Image | list[Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        return self._opened(index, _in_rgb)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """A digest of each image as it is stored: equal for copies, not for images saved anew."""
        return tuple(_digest(self._read(index)) for index in range(self._size))

    def _opened(self, index: int, use: Callable[[Image], T]) -> T:
        pil = _pillow()
        stored = self._read(index)
        if isinstance(stored, pil.Image):
            return use(stored)
        if stored is None:
            raise DataError(f"{self._where(index)} must hold an image, got none")
        try:
            with pil.open(BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
                return use(image)
        except FileNotFoundError as error:
            raise DataError(f"{self._where(index)}: no such file: {stored}") from error
        except pil.UnidentifiedImageError as error:
            got = f"{len(stored)} bytes of something else" if isinstance(stored, bytes) else stored
            raise DataError(f"{self._where(index)} must hold an image, got {got}") from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say "damaged"
            raise DataError(f"{self._where(index)}: the image is damaged: {error}") from error


def images_in(table: Table, column: str) -> Images:
    """The images of a column: bytes, decoded images, or the names of files beside the table."""
    cells = table.columns[column]

    def read(index: int) -> Any:
        cell = cells[index]
        return table.folder / cell if isinstance(cell, str) else cell

    return Images(read, lambda i: f"{table.where(i)}: column {column!r}", len(cells))


def read_class_folders(root: Path) -> tuple[Images, list[str], tuple[str, ...] | None]:
    """Images of ``root/<class>/<file>``, or of ``root/train/<class>/`` and ``root/test/<class>/``.

    Returns:
        the images in the order of their paths, the class of each, and "train" or "test" of each
        where the folder says it.

    Raises:
        DataError: there are no class folders, one of them is empty, or one holds a file that is no
            image. Files whose name begins with a dot do not count.
    """
    first = _folders(root)
    split = {folder.name for folder in first} == set(SPLITS)
    tops = first if split else [root]
    files: list[Path] = []
    labels: list[str] = []
    splits: list[str] = []
    for top in tops:
        classes = _folders(top)
        if not classes:
            raise DataError(
                f"{top} must hold a folder of images for each class, or .parquet files; "
                "got no folder"
            )
        for folder in classes:
            if not is_unicode(folder.name):
                raise DataError(f"{folder!r} names a class and must be UTF-8, got other bytes")
            found = [path for path in _visible(folder) if path.is_file()]
            if not found:
                raise DataError(f"{folder} must hold the images of a class, got no file")
            files += found
            labels += [folder.name] * len(found)
            splits += [top.name] * len(found)
    images = Images(lambda i: files[i], lambda i: str(files[i]), len(files))
    return images, labels, tuple(splits) if split else None


def _digest(stored: Any) -> str:
    if not isinstance(stored, bytes):
        stored = stored.tobytes() if hasattr(stored, "tobytes") else Path(stored).read_bytes()
    return hashlib.sha256(stored).hexdigest()


def _folders(path: Path) -> list[Path]:
    return [entry for entry in _visible(path) if entry.is_dir()]


def _visible(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _in_rgb(image: Image) -> Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = _pillow().new("RGBA", image.size, "white")
        return _pillow().alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")  # decodes, also what is RGB


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images need the package pillow: pip install 'fedms[images]'") from error
    return Image
