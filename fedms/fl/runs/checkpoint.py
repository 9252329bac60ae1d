"""Checkpoints that survive a kill at any moment.

They are written under a temporary name, synced, renamed, and verified when read. A checkpoint is a
folder ``round-0007`` with ``server.safetensors``, ``clients.safetensors`` (``<i>/<name>`` for the
i-th client of ``state.json``) and ``state.json``, which holds the digests of the other two. Never
pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedms.fl.runs.files import sync_folder, write_synced
from fedms.fl.types import CheckpointError, State


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on after ``round``.

    Attributes:
        server: what the server holds.
        kept: by client id, what each client holds of its own.
        visited: clients that have been visited in the current stage.
        sal: :meth:`fedms.fl.sal.Activation.state`.
    """

    round: int
    server: State
    kept: dict[str, State]
    visited: tuple[str, ...]
    sal: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write ``folder/round-NNNN`` atomically and delete all but the newest ``keep``.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full. Older checkpoints are
            untouched.
    """
    clients = sorted(checkpoint.kept)
    kept = {
        # clients may hold the very same tensor, e.g. an untrained part of their first expert
        f"{i}/{name}": tensor.clone()
        for i, client in enumerate(clients)
        for name, tensor in checkpoint.kept[client].items()
    }
    files = {
        "server.safetensors": save(
            {name: tensor.contiguous() for name, tensor in checkpoint.server.items()}
        ),
        "clients.safetensors": save({name: tensor.contiguous() for name, tensor in kept.items()}),
    }
    record = {
        "round": checkpoint.round,
        "clients": clients,
        "visited": list(checkpoint.visited),
        "sal": checkpoint.sal,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["state.json"] = json.dumps(record, indent=1).encode()
    final = folder / f"round-{checkpoint.round:04d}"
    temporary = folder / f".{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_synced(temporary / name, content)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        for old in _folders(folder)[keep:]:
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {final} cannot be written: {error.strerror}"
        ) from error


def load_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    ``warn`` hears of each damaged one that was passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one of them is damaged.
    """
    folders = _folders(folder)
    for candidate in folders:
        try:
            return _read(candidate)
        except (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError) as error:
            warn(f"checkpoint {candidate.name} is damaged ({error}); trying the one before")
    if folders:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read; the run must be started again"
        )
    return None


def _folders(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    return sorted(
        folder.glob("round-*"), key=lambda path: (len(path.name), path.name), reverse=True
    )


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / "state.json").read_bytes())
    tensors: dict[str, State] = {}
    for name, digest in record["sha256"].items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(
                f"{name} is not what was written: {len(content)} bytes with another digest"
            )
        tensors[name] = load(content)
    kept: dict[str, State] = {client: {} for client in record["clients"]}
    for key, tensor in tensors["clients.safetensors"].items():
        number, _, name = key.partition("/")
        kept[record["clients"][int(number)]][name] = tensor
    return Checkpoint(
        record["round"],
        tensors["server.safetensors"],
        kept,
        tuple(record["visited"]),
        record["sal"],
    )
