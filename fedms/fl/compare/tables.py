"""The tables of a comparison, for a page and for a terminal alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from fedms.fl.compare.cells import bracketed, ranged
from fedms.fl.compare.comparison import Comparison, FullTable, Interval, Score
from fedms.fl.compare.looks import families_of
from fedms.fl.compare.result import Block, Result, balance
from fedms.fl.runs.html import Cell
from fedms.fl.tasks.task import Metric

SCORES: dict[str, Score] = {
    "own": lambda run: run.scores.own,
    "worst tenth": lambda run: run.scores.worst10,
    "everyone's": lambda run: run.scores.everyone,
    "own + everyone's": lambda run: balance(run.scores),
}
"""What methods are compared by."""
PARTS = ("own", "worst10", "everyone", "unseen")
COLUMNS = (
    "method", "seeds", "own\ndata", "worst\n10 %", "everyone's\ndata", "unseen\nclients", "MB\nup",
    "MB\ndown", "time\n(s)",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Columns, rows of cells, and what stands above and below them."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]]
    note: str


def setting_tables(comparison: Comparison, *, ranges: bool) -> list[Table]:
    """Each setting's methods by own + everyone's, means over the seeds that they have in common.

    Methods that lack one of those come last, with the seeds that they have.

    Args:
        ranges: also from where to where the seeds' scores go.
    """
    return [_setting_table(comparison, setting, ranges) for setting in comparison.settings()]


def _setting_table(comparison: Comparison, setting: str, ranges: bool) -> Table:
    blocks = sorted(block for block in comparison.blocks if block.setting == setting)
    full = comparison.common(setting)
    runs = {comparison.labels[m]: comparison.runs(full, m) for m in full.methods}
    rest: dict[str, list[Result]] = {}
    for block in blocks:
        for method, run in comparison.blocks[block].items():
            if method not in full.methods:
                rest.setdefault(f"{run.label} †", []).append(run)
    best = [
        max(_known(_mean(each, part) for each in runs.values()), default=None) for part in PARTS
    ]
    rows = [_row(name, each, ranges, best) for name, each in _ordered(runs)]
    rows += [_row(name, each, ranges, [None] * len(PARTS)) for name, each in _ordered(rest)]
    metric = next(iter(runs.values()))[0].metric
    note = f"{_unit(metric)}, mean over clients and {_seeds(full.blocks)}. MB: 10⁶ bytes."
    if left := [block for block in blocks if block not in full.blocks]:
        note += f" Not all methods have {_seeds(left)}."
    if rest:
        note += " †: over the seeds that it has, so not to be compared with those above."
    return Table(setting, COLUMNS, rows, note)


def _row(
    name: str, runs: Sequence[Result], ranges: bool, best: Sequence[float | None]
) -> list[Cell]:
    metric, scores = runs[0].metric, []
    for part, highest in zip(PARTS, best, strict=True):
        middle = _mean(runs, part)
        values = [getattr(run.scores, part) for run in runs]
        text = ranged(metric, values) if ranges else metric.shown(middle)
        scores.append((text, middle is not None and middle == highest))
    seconds = _known(run.seconds for run in runs)
    texts = (
        f"{mean(run.bytes_up for run in runs) / 1e6:,.1f}",
        f"{mean(run.bytes_down for run in runs) / 1e6:,.1f}",
        f"{mean(seconds):,.0f}" if seconds else "–",
    )
    return [(name, False), (str(len(runs)), False), *scores, *((text, False) for text in texts)]


def rank_tables(comparison: Comparison) -> list[Table]:
    """Mean ranks: over most blocks, and of most methods if that is another table.

    None of fewer than two blocks.
    """
    tables = [table for table in comparison.tables() if len(table.blocks) > 1]
    return [_rank_table(comparison, table) for table in tables if len(table.methods) > 1]


def _rank_table(comparison: Comparison, table: FullTable) -> Table:
    found = {
        name: ranks for name, score in SCORES.items() if (ranks := comparison.ranks(table, score))
    }
    by = found.get("own + everyone's", found["own"])
    rows = [
        [
            (text, False)
            for text in (comparison.labels[m], *(bracketed(r[m], 1, 1) for r in found.values()))
        ]
        for m in sorted(table.methods, key=lambda m: by[m].mean)
    ]
    settings = "; ".join(sorted({block.setting for block in table.blocks}))
    title = f"Mean ranks of {len(table.methods)} methods over {len(table.blocks)} blocks"
    return Table(title, ("1 is the best", *found), rows, f"Blocks of: {settings}.")


def difference_tables(comparison: Comparison) -> list[Table]:
    """For each metric, one method less each other over the blocks that both have, at least two.

    That is the one that is beaten least: of FedMS's, or of all where there is none.
    """
    tables = []
    for metric, part in comparison.by_metric().items():
        ours, others = families_of(part)
        reference, *others = [*ours, *others]
        rows = []
        for other in others:
            shared = sum({reference, other} <= set(runs) for runs in part.blocks.values())
            if shared > 1:
                found = [part.difference(score, reference, other) for score in SCORES.values()]
                texts = [_difference(each, metric) for each in found]
                rows.append([(text, False) for text in (part.labels[other], str(shared), *texts)])
        if rows:
            title = f"{part.labels[reference]} less each other method, in {metric.unit}"
            note = "Above 0: it is better. Means over the blocks that both have run."
            tables.append(Table(title, ("less", "blocks", *SCORES), rows, note))
    return tables


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(runs: Sequence[Result], part: str) -> float | None:
    values = _known(getattr(run.scores, part) for run in runs)
    return mean(values) if values else None


def _unit(metric: Metric) -> str:
    name = metric.name.capitalize()
    return f"{name} in %" if metric.unit == "%" else f"{name}, less is better"


def _seeds(blocks: Sequence[Block]) -> str:
    seeds = ", ".join(str(block.seed) for block in blocks)
    return f"seed{'s' if len(blocks) > 1 else ''} {seeds}"


def _difference(found: Interval | None, metric: Metric) -> str:
    if found is None:
        return "–"
    return bracketed(found, abs(metric.factor), metric.digits, signed=True)


def _ordered(rows: Mapping[str, list[Result]]) -> list[tuple[str, list[Result]]]:
    """By own + everyone's, or by own where there are no others."""

    def place(row: tuple[str, list[Result]]) -> float:
        own, everyone = _mean(row[1], "own"), _mean(row[1], "everyone")
        assert own is not None
        return own if everyone is None else (own + everyone) / 2

    return sorted(rows.items(), key=place, reverse=True)
