"""The GPU suite's file: one JSON a device and day, written whole after every finished part."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
SECTIONS = ("build", "test", "sanitize", "tune", "time", "report")
SHARES = {"build": 8, "test": 4, "sanitize": 2, "tune": 6, "time": 8, "report": 0.5}
"""What a section may use of the time left, beside those still to come. What it leaves is theirs."""


class Results:
    """What the suite and its worker read and write.

    A section is {"state", "seconds", "sources", ...}. State "done"; "failed"; or "cut", stopped by
    the deadline, so that the next start goes on with it. sources: the hash of the code it ran on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"sections": {}, "left_out": {}}
        self.reload()

    def reload(self) -> None:
        """Read what another process wrote. Raises ValueError when the file is not the suite's."""
        if not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} must be a JSON file of this suite: {error}") from None
        if not isinstance(data, dict) or not {"sections", "left_out"} <= data.keys():
            raise ValueError(f"{self.path} must be a JSON file of this suite, got something else")
        self.data = data

    def section(self, name: str) -> dict[str, Any]:
        return self.data["sections"].setdefault(name, {})

    def finished(self, name: str, sources: str) -> bool:
        """Whether the section ran to its end on this code."""
        section = self.section(name)
        return section.get("state") == "done" and section.get("sources") == sources

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
        fresh.replace(self.path)


class Budget:
    """Seconds until the deadline of this start."""

    def __init__(self, seconds: float) -> None:
        self.until = time.time() + seconds

    def left(self) -> float:
        return self.until - time.time()

    def slice(self, section: str, to_come: list[str]) -> float:
        """What the section may use, when `to_come` still have to run after it."""
        return self.left() * SHARES[section] / sum(SHARES[s] for s in (section, *to_come))


def sources(versions: dict[str, str | None]) -> str:
    """A hash of what decides the results: package versions, library, kernels, build and this suite.

    plan.json is left out: installing the table that was measured must not make it stale.
    """
    files = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    files += [ROOT / "bench" / "gated_lora_cases.py", *(ROOT / "bench").glob("gpu_*.py")]
    for folder in ("csrc", "fedms/kernels"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
