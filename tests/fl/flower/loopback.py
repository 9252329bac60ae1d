"""Flower's own processes on the loopback address, for tests: started, waited for, surely killed.

Every process is a group of its own, and Flower detaches some of its children from their groups; so
what is left at the end is found by a mark in its environment and killed by its number.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from certificates import Certificates
from patience import PATIENCE

SCRIPTS = Path(sys.executable).parent
MARK = "FEDMS_LOOPBACK_TEST"


class Loopback:
    """A SuperLink and SuperNodes of one test.

    Args:
        folder: for logs, Flower's home, and the working directory of all processes.
        certificates: switches TLS and the authentication of SuperNodes on.
    """

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        self.folder, self._tls = folder, certificates
        self._port = _free_port()
        self._mark = uuid4().hex
        self._registered: set[str] = set()
        self._started: list[subprocess.Popen[bytes]] = []
        self._log: dict[int, Path] = {}
        self._marks: dict[int, str] = {}
        home = folder / "flwr"
        home.mkdir(parents=True)
        secure = f'root-certificates = "{certificates.ca}"' if certificates else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink.loopback]\naddress = "127.0.0.1:{self._port}"\n{secure}\n'
        )
        self._env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            MARK: self._mark,
        }

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self._started:
            process.wait()

    def superlink(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink and wait until it answers."""
        options = ["--host", "127.0.0.1", "--port", str(self._port)]
        options += ["--disable-runtime-dependency-installation"]
        options += ["--database", str(self.folder / "superlink.db")]
        if self._tls:
            options += ["--ssl-ca-certfile", str(self._tls.ca), "--enable-supernode-auth"]
            options += ["--ssl-certfile", str(self._tls.certificate)]
            options += ["--ssl-keyfile", str(self._tls.key)]
        else:
            options += ["--insecure"]
        process = self._start("superlink", ["flower-superlink", *options])
        wait_for(lambda: _listens(self._port), PATIENCE, "the SuperLink listens", self.logs)
        return process

    def supernode(
        self, name: str, config: Mapping[str, str | bool], *, registered: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode with this node config, its key known to the SuperLink or not."""
        pairs = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        options = ["--superlink", f"127.0.0.1:{self._port}", "--port", str(_free_port())]
        options += ["--node-config", pairs]
        if self._tls:
            private, public = self._tls.node(name)
            if registered and name not in self._registered:
                self._registered.add(name)
                self.flwr("supernode", "register", str(public), "loopback")
            options += ["--root-certificates", str(self._tls.ca)]
            options += ["--auth-supernode-private-key", str(private)]
        else:
            options += ["--insecure"]
        return self._start(name, ["flower-supernode", *options])

    def flwr(self, *command: str, seconds: float = PATIENCE) -> str:
        """Run ``flwr`` to its end and return what it said."""
        done = subprocess.run(
            [SCRIPTS / "flwr", *command], env=self._env, cwd=self.folder, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + self.logs()
        return done.stdout

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """What a process and its children have written."""
        return self._log[process.pid].read_text(errors="replace")

    def processes(self, of: subprocess.Popen[bytes] | None = None, program: str = "") -> list[int]:
        """Numbers of all processes of this test that are alive.

        Args:
            of: this one and what it has started, and what that has, alone.
            program: those alone whose command line has this word.
        """
        mark, found = f"{MARK}={self._mark if of is None else self._marks[of.pid]}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                alive = b"\nState:\tZ" not in (entry / "status").read_bytes()
                marked = b"\0" + mark in b"\0" + (entry / "environ").read_bytes()
                if alive and marked and program.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def kill(self, of: subprocess.Popen[bytes] | None = None, program: str = "") -> None:
        """SIGKILL to some :meth:`processes`, and to what they start meanwhile."""
        while left := self.processes(of, program):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def logs(self) -> str:
        """The end of what every process has written."""
        return "".join(
            f"\n--- {path.name}\n" + path.read_text(errors="replace")[-4000:]
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        number = len(self._started) + 1
        path, mark = self.folder / f"{number}-{name}.log", f"{self._mark}-{number}."
        with path.open("wb") as log:
            process = subprocess.Popen(
                [SCRIPTS / command[0], *command[1:]], env={**self._env, MARK: mark},
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        self._log[process.pid], self._marks[process.pid] = path, mark
        return process


def wait_for(
    what: Callable[[], object], seconds: float, name: str, logs: Callable[[], str] = str
) -> None:
    """Wait until something is true; AssertionError with ``logs`` if it takes longer."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds} s in vain until {name}{logs()}"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _toml(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
