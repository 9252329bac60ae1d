"""Tables and pictures of the study, written into docs/study.md and docs/study/.

A table stands between `<!-- NAME -->` and `<!-- end -->` in the page and is made anew from the
lines; the words around the tables are people's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from study_cells import METHODS, NATURAL, TASKS, Cell, label
from study_lines import ROOT, Choice, Line, Lines, processor

from fedms.fl.compare.cells import bracketed, ranged
from fedms.fl.compare.comparison import Comparison, FullTable, Score
from fedms.fl.compare.pictures import draw
from fedms.fl.compare.result import Block, Point, Result, balance, frontier, own_at
from fedms.fl.compare.tables import SCORES
from fedms.fl.tasks.causal_lm import BITS
from fedms.fl.tasks.classify import ACCURACY

PAGE = ROOT / "docs" / "study.md"
REFERENCE = "fedms, late"
RIVAL = "fedavg_ft"
FIRST = (
    REFERENCE, "fedms", "fedms, no SAL, logits, one half, late", "fedavg", RIVAL, "ditto",
    "local_only",
)  # fmt: skip
"""Stand out in the pictures, beside the best of the others."""
Row = Sequence[str]


class Study(NamedTuple):
    """The lines of the study, compared.

    Attributes:
        places: (task, alpha) of every setting.
        chosen: (task, method) -> what validation scores chose.
    """

    lines: Lines
    comparison: Comparison
    places: dict[str, tuple[str, str]]
    chosen: Callable[[str, str], Choice]

    @classmethod
    def of(cls, lines: Lines) -> Study:
        runs = lines.runs()
        places = {setting(cell): (cell.task, cell.alpha) for cell in sorted(runs)}
        found = Comparison(result_of(cell, line) for cell, line in runs.items())
        return cls(lines, found, places, cache(lines.chosen))  # the file is read at every question

    def with_knob(self, result: Result) -> Point:
        """The scores at the knob that was chosen."""
        task, _ = self.places[result.block.setting]
        return result.at(self.chosen(task, result.method).knob)


def setting(cell: Cell) -> str:
    """A task and its alpha, in words."""
    return cell.task if cell.alpha == NATURAL else f"{cell.task}, alpha {cell.alpha}"


def point(scores: Line) -> Point:
    """The scores of a line, or of one of its knobs."""
    return Point(*(scores[name] for name in ("own", "worst10", "everyone", "unseen")))


def result_of(cell: Cell, line: Line) -> Result:
    """A line as what `fedms report` compares."""
    costs: dict[str, Any] = {
        name: line[name] for name in ("bytes_up", "bytes_down", "trained_share", "gate")
    }
    return Result(
        block=Block(setting(cell), cell.seed),
        method=cell.method,
        label=label(cell.method),
        algorithm=cell.method.partition(",")[0],
        metric=ACCURACY if TASKS[cell.task].classes else BITS,
        scores=point(line),
        seconds=None,  # of a machine that was busy with other runs
        cpu_seconds=line.get("step_seconds"),
        by_knob={float(knob): point(scores) for knob, scores in line["frontier"].items()},
        **costs,
    )


def write_report(lines: Lines, page: Path = PAGE) -> list[Path]:
    """Fill the page's tables and draw its pictures."""
    study = Study.of(lines)
    text = page.read_text("utf-8")
    for name, table in TABLES.items():
        filled = f"<!-- {name} -->\n{table(study)}\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, new=filled: new, text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{page} has no place for the table {name!r}")
    page.write_text(text, "utf-8")
    return [page, *draw(study.comparison, page.parent / page.stem, FIRST)]


# Tables -------------------------------------------------------------------------------------------


def points(study: Study) -> str:
    """Each setting: own / worst tenth / everyone's / unseen, means over seeds."""
    parts = []
    for name in study.places:
        rows = []
        for method in study.comparison.labels:
            runs = study.comparison.of(name, method)
            if runs:
                rows.append((_mean(balance(run.scores) for run in runs), _point(runs)))
        rows.sort(key=lambda row: -row[0])
        head = (
            name, "seeds", "own data", "worst tenth", "everyone's data", "unseen clients", "MB up",
            "MB down", "processor s", "trained", "gate on local",
        )  # fmt: skip
        parts.append(_table(head, [row for _, row in rows]))
    return "\n\n".join(parts)


