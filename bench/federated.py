"""FedMS, its rivals and its ablations over seeds, at equal local steps per client, as a table.

    python bench/federated.py [key=value ...] --seeds 0 1 2 --out bench/results/federated.md

Every row of a seed runs on the same clients and the same model. Settings change
all rows. What has run is kept under --runs and not run again, so the seeds can be given to several
processes and put together by one more call.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

import torch

from fedms.fl.config import Config, load_config
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.records import RoundRecord
from fedms.fl.runs.method import run_method
from fedms.fl.runs.report import read_rounds

ROWS: dict[str, list[str]] = {
    "zero-shot": ["method=zero_shot"],
    "local only": ["method=local_only"],
    "FedAvg-LoRA": ["method=fedavg"],
    "FedAvg-LoRA + fine-tuning": ["method=fedavg_ft"],
    "**FedMS**": [],
    "FedMS, no SAL": ["sal.enabled=false"],
    "FedMS, fixed 0.5 mix": ["mofm.gate=fixed"],
    "FedMS, gate not anchored": ["mofm.anchor=0.0"],
    "FedMS, gate adapter not shared": ["mofm.share_adapter=false"],
    "FedMS, layer mixture": ["mofm.combine=layer", "mofm.gate_input=base"],
    "FedMS, local expert from zero": ["mofm.local_from=zero"],
    "FedMS, local expert on the mixture's loss": ["mofm.local_loss=mixture"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/federated"), help="where the runs are kept"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    results: dict[str, list[list[RoundRecord]]] = {row: [] for row in args.rows}
    with Progress() as progress:
        for seed in args.seeds:
            world: World | None = None
            for row in args.rows:
                folder = args.runs / f"seed{seed}" / "-".join(re.findall(r"[\w.]+", row))
                if not (folder / "finished").exists():
                    config = _config(args.settings, seed, ROWS[row])
                    world = world or World(config, progress)
                    folder.mkdir(parents=True, exist_ok=True)
                    run_method(config, world, folder, progress)
                    (folder / "finished").touch()
                results[row].append(read_rounds(folder))
    table = _table(results, args.seeds, args.settings)
    if args.out:
        args.out.write_text(table, encoding="utf-8")
    print(table)


def _config(settings: list[str], seed: int, row: list[str]) -> Config:
    # Between the ends of the stages nothing is scored: the rows need the last round alone.
    common = [f"seed={seed}", "eval.every=1000", "eval.pooled_examples=400"]
    return load_config(None, [*common, *settings, *row]).replace(rivals=())


def _table(
    results: dict[str, list[list[RoundRecord]]], seeds: list[int], settings: list[str]
) -> str:
    lines = [
        f"Accuracy in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; "
        f"torch {torch.__version__}, settings: {' '.join(settings) or 'the defaults'}.",
        "",
        "| | own data | worst 10 % of clients | everyone's data | gate on local | trained share "
        "| MB sent a client |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, runs in results.items():
        ends = [rounds[-1] for rounds in runs]
        own = [end.personalized_accuracy for end in ends if end.personalized_accuracy]
        pooled = [end.pooled_accuracy.mean for end in ends if end.pooled_accuracy]
        gates = [end.gate_local_mean for end in ends if end.gate_local_mean is not None]
        clients = max(1, max(len(record.participants) for rounds in runs for record in rounds))
        sent = [sum(r.bytes_up + r.bytes_down for r in rounds) / clients / 1e6 for rounds in runs]
        share = [max(record.trainable_share for record in rounds) for rounds in runs]
        cells = [
            row,
            _percent([score.mean for score in own]),
            _percent([score.worst10 for score in own]),
            _percent(pooled),
            f"{statistics.mean(gates):.2f}" if gates else "–",
            f"{100 * statistics.mean(share):.2f} %",
            f"{statistics.mean(sent):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.pstdev(values):.1f}"


if __name__ == "__main__":
    main()
