"""Packages of registries, fetched by the registries' own clients, and checked before use."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedms.fl.types import FedMSError

Client = Callable[[Sequence[str], Path | None], None]
"""Runs a command; what it prints goes to the file, if one is given."""


@dataclass(frozen=True)
class Downloads:
    """Where downloads lie.

    Attributes:
        shared: what was put there by hand, and what a fetch had whole when it was stopped.
        own: of one fetch alone, so that another one's end takes nothing away from it.
    """

    shared: Path
    own: Path


class Source(Protocol):
    """Something to download."""

    @property
    def name(self) -> str: ...
    @property
    def megabytes(self) -> int: ...

    def get(self, downloads: Downloads, client: Client) -> Path:
        """The file in ``downloads.own``.

        Raises:
            FedMSError: it cannot be had or is not what it must be.
        """
        ...


@dataclass(frozen=True)
class Package:
    """One release of a package.

    A file that stands in the shared downloads folder already, put there by hand or by a fetch that
    was stopped, is taken if its digest is right.

    Attributes:
        client: who brings it: "pip" (a pure wheel) or "npm" (a tarball).
        file: the name of the file that the client leaves.
        sha256: of that file.
        megabytes: its size, to be told.
    """

    client: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: int

    def get(self, downloads: Downloads, client: Client) -> Path:
        path, shared = downloads.own / self.file, downloads.shared / self.file
        with suppress(FileNotFoundError):
            _link(shared, path)
            if _sha256(path) == self.sha256:
                return path
            path.unlink()
            shared.unlink()
        by_hand = (
            f"or put {self.file} of {self.name} {self.version} (sha256 {self.sha256}) "
            f"into {downloads.shared}"
        )
        try:
            client(self._command(downloads.own), None)
        except MissingClient as error:
            raise MissingClient(
                f"{self.name} comes by {self.client}, which is not installed here: "
                f"install {self.client}, {by_hand}"
            ) from error
        if not path.is_file():
            raise FedMSError(f"{self.client} did not bring {self.file}: try again, {by_hand}")
        found = _sha256(path)
        if found != self.sha256:
            path.unlink()
            raise FedMSError(
                f"{self.file} has the sha256 {found}, expected {self.sha256}: it is not the file "
                "that this release of fedms knows, and was deleted"
            )
        _link(path, shared)
        return path

    def _command(self, downloads: Path) -> list[str]:
        if self.client == "npm":
            what = f"{self.name}@{self.version}"
            return ["npm", "pack", "--silent", "--pack-destination", str(downloads), what]
        # not by find_spec, at which setuptools puts a distutils of its own in place
        own = any(importlib.metadata.distributions(name="pip"))
        return [
            *([sys.executable, "-m", "pip"] if own else ["pip"]),
            *("download", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--only-binary=:all:", "--dest", str(downloads), f"{self.name}=={self.version}"),
        ]


class MissingClient(FedMSError):
    """A registry's client is not installed."""


def run_client(command: Sequence[str], output: Path | None) -> None:
    """Run a registry's client to its end.

    Raises:
        MissingClient: it is not installed.
        FedMSError: it fails; with the line in which it says why.
    """
    program = shutil.which(command[0])
    if program is None:
        raise MissingClient(f"{command[0]} is not installed")
    try:
        with (output or Path(os.devnull)).open("wb") as file:
            done = subprocess.run(
                [program, *command[1:]], stdout=file, stderr=subprocess.PIPE, check=False
            )
    except OSError as error:
        raise FedMSError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.lower().startswith(("error", "npm error"))]
        raise FedMSError(
            f"`{' '.join(command)}` failed with status {done.returncode}: "
            f"{(errors or lines[-1:] or ['it said nothing'])[0]}"
        )


def read_member(archive: Path, name: str) -> bytes:
    """One file of a wheel, or of an npm tarball, where everything is below ``package/``.

    Raises:
        FedMSError: the archive has no such file.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as tarball:
            file = tarball.extractfile(f"package/{name}")
            if file is not None:
                return file.read()
    except KeyError:
        pass
    raise FedMSError(f"{archive.name} holds no {name}")


def read_members(archive: Path, pattern: str) -> list[bytes]:
    """All files of an npm tarball whose name below ``package/`` fits a regular expression whole,
    in the order of their names, in one pass."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tarball:
        for member in tarball:
            if re.fullmatch(f"package/{pattern}", member.name):
                file = tarball.extractfile(member)
                if file is not None:
                    found[member.name] = file.read()
    return [found[name] for name in sorted(found)]


def _link(path: Path, to: Path) -> None:
    """A second name for a file, which outlives the first; what has the name already keeps it."""
    try:
        os.link(path.resolve(), to)
    except FileExistsError:
        pass
    except OSError:  # the disk knows one name a file, or there is no such file
        shutil.copyfile(path, to)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