def _point(runs: Sequence[Result]) -> Row:
    def scores(name: str) -> str:
        return ranged(runs[0].metric, [getattr(run.scores, name) for run in runs])

    gates = [run.gate for run in runs if run.gate is not None]
    spent = [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
    return (
        runs[0].label, str(len(runs)),
        *(scores(name) for name in ("own", "worst10", "everyone", "unseen")),
        f"{mean(run.bytes_up for run in runs) / 1e6:.1f}",
        f"{mean(run.bytes_down for run in runs) / 1e6:.1f}",
        f"{mean(spent):.0f}" if spent else "–",
        f"{100 * mean(run.trained_share for run in runs):.2f} %",
        f"{mean(gates):.2f}" if gates else "–",
    )  # fmt: skip


def knobs(study: Study) -> str:
    """With the knob: as chosen on validation data, and own data at equal everyone's."""
    parts = []
    for name, (task, _) in study.places.items():
        if not TASKS[task].classes:
            continue
        levels = {
            runs[0].label: _mean(run.scores.everyone for run in runs)
            for other in (RIVAL, REFERENCE)
            if (runs := study.comparison.of(name, other))
        }
        rows = []
        for method, label_ in study.comparison.labels.items():
            runs = study.comparison.of(name, method)
            if not runs:
                continue
            chosen = [study.with_knob(run) for run in runs]
            curve = frontier(runs)
            at = [own_at(curve, level) for level in levels.values()]
            middle = _mean(map(balance, chosen))
            rows.append((middle, (
                label_, f"{study.chosen(task, method).knob:g}",
                *(f"{100 * mean(getattr(c, each) for c in chosen):.1f}"
                  for each in ("own", "worst10", "everyone")),
                f"{100 * middle:.1f}",
                *("–" if own is None else f"{100 * own:.1f}" for own in at),
            )))  # fmt: skip
        rows.sort(key=lambda row: -row[0])
        head = (
            name, "knob", "own", "worst tenth", "everyone's", "(own + everyone's) / 2",
            *(f"own at everyone's {100 * e:.1f} ({other})" for other, e in levels.items()),
        )  # fmt: skip
        parts.append(_table(head, [row for _, row in rows]))
    return "\n\n".join(parts)


def _scores(study: Study) -> dict[str, Score]:
    """What methods are compared by."""
    return SCORES | {
        "own + everyone's, each with its knob": lambda run: balance(study.with_knob(run))
    }


def ranks(study: Study) -> str:
    """Mean ranks with 95 % of the bootstrap: over most blocks, of the methods in all of them."""
    return _ranks(study, study.comparison.most_blocks())


def ranks_all(study: Study) -> str:
    """The same of most methods, over the blocks that have all of them."""
    return _ranks(study, study.comparison.most_methods())


def _ranks(study: Study, table: FullTable) -> str:
    scores = _scores(study)
    found = {name: study.comparison.ranks(table, score) for name, score in scores.items()}
    order = sorted(table.methods, key=lambda m: found["own + everyone's"][m].mean)
    rows = [[label(m), *(bracketed(found[name][m], 1.0, 1) for name in scores)] for m in order]
    places = sorted({study.places[block.setting] for block in table.blocks})
    tasks = ", ".join(f"{task} {alpha}" for task, alpha in places)
    note = f"{len(table.blocks)} blocks of task, alpha and seed: {tasks}."
    return f"{_table(('mean rank', *scores), rows)}\n\n{note}"


def differences(study: Study) -> str:
    """FedMS as it is recommended less each other method, in points."""
    rows, scores = [], _scores(study)
    accuracies = study.comparison.by_metric()[ACCURACY]  # bits and points have no mean
    for method, label_ in accuracies.labels.items():
        found = [accuracies.difference(score, REFERENCE, method) for score in scores.values()]
        if method != REFERENCE and None not in found:
            blocks = accuracies.blocks.values()
            shared = sum(REFERENCE in runs and method in runs for runs in blocks)
            cells = [bracketed(each, 100.0, 1, signed=True) for each in found if each]
            rows.append([label_, str(shared), *cells])
    return _table((f"{label(REFERENCE)} less", "blocks", *scores), rows)


def choices(study: Study) -> str:
    """Validation scores by the scale of the learning rates, and what they choose."""
    own = [name for name, method in METHODS.items() if method.like is None]
    every = {(task, name): study.lines.choices(task, name) for task in TASKS for name in own}
    scales = sorted({scale for tried in every.values() for scale in tried})
    rows = []
    for (task, method), tried in every.items():
        if tried:
            scale, knob = study.chosen(task, method)
            means = {s: _mean((line["own"], line["everyone"])) for s, line in tried.items()}
            cells = [f"{100 * means[s]:.1f}" if s in means else "–" for s in scales]
            rows.append([task, label(method), *cells, f"{scale:g}", f"{knob:g}"])
    return _table(("task", "method", *(f"x {s:g}" for s in scales), "chosen", "knob"), rows)


def progress(study: Study) -> str:
    """What has been run."""
    rows, runs = [], study.lines.runs()
    for place in study.places.values():
        there = [(cell, line) for cell, line in runs.items() if (cell.task, cell.alpha) == place]
        minutes = sum(processor(line) for _, line in there) / 60
        rows.append([
            *place, str(len({cell.method for cell, _ in there})),
            str(len({cell.seed for cell, _ in there})), str(len(there)), f"{minutes:.0f}",
            ", ".join(sorted({line["commit"] for _, line in there})),
        ])  # fmt: skip
    head = ("task", "alpha", "methods", "seeds", "runs", "processor minutes", "commits")
    return _table(head, rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "ranks": ranks,
    "ranks-all": ranks_all,
    "differences": differences,
    "knobs": knobs,
    "points": points,
    "choices": choices,
    "progress": progress,
}


# Cells --------------------------------------------------------------------------------------------


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: Iterable[float | None]) -> float:
    return mean(value for value in values if value is not None)
