"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder ``round-0007`` with ``server.safetensors`` and ``state.json``, which holds
the first one's digest and names the clients that the round has written
(:mod:`fedms.fl.journal.states`). It is written under a temporary name and synced after them, so its
renaming is what commits the round. It is verified when read. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedms.fl.journal.files import sync_folder, write_synced
from fedms.fl.journal.states import ClientStates
from fedms.fl.types import CheckpointError, State

_DAMAGE = (OSError, ValueError, LookupError, TypeError, SafetensorError, CheckpointError)


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after ``round``, beside the clients' states.

    Attributes:
        server: what the server holds.
        written: clients whose states are of this very round.
        sal: :meth:`fedms.fl.sal.Activation.state`.
    """

    round: int
    server: State
    written: tuple[str, ...]
    sal: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, states: ClientStates, keep: int) -> None:
    """Commit a round: write ``folder/round-NNNN`` atomically, then delete what nobody needs.

    The newest ``keep`` checkpoints stay, and of every client the states that they refer to.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full. Older checkpoints are
            untouched.
    """
    server = save({name: tensor.contiguous() for name, tensor in checkpoint.server.items()})
    record = {
        "round": checkpoint.round,
        "written": list(checkpoint.written),
        "sal": checkpoint.sal,
        "sha256": hashlib.sha256(server).hexdigest(),
    }
    final = folder / f"round-{checkpoint.round:04d}"
    temporary = folder / f".{final.name}"
    try:
        states.sync()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_synced(temporary / "server.safetensors", server)
        write_synced(temporary / "state.json", json.dumps(record, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        kept = _folders(folder)
        for old in kept[keep:]:
            shutil.rmtree(old)
        with suppress(ValueError, LookupError, TypeError):  # damaged, its states stay
            oldest = json.loads((kept[:keep][-1] / "state.json").read_bytes())
            states.forget_before(oldest["round"], oldest["written"])
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {final} cannot be written: {error.strerror}"
        ) from error


def load_checkpoint(
    folder: Path, states: ClientStates, warn: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    It is whole if the states that its round has written are, too. ``warn`` hears of each damaged
    one that was passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one of them is damaged.
    """
    folders = _folders(folder)
    for candidate in folders:
        try:
            return _read(candidate, states)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            SafetensorError,
            CheckpointError,
        ) as error:
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


def _read(folder: Path, states: ClientStates) -> Checkpoint:
    record = json.loads((folder / "state.json").read_bytes())
    content = (folder / "server.safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(
            f"server.safetensors is not what was written: {len(content)} bytes with another digest"
        )
    for client_id in record["written"]:
        states.verify(client_id, record["round"])
    return Checkpoint(record["round"], load(content), tuple(record["written"]), record["sal"])
