"""Numbers beside marks, each where it hides neither a mark nor another number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCES = (0, 3, 7, 12, 18, 25, 33, 42, 52, 64)
"""Points between a mark and its number; beyond the third a thin line joins the two."""
ANGLES = np.pi * (np.array([1, 15, 7, 9, 4, 12, 0, 8, 2, 14, 6, 10, 3, 13, 5, 11]) / 8)


@dataclass(frozen=True)
class Mark:
    """A mark of a panel.

    Attributes:
        x, y: in the panel's units.
        text: what stands beside it.
        size: its diameter in points.
        large: whether the text is.
    """

    x: float
    y: float
    text: str
    color: str
    size: float
    large: bool


def number(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write the texts, those of large marks first. The panel's limits and place must be final."""
    from matplotlib.patheffects import withStroke

    points = 72 / axes.figure.dpi
    panel = axes.get_window_extent()
    corner = np.array([panel.x0, panel.y0]) * points
    room = np.array([0, 0, panel.width, panel.height]) * points
    at = [axes.transData.transform((mark.x, mark.y)) * points - corner for mark in marks]
    taken = [_box(*spot, *[0.8 * mark.size] * 2) for spot, mark in zip(at, marks, strict=True)]
    for place in sorted(range(len(marks)), key=lambda i: not marks[i].large):
        mark, (x, y) = marks[place], at[place]
        size = 8.5 if mark.large else 6.5
        width, height = 0.66 * size * len(mark.text), 0.95 * size
        free = (
            (dx, dy)
            for dx, dy in _offsets(mark.size / 2 + width / 2, mark.size / 2 + height / 2)
            if _inside(box := _box(x + dx, y + dy, width, height), room)
            and not any(_overlap(box, other) for other in taken)
        )
        dx, dy = next(free, (0.0, 0.0))
        taken.append(_box(x + dx, y + dy, width, height))
        far = math.hypot(dx, dy) > mark.size / 2 + width + DISTANCES[2]
        line = {
            "arrowstyle": "-",
            "color": mark.color,
            "linewidth": 0.6,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.annotate(
            mark.text, (mark.x, mark.y), (dx, dy), textcoords="offset points", fontsize=size,
            ha="center", va="center", zorder=9, color=mark.color,
            fontweight="bold" if mark.large else "normal",
            arrowprops=line if far else None,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _offsets(across: float, up: float) -> Iterator[tuple[float, float]]:
    """Places of a text's middle around a mark, the nearest first."""
    for distance in DISTANCES:
        for angle in ANGLES:
            yield (
                float(np.cos(angle) * (across + distance)), float(np.sin(angle) * (up + distance))
            )  # fmt: skip


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box, room: Sequence[float] | np.ndarray) -> bool:
    return box[0] > room[0] and box[1] > room[1] and box[2] < room[2] and box[3] < room[3]
