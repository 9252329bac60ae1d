"""How a comparison's numbers are written."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from fedms.fl.compare.comparison import Interval
from fedms.fl.tasks.task import Metric


def ranged(metric: Metric, scores: Iterable[float | None]) -> str:
    """The mean over seeds, and from where to where they go: ``76.4 (73.9–79.2)``."""
    known = [metric.factor * score for score in scores if score is not None]
    if not known:
        return "–"
    spread = f" ({min(known):.{metric.digits}f}–{max(known):.{metric.digits}f})"
    return f"{mean(known):.{metric.digits}f}{spread if len(known) > 1 else ''}"


def bracketed(found: Interval, factor: float, digits: int, *, signed: bool = False) -> str:
    """A mean and its interval: ``+4.5 [+2.3, +7.2]``."""
    low, high = sorted((factor * found.low, factor * found.high))
    middle, sign = factor * found.mean, "+" if signed else ""
    return f"{middle:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
