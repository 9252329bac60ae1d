"""The pictures of a comparison: frontiers, scores against costs, mean ranks.

A method has one colour, marker and number in all of them (see looks.py); numbers stand beside the
marks, and a key below says whose they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from fedms.fl.compare.comparison import Comparison, FullTable
from fedms.fl.compare.looks import Look, looks_of
from fedms.fl.compare.marks import Mark, number
from fedms.fl.compare.result import Result, balance, frontier
from fedms.fl.runs.plots import any_script, decorate, new_figure, plain
from fedms.fl.tasks.task import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
A_ROW = 2
"""Panels."""
FAR = 3.0
"""Interquartile ranges beyond the worse quartile."""
Looks = dict[str, Look]
Panel = tuple["Axes", list[Mark]]


def draw(comparison: Comparison, folder: Path, first: Sequence[str] = ()) -> list[Path]:
    """Draw what there are numbers for.

    Args:
        first: methods that stand out in any case.

    Raises:
        FedMSError: matplotlib is not installed.
    """
    looks = looks_of(comparison, first)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with any_script():
        figures = {
            "frontier.png": frontiers(comparison, looks),
            "cost.png": costs(comparison, looks),
            "ranks.png": ranks(comparison, looks),
        }
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / name, dpi=DPI)
                written.append(folder / name)
    return written


def frontiers(comparison: Comparison, looks: Looks) -> Figure | None:
    """A panel a setting: own against everyone's as the knob turns, with a mark where a method
    answers without it, the larger the more it sends. None where nobody has everyone's examples.
    """
    found = {
        setting: {m: runs for m in looks if (runs := comparison.of(setting, m)) and frontier(runs)}
        for setting in comparison.settings()
    }
    found = {setting: methods for setting, methods in found.items() if methods}
    if not found:
        return None
    most = max(_sent(runs) for methods in found.values() for runs in methods.values()) or 1
    figure, grid = _grid(len(found), 7.2, 6.0)
    panels = []
    for axes, (setting, methods) in zip(grid, found.items(), strict=True):
        metric = next(iter(methods.values()))[0].metric
        marks, curves = [], []
        for method, runs in methods.items():
            look = looks[method]
            curve = frontier(runs)
            line = {p.knob: (metric.factor * p.everyone, metric.factor * p.own) for p in curve}
            style: dict[str, Any] = {"linewidth": 1.4 if look.stands_out else 0.6}
            axes.plot(*zip(*line.values(), strict=True), color=look.color, zorder=1, **style)
            marks.append(
                _mark(axes, line[runs[0].knob], look, 5 + 8 * math.sqrt(_sent(runs) / most))
            )
            curves.append(list(line.values()))
        decorate(axes, setting, f"everyone's data [{metric.unit}]")
        axes.set_ylabel(f"own data [{metric.unit}]")
        panels.append((axes, _limited(axes, marks, metric, curves, costs=False)))
    _key(figure, looks, {method for methods in found.values() for method in methods}, panels)
    return figure


def costs(comparison: Comparison, looks: Looks) -> Figure:
    """The mean of own and everyone's scores (own alone where there are no others) against bytes and
    against seconds, each for the methods that have most blocks in common and for most methods,
    among the runs of which the cost is known.
    """
    wanted = [
        (known, table, name, cost)
        for part in comparison.by_metric().values()
        for name, cost in _measured(part)
        for known in [part.where(lambda run, cost=cost: cost(run) is not None)]
        for table in known.tables()
    ]
    figure, grid = _grid(len(wanted), 7.2, 5.2)
    panels, shown = [], set()
    for axes, (part, table, name, cost) in zip(grid, wanted, strict=True):
        metric = part.runs(table, table.methods[0])[0].metric
        runs = {method: part.runs(table, method) for method in looks if method in table.methods}
        both = all(run.scores.everyone is not None for found in runs.values() for run in found)
        marks = []
        for method, found in runs.items():
            spent = mean(seconds for run in found if (seconds := cost(run)) is not None)
            scores = [balance(run.scores) if both else run.scores.own for run in found]
            y = metric.factor * mean(score for score in scores if score is not None)
            marks.append(_mark(axes, (spent, y), looks[method], 9))
            shown.add(method)
        decorate(axes, f"{len(marks)} methods, {_counted(table)}", name)
        axes.set_ylabel(f"{'own + everyone, mean' if both else 'own data'} [{metric.unit}]")
        panels.append((axes, _limited(axes, marks, metric, costs=True)))
    _key(figure, looks, shown, panels)
    return figure


def _measured(comparison: Comparison) -> list[tuple[str, Callable[[Result], float | None]]]:
    """Bytes, and seconds of the processor where some run has them, else of the rounds."""
    runs = [run for runs in comparison.blocks.values() for run in runs.values()]
    found: list[tuple[str, Callable[[Result], float | None]]] = [
        ("sent and received [MB]", lambda run: run.sent / 1e6)
    ]
    if any(run.cpu_seconds is not None for run in runs):
        found.append(("clients' training [processor seconds]", lambda run: run.cpu_seconds))
    elif any(run.seconds is not None for run in runs):
        found.append(("rounds [seconds]", lambda run: run.seconds))
    return found


def ranks(comparison: Comparison, looks: Looks) -> Figure:
    """Mean ranks by own + everyone's (own alone where there are no others), with intervals."""
    tables = comparison.tables()
    heights = [0.9 + 0.21 * max(3, len(table.methods)) for table in tables]
    figure = new_figure(8.0, sum(heights))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        name = "own + everyone's data"
        found = comparison.ranks(table, lambda run: balance(run.scores))
        if not found:
            name, found = "own data", comparison.ranks(table, lambda run: run.scores.own)
        order = sorted(found, key=lambda m: -found[m].mean)
        for place, method in enumerate(order):
            middle, low, high = found[method]
            look = looks[method]
            axes.plot([low, high], [place, place], color=look.color, linewidth=2)
            axes.plot([middle], [place], color=look.color, marker=look.marker)
        names = [f"{plain(looks[m].label)}  {looks[m].number}" for m in order]
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.set_ylim(-0.7, len(order) - 0.3)
        decorate(axes, f"mean rank by {name}, {_counted(table)}", "rank, 1 the best")
    return figure


