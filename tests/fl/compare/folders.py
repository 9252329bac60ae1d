"""Folders of finished runs as a run leaves them, by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedms.fl.config import load_config, to_toml
from fedms.fl.evaluate import spread
from fedms.fl.journal.records import ClientRecord, RoundRecord

ROUNDS = ("stage1.rounds=1", "stage2.rounds=1", "rivals=[]")


def write_run(
    folder: Path,
    *overrides: str,
    own: tuple[float, ...] = (0.5, 0.7),
    everyone: float | None = 0.4,
    by_prior: dict[str, tuple[float, float]] | None = None,
    unseen: dict[str, tuple[float, float]] | None = None,
    rounds: int = 2,
    content: str = "the same",
    **changes: Any,
) -> Path:
    """``own``: the clients' scores after the last round, of as many rounds as are done.

    unseen: by prior the scores of a client that takes no part.
    """
    folder.mkdir(parents=True)
    config = load_config(None, [*ROUNDS, *overrides])
    (folder / "config.toml").write_text(to_toml(config), "utf-8")
    digests = dict.fromkeys(("inputs", "labels", "clients", "model"), content)
    (folder / "origin.json").write_text(json.dumps(digests), "utf-8")
    scored = [(True, score, by_prior or {}) for score in own]
    scored += [(False, 0.0, unseen)] if unseen else []
    clients = [
        ClientRecord(
            client_id=f"c{k}", seen=seen, num_test=10, accuracy=score, pooled_accuracy=everyone,
            gate_local=None, round=rounds, stage="stage2", by_prior=knobs,
        )
        for k, (seen, score, knobs) in enumerate(scored)
    ]  # fmt: skip
    records = [
        asdict(RoundRecord(**{**_plain(number), **changes,
               "personalized_accuracy": spread(own),
               "pooled_accuracy": None if everyone is None else spread([everyone])}))
        for number in range(1, rounds + 1)
    ]  # fmt: skip
    _write_lines(folder / "metrics.jsonl", records)
    _write_lines(folder / "clients.jsonl", [asdict(client) for client in clients])
    return folder


def _plain(number: int) -> dict[str, Any]:
    return {
        "round": number, "stage": f"stage{number}", "seconds": 1.5, "participants": ["c0", "c1"],
        "failed": [], "awake_blocks": [], "trainable_parameters": 1,
        "trainable_share": 0.01 / number, "bytes_up": 10**6, "bytes_down": 2 * 10**6,
        "train_loss": 1.0, "global_accuracy": None, "unseen_accuracy": None,
        "gate_local_mean": None, "peak_memory_mb": 1.0,
    }  # fmt: skip


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
