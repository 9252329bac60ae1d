"""The study's pictures: frontiers, accuracy against bytes and against compute, mean ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study_cells import TASKS, label
from study_lines import Line
from study_numbers import Study, balance, frontier

# Okabe and Ito's palette, and markers, so that no method rests on its colour alone
LOOKS = {
    "fedms, late": ("#0072B2", "o"),
    "fedms": ("#56B4E9", "h"),
    "fedavg_ft": ("#CC79A7", "D"),
    "fedavg": ("#E69F00", "s"),
    "local_only": ("#009E73", "^"),
    "ditto": ("#D55E00", "P"),
    "fedms, no SAL, logits, one half, late": ("#003a5d", "X"),
    "fedalt": ("#8c564b", "*"),
    "fedsa_lora": ("#999999", "<"),
}
GREY = ("#bbbbbb", ".")
A_ROW = 3
"""Panels."""


def draw(study: Study, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "frontier.png": _frontiers(study),
        "cost.png": _costs(study),
        "ranks.png": _ranks(study),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in pictures]


def _frontiers(study: Study) -> Figure:
    """Own against everyone's as the knob turns; a mark where a method answers without it, the
    larger the more it sends.
    """
    settings = [s for s in study.settings() if TASKS[s[0]].classes]
    figure, grid = _figure(len(settings), 4.6, 4.4)
    sent = [_bytes([run]) for lines in study.lines.values() for run in lines.values()]
    most = max(sent, default=0) or 1
    for axes, (task, alpha) in zip(grid, settings, strict=False):
        for method in [m for m in study.methods() if m != "zero_shot"]:
            runs = study.of(task, alpha, method)
            if not runs:
                continue
            (color, marker), known = LOOKS.get(method, GREY), method in LOOKS
            curve = frontier(runs)
            x, y = [100 * e for _, e, _ in curve], [100 * own for _, _, own in curve]
            width = 1.8 if method == "fedms, late" else 1.0
            axes.plot(x, y, color=color, linewidth=width, zorder=1 + known)
            at = mean(100 * run["everyone"] for run in runs), mean(100 * run["own"] for run in runs)
            size = 15 + 120 * _bytes(runs) / most
            axes.scatter(*at, s=size, color=color, marker=marker, zorder=3 + known,
                         label=label(method) if known else None)  # fmt: skip
        _decorate(axes, _title(task, alpha), "everyone's data, %")
    for axes in grid[::A_ROW]:
        axes.set_ylabel("own data, %")
    _legend(figure, grid)
    return figure


def _costs(study: Study) -> Figure:
    """(own + everyone's) / 2 against megabytes and processor seconds, a client and round."""
    figure, grid = _figure(2, 5.2, 4.6)
    costs: list[tuple[str, Callable[[Sequence[Line]], float]]] = [
        ("sent and received, MB", lambda runs: _bytes(runs) / 1e6),
        ("clients' training, processor seconds", lambda runs: mean(r["cpu_seconds"] for r in runs)),
    ]
    methods, blocks = study.complete()
    for axes, (name, cost) in zip(grid, costs, strict=True):
        for method in methods:
            runs = [study.lines[block][method] for block in blocks]
            color, marker = LOOKS.get(method, GREY)
            axes.scatter(cost(runs), 100 * mean(map(balance, runs)), color=color, marker=marker,
                         s=60, label=label(method) if method in LOOKS else None)  # fmt: skip
            if method not in LOOKS:
                place = (cost(runs), 100 * mean(map(balance, runs)))
                axes.annotate(
                    method, place, fontsize=6.5, xytext=(3, 3), textcoords="offset points"
                )
        _decorate(axes, f"{len(blocks)} blocks", name)
    grid[0].set_ylabel("mean of own and everyone's, %")
    _legend(figure, grid)
    return figure


def _ranks(study: Study) -> Figure:
    found = study.ranks(balance)
    order = sorted(found, key=lambda m: -found[m].mean)
    figure, (axes,) = _figure(1, 7.0, 1.2 + 0.28 * max(4, len(order)))
    for place, method in enumerate(order):
        middle, low, high = found[method]
        color, marker = LOOKS.get(method, GREY)
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot([middle], [place], color=color, marker=marker)
    axes.set_yticks(range(len(order)), list(map(label, order)), fontsize=8)
    _decorate(axes, "", "mean rank by own + everyone's, 95 % of the bootstrap over blocks")
    return figure


def _bytes(runs: Sequence[Line]) -> float:
    return mean(run["bytes_up"] + run["bytes_down"] for run in runs)


def _title(task: str, alpha: str) -> str:
    return f"{task}, natural clients" if alpha == "natural" else f"{task}, alpha {alpha}"


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """So many panels, at least one, in rows."""
    panels = max(1, panels)
    columns, rows = min(panels, A_ROW), math.ceil(panels / A_ROW)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: list[Axes] = [*figure.subplots(rows, columns, squeeze=False).flat]
    for spare in grid[panels:]:
        spare.set_axis_off()
    return figure, grid[:panels]


def _decorate(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for axes in grid:
        handles, names = axes.get_legend_handles_labels()
        found.update(zip(names, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / 2.6))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False,
        fontsize=8,
    )  # fmt: skip
