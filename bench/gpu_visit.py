"""What the two visits to a GPU share: one results file, items in order, their sections.

A visit is a process with a deadline. Every item's result is in the file and printed before the next
one begins; an item that hangs ends the process with the line it hung in, an item that loses the
device ends the items that need it in this process. Nothing is timed whose result was not checked.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rows import first_line
from timing import Clock

import fedms
from fedms.kernels import native, plan, tiles

ROOT = Path(__file__).parent.parent


class CacheCount:
    """Counts what Triton found in its cache and what it compiled; names of the latter."""

    def __init__(self) -> None:
        from triton import knobs

        self.hits = 0
        self.missed: list[str] = []
        knobs.compilation.listener = self

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.hits += 1
        else:
            self.missed.append(src.name)

    def found(self) -> dict[str, Any]:
        return {"line": f"{self.hits} hits, {len(self.missed)} misses", "missed": self.missed[:20]}


class Visit:
    """The results file, the clock and the deadline.

    out: the folder of everything written; what an earlier start left there is kept, and only what
    is missing runs. tiny: rehearsal's sizes. limit: seconds an item may take before it counts as
    hung.
    """

    def __init__(
        self, out: Path, seconds: float, device: torch.device, clock: Clock, tiny: bool = False
    ) -> None:
        self.out, self.device, self.clock, self.tiny = out, device, clock, tiny
        self.until = time.monotonic() + seconds
        self.limit = 900.0 if tiny else 90.0  # a rehearsal interprets, on whatever is left of a CPU
        self.rounds = 3 if tiny else 10
        self.lost = ""
        self.cache = CacheCount()
        self.data: dict[str, Any] = {"rehearsal": tiny, "items": {}, "left_out": []}
        out.mkdir(parents=True, exist_ok=True)
        if (out / "results.json").exists():
            self.data = json.loads((out / "results.json").read_text("utf-8"))
            self.data["left_out"] = []
            if (name := self.data.pop("running", None)) is not None:
                self.data["items"][name] = {"refused": "the process ended in it"}

    def left(self) -> float:
        return self.until - time.monotonic()

    def within(self, seconds: float) -> float:
        """These or what is left, whichever is less; all that is left for a rehearsal."""
        return self.left() if self.tiny else min(seconds, self.left())

    def write(self) -> None:
        fresh = self.out / "results.tmp"
        fresh.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        fresh.replace(self.out / "results.json")

    def item(self, name: str, work: Callable[[], dict[str, Any]], *, apart: bool = False) -> Any:
        """Run one item and keep what it gave, {"refused": why} when it raised; None if left out.

        apart: it runs in a process of its own, so a lost device does not matter.
        """
        if name in self.data["items"]:
            return self.data["items"][name]
        if self.left() <= 0 or (self.lost and not apart):
            self.data["left_out"].append(name)
            self.write()
            return None
        self.data["running"] = name
        self.write()
        begin = time.monotonic()
        faulthandler.dump_traceback_later(self.limit + max(0.0, self.left() * apart), exit=True)
        try:
            found = work()
        except Exception as error:  # a compiler's, a launch's or the device's; the file says it
            found = {"refused": first_line(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()
        if not (self.lost or self._works()):
            self.lost = name
            found["lost"] = True
        self.data["items"][name] = found | {"seconds": round(time.monotonic() - begin, 2)}
        del self.data["running"]
        self.write()
        print(f"[{self.left():4.0f} s left] {name}: {brief(found)}", flush=True)
        return found

    def _works(self) -> bool:
        try:
            return 0.0 <= torch.rand(1, device=self.device).item() < 1.0
        except RuntimeError:
            return False


def brief(found: dict[str, Any]) -> str:
    """One line of an item: its own, or the first levels of what it holds."""
    if "refused" in found:
        return f"REFUSED {found['refused']}"
    return str(found.get("line") or {k: v for k, v in found.items() if not isinstance(v, dict)})


def why_not_installed(package: Path, checkout: Path, cuda: str) -> str:
    """Why this fedms must not be tested or timed here; empty when it may.

    The source folder has no compiled module: its tests would be skipped and pass for nothing.
    """
    if checkout in package.resolve().parents:
        return f"fedms must be the installed package (run Python with -P), got {package}"
    if not cuda.startswith("built") or "cannot run" in cuda:
        return f"the CUDA module must run (-C cmake.define.FEDMS_CUDA=ON builds it), it is {cuda}"
    return ""


def about(visit: Visit) -> dict[str, Any]:
    """Device, versions and the package under test. Raises RuntimeError for the wrong package."""
    info = native.build_info()
    why = why_not_installed(Path(fedms.__file__), ROOT, info["cuda"])
    if why and not visit.tiny:
        raise RuntimeError(why)
    name = platform.machine() if visit.tiny else torch.cuda.get_device_name()
    return {
        "line": f"{name}, torch {torch.__version__}, fedms in {Path(fedms.__file__).parent}",
        "device": name,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "peft", "numpy")},
        "kernels": info,
        "backends": [b for b in plan.BACKENDS if _runs(b, visit.device)],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _runs(backend: str, device: torch.device) -> bool:
    return plan.runs(backend, device, torch.bfloat16, torch.bfloat16)


def bounded(
    words: list[str], seconds: float, log: Path, **environment: str
) -> tuple[int | None, str]:
    """Exit code, None when the time ended first, and the output, which is kept in `log` too."""
    with log.open("w+", errors="replace") as output:
        child = subprocess.Popen(
            words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"XDG_CONFIG_HOME": str(log.parent / "no-table")} | environment,
        )  # fmt: skip
        try:
            code: int | None = child.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
            for end in (signal.SIGINT, signal.SIGKILL):  # pytest reports when it is interrupted
                os.killpg(child.pid, end)
                try:
                    child.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        output.seek(0)
        return code, output.read()


def own_table() -> tempfile.TemporaryDirectory[str]:
    """A user's table of its own for the visit: nobody's earlier rows take part."""
    home = tempfile.TemporaryDirectory()
    os.environ["XDG_CONFIG_HOME"] = home.name
    tiles.forget()
    return home
