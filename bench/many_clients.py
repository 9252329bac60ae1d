"""Ten thousand clients on one machine: seconds a round, peak memory, disk, and a kill in between.

    python bench/many_clients.py [--clients 10000] [--rounds 20] [key=value ...]

Clients of 12 short texts each, a cohort of 50 in every round, ``--rounds`` rounds of each stage, on
a BERT of four narrow blocks that nobody trained: what is measured is the loop around a model, not
the model. A second run is killed in the middle of each stage and resumed; its metrics must be equal
to the first one's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TEXTS, COHORT, CLASSES, WORDS = 12, 50, 10, 400
NOT_COMPARED = ("seconds", "peak_memory_mb")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20, help="of each stage")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model")
        make_table(folder / "notes.csv", args.clients)
        settings = [
            f"model.path={folder / 'model'}", "model.max_tokens=16",
            f"data.source={folder / 'notes.csv'}", "data.partitioner=column",
            "data.client_column=client", "data.train=0.5", "data.gate=0.1", "data.val=0.1",
            "data.test=0.3", 'lora.targets=["query", "value"]', "lora.r=4",
            f"stage1.rounds={args.rounds}", f"stage2.rounds={args.rounds}",
            "stage1.local_steps=3", "stage2.local_steps=3", "stage1.batch_size=6",
            "stage2.batch_size=6", "mofm.gate_steps=10", "rivals=[]",
            f"server.fraction_train={COHORT / (args.clients - 4)}",
            *args.settings,
        ]  # fmt: skip
        whole, stopped = folder / "whole", folder / "stopped"
        started = time.perf_counter()
        begin(whole, settings).wait()
        seconds = time.perf_counter() - started
        kills = [args.rounds // 2, args.rounds + args.rounds // 2]
        for after in kills:
            kill_after(stopped, settings, after)
        begin(stopped, settings).wait()
        rounds = lines(whole / "metrics.jsonl")
        print_table(rounds, args.clients, seconds)
        for name in ("metrics.jsonl", "clients.jsonl"):
            if comparable(whole / name) != comparable(stopped / name):
                raise SystemExit(f"{name} of the killed run differs")
        print(f"\nKilled in rounds {kills} and resumed: every line of metrics and scores is equal.")
        states = [path for path in (whole / "clients").rglob("*") if path.is_file()]
        mb = sum(path.stat().st_size for path in states) / 1e6
        newest = max((whole / "checkpoints").iterdir())
        kb = sum(path.stat().st_size for path in newest.iterdir()) / 1e3
        print(f"On disk: {len(states)} clients' states, {mb:.1f} MB; a checkpoint {kb:.0f} kB.")


def make_model(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(WORDS))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=128, max_position_embeddings=32, initializer_range=0.2,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_table(path: Path, clients: int) -> None:
    """Texts of eight words, half of them from their class; a client has mostly two classes."""
    draw = random.Random(0)
    each = WORDS // CLASSES
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "client"])
        for client in range(clients):
            mine = draw.sample(range(CLASSES), 2)
            for _ in range(TEXTS):
                label = draw.choice(mine) if draw.random() < 0.8 else draw.randrange(CLASSES)
                own = [draw.randrange(each * label, each * (label + 1)) for _ in range(4)]
                words = [*own, *(draw.randrange(WORDS) for _ in range(4))]
                writer.writerow([" ".join(f"w{i}" for i in words), f"w{each * label}", client])


def begin(folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """Start a run, or go on with it, in a process of its own."""
    there = (folder / "config.toml").exists()
    arguments = ["resume", str(folder)] if there else ["run", *settings, "--out", str(folder)]
    code = "import sys; from fedms.fl.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments, "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def kill_after(folder: Path, settings: list[str], rounds: int) -> None:
    process = begin(folder, settings)
    while len(lines(folder / "metrics.jsonl")) < rounds:
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def comparable(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in NOT_COMPARED} for line in lines(path)]


def print_table(rounds: list[dict], clients: int, seconds: float) -> None:
    print(
        f"{clients} clients x {TEXTS} texts, {len(rounds[0]['participants'])} a round; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads; {seconds:.0f} s in all.\n"
    )
    print("| round | stage | seconds | visited so far | peak memory, MB | own, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    visited: set[str] = set()
    shown = {*range(0, len(rounds), max(1, len(rounds) // 8)), len(rounds) - 1}
    for number, line in enumerate(rounds):
        visited |= set(line["participants"])
        if number in shown:
            own = line["personalized_accuracy"]
            score = "–" if own is None else f"{100 * own['mean']:.1f}"
            print(
                f"| {line['round']} | {line['stage']} | {line['seconds']:.1f} | {len(visited)} | "
                f"{line['peak_memory_mb']:.0f} | {score} |"
            )


if __name__ == "__main__":
    main()