# What the pictures share ------------------------------------------------------------------------


def _counted(table: FullTable) -> str:
    count = len(table.blocks)
    return f"{count} block{'s' if count > 1 else ''}"


def _sent(runs: Iterable[Result]) -> float:
    return mean(run.sent for run in runs)


def _mark(axes: Axes, at: tuple[float, float], look: Look, size: float) -> Mark:
    size = size if look.stands_out else 5
    style: dict[str, Any] = {"markersize": size, "markeredgecolor": "white", "linestyle": ""}
    axes.plot(
        [at[0]], [at[1]], color=look.color, marker=look.marker if look.stands_out else "o",
        markeredgewidth=0.6, zorder=3 + look.stands_out, **style,
    )  # fmt: skip
    color = look.color if look.stands_out else "#777777"
    return Mark(*at, str(look.number), color, size, look.stands_out)


def _limited(
    axes: Axes, marks: Sequence[Mark], metric: Metric, curves: Sequence[Any] = (), *, costs: bool
) -> list[Mark]:
    """Show the marks, and of curves what is beyond the best of them; up is better, and so is right
    unless x is a cost. Marks far off that another excels are named above.

    Returns:
        the marks that are shown.
    """
    better = math.copysign(1.0, metric.factor)
    right = np.array([1.0 if costs else better, better])  # what right and up mean
    good = np.array([-1.0 if costs else better, better])
    places = np.array([(mark.x, mark.y) for mark in marks])
    scores = good * places
    quarter, three = np.percentile(scores, (25, 75), axis=0)
    far = scores < quarter - FAR * (three - quarter)
    excelled = np.any(np.all(scores[None] >= scores[:, None], axis=2)
                      & np.any(scores[None] > scores[:, None], axis=2), axis=1)  # fmt: skip
    near = ~(np.any(far, axis=1) & excelled)
    at = right * places
    low, high = at[near].min(0), at[near].max(0)
    for curve in curves:
        within = right * np.array(curve)
        high = np.maximum(high, within[within[:, 0] >= low[0]].max(0, initial=-np.inf))
    margin = np.maximum(0.06 * (high - low), 0.01 * np.abs(high) + 1e-3)
    (x0, y0), (x1, y1) = right * (low - margin), right * (high + margin)
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)
    beyond = [mark.text for mark, is_near in zip(marks, near, strict=True) if not is_near]
    if beyond:
        axes.set_title(f"far off: {', '.join(beyond)}", loc="right", fontsize=8, color="#777777")
    return [mark for mark, is_near in zip(marks, near, strict=True) if is_near]


def _grid(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns, rows = min(panels, A_ROW), math.ceil(panels / A_ROW)
    figure = new_figure(width * columns, height * rows)
    grid: list[Axes] = [*figure.subplots(rows, columns, squeeze=False).flat]
    for spare in grid[panels:]:
        spare.set_axis_off()
    return figure, grid[:panels]


def _key(figure: Figure, looks: Looks, shown: Iterable[str], panels: Sequence[Panel]) -> None:
    """Whose the numbers are, below the panels; then, as all have their places, the numbers."""
    from matplotlib.lines import Line2D

    shown = set(shown)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker if look.stands_out else "o",
               markersize=7 if look.stands_out else 5, linewidth=1.4 if look.stands_out else 0.6,
               label=f"{look.number}  {plain(look.label)}")
        for method, look in looks.items() if method in shown
    ]  # fmt: skip
    columns = max(1, int(figure.get_figwidth() / 3.4))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    figure.draw_without_rendering()
    for axes, marks in panels:
        number(axes, marks)
