"""What each client holds of its own, on disk: one file a client and round.

``<folder>/<2 hex>/<client>.<round>.<digest>.safetensors``, written under a temporary name, synced
and renamed. A version of a round that was committed is never written again, so a kill at any moment
leaves what the last checkpoint needs. Nothing is held in memory, and no file lists the clients:
whoever visits a client (a rank, another machine) writes it without asking the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedms.fl.journal.files import sync_folder, write_synced
from fedms.fl.types import CheckpointError, State

ENDING = ".safetensors"


class ClientStates:
    """The states of a run's clients by round.

    Args:
        folder: where they are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._touched: set[Path] = set()

    def write(self, client_id: str, round: int, state: State) -> None:
        """Keep what a client holds after a round, in place of an attempt at the same round.

        Raises:
            OSError: the disk refuses.
        """
        # clients may hold the very same tensor, e.g. an untrained part of their first expert
        content = save({name: tensor.clone().contiguous() for name, tensor in state.items()})
        stem = self._stem(client_id)
        final = stem.with_name(f"{stem.name}.{round}.{_digest(content)}{ENDING}")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}")
        write_synced(temporary, content)
        for version in self._versions(stem):
            if version.round == round:
                version.path.unlink()
        temporary.rename(final)
        self._touched.add(final.parent)

    def sync(self) -> None:
        """Wait until all that was written is on the disk under its name."""
        for folder in (self.folder, *self._touched) if self._touched else ():
            sync_folder(folder)
        self._touched.clear()

    def read(self, client_id: str, at_most_round: int) -> State | None:
        """What a client held after its last visit up to a round; None before its first.

        Raises:
            CheckpointError: the file is damaged.
        """
        stem = self._stem(client_id)
        versions = [v for v in self._versions(stem) if v.round <= at_most_round]
        if not versions:
            return None
        return self._load(client_id, max(versions).path)

    def verify(self, client_id: str, round: int) -> None:
        """Make sure that a state of this very round is there and whole.

        Raises:
            CheckpointError: it is not.
        """
        for version in self._versions(self._stem(client_id)):
            if version.round == round:
                self._load(client_id, version.path)
                return
        raise CheckpointError(f"the state of client {client_id} after round {round} is missing")

    def _load(self, client_id: str, path: Path) -> State:
        try:
            content = path.read_bytes()
            if _digest(content) != path.name.removesuffix(ENDING).rpartition(".")[2]:
                raise ValueError(f"{len(content)} bytes with another digest")
            return load(content)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the state of client {client_id} in {path} is not what was written: {error}"
            ) from error

    def forget_after(self, round: int) -> None:
        """Delete what a run that was killed has left of later rounds, and torn files."""
        for path in self.folder.glob(f"*/*{ENDING}"):  # file managers leave files of their own
            if path.name.startswith(".") or _round(path) > round:
                path.unlink()

    def forget_before(self, round: int, client_ids: Iterable[str]) -> None:
        """Delete what these clients held before ``round``, in which each of them was written."""
        for client_id in client_ids:
            for version in self._versions(self._stem(client_id)):
                if version.round < round:
                    version.path.unlink()

    def forget_older(self, client_id: str, round: int) -> None:
        """Delete what a client held before its last visit up to a round.

        For who keeps a client without a checkpoint beside it: nobody goes back further than that.
        """
        versions = [v.round for v in self._versions(self._stem(client_id)) if v.round <= round]
        if versions:
            self.forget_before(max(versions), [client_id])

    def _stem(self, client_id: str) -> Path:
        """Bucket and beginning of a client's file names: told apart where case is not, and short.

        Whatever a table may call a client, nothing leaves the folder.
        """
        digest = hashlib.sha256(client_id.encode(errors="surrogatepass")).hexdigest()
        readable = quote(client_id, safe="", errors="replace").replace(".", "%2E")[:80]
        return self.folder / digest[:2] / f"{readable}-{digest[:16]}"

    @staticmethod
    def _versions(stem: Path) -> list[_Version]:
        if not stem.parent.is_dir():
            return []
        names = (path for path in stem.parent.iterdir() if path.name.startswith(f"{stem.name}."))
        return [_Version(_round(path), path) for path in names]


class _Version(NamedTuple):
    round: int
    path: Path


def _round(path: Path) -> int:
    return int(path.name.split(".")[1])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
