"""One command for a machine with a GPU: build, test, sanitize, tune, time, report.

    python bench/gpu_suite.py                       everything, in 9 minutes
    python bench/gpu_suite.py                       once more: what is missing of the same day
    python bench/gpu_suite.py --only tune,time      these again, whatever the file has
    python bench/gpu_suite.py --rehearse            every section's code on tiny shapes, no GPU

Writes bench/results/<gpu>-<date>.json whole after every section, case and shape, the tuned table
beside it as <gpu>-<date>-plan.json and a picture as .png. No row is timed whose result was not
checked against float64. A section that does not fit is cut and listed; a second start goes on
there. A section that ran on other sources runs again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_results import ROOT, SECTIONS, Budget, Results, sources

RESULTS = ROOT / "bench" / "results"
WORKER = ROOT / "bench" / "gpu_worker.py"
TOOLS = {  # torch probes the driver for calls that it may not have: no error of a kernel's
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}
RESTARTS = 6  # of a worker whose device was lost
CUT, DEVICE_LOST = 10, 11  # the worker's exit codes
FOUND = 86  # the exit code asked of compute-sanitizer when it finds something
ASK = """
import json, torch
from fedms.kernels import native, plan
device, bf16 = torch.device("{device}"), torch.bfloat16
runs = {{b: plan.runs(b, device, bf16, bf16) for b in plan.BACKENDS}}
print(json.dumps([native.build_info(), runs]))
"""

Section = dict[str, Any]


@dataclass
class Suite:
    """What the sections share. `deadline` is the running section's, seconds since the epoch."""

    results: Results
    plan: Path
    rehearse: bool
    environment: dict[str, str]
    deadline: float = 0.0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def command(self, *words: str | Path) -> tuple[int | None, str]:
        """Exit code, None when the section's time ended first, and what was printed, in order."""
        left = self.deadline - time.time()
        if left <= 0:
            return None, ""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            child = subprocess.Popen(
                [str(word) for word in words], cwd=ROOT, env=self.environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(left)
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

    def backends(self) -> list[str]:
        """Those of the plan that run on this device, in the plan's order."""
        return [name for name, runs in self.results.data["backends"].items() if runs]


def build(suite: Suite) -> Section:
    """Install the package as it is here; its dependencies, torch above all, stay as they are."""
    pip = [sys.executable, "-m", "pip"]
    install = [*pip, "install", "--no-build-isolation", "--no-deps", "--force-reinstall", "."]
    command = [*pip, "--version"] if suite.rehearse else install
    code, text = suite.command(*command)
    if code != 0:
        return _ended(code, text)
    code, text = suite.command(sys.executable, "-c", ASK.format(device=suite.device))
    if code != 0:
        return _ended(code, text)
    info, backends = json.loads(next(s for s in text.splitlines() if s.startswith("[{")))
    suite.results.data["backends"] = backends
    return {"state": "done", "command": " ".join(command[1:]), "kernels": info}


def test(suite: Suite) -> Section:
    """Every test file that asks whether there is a GPU; a backend's tests have it in their name.

    Those of the federated part, which has packages of its own, know no device beyond the op's.
    """
    found = set((ROOT / "tests").rglob("test_*.py")) - set((ROOT / "tests/fl").iterdir())
    asking = [path for path in found if "torch.cuda.is_available()" in path.read_text("utf-8")]
    paths = [ROOT / "tests/kernels/test_packing.py"] if suite.rehearse else sorted(asking)
    # Most of the time goes into compiling kernels, which several processes do at once.
    many = importlib.util.find_spec("xdist") is not None and not suite.rehearse
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if many else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        code, text = suite.command(
            sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider",
            "-m", "not slow", f"--junitxml={report}", "--continue-on-collection-errors", *parallel,
        )  # fmt: skip
        if not report.exists():
            return _ended(code, text)
        tests = list(ElementTree.parse(report).iter("testcase"))
    counts = _count(tests)
    by_backend = {
        backend: _count([t for t in tests if backend in f"{t.get('classname')} {t.get('name')}"])
        for backend in suite.backends()
    }
    failures = [t.get("name") for t in tests if _outcome(t) == "failed"]
    files = [str(path.relative_to(ROOT)) for path in paths]
    note = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    return {
        "state": "done" if code is not None else "cut",
        "note": note,
        "files": files,
        "backends": by_backend,
        "failures": failures,
        "output": text[-4000:] if failures else "",
    }


def sanitize(suite: Suite) -> Section:
    """compute-sanitizer over small problems of each backend whose kernels are ours."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None and not suite.rehearse:
        return {"state": "done", "note": "compute-sanitizer is not installed", "runs": []}
    ours = [b for b in suite.backends() if b not in ("stacked", "native")]
    runs = [r for r in suite.results.section("sanitize").get("runs", []) if r["state"] != "cut"]
    known = {(run["backend"], run["tool"]) for run in runs}
    for backend, tool in product(reversed(ours), list(TOOLS)[:1] if suite.rehearse else TOOLS):
        if (backend, tool) in known:
            continue
        # Without torch's caching of memory an access behind a tensor is one behind an allocation.
        words = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        if not suite.rehearse:
            words += [str(sanitizer), "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND)]
        words += [sys.executable, str(WORKER), "exercise", "--backend", backend]
        code, text = suite.command(*words, *["--rehearse"] * suite.rehearse)
        clean = "right, not sanitized" if suite.rehearse else "clean"
        states = {None: "cut", 0: clean, FOUND: "errors found"}
        run = {"backend": backend, "tool": tool, "state": states.get(code, f"exit code {code}")}
        runs.append(run if run["state"] == clean else run | {"output": text[-4000:]})
    note = ", ".join(f"{r['backend']} {r['tool']} {r['state']}" for r in runs)
    cut = any(run["state"] == "cut" for run in runs)
    return {"state": "cut" if cut else "done", "note": note, "runs": runs}


def tune(suite: Suite) -> Section:
    """The plan's table, shape by shape, into the file beside the results."""
    return _work(suite, "tune")


def timing(suite: Suite) -> Section:
    """The ceilings and the matrix, with the table that was tuned."""
    return _work(suite, "time")


def _work(suite: Suite, name: str) -> Section:
    """Run the worker; start it again behind an item that took its process along."""
    words = [sys.executable, WORKER, name, "--results", suite.results.path, "--plan", suite.plan]
    words += ["--until", str(suite.deadline - 1)] + ["--rehearse"] * suite.rehearse
    suite.deadline += 20  # the item in work when the time ends may end; the alarm bounds it
    code, text = 1, ""
    for _ in range(RESTARTS):
        code, text = suite.command(*words)
        suite.results.reload()
        section = suite.results.section(name)
        if code != DEVICE_LOST and "running" not in section:
            break
        if code is None:  # ended by us and not by the item's fault: it is tried again
            del section["running"]
            break
    section = dict(suite.results.section(name))
    items = section.get("items", {})
    refused = [item for item, found in items.items() if "refused" in found]
    section["note"] = f"{len(items) - len(refused)} done, {len(refused)} refused"
    if code in (CUT, None):
        return section | {"state": "cut"}
    return section | ({"state": "done"} if code == 0 else _ended(code, text))


def _ended(code: int | None, text: str) -> Section:
    if code is None:
        return {"state": "cut", "note": "the time ended", "output": text[-2000:]}
    last = text.strip().splitlines()[-1:] or ["no output"]
    return {"state": "failed", "note": f"exit code {code}: {last[0]}", "output": text[-8000:]}


def _outcome(test: ElementTree.Element) -> str:
    kinds = {child.tag for child in test}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def _count(tests: list[ElementTree.Element]) -> dict[str, int]:
    outcomes = [_outcome(t) for t in tests]
    return {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}


RUN: dict[str, Callable[[Suite], Section]] = {
    "build": build, "test": test, "sanitize": sanitize, "tune": tune, "time": timing,
}  # fmt: skip


def run(suite: Suite, budget: Budget, only: list[str], code: str) -> None:
    """The sections in order, each within its share of what is left; then the report, always."""
    data = suite.results.data
    finished = [s for s in SECTIONS if suite.results.finished(s, code)]
    if importlib.util.find_spec("fedms") is None and "build" in finished:
        finished.remove("build")  # on another machine
    todo = [s for s in SECTIONS if s in only or not (only or s in finished)]
    data["left_out"] = {}
    for name in SECTIONS[:-1]:
        if name not in todo:
            print(f"{name}: {'not asked for' if only else 'finished before'}", flush=True)
            continue
        if budget.left() <= 0:
            data["left_out"]["sections"] = [*data["left_out"].get("sections", []), name]
            continue
        if name != "build" and "backends" not in data:
            raise SystemExit(f"{name} must come after the section build, which has not ended yet")
        before = suite.results.section(name)
        if name in only or before.get("sources") != code:
            before.clear()
        before["sources"] = code
        suite.results.write()
        print(f"{name} ...", flush=True)
        begin = time.time()
        suite.deadline = begin + budget.slice(name, todo[todo.index(name) + 1 :])
        section = RUN[name](suite)
        section |= {"sources": code, "seconds": time.time() - begin}
        data = suite.results.data
        data["sections"][name] = section
        if left_out := section.pop("left_out", []):
            data["left_out"][name] = left_out
        suite.results.write()
        print(f"{name}: {section['state']} {section.get('note', '')}", flush=True)
        if name == "build" and section["state"] != "done":
            data["left_out"]["sections"] = [s for s in todo if s not in ("build", "report")]
            break
    suite.results.write()


def report(suite: Suite, install_plan: bool) -> None:
    """Judge the targets, install the table if asked, draw the picture, print the table last."""
    import gpu_report

    data = suite.results.data
    section = gpu_report.judge(data) | {"state": "done", "sources": data["sources"]}
    data["sections"]["report"] = section
    section["note"] = gpu_report.picture(data, suite.results.path.with_suffix(".png"))
    if install_plan:
        section["installed"] = _install(suite, section["backends"])
    suite.results.write()
    print()
    for line in gpu_report.table(data):
        print(line)
    print(f"written to {suite.results.path}")


def _install(suite: Suite, backends: dict[str, dict[str, Any]]) -> str:
    """Merge the tuned rows of backends that passed here into the package's own table."""
    if suite.rehearse or not suite.plan.exists():
        return "nothing was tuned on a GPU"
    from fedms.kernels import tiles

    rows = tiles.parse(suite.plan.read_text("utf-8"), str(suite.plan))
    right = {s: c for s, c in rows.items() if backends[c.backend]["passed_on_device"]}
    tiles.save(right, ROOT / "fedms/kernels/plan.json")
    return f"{len(right)} of {len(rows)} rows; the others' backend has not passed"


def describe(rehearse: bool, commit: str | None) -> dict[str, Any]:
    """Device, date, versions and code."""
    packages = {name: _version(name) for name in ("torch", "triton", "peft", "numpy")}
    driver = _first_word("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "rehearsal": rehearse,
        "device": platform.machine() if rehearse else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": packages,
        "commit": commit or _first_word("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": sources(packages),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_word(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="the budget of this start")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, help="the JSON, in place of bench/results/...")
    parser.add_argument("--plan", type=Path, help="the tuned table, by default beside the JSON")
    parser.add_argument("--install-plan", action="store_true", help="into fedms/kernels/plan.json")
    parser.add_argument("--commit", help="where this folder is no git repository")
    args = parser.parse_args()
    args.only = [name for name in args.only.split(",") if name]
    unknown = sorted(set(args.only) - set(SECTIONS))
    if unknown:
        parser.error(f"--only must name sections of {', '.join(SECTIONS)}, got {unknown[0]!r}")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("this needs a GPU that torch can use; --rehearse runs the code without one")
    if args.rehearse and args.out and RESULTS in args.out.resolve().parents:
        parser.error(f"a rehearsal must not write into {RESULTS}, got --out {args.out}")
    return args


def main() -> int:
    args = arguments()
    budget = Budget(60 * args.minutes)
    about = describe(args.rehearse, args.commit)
    slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    folder = Path(tempfile.mkdtemp(prefix="fedms-rehearsal-")) if args.rehearse else RESULTS
    path = args.out or folder / f"{slug}-{about['date']}.json"
    path = path.resolve()  # children run in another folder
    results = Results(path)
    for what in ("device", "date", "rehearsal"):
        if results.data.get(what, about[what]) != about[what]:
            raise SystemExit(
                f"--out must name a file of this {what} ({about[what]}), "
                f"got one of {results.data[what]}: {path}"
            )
    results.data |= about
    with tempfile.TemporaryDirectory() as home:
        # The user's own table of tiles must not take part: the worker's is what was tuned here.
        environment = os.environ | {"XDG_CONFIG_HOME": home}
        if args.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        plan = (args.plan or path.with_name(f"{path.stem}-plan.json")).resolve()
        suite = Suite(results, plan, args.rehearse, environment)
        run(suite, budget, args.only, about["sources"])
    report(suite, args.install_plan)
    return int(any(s.get("state") == "failed" for s in results.data["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
