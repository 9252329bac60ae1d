"""``fedms tune``: measure a shape on this machine's GPU and keep what was fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from fedms.kernels import tiles
from fedms.kernels.tune import tune


def tune_and_save(
    m: int, k: int, n: int, ranks: Sequence[int], dtype: str, adapter: str, console: Console
) -> None:
    """Tune one shape, print every candidate and write the winner to the user's table.

    Raises RuntimeError when there is no GPU that torch can use.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU that torch can use, and there is none")
    with console.status(f"tuning {m} x {k} -> {n}"):
        tuned = tune(
            m, k, n, ranks, device=torch.device("cuda"), dtype=getattr(torch, dtype),
            adapter=getattr(torch, adapter),
        )  # fmt: skip
    table = Table("direction", "candidate", "us", title=tuned.shape.device)
    for attempt in sorted(tuned.attempts, key=lambda a: a.microseconds or float("inf")):
        time = attempt.problem if attempt.microseconds is None else f"{attempt.microseconds:.1f}"
        table.add_row(attempt.direction, attempt.what, time)
    console.print(table)
    path = tiles.user_table()
    tiles.save({tuned.shape: tuned.choice}, path)
    console.print(f"{tuned.choice.backend} is fastest for {m} x {k} -> {n}; written to {path}")
