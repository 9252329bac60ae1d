"""Tables and pictures of the study, written into docs/study.md and docs/study/.

A table stands between `<!-- NAME -->` and `<!-- end -->` in the page and is made anew from the
lines; the words around the tables are people's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean

from study_cells import METHODS, TASKS, label
from study_lines import ROOT, Line, Lines
from study_numbers import Interval, Study, at_knob, balance, frontier, own_at

PAGE = ROOT / "docs" / "study.md"
REFERENCE = "fedms, late"
RIVAL = "fedavg_ft"
Row = Sequence[str]


def write_report(lines: Lines, page: Path = PAGE) -> list[Path]:
    """Fill the page's tables and draw its pictures."""
    from study_pictures import draw

    study = Study(lines.runs())
    text = page.read_text("utf-8")
    for name, table in TABLES.items():
        filled = f"<!-- {name} -->\n{table(study, lines)}\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, new=filled: new, text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{page} has no place for the table {name!r}")
    page.write_text(text, "utf-8")
    return [page, *draw(study, page.parent / page.stem)]


# Tables -------------------------------------------------------------------------------------------


def points(study: Study, lines: Lines) -> str:
    """Each setting: own / worst tenth / everyone's / unseen, means over seeds."""
    parts = []
    for task, alpha in study.settings():
        rows = []
        for method in study.methods():
            runs = study.of(task, alpha, method)
            if runs:
                rows.append((mean(map(balance, runs)), _point(task, method, runs)))
        rows.sort(key=lambda row: -row[0])
        head = (
            task if alpha == "natural" else f"{task}, alpha {alpha}", "seeds", "own data",
            "worst tenth", "everyone's data", "unseen clients", "MB up", "MB down",
            "processor s", "trained", "gate on local",
        )  # fmt: skip
        parts.append(_table(head, [row for _, row in rows]))
    return "\n\n".join(parts)


def _point(task: str, method: str, runs: Sequence[Line]) -> Row:
    def scores(name: str) -> str:
        return _over_seeds(task, [run[name] for run in runs if run[name] is not None])

    gates = [run["gate"] for run in runs if run["gate"] is not None]
    return (
        label(method), str(len(runs)),
        *(scores(name) for name in ("own", "worst10", "everyone", "unseen")),
        f"{mean(run['bytes_up'] for run in runs) / 1e6:.1f}",
        f"{mean(run['bytes_down'] for run in runs) / 1e6:.1f}",
        f"{mean(run['cpu_seconds'] for run in runs):.0f}",
        f"{100 * mean(run['trained_share'] for run in runs):.2f} %",
        f"{mean(gates):.2f}" if gates else "–",
    )  # fmt: skip


def knobs(study: Study, lines: Lines) -> str:
    """With the knob: as chosen on validation data, and own data at equal everyone's."""
    parts = []
    for task, alpha in study.settings():
        if not TASKS[task].classes:
            continue
        levels = {
            other: mean(run["everyone"] for run in runs)
            for other in (RIVAL, REFERENCE)
            if (runs := study.of(task, alpha, other))
        }
        rows = []
        for method in study.methods():
            runs = study.of(task, alpha, method)
            if not runs:
                continue
            knob = lines.chosen(task, method).knob
            chosen = [at_knob(run, knob) for run in runs]
            curve = frontier(runs)
            at = [own_at(curve, level) for level in levels.values()]
            rows.append((mean(map(balance, chosen)), (
                label(method), f"{knob:g}",
                *(f"{100 * mean(c[name] for c in chosen):.1f}"
                  for name in ("own", "worst10", "everyone")),
                f"{100 * mean(map(balance, chosen)):.1f}",
                *("–" if own is None else f"{100 * own:.1f}" for own in at),
            )))  # fmt: skip
        rows.sort(key=lambda row: -row[0])
        head = (
            task if alpha == "natural" else f"{task}, alpha {alpha}", "knob", "own", "worst tenth",
            "everyone's", "(own + everyone's) / 2",
            *(f"own at everyone's {100 * e:.1f} ({label(m)})" for m, e in levels.items()),
        )  # fmt: skip
        parts.append(_table(head, [row for _, row in rows]))
    return "\n\n".join(parts)


