"""What a second process gives: a round of each stage on one and on more ranks, one thread each.

    python bench/torchrun_speed.py [--ranks 1 2] [--repeats 3] [key=value ...]

The default run without rivals, its second round of each stage, when nothing is left to warm up.
Runs are interleaved and medians shown; all of them must end with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMALL = ["stage1.rounds=2", "stage2.rounds=2", "sal.start_blocks=3", "rivals=[]"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    runs: dict[int, list[list[dict[str, Any]]]] = {ranks: [] for ranks in args.ranks}
    for _ in range(args.repeats):
        for ranks, rounds in runs.items():
            rounds.append(run(ranks, args.settings))
    check(runs)
    seconds = {
        ranks: [statistics.median(rounds[place]["seconds"] for rounds in each) for place in (1, 3)]
        for ranks, each in runs.items()
    }
    first = seconds[args.ranks[0]]
    print("| ranks, one thread each | stage 1, s a round | stage 2 | times as fast | stage 2 |")
    print("| --- | --- | --- | --- | --- |")
    for ranks, (one, two) in seconds.items():
        print(f"| {ranks} | {one:.2f} | {two:.2f} | {first[0] / one:.2f} | {first[1] / two:.2f} |")


def run(ranks: int, settings: list[str]) -> list[dict[str, Any]]:
    """The lines of a run on so many ranks."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), "-m", "fedms", "run", *SMALL, *settings, "--out", str(folder), "--quiet",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # not in the checkout, whose package has no compiled module
        subprocess.run(command, check=True, cwd=place, env=environment, stdout=subprocess.DEVNULL)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check(runs: dict[int, list[list[dict[str, Any]]]]) -> None:
    """In other batches examples round otherwise: a score may differ in one or two of them."""
    (wanted, *_), *_ = runs.values()
    for ranks, each in runs.items():
        for rounds in each:
            for line, other in zip(rounds, wanted, strict=True):
                assert line["participants"] == other["participants"], ranks
                for name in ("train_loss", "global_accuracy"):
                    assert abs(line[name] - other[name]) < 0.01, (ranks, name, line[name])


if __name__ == "__main__":
    main()
