"""Carries out a group of cells: the same clients and model, one run after the other."""

from __future__ import annotations

import platform
import re
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from study_cells import PRIORS, TASKS, Cell, Group, config_of, overrides
from study_lines import Line, Lines, append, shown

from fedms.fl.engines.world import World
from fedms.fl.evaluate import spread
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.records import ClientRecord, RoundRecord
from fedms.fl.model.backbone import Backbone
from fedms.fl.runs.method import run_method
from fedms.fl.runs.report import read_clients, read_rounds
from fedms.fl.tasks.task import Batch, Metric


class Meter(Progress):
    """Processor seconds of the clients' training in each round, by the round's wall seconds.

    Those are no two rounds' alike, and a method that begins where another ended its first stage
    has that one's lines, so it is charged for them. The frozen states that a batch starts from are
    left out: they are computed once, by whichever run of a process comes first.
    """

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.spent: dict[float, float] = {}
        self._frozen = 0.0
        self._marks = [0.0]

    def leave_out(self, backbone: Backbone) -> None:
        """Do not count what this backbone spends on frozen states."""
        compute = backbone.entering

        def entering(batch: Batch, depths: Sequence[int]) -> dict[int, torch.Tensor]:
            began = time.process_time()
            states = compute(batch, depths)
            self._frozen += time.process_time() - began
            return states

        backbone.entering = entering

    def round(self, method: str, stage: str, round: int, rounds: int, steps: int) -> None:
        super().round(method, stage, round, rounds, steps)
        self._marks = [self._now()]

    def advance(self, count: int) -> None:
        super().advance(count)
        self._marks += [self._now()] * count

    def scored(self, method: str, record: RoundRecord, metric: Metric) -> None:
        super().scored(method, record, metric)
        visits = len(record.participants) + len(record.failed)
        self.spent[record.seconds] = self._marks[visits] - self._marks[0]

    def _now(self) -> float:
        return time.process_time() - self._frozen


def work(
    group: Group, runs: Path, commit: str, lines: Path | None, again: bool = False
) -> list[Line]:
    """Run the cells that a group names and append their lines; a cell that fails is told.

    Args:
        lines: the file that they are appended to. A cell that another process has meanwhile added
            is left out, unless ``again``.
    """
    found: list[Line] = []
    meter, world = Meter(), None
    for cell, scale in group.cells:
        if lines is not None and not again and Lines(lines).has(group.kind, cell, scale):
            continue
        started = time.perf_counter()
        try:
            config = config_of(cell, scale, group.kind)
            if world is None:
                world = World(config, meter)
                meter.leave_out(world.model.backbone)
            folder = runs / _name(cell, scale, group.kind)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            folder.mkdir(parents=True)
            run_method(config, world, folder, meter)
            line = _line(cell, scale, group.kind, folder, meter.spent, commit, world)
        except Exception:
            print(f"{cell} failed after {time.perf_counter() - started:.0f} s", flush=True)
            traceback.print_exc()
            continue
        if lines is not None:
            append(lines, line)
            print(f"{shown(line)}, {time.perf_counter() - started:.0f} s", flush=True)
        found.append(line)
    return found


def _name(cell: Cell, scale: float, kind: str) -> str:
    method = "-".join(re.findall(r"\w+", cell.method))
    return f"{cell.task}/{cell.alpha}/{cell.seed}/{kind}/{method}-x{scale:g}"


def _line(
    cell: Cell,
    scale: float,
    kind: str,
    folder: Path,
    spent: dict[float, float],
    commit: str,
    world: World,
) -> Line:
    rounds = read_rounds(folder)
    clients = [c for c in read_clients(folder) if c.round == rounds[-1].round]
    return {
        "kind": kind, **cell._asdict(), "scale": scale,
        **_scores(clients, None),
        "global": rounds[-1].global_accuracy,
        "gate": rounds[-1].gate_local_mean,
        "frontier": {
            f"{a:g}": _scores(clients, a) for a in (PRIORS if TASKS[cell.task].classes else ())
        },
        "bytes_up": sum(r.bytes_up for r in rounds),
        "bytes_down": sum(r.bytes_down for r in rounds),
        "seconds": round(sum(r.seconds for r in rounds), 1),
        "step_seconds": round(sum(spent[r.seconds] for r in rounds), 3),
        "trained_share": max(r.trainable_share for r in rounds),
        "failed": sum(len(r.failed) for r in rounds),
        "settings": overrides(cell, scale, kind),
        "commit": commit,
        "machine": ", ".join([platform.machine(), _device(world), f"torch {torch.__version__}"]),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def _device(world: World) -> str:
    device = world.model.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, 1 thread"


def _scores(clients: list[ClientRecord], prior: float | None) -> dict[str, float | None]:
    """Means over clients, at a knob or as the method answers."""

    def score(client: ClientRecord) -> tuple[float, float]:
        if prior is None:
            return client.accuracy, client.pooled_accuracy
        own, everyone = client.by_prior[str(prior)]
        return own, everyone

    seen = [score(client) for client in clients if client.seen]
    unseen = spread([score(client)[0] for client in clients if not client.seen])
    own, everyone = spread([own for own, _ in seen]), spread([each for _, each in seen])
    assert own is not None
    assert everyone is not None
    return {
        name: None if value is None else round(value, 5)
        for name, value in (
            ("own", own.mean),
            ("worst10", own.worst10),
            ("everyone", everyone.mean),
            ("unseen", unseen.mean if unseen else None),
        )
    }
