"""A run's lines as TensorBoard's event files: ``tensorboard --logdir DIR``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedms.fl.types import ConfigError


class Events:
    """Writes a round's numbers to ``folder/tensorboard``.

    Args:
        done: rounds that count. What an attempt at a later one has written is not shown.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "engine.tensorboard needs TensorBoard: pip install 'fedms[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write and flush a round, a line of ``metrics.jsonl``."""
        for name, value in _scalars(line).items():
            if value is not None:
                self._writer.add_scalar(name, value, line["round"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers by name, in the units of the line; None: not measured."""
    none = {"mean": None, "worst10": None}
    own, everyone, unseen = (
        line[f"{name}_accuracy"] or none for name in ("personalized", "pooled", "unseen")
    )
    return {
        "score/own": own["mean"],
        "score/own, worst tenth": own["worst10"],
        "score/everyone's": everyone["mean"],
        "score/unseen clients": unseen["mean"],
        "score/common model": line["global_accuracy"],
        "train/loss": line["train_loss"],
        "train/awake blocks": len(line["awake_blocks"]),
        "train/gate on local": line["gate_local_mean"],
        "clients/came back": len(line["participants"]),
        "clients/failed": len(line["failed"]),
        "bytes/up": line["bytes_up"],
        "bytes/down": line["bytes_down"],
        "cost/seconds": line["seconds"],
        "cost/peak memory, MB": line["peak_memory_mb"],
    }
