"""A run's folder while it goes on: lines of metrics, clients' states, checkpoints.

A round's lines are written before its checkpoint, whose renaming is what commits it. So a kill can
leave lines and states of a round that did not count; they are dropped when the folder is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from fedms.fl.journal.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedms.fl.journal.files import replace_file
from fedms.fl.journal.records import ClientRecord, ClientScore, RoundRecord
from fedms.fl.journal.states import ClientStates
from fedms.fl.journal.tensorboard import Events

METRICS, CLIENTS = "metrics.jsonl", "clients.jsonl"


def last_counted(folder: Path, round: int) -> dict[str, int]:
    """The round, up to this one, in which each client's answer last counted; a run's folder."""
    found: dict[str, int] = {}
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if round else ():
        record = json.loads(line)
        found |= dict.fromkeys(record["participants"], record["round"])
        if record["round"] == round:  # later lines may be of a round that is not over
            break
    return found


@dataclass(frozen=True)
class Outcome:
    """A first stage's end, its checkpoint and lines, for a method that begins with the same."""

    checkpoint: Checkpoint
    lines: dict[str, str]


class Journal:
    """What one method writes down round by round, and where it goes on.

    Args:
        folder: it exists.
        keep: newest checkpoints that stay.
        warn: hears of damaged checkpoints.
        tensorboard: write event files, too.

    Attributes:
        newest: the last checkpoint that is whole, or None before the first.
        states: what the clients hold of their own.
    """

    def __init__(
        self, folder: Path, keep: int, warn: Callable[[str], None], tensorboard: bool = False
    ) -> None:
        self.folder, self._keep = folder, keep
        self.states = ClientStates(folder / "clients")
        self.newest = load_checkpoint(folder / "checkpoints", self.states, warn)
        done = self.newest.round if self.newest else 0
        self.states.forget_after(done)
        for name in (METRICS, CLIENTS):
            self._drop_lines_after(done, folder / name)
        self._events = Events(folder, done) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()

    def commit(
        self, record: RoundRecord, scores: Sequence[ClientScore], checkpoint: Checkpoint
    ) -> None:
        """Make a round count.

        Raises:
            OSError, CheckpointError: the disk refuses.
        """
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        with (self.folder / CLIENTS).open("a", encoding="utf-8") as file:
            for score in scores:
                line = ClientRecord(**asdict(score), round=record.round, stage=record.stage)
                file.write(json.dumps(asdict(line)) + "\n")
        self._save(checkpoint)
        if self._events is not None:
            self._events.add(asdict(record))

    def outcome(self) -> Outcome | None:
        """What a method needs to go on from here; None if clients hold something of their own."""
        if self.newest is None or (self.folder / "clients").exists():
            return None
        lines = {name: (self.folder / name).read_text("utf-8") for name in (METRICS, CLIENTS)}
        return Outcome(self.newest, lines)

    def adopt(self, outcome: Outcome) -> None:
        """Begin where another method has ended its first stage."""
        for name, text in outcome.lines.items():
            replace_file(self.folder / name, text.encode())
        self._save(outcome.checkpoint)
        if self._events is not None:
            for line in outcome.lines[METRICS].splitlines():
                self._events.add(json.loads(line))

    def _save(self, checkpoint: Checkpoint) -> None:
        save_checkpoint(self.folder / "checkpoints", checkpoint, self.states, self._keep)
        self.newest = checkpoint

    @staticmethod
    def _drop_lines_after(round: int, path: Path) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["round"] <= round]
            replace_file(path, "".join(kept).encode())
