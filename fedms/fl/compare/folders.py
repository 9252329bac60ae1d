"""Finds finished runs in folders, rivals among them, and reads what a comparison needs of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedms.fl.compare.identity import Identity, identity_of, labels, setting_names
from fedms.fl.compare.result import Block, Point, Result
from fedms.fl.evaluate import spread
from fedms.fl.journal.files import read_record
from fedms.fl.journal.records import ClientRecord
from fedms.fl.runs.origin import FILE, config_of
from fedms.fl.runs.plots import MethodRun
from fedms.fl.runs.report import method_run, read_rounds
from fedms.fl.types import FedMSError

BEGUN = frozenset((FILE, "metrics.jsonl"))
"""Files of which the folder of a run has one from its first round on."""


@dataclass(frozen=True)
class Found:
    """What was found in folders.

    Attributes:
        results: by folder.
        left_out: by folder, why it is not compared.
    """

    results: dict[Path, Result]
    left_out: dict[Path, str]


def holds_one_run(folder: Path) -> bool:
    """Whether a folder is a run's own, and not one that many runs lie in."""
    return any((folder / name).exists() for name in BEGUN)


def read_runs(folders: Sequence[Path]) -> Found:
    """Every finished run in the folders, at any depth, with its rivals.

    Raises:
        FedMSError: a folder does not exist or holds no run, or no run is left.
    """
    read: dict[Path, tuple[Identity, MethodRun]] = {}
    left_out: dict[Path, str] = {}
    for folder in _method_folders(folders):
        try:
            read[folder] = _read(folder)
        except FedMSError as error:
            left_out[folder] = str(error)
    identities = [identity for identity, _ in read.values()]
    settings, names = setting_names(identities), labels(identities)
    results: dict[Path, Result] = {}
    first: dict[tuple[Block, str], Path] = {}
    for (folder, (identity, run)), setting, label in zip(
        read.items(), settings, names, strict=True
    ):
        block = Block(setting, identity.seed)
        same = first.setdefault((block, label), folder)
        if same is folder:
            results[folder] = _result(block, label, run, identity.how["prior"])
        else:
            left_out[folder] = f"the same method and settings as {same}"
    if not results:
        reasons = "".join(f"\n  {folder}: {reason}" for folder, reason in left_out.items())
        raise FedMSError(f"no finished run to compare:{reasons}")
    return Found(results, left_out)


def _method_folders(folders: Iterable[Path]) -> list[Path]:
    """Each once, in the order of the arguments, then by name."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FedMSError(f"{folder} is no folder")
        inside = list(_walk(folder))
        if not inside:
            raise FedMSError(f"{folder} holds no run, nor does any folder in it")
        for place in inside:
            found.setdefault(place.resolve(), place)
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    """Folders of one method's run; of what lies in such a one, only rivals are looked at."""
    for place, inside, files in os.walk(folder, onerror=_raise):
        inside.sort()
        if not BEGUN.isdisjoint(files):
            inside[:] = [name for name in inside if name == "rivals"]
            yield Path(place)


def _raise(error: OSError) -> None:
    raise error


def _read(folder: Path) -> tuple[Identity, MethodRun]:
    """FedMSError: it is no run, damaged, unfinished, or was not scored at its end."""
    config = config_of(folder)
    run = method_run(folder, config.method, config, read_rounds(folder))
    if not run.finished:
        raise FedMSError(f"unfinished: {run.rounds[-1].round} of {run.planned} rounds")
    if run.rounds[-1].personalized_accuracy is None:
        raise FedMSError("no client was scored after its last round")
    names = ("inputs", "labels", "clients", "model")
    content = read_record(folder / FILE, *names) if (folder / FILE).exists() else {}
    return identity_of(config, [content[name] for name in names if name in content]), run


def _result(block: Block, label: str, run: MethodRun, knob: float) -> Result:
    last = run.rounds[-1]
    own, everyone, unseen = last.personalized_accuracy, last.pooled_accuracy, last.unseen_accuracy
    assert own is not None
    return Result(
        block=block,
        method=label,
        label=label,
        algorithm=run.method,
        metric=run.metric,
        scores=Point(
            own.mean,
            own.worst10,
            everyone.mean if everyone else None,
            unseen.mean if unseen else None,
        ),
        by_knob=_by_knob([client for client in run.clients if client.round == last.round]),
        bytes_up=sum(record.bytes_up for record in run.rounds),
        bytes_down=sum(record.bytes_down for record in run.rounds),
        seconds=sum(record.seconds for record in run.rounds),
        cpu_seconds=None,
        trained_share=max(record.trainable_share for record in run.rounds),
        gate=last.gate_local_mean,
        knob=knob,
    )


def _by_knob(clients: Sequence[ClientRecord]) -> dict[float, Point]:
    """Means over clients at each of ``eval.priors``."""
    points: dict[float, Point] = {}
    for knob in clients[0].by_prior if clients else ():
        own = spread([client.by_prior[knob][0] for client in clients if client.seen])
        everyone = spread([
            client.by_prior[knob][1]
            for client in clients if client.seen and client.pooled_accuracy is not None
        ])  # fmt: skip
        unseen = spread([client.by_prior[knob][0] for client in clients if not client.seen])
        if own is not None:
            points[float(knob)] = Point(
                own.mean,
                own.worst10,
                everyone.mean if everyone else None,
                unseen.mean if unseen else None,
            )
    return points
