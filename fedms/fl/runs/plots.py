"""The pictures of a run, as PNG. A method keeps its colour and its marker in all of them.

Needs matplotlib, which is imported when the first picture is drawn; its global backend and settings
are left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedms.fl.journal.records import ClientRecord, RoundRecord
from fedms.fl.tasks.task import Metric
from fedms.fl.types import FedMSError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
# Okabe and Ito's palette: told apart by colour-blind readers, and the markers differ as well.
_LOOKS = {
    "fedms": ("#0072B2", "o"),
    "fedavg": ("#E69F00", "s"),
    "fedavg_ft": ("#CC79A7", "D"),
    "local_only": ("#009E73", "^"),
    "zero_shot": ("#666666", "v"),
}
_OTHER = ("#D55E00", "P")
_GREY, _PALE, _DARK = "#666666", "#e4e4e4", "#003a5d"


@dataclass(frozen=True)
class MethodRun:
    """What one method wrote.

    Attributes:
        planned: its number of rounds when it is through.
        metric: how its scores are shown.
    """

    method: str
    name: str
    rounds: list[RoundRecord]
    clients: list[ClientRecord]
    planned: int
    metric: Metric

    @property
    def finished(self) -> bool:
        return self.rounds[-1].round >= self.planned

    @property
    def label(self) -> str:
        return self.name if self.finished else f"{self.name} (unfinished)"

    @property
    def final_clients(self) -> list[ClientRecord]:
        """Every client's scores in the last round that was scored."""
        last = max((client.round for client in self.clients), default=0)
        return [client for client in self.clients if client.round == last]


@dataclass(frozen=True)
class LabelCounts:
    """Training examples, ``counts[client][class]``."""

    class_names: list[str]
    clients: list[str]
    counts: list[list[int]]


def draw(runs: Sequence[MethodRun], labels: LabelCounts | None, folder: Path) -> list[Path]:
    """Draw what there are numbers for; the first run is the one that the others are held against.

    Raises:
        FedMSError: matplotlib is not installed.
    """
    figures = {
        "accuracy.png": accuracy(runs),
        "bytes.png": accuracy_by_bytes(runs),
        "clients.png": client_histograms(runs),
        "labels.png": label_map(labels) if labels is not None else None,
        "blocks_and_gate.png": blocks_and_gate(runs[0]),
    }
    written = []
    with any_script():
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / name, dpi=DPI)
                written.append(folder / name)
    return written


