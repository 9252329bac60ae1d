"""Second visit to a GPU: tune, time, and what else a layer can be. At most 450 s of work.

    python bench/gpu_suite.py --out FOLDER         results.json, plan.json, junit.xml, logs
    python bench/gpu_suite.py --rehearse --out F   every line of it on tiny layers, without a GPU
    python bench/gpu_suite.py --install FOLDER     here, afterwards: plan.json into the package's

In order, each written and printed before the next: the package, the ceilings and the sweep as in
the first visit; six layers tuned and timed; one layer with more experts, segments, dropout, top-k;
few images; a training step of a CLIP-sized model; the tests; the sanitizer on our kernels alone;
a federated round; then the rest of the matrix until the time ends.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, first_cases, gpu_case, matrix, tuned_cases, varied
from gpu_first import arguments, begin

OURS = {
    "triton": [
        f"{k}_kernel" for k in ("pack", "shrink", "gemm", "combine", "expand", "outer", "outer_sum")
    ],
    "cuda": ["fedms"],
}
"""What the names of a backend's kernels contain: torch's and cuBLAS's are not looked at."""
TABLE = Path(__file__).parents[1] / "fedms/kernels/plan.json"
FOUND = 86  # the exit code asked of compute-sanitizer when it finds something


def main() -> int:
    if sys.argv[1:2] == ["--exercise"]:
        return exercise(sys.argv[2], torch.device(sys.argv[3]))
    if sys.argv[1:2] == ["--install"]:
        return install(Path(sys.argv[2]))
    args = arguments(__doc__, 450.0)
    import gpu_sections as sections
    import gpu_visit as gpu
    import stand_in_cuda

    tiny = args.rehearse
    with gpu.own_table(), stand_in_cuda.stand_in() if tiny else contextlib.nullcontext():
        visit = begin(args)
        if visit is None:
            return 1
        seconds = 0.01 if tiny else 1.0
        for case in tuned_cases(tiny):
            visit.item(f"tune {case}", lambda c=case: sections.tuned(visit, c))
        for case in tuned_cases(tiny):
            visit.item(f"time {case}", lambda c=case: sections.timed(visit, c, seconds))
        for case in varied(first_cases(tiny)[0], tiny):
            visit.item(f"time {case}", lambda c=case: sections.timed(visit, c, seconds))
        few = "ViT-B/16, 8 images"
        for i in range(1 if tiny else len(MODELS[few][1])):
            case = gpu_case(few, i, tiny)
            visit.item(f"tune {case}", lambda c=case: sections.tuned(visit, c))
            visit.item(f"time {case}", lambda c=case: sections.timed(visit, c, seconds))
        visit.item("training step", lambda: training(visit))
        visit.item("tests", lambda: sections.tests(visit, visit.within(60.0)), apart=True)
        for backend in OURS.keys() & set(visit.data["items"]["about"]["backends"]):
            name = f"memcheck {backend}"
            visit.item(name, lambda b=backend: sanitized(visit, b), apart=True)
        visit.item("federated round", lambda: sections.federated(visit), apart=True)
        rest = first_cases(tiny)[:1] if tiny else matrix()
        for case in rest:
            compiled = case.k == case.n and case.m > 16 and case.experts == 2
            work = lambda c=case, x=compiled: sections.timed(visit, c, seconds / 2, compiled=x)  # noqa: E731
            if f"time {case}" not in visit.data["items"] or compiled:
                visit.item(f"time {case}" + " compiled" * compiled, work)
        print(f"written to {visit.out}")
    return int(bool(visit.lost))


def training(visit: Any) -> dict[str, Any]:
    """A training step of CLIP ViT-B/16 with two gated adapters on every linear, bf16.

    Eagerly, and as one CUDA graph: forward, backward and AdamW.
    """
    from peft_cases import check, pair, step
    from timing import interleaved, ratios

    name = "smoke" if visit.tiny else "CLIP ViT-B/16, 32 images"
    difference = check(name, "two gated", device=visit.device)
    sides = pair(name, "two gated", device=visit.device)
    found: dict[str, Any] = {"loss curves differ by": difference}
    for kind, graph in (("eager", False), ("graph", True)):
        try:
            runs = {n: {"both": step(side, graph=graph)} for n, side in sides.items()}
        except RuntimeError as error:
            found[kind] = {"refused": str(error).splitlines()[0]}
            continue
        times = interleaved(runs, 0.01 if visit.tiny else 3.0, 5, visit.clock)
        peft, ours = (times[side]["both"] for side in ("peft", "fedms"))
        found[kind] = {
            "peft us": statistics.median(peft),
            "fedms us": statistics.median(ours),
            "peft over fedms": ratios(peft, ours),
        }
    return found | {"line": {k: v for k, v in found.items() if k in ("eager", "graph")}}


def sanitized(visit: Any, backend: str) -> dict[str, Any]:
    """memcheck over small problems of one backend, on its own kernels alone."""
    from gpu_visit import bounded

    inside = [sys.executable, __file__, "--exercise", backend, str(visit.device)]
    if visit.tiny:
        code, text = bounded(inside, visit.left(), visit.out / f"memcheck-{backend}.log")
        return {"line": f"exit code {code}, not sanitized", "output": text[-500:]}
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    log = visit.out / f"memcheck-{backend}.log"
    _, usage = bounded([tool, "--help"], 10.0, log)
    option = "--kernel-name" if "--kernel-name" in usage else "--filter"
    # torch probes the driver for calls that it may not have: no error of a kernel's
    words = [tool, "--tool", "memcheck", "--report-api-errors", "no"]
    words += ["--error-exitcode", str(FOUND)]
    for name in OURS[backend]:
        words += [option, f"kns={name}"]
    # without torch's caching of memory an access behind a tensor is one behind an allocation
    code, text = bounded(
        [*words, *inside], visit.within(40.0), log, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    said = {None: "CUT", 0: "clean", FOUND: "ERRORS FOUND"}.get(code, f"exit code {code}")
    return {"line": said, "backend": backend, "output": "" if code == 0 else text[-4000:]}


def exercise(backend: str, device: torch.device) -> int:
    """Forward and backward of small problems of every kind; exit code 1 when one is off."""
    from rows import Row, checked, problem

    case = gpu_case("ViT-B/16", tiny=True)
    wrong = 0
    for each in [case, *varied(case, tiny=True)]:
        whole = problem(each, device)
        said = checked({backend: Row(whole, whole.fedms(backend))})[backend]
        print(f"{each}: {said or 'right'}", flush=True)
        wrong += bool(said)
    return int(wrong > 0)


def install(folder: Path, table: Path = TABLE) -> int:
    """Merge the rows that a visit measured into the table that the package brings."""
    from fedms.kernels import tiles

    path = folder / "plan.json"
    found = tiles.parse(path.read_text("utf-8"), str(path))
    unmeasured = [shape for shape, choice in found.items() if not choice.measured]
    if unmeasured:
        raise ValueError(f"{path} must have rows of the tuner, got {unmeasured[0]} not measured")
    tiles.save(found, table)
    print(f"{len(found)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
