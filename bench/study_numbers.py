"""What the study's lines say: means, frontiers, ranks and differences with bootstrap intervals.

A block is a (task, alpha, seed): the same clients, model and mini-batches for every method, so
methods are compared within blocks, and intervals come from drawing blocks anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

import numpy as np
from study_cells import Cell
from study_lines import Line

Block = tuple[str, str, int]
Score = Callable[[Line], float]
DRAWS = 4000


class Interval(NamedTuple):
    """A mean over blocks, and where 95 % of the bootstrap's means are."""

    mean: float
    low: float
    high: float


class Study:
    """Finished runs by block and method.

    Attributes:
        lines: of every block, each method's line.
    """

    def __init__(self, runs: Mapping[Cell, Line]) -> None:
        self.lines: dict[Block, dict[str, Line]] = {}
        for cell, line in runs.items():
            block = (cell.task, cell.alpha, cell.seed)
            self.lines.setdefault(block, {})[cell.method] = line

    def settings(self) -> list[tuple[str, str]]:
        """Every (task, alpha) that has a run."""
        return sorted({(task, alpha) for task, alpha, _ in self.lines})

    def methods(self) -> list[str]:
        return list(dict.fromkeys(m for lines in self.lines.values() for m in lines))

    def of(self, task: str, alpha: str, method: str) -> list[Line]:
        """A method's lines in a setting, one a seed: the same seeds for all methods, and none for a
        method that lacks one of them.
        """
        blocks = [block for block in self.lines if block[:2] == (task, alpha)]
        methods, blocks = self._without_gaps(blocks)
        return [self.lines[block][method] for block in blocks] if method in methods else []

    def complete(self) -> tuple[list[str], list[Block]]:
        """Methods and blocks of which every pair has run."""
        return self._without_gaps(self.lines)

    def _without_gaps(self, blocks: Iterable[Block]) -> tuple[list[str], list[Block]]:
        """The largest full table that the blocks with the most methods make."""
        order = sorted(sorted(blocks), key=lambda block: -len(self.lines[block]))
        best: tuple[list[str], list[Block]] = ([], [])
        for count in range(1, len(order) + 1):
            methods = [m for m in self.methods() if all(m in self.lines[b] for b in order[:count])]
            if len(methods) * count > len(best[0]) * len(best[1]):
                best = methods, sorted(order[:count])
        return best

    def ranks(self, score: Score) -> dict[str, Interval]:
        """Mean rank over the complete blocks, 1 for the highest score; ties share their ranks."""
        methods, blocks = self.complete()
        if not blocks:
            return {}
        scores = np.array([[score(self.lines[b][m]) for m in methods] for b in blocks])
        ranks = np.stack([_ranks(row) for row in scores])
        return dict(zip(methods, map(interval, ranks.T), strict=True))

    def difference(self, score: Score, method: str, other: str) -> Interval | None:
        """Of two methods in the blocks that both have run."""
        both = [lines for lines in self.lines.values() if method in lines and other in lines]
        found = [score(lines[method]) - score(lines[other]) for lines in both]
        return interval(found) if found else None


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def _ranks(scores: np.ndarray) -> np.ndarray:
    above = scores[None] > scores[:, None]
    equal = scores[None] == scores[:, None]
    return above.sum(1) + (equal.sum(1) + 1) / 2


def balance(line: Line) -> float:
    """The mean of own and everyone's."""
    return (line["own"] + line["everyone"]) / 2


def at_knob(line: Line, knob: float) -> Line:
    """The scores at a value of the knob."""
    return line if knob == 0 else line["frontier"][f"{knob:g}"]


def frontier(lines: Iterable[Line]) -> list[tuple[float, float, float]]:
    """(knob, everyone's, own), means over lines, by rising knob."""
    lines = list(lines)
    knobs = sorted({0.0, *(float(a) for line in lines for a in line["frontier"])})
    return [
        (
            a,
            mean(at_knob(line, a)["everyone"] for line in lines),
            mean(at_knob(line, a)["own"] for line in lines),
        )
        for a in knobs
    ]


def own_at(curve: Sequence[tuple[float, float, float]], everyone: float) -> float | None:
    """The highest own score on a frontier, straight between its knobs, that leaves at least
    ``everyone`` on everyone's data; None where it does not reach that.
    """
    points = [(e, own) for _, e, own in curve]
    reached = [own for e, own in points if e >= everyone]
    for (e0, own0), (e1, own1) in pairwise(points):
        if min(e0, e1) < everyone < max(e0, e1):
            reached.append(own0 + (own1 - own0) * (everyone - e0) / (e1 - e0))
    return max(reached, default=None)