def accuracy(runs: Sequence[MethodRun]) -> Figure | None:
    """Own and everyone's scores against the round; None where nothing was scored."""
    scored = [run for run in runs if _curve(run, _own)[0].size]
    if not scored:
        return None
    figure = new_figure(9.5, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, score, title in ((left, _own, "own data"), (right, _everyone, "everyone's data")):
        for run in scored:
            rounds, values = _curve(run, score)
            untrained = not any(r.trainable_parameters for r in run.rounds)
            _line(axes, run, rounds, values, level=untrained)
        decorate(axes, title, "round")
        _whole_rounds(axes, max(run.rounds[-1].round for run in runs))
    left.set_ylabel(_mean_of(runs))
    _widen(left, 0.16, 0.08)  # room for the marks
    for axes in (left, right):
        _mark_stages_and_blocks(axes, runs[0].rounds)
    _legend(figure, left)
    return figure


def accuracy_by_bytes(runs: Sequence[MethodRun]) -> Figure | None:
    """Own scores against what all clients together had sent and received by then."""
    scored = [run for run in runs if _curve(run, _own)[0].size]
    if not scored:
        return None
    figure = new_figure(7.0, 4.8)
    axes = figure.subplots()
    for run in scored:
        rounds, values = _curve(run, _own)
        sent = {r.round: (r.bytes_up + r.bytes_down) / 1e6 for r in run.rounds}
        so_far = np.array([sum(mb for n, mb in sent.items() if n <= r) for r in rounds])
        silent = not any(sent.values())
        _line(axes, run, so_far, values, level=silent, note=", sends nothing" if silent else "")
    title = f"{runs[0].metric.name} on own data against communication"
    decorate(axes, title, "sent up and down so far [MB]")
    axes.set_xlim(0, max(axes.get_xlim()[1], 1e-3))
    axes.set_ylabel(_mean_of(runs))
    _widen(axes, 0.04, 0.04)
    _legend(figure, axes, columns=2)
    return figure


def client_histograms(runs: Sequence[MethodRun]) -> Figure | None:
    """The clients' own scores after the last scored round: the first run against each other."""
    found = [(run, _final_own(run)) for run in runs]
    if not found[0][1].size:
        return None
    (hero, own), *rivals = [(run, values) for run, values in found if values.size]
    everything = np.concatenate([own, *(values for _, values in rivals)])
    metric = runs[0].metric
    bins = _bins(everything, in_percent=metric.unit == "%")
    worst = own[: math.ceil(len(own) / 10)]
    color = _look(hero)[0]
    panels = max(1, len(rivals))
    columns = min(2, panels)
    figure = new_figure(
        4.6 * columns + (2.4 if panels == 1 else 0), 2.7 * math.ceil(panels / 2) + 1.1
    )
    grid = figure.subplots(math.ceil(panels / 2), columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    for i, axes in enumerate(grid.flat[:panels]):
        parts = [worst, own[len(worst) :]]
        names = [f"{hero.label}, worst 10 %", hero.label]
        axes.hist(parts, bins, stacked=True, color=[_DARK, color], alpha=0.75, label=names)
        mean = f"mean of the worst 10 % ({worst.mean():.{metric.digits}f} {metric.unit})"
        axes.axvline(worst.mean(), color=_DARK, linestyle=(0, (4, 2)), label=mean)
        title = f"{metric.name} of the clients on their own data"
        if rivals:
            rival, values = rivals[i]
            title = rival.label
            outline = {"histtype": "step", "color": "black", "linewidth": 1.6}
            axes.hist(values, bins, label="the rival named above", **outline)
        below = f"{metric.name} [{metric.unit}]" if i + columns >= panels else ""
        decorate(axes, title, below)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[attr-defined]
        if i % columns == 0:
            axes.set_ylabel("clients")
    _legend(figure, grid[0, 0], columns=2)
    return figure


def label_map(labels: LabelCounts) -> Figure:
    """How many training examples of each class each client has."""
    figure = new_figure(
        min(14.0, max(6.5, 3.4 + 0.3 * len(labels.class_names))),
        min(11.0, max(4.8, 2.9 + 0.2 * len(labels.clients))),
    )
    from matplotlib.colors import PowerNorm

    axes = figure.subplots()
    counts = np.array(labels.counts)
    # the square root, so that a class with few examples is still told from one with none
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, counts.max()))
    image = axes.imshow(counts, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="training examples", fraction=0.05, pad=0.02)
    rows, columns = _thin(len(labels.clients)), _thin(len(labels.class_names))
    axes.set_yticks(rows, [_short(labels.clients[i], 22) for i in rows], fontsize=7.5)
    names = [_short(labels.class_names[i], 28) for i in columns]
    axes.set_xticks(columns, names, fontsize=7.5, rotation=50, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.set_title(f"classes of {len(labels.clients)} clients", loc="left", fontsize=10.5)
    return figure


def blocks_and_gate(run: MethodRun) -> Figure | None:
    """Which blocks were awake, and below it how much the gate relied on the local expert."""
    depth = max((max(r.awake_blocks, default=-1) for r in run.rounds), default=-1) + 1
    if not depth:
        return None
    gates: dict[int, list[float]] = {}
    for client in run.clients:
        if client.seen and client.gate_local is not None:
            gates.setdefault(client.round, []).append(100 * client.gate_local)
    figure = new_figure(7.5, min(5.0, 1.5 + 0.22 * depth) + (2.6 if gates else 0))
    panels = figure.subplots(
        1 + bool(gates), 1, sharex=True, squeeze=False,
        height_ratios=[min(3.5, 0.5 + 0.22 * depth), 2.4][: 1 + bool(gates)],
    )[:, 0]  # fmt: skip
    top = panels[0]
    color = _look(run)[0]
    for record in run.rounds:
        for block in range(depth):
            shade = color if block in record.awake_blocks else _PALE
            top.bar(record.round, 0.86, bottom=block - 0.43, width=1.0, color=shade)
    decorate(top, "blocks awake (in colour)", "" if gates else "round")
    top.grid(False)
    top.set_ylabel("block")
    top.set_ylim(-0.6, depth - 0.4)
    top.set_yticks(_thin(depth, 12))
    if gates:
        _draw_gate(panels[1], gates, color)
        _legend(figure, panels[1])
    _whole_rounds(top, run.rounds[-1].round)
    return figure


def _draw_gate(axes: Axes, gates: dict[int, list[float]], color: str) -> None:
    rounds = sorted(gates)
    mean = [float(np.mean(gates[r])) for r in rounds]
    low, high = np.array([np.percentile(gates[r], (10, 90)) for r in rounds]).T
    axes.axhline(50, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="both experts alike")
    band = "10th to 90th percentile of the clients"
    if len(rounds) > 1:
        axes.fill_between(rounds, low, high, color=color, alpha=0.22, linewidth=0, label=band)
    else:
        axes.vlines(rounds, low, high, color=color, alpha=0.3, linewidth=8, label=band)
    axes.plot(rounds, mean, color=color, marker="o", markersize=5, label="mean over clients")
    decorate(axes, "gate", "round")
    axes.set_ylabel("weight on the\nlocal expert [%]")
    axes.set_ylim(-3, 103)


# What the pictures share ------------------------------------------------------------------------


@contextmanager
def any_script() -> Iterator[None]:
    """Names in a script that no font has are drawn as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FedMSError(
            'the pictures of a report need matplotlib: pip install "fedms[demo]"'
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _own(record: RoundRecord) -> float | None:
    return record.personalized_accuracy.mean if record.personalized_accuracy else None


def _everyone(record: RoundRecord) -> float | None:
    return record.pooled_accuracy.mean if record.pooled_accuracy else None


def _curve(
    run: MethodRun, score: Callable[[RoundRecord], float | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds that were scored, and the score as it is shown."""
    factor = run.metric.factor
    pairs = [(r.round, factor * value) for r in run.rounds if (value := score(r)) is not None]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def _final_own(run: MethodRun) -> np.ndarray:
    """The clients' scores as they are shown, the worst first."""
    scores = np.sort([client.accuracy for client in run.final_clients if client.seen])
    return run.metric.factor * scores


def _mean_of(runs: Sequence[MethodRun]) -> str:
    return f"{runs[0].metric.name}, mean over clients [{runs[0].metric.unit}]"


def _bins(values: np.ndarray, *, in_percent: bool) -> np.ndarray:
    """Edges of a histogram: whole fives or tens of percent, else as numpy finds them."""
    if not in_percent:
        return np.histogram_bin_edges(values, bins="auto")
    step = 5 if np.ptp(values) <= 70 else 10
    bins = np.arange(math.floor(values.min() / step) * step, values.max() + step, step)
    return np.append(bins, bins[-1] + step) if len(bins) < 2 else bins


def _look(run: MethodRun) -> tuple[str, str]:
    return _LOOKS.get(run.method, _OTHER)


def _line(
    axes: Axes, run: MethodRun, x: np.ndarray, y: np.ndarray, *, level: bool = False, note: str = ""
) -> None:
    """A curve, or a level line at the last value where the abscissa means nothing to the method."""
    if not x.size:
        return
    color, marker = _look(run)
    label = plain(run.label + note)
    if level:
        dashes = (0, (5, 2)) if run.method != "zero_shot" else (0, (1.5, 1.5))
        axes.axhline(y[-1], color=color, linewidth=1.6, linestyle=dashes, label=label)
        return
    hero = run.method == "fedms"
    style: dict[str, Any] = {"linewidth": 2.4 if hero else 1.5, "zorder": 3 if hero else 2}
    axes.plot(x, y, color=color, marker=marker, markersize=5 if hero else 4, label=label, **style)


def _mark_stages_and_blocks(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    across = axes.get_xaxis_transform()  # x in rounds, y in shares of the height
    faint: dict[str, Any] = {"transform": across, "color": _GREY}
    for before, after in pairwise(rounds):
        if before.stage != after.stage:
            axes.axvline(after.round - 0.5, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)))
            name = plain(after.stage.replace("stage", "stage "))
            axes.text(after.round - 0.42, 0.975, name, va="top", fontsize=8, **faint)
        woken = sorted(set(after.awake_blocks) - set(before.awake_blocks))
        if woken:
            what = ", ".join(map(str, woken)) if len(woken) < 3 else f"{len(woken)} blocks"
            axes.plot([after.round], [0.02], "^", markersize=5, **faint)
            axes.text(after.round, 0.05, f"wakes\n{what}", ha="center", fontsize=7, **faint)


def decorate(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(plain(title), loc="left", fontsize=10.5)
    axes.set_xlabel(xlabel)
    axes.grid(color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_rounds(axes: Axes, last: int) -> None:
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # type: ignore[attr-defined]


def _widen(axes: Axes, below: float, above: float) -> None:
    """Room below and above, as shares of the height."""
    low, high = axes.get_ylim()
    axes.set_ylim(low - below * (high - low), high + above * (high - low))


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Below the axes, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    style: dict[str, Any] = {"ncols": min(columns, len(names)), "frameon": False, "fontsize": 9}
    figure.legend(handles, names, loc="outside lower center", **style)


def _thin(count: int, most: int = 40) -> list[int]:
    """At most ``most`` of the indices, evenly spaced."""
    return list(range(0, count, math.ceil(count / most) or 1))


def _short(name: str, length: int) -> str:
    return plain(name if len(name) <= length else name[: length - 1].rstrip() + "…")


def plain(text: str) -> str:
    """As it stands: matplotlib would set what is between two dollars as mathematics."""
    return text.replace("$", r"\$")
