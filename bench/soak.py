"""A thousand rounds of a thousand clients: seconds a round, memory and open files must stay flat.

    python bench/soak.py [--rounds 1000] [--clients 1000] [key=value ...]

Half of the rounds are of each stage, a cohort of 20 in each, on the model and the texts of
``bench/many_clients.py``. Exits with 1 where the last quarter of a stage takes more than a fifth
more CPU time than its second, or more than 5 % more memory, or more open files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from many_clients import make_model, make_table

from fedms.fl.config import load_config
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.method import run_method

COHORT = 20
SLOWER, LARGER = 1.2, 1.05


class Note(NamedTuple):
    wall: float
    cpu: float
    mb: float
    files: int


class Watch(Progress):
    """Says nothing; notes time, memory and open files at the beginning of every round."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[Note] = []

    def round(self, *args: object) -> None:
        clocks = time.perf_counter(), time.process_time()
        self.notes.append(Note(*clocks, resident_mb(), open_files()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        make_table(folder / "notes.csv", args.clients)
        config = load_config(None, [
            f"model.path={folder / 'model'}", "model.max_tokens=12", "model.dtype=float32",
            f"data.source={folder / 'notes.csv'}", "data.partitioner=column",
            "data.client_column=client", "data.unseen_clients=0", "data.train=0.5",
            "data.gate=0.1", "data.val=0.1", "data.test=0.3", 'lora.targets=["query"]', "lora.r=2",
            f"stage1.rounds={args.rounds // 2}", f"stage2.rounds={args.rounds - args.rounds // 2}",
            "stage1.local_steps=1", "stage2.local_steps=1", "stage1.batch_size=6",
            "stage2.batch_size=6", "mofm.gate_steps=2", "rivals=[]", "sal.max_blocks=2",
            f"server.fraction_train={COHORT / args.clients}", "eval.every=50", "eval.clients=20",
            "eval.pooled_examples=20", "eval.val_examples=50",
            f"engine.cohort={COHORT}", *args.settings,
        ])  # fmt: skip
        watch = Watch()
        run_folder = folder / "run"
        run_folder.mkdir()
        run_method(config, World(config, watch), run_folder, watch)
        watch.round()
        files = sum(path.is_file() for path in run_folder.rglob("*"))
        mb = sum(p.stat().st_size for p in run_folder.rglob("*") if p.is_file()) / 1e6
    report(watch.notes, args.clients)
    print(f"\nOn disk at the end: {files} files, {mb:.1f} MB.")
    check(watch.notes)


def resident_mb() -> float:
    """What this process holds now, in units of 2**20 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def seconds(notes: list[Note], clock: str = "cpu") -> float:
    """The median round."""
    return statistics.median(getattr(b, clock) - getattr(a, clock) for a, b in pairwise(notes))


def report(notes: list[Note], clients: int) -> None:
    rounds = len(notes) - 1
    print(
        f"{rounds} rounds, {clients} clients, {COHORT} a round; torch {torch.__version__}, one "
        f"thread; {notes[-1].wall - notes[0].wall:.0f} s in all.\n"
    )
    print("| rounds | seconds a round, median | CPU seconds | memory after, MB | open files |")
    print("| --- | --- | --- | --- | --- |")
    step = max(1, rounds // 10)
    for start in range(0, rounds, step):
        part = notes[start : start + step + 1]
        end = start + len(part) - 1
        clocks = f"{seconds(part, 'wall'):.3f} | {seconds(part):.3f}"
        print(f"| {start + 1} to {end} | {clocks} | {part[-1].mb:.0f} | {part[-1].files} |")


def check(notes: list[Note]) -> None:
    """Each stage's second half against its first, less the rounds in which caches fill."""
    half = (len(notes) - 1) // 2
    for name, part in (("stage1", notes[: half + 1]), ("stage2", notes[half:])):
        quarter = len(part) // 4
        early, late = part[quarter : 2 * quarter], part[3 * quarter :]
        slower, larger = seconds(late) / seconds(early), late[-1].mb / early[-1].mb
        print(f"{name}: {slower:.2f} times the CPU seconds, {larger:.3f} times the memory")
        if slower > SLOWER or larger > LARGER or late[-1].files > early[-1].files:
            raise SystemExit(f"{name} is not flat")


if __name__ == "__main__":
    main()