def _scores(lines: Lines) -> dict[str, Callable[[Line], float]]:
    """What methods are compared by."""
    chosen = cache(lines.chosen)  # the file is read at every question

    def at_its_knob(line: Line) -> float:
        return balance(at_knob(line, chosen(line["task"], line["method"]).knob))

    return {
        "own": lambda line: line["own"],
        "worst tenth": lambda line: line["worst10"],
        "everyone's": lambda line: line["everyone"],
        "own + everyone's": balance,
        "own + everyone's, each with its knob": at_its_knob,
    }


def ranks(study: Study, lines: Lines) -> str:
    """Mean ranks over blocks, with 95 % of the bootstrap."""
    methods, blocks = study.complete()
    scores = _scores(lines)
    found = {name: study.ranks(score) for name, score in scores.items()}
    order = sorted(methods, key=lambda m: found["own + everyone's"][m].mean)
    rows = [[label(m), *(_interval(found[name][m], 1.0, 1) for name in scores)] for m in order]
    tasks = ", ".join(f"{task} {alpha}" for task, alpha in sorted({b[:2] for b in blocks}))
    note = f"{len(blocks)} blocks of task, alpha and seed: {tasks}."
    return f"{_table(('mean rank', *scores), rows)}\n\n{note}"


def differences(study: Study, lines: Lines) -> str:
    """FedMS as it is recommended less each other method, in points."""
    rows, scores = [], _scores(lines)
    for method in study.methods():
        found = [study.difference(score, REFERENCE, method) for score in scores.values()]
        if method != REFERENCE and None not in found:
            shared = sum(REFERENCE in all_ and method in all_ for all_ in study.lines.values())
            cells = [_interval(each, 100.0, 1, signed=True) for each in found if each]
            rows.append([label(method), str(shared), *cells])
    return _table((f"{label(REFERENCE)} less", "blocks", *scores), rows)


def choices(study: Study, lines: Lines) -> str:
    """Validation scores by the scale of the learning rates, and what they choose."""
    own = [name for name, method in METHODS.items() if method.like is None]
    every = {(task, name): lines.choices(task, name) for task in TASKS for name in own}
    scales = sorted({scale for tried in every.values() for scale in tried})
    rows = []
    for (task, method), tried in every.items():
        if tried:
            scale, knob = lines.chosen(task, method)
            sums = [f"{100 * balance(tried[s]):.1f}" if s in tried else "–" for s in scales]
            rows.append([task, label(method), *sums, f"{scale:g}", f"{knob:g}"])
    return _table(("task", "method", *(f"x {s:g}" for s in scales), "chosen", "knob"), rows)


def progress(study: Study, lines: Lines) -> str:
    """What has been run."""
    rows = []
    for task, alpha in study.settings():
        blocks = [lines for block, lines in study.lines.items() if block[:2] == (task, alpha)]
        runs = [run for lines in blocks for run in lines.values()]
        rows.append([
            task, alpha, str(len({run["method"] for run in runs})), str(len(blocks)),
            str(len(runs)), f"{sum(run['cpu_seconds'] for run in runs) / 60:.0f}",
            ", ".join(sorted({run["commit"] for run in runs})),
        ])  # fmt: skip
    head = ("task", "alpha", "methods", "seeds", "runs", "processor minutes", "commits")
    return _table(head, rows)


TABLES: dict[str, Callable[[Study, Lines], str]] = {
    "ranks": ranks,
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


def _over_seeds(task: str, values: Sequence[float]) -> str:
    """Accuracies in %, bits per token otherwise; with the range of the seeds."""
    if not values:
        return "–"
    factor, digits = (100, 1) if TASKS[task].classes else (-1, 3)
    shown = sorted(factor * value for value in values)
    spread = f" ({shown[0]:.{digits}f}–{shown[-1]:.{digits}f})" if len(shown) > 1 else ""
    return f"{mean(shown):.{digits}f}{spread}"


def _interval(found: Interval, factor: float, digits: int, signed: bool = False) -> str:
    middle, low, high = (factor * value for value in found)
    sign = "+" if signed else ""
    return f"{middle:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
