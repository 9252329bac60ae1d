"""Methods compared over blocks: full tables, mean ranks, paired differences, with intervals.

Methods are compared within blocks alone, and intervals come from drawing blocks anew (percentile
bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedms.fl.compare.result import Block, Result
from fedms.fl.tasks.task import Metric

Score = Callable[[Result], float | None]
"""What methods are compared by, more is better; None: a run has no such score."""
DRAWS = 4000
LEAST_METHODS, LEAST_BLOCKS = 5, 2


class Interval(NamedTuple):
    """A mean over blocks, and where 95 % of the bootstrap's means are."""

    mean: float
    low: float
    high: float


class FullTable(NamedTuple):
    """Methods and blocks of which every pair has run."""

    methods: list[str]
    blocks: list[Block]


class Comparison:
    """Finished runs by block and method; the last of a pair counts.

    Attributes:
        blocks: of every block, each method's run.
        labels: of the methods, in the order in which they came.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self.blocks: dict[Block, dict[str, Result]] = {}
        for result in results:
            self.blocks.setdefault(result.block, {})[result.method] = result
        self.labels = {m: run.label for runs in self.blocks.values() for m, run in runs.items()}

    def settings(self) -> list[str]:
        """Every one that has a run."""
        return sorted({block.setting for block in self.blocks})

    def by_metric(self) -> dict[Metric, Comparison]:
        """The blocks of each metric apart, as numbers of two units have no mean."""
        metrics = dict.fromkeys(
            run.metric for runs in self.blocks.values() for run in runs.values()
        )
        return {each: self.where(lambda run, each=each: run.metric == each) for each in metrics}

    def where(self, kept: Callable[[Result], bool]) -> Comparison:
        """Of some of the runs."""
        runs = (run for runs in self.blocks.values() for run in runs.values())
        return Comparison(run for run in runs if kept(run))

    def common(self, setting: str) -> FullTable:
        """The largest full table of a setting: its methods over the same seeds."""
        chain = self._chain([block for block in self.blocks if block.setting == setting])
        return max(chain, key=lambda table: len(table.methods) * len(table.blocks))

    def of(self, setting: str, method: str) -> list[Result]:
        """A method's runs in :meth:`common`, one a seed; none if it lacks one of them."""
        table = self.common(setting)
        return self.runs(table, method) if method in table.methods else []

    def runs(self, table: FullTable, method: str) -> list[Result]:
        """A method's runs in a table's blocks."""
        return [self.blocks[block][method] for block in table.blocks]

    def most_blocks(self) -> FullTable:
        """As many blocks as have :data:`LEAST_METHODS` methods in common, or as many as there are
        in the block with the most.
        """
        chain = self._chain(self.blocks)
        least = min(LEAST_METHODS, len(chain[0].methods)) if chain else 0
        return next((t for t in reversed(chain) if len(t.methods) >= least), FullTable([], []))

    def most_methods(self) -> FullTable:
        """As many methods as have :data:`LEAST_BLOCKS` blocks in common, or all blocks if there are
        fewer.
        """
        chain = self._chain(self.blocks)
        wide = [table for table in chain if len(table.blocks) >= min(LEAST_BLOCKS, len(chain))]
        most = len(wide[0].methods) if wide else 0
        same = [table for table in wide if len(table.methods) == most]
        return same[-1] if same else FullTable([], [])

    def tables(self) -> list[FullTable]:
        """The one with most blocks, and the one with most methods if that is another."""
        long, wide = self.most_blocks(), self.most_methods()
        return [long] if long == wide else [long, wide]

    def _chain(self, blocks: Iterable[Block]) -> list[FullTable]:
        """Full tables of one block, two, three ...: each with the block more that leaves the most
        methods.
        """
        left, methods, chosen, chain = sorted(blocks), list(self.labels), [], []
        while left:
            block = max(left, key=lambda b: sum(method in self.blocks[b] for method in methods))
            left.remove(block)
            methods = [method for method in methods if method in self.blocks[block]]
            chosen.append(block)
            chain.append(FullTable(methods, sorted(chosen)))
        return chain

    def ranks(self, table: FullTable, score: Score) -> dict[str, Interval]:
        """Mean ranks over a full table's blocks, 1 for the highest score; ties share their ranks.

        Empty where a run has no such score.
        """
        rows = [[score(self.blocks[b][m]) for m in table.methods] for b in table.blocks]
        if not rows or any(value is None for row in rows for value in row):
            return {}
        ranks = np.stack([_ranks(row) for row in np.array(rows, dtype=np.float64)])
        return dict(zip(table.methods, map(interval, ranks.T), strict=True))

    def difference(self, score: Score, method: str, other: str) -> Interval | None:
        """Of two methods in the blocks where both have a score."""
        found = [
            ours - theirs
            for runs in self.blocks.values()
            if method in runs and other in runs
            and (ours := score(runs[method])) is not None
            and (theirs := score(runs[other])) is not None
        ]  # fmt: skip
        return interval(found) if found else None


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean with its bootstrap interval; the same draws every time."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def _ranks(scores: np.ndarray) -> np.ndarray:
    above = scores[None] > scores[:, None]
    equal = scores[None] == scores[:, None]
    return above.sum(1) + (equal.sum(1) + 1) / 2
