"""What each speed idea of the local engine gives: a round of each stage with and without it.

    python bench/speed_ideas.py [--repeats 3] [key=value ...]

The variants' runs are interleaved. Every variant runs in a process of its own, so that its peak
memory is its own. The last column shows the largest difference of a client's accuracy from the
engine as it is; a base in fp32 may differ, the others by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedms.fl.config import load_config
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.method import run_method

VARIANTS: dict[str, list[str]] = {
    "all on": [],
    "no prefix reuse": ["engine.prefix_cache_mb=0"],
    "global path not kept": ["engine.cache_global=false"],
    "six clients side by side": ["engine.cohort=6"],
    "base in fp32": ["model.dtype=float32"],
}
SMALL = [
    "stage1.rounds=2",
    "stage2.rounds=2",
    "sal.start_blocks=2",
    "sal.max_blocks=2",
    "rivals=[]",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(_measure(args.variant, args.settings)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--variant", name, *args.settings]
            runs[name].append(
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            )
    _print(runs)


def _measure(variant: str, settings: list[str]) -> dict[str, Any]:
    """The second round of each stage, when nothing is left to warm up."""
    config = load_config(None, [*SMALL, *settings, *VARIANTS[variant]])
    with tempfile.TemporaryDirectory() as folder, Progress(quiet=True) as progress:
        world = World(config, progress)
        run_method(config, world, Path(folder), progress)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        clients = (Path(folder) / "clients.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    return {
        "stage1": rounds[1]["seconds"],
        "stage2": rounds[3]["seconds"],
        "memory": rounds[-1]["peak_memory_mb"],
        "scores": [json.loads(line)["accuracy"] for line in clients],
        "threads": torch.get_num_threads(),
    }


def _print(runs: dict[str, list[dict[str, Any]]]) -> None:
    plain = runs["all on"]
    print(
        f"torch {torch.__version__}, {plain[0]['threads']} threads; "
        f"medians of {len(plain)} interleaved runs.\n"
    )
    print(
        "| | stage 1, s a round | stage 2, s a round | peak memory, MB "
        "| largest difference in a client's accuracy |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, measured in runs.items():
        seconds = [
            statistics.median(run[stage] for run in measured) for stage in ("stage1", "stage2")
        ]
        memory = statistics.median(run["memory"] for run in measured)
        worst = max(
            abs(a - b)
            for run in measured
            for a, b in zip(run["scores"], plain[0]["scores"], strict=True)
        )
        print(f"| {name} | {seconds[0]:.1f} | {seconds[1]:.1f} | {memory:.0f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
