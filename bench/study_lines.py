"""The study's records, bench/results/study.jsonl: a line a finished run, and what they choose.

A line: kind ("run", or "choice": scored on validation examples), task, alpha, seed, method, scale
(of the learning rates), settings, commit, machine, when; own, worst10, everyone, unseen, global
(shares in [0, 1], or log2 p a token); gate (mean weight on the local expert); frontier (the same
scores by the knob on the label prior); bytes_up, bytes_down (all clients, all rounds), seconds,
step_seconds (of processor, of the clients' training alone, without frozen states; the first lines
have cpu_seconds, with them, which whoever came first in a process had to compute), trained_share.
The last line of a cell counts.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from study_cells import BOUNDS, METHODS, SCALES, TASKS, Cell

ROOT = Path(__file__).parents[1]
LINES = ROOT / "bench" / "results" / "study.jsonl"
Line = dict[str, Any]


class Choice(NamedTuple):
    scale: float
    knob: float


class Lines:
    """The file of lines, read anew at every question: other processes append to it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _all(self, kind: str) -> list[Line]:
        if not self._path.exists():
            return []
        lines = map(json.loads, self._path.read_text("utf-8").splitlines())
        return [line for line in lines if line["kind"] == kind]

    def runs(self) -> dict[Cell, Line]:
        """The last line of every cell of the table."""
        return {cell_of(line): line for line in self._all("run") if line["method"] in METHODS}

    def choices(self, task: str, method: str) -> dict[float, Line]:
        """By scale, the last line of every one that was tried."""
        name = METHODS[method].like or method
        return {
            line["scale"]: line
            for line in self._all("choice")
            if (line["task"], line["method"]) == (task, name)
        }

    def has(self, kind: str, cell: Cell, scale: float) -> bool:
        """Whether a cell has a line; a choice at that scale."""
        if kind == "run":
            return cell in self.runs()
        return scale in self.choices(cell.task, cell.method)

    def untried(self, task: str, method: str) -> list[float]:
        """The scales that a method's choice still needs: while the best is the least or the
        greatest, half or twice of it.
        """
        if METHODS[method].like is not None or not TASKS[task].tuned:
            return []
        tried = self.choices(task, method)
        left = [scale for scale in SCALES if scale not in tried]
        if left:
            return left
        best = self.chosen(task, method).scale
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        low, high = BOUNDS
        return [] if beyond is None or not low <= beyond <= high else [beyond]

    def chosen(self, task: str, method: str) -> Choice:
        """The rule: of the scales of the learning rates the one with the highest sum of validation
        scores on own and on everyone's data, without a knob; then of the knobs likewise.
        """
        tried = self.choices(task, method)
        if not tried:
            return Choice(1.0, 0.0)
        best = max(tried.values(), key=_sum)
        knobs = {0.0: best, **{float(a): point for a, point in best["frontier"].items()}}
        return Choice(best["scale"], max(knobs, key=lambda a: _sum(knobs[a])))


def _sum(scores: Line) -> float:
    return scores["own"] + scores["everyone"]


def cell_of(line: Line) -> Cell:
    return Cell(line["task"], line["alpha"], line["seed"], line["method"])


def append(path: Path, line: Line) -> None:
    """Add a line, whole, whoever else does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")


def processor(line: Line) -> float:
    """Seconds, of whichever kind a line has."""
    return line["step_seconds"] if "step_seconds" in line else line["cpu_seconds"]


def shown(line: Line) -> str:
    """A line as people read it."""
    factor = 100 if TASKS[line["task"]].classes else 1
    scores = [
        f"{name} {factor * line[name]:.1f}"
        for name in ("own", "worst10", "everyone", "unseen", "global")
        if line[name] is not None
    ]
    sent = (line["bytes_up"] + line["bytes_down"]) / 1e6
    return (
        f"{line['task']} {line['alpha']} seed {line['seed']} {line['method']} x{line['scale']:g} "
        f"({line['kind']}): {', '.join(scores)}; {sent:.1f} MB, "
        f"{processor(line):.0f} s of processor"
    )


def commit() -> str:
    """What the code is, with a + where it is not what was committed."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(ROOT), *words]
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", "fedms", "csrc", *map(str, ROOT.glob("bench/study*.py"))
    )
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")
