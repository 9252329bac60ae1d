"""What a run tells while it runs: phases, rounds with accuracy and time left, and warnings.

A quiet one says warnings alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from fedms.fl.journal.records import RoundRecord
from fedms.fl.tasks.task import Metric


class Progress:
    """Bars on a terminal, one line per round elsewhere.

    Args:
        quiet: say nothing but warnings.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self._quiet = quiet
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._method = ""
        self._seconds: list[float] = []
        self._total = 0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """A piece of work with a name and, where known, a size that :meth:`advance` counts up."""
        started = time.perf_counter()
        self._start(name, total, "")
        yield
        if (seconds := time.perf_counter() - started) >= 0.5:
            self.say(f"{name} ready after {seconds:.1f} s")

    def round(self, method: str, stage: str, round: int, rounds: int, steps: int) -> None:
        """A round begins; ``steps`` visits and evaluations are ahead in it."""
        if method != self._method:
            self._method, self._seconds = method, []
        self._total = rounds
        left = (
            f"about {self._mean_seconds * (rounds - round + 1):.0f} s left" if self._seconds else ""
        )
        self._start(f"{method} {stage} round {round}/{rounds}", steps, left)

    def advance(self, count: int) -> None:
        """``count`` more units of the current phase or round are done."""
        if self._task is not None:
            self._bars.advance(self._task, count)

    def scored(self, method: str, record: RoundRecord, metric: Metric) -> None:
        """A round has ended; ``metric`` says how its scores are shown."""
        self._seconds.append(record.seconds)
        left = self._mean_seconds * (self._total - record.round)
        parts = [
            f"{method} {record.stage} round {record.round}/{self._total}",
            f"{record.seconds:.1f} s",
        ]
        if record.train_loss is not None:
            parts.append(f"loss {record.train_loss:.3f}")
        for name, score in (
            ("own", record.personalized_accuracy),
            ("everyone's", record.pooled_accuracy),
        ):
            if score is not None:
                parts.append(f"{name} {metric.shown(score.mean)} {metric.unit}")
        if record.gate_local_mean is not None:
            parts.append(f"gate on local {record.gate_local_mean:.2f}")
        parts.append(f"awake {record.awake_blocks}")
        if left:
            parts.append(f"about {left:.0f} s left")
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if not self._quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """A line that is printed even when quiet."""
        self.console.print(f"warning: {text}", soft_wrap=True, markup=False)

    @property
    def _mean_seconds(self) -> float:
        return sum(self._seconds) / len(self._seconds)

    def _start(self, description: str, total: int | None, note: str) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(description, total=total, note=note)


@contextmanager
def steps(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """What a piece of work of several steps tells: (the step, how many of its units are done, of
    how many). A bar on a terminal, a line a step elsewhere."""
    console = Console(file=sys.stderr, highlight=False)
    bar = Bars(*Bars.get_default_columns(), console=console, transient=True)
    task, last = bar.add_task(name), ""

    def tell(step: str, done: int, total: int) -> None:
        nonlocal last
        if step != last and not console.is_terminal:
            console.print(f"{name}: {step}", soft_wrap=True, markup=False)
        last = step
        bar.update(task, description=f"{name}: {step}", completed=done, total=total)

    bar.disable = not console.is_terminal
    with bar:
        yield tell
