"""First visit to a GPU: are the kernels right, and is the design? At most 170 s of work.

    python bench/gpu_first.py --out FOLDER         results.json, plan.json, junit.xml, tests.log
    python bench/gpu_first.py --rehearse --out F   every line of it on tiny layers, without a GPU

In order, each written and printed before the next: the package under test and the device's
ceilings; every row of every output on production tiles; what q/o (8192 x 4096 x 4096) costs kernel
by kernel, in every tile, beside cuBLAS; three layers against peft's arithmetic and plain torch,
eagerly and as CUDA graphs; the device's tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cases import first_cases

if TYPE_CHECKING:
    from gpu_visit import Visit


def arguments(description: str | None, seconds: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--seconds", type=float, help=f"default {seconds:g}; a rehearsal's is 20 x")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.seconds is None:  # a rehearsal interprets, on whatever is left of a CPU
        args.seconds = seconds * (20 if args.rehearse else 1)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        parser.error("this needs a GPU that torch can use; --rehearse runs the code without one")
    return args


def begin(args: argparse.Namespace) -> Visit | None:
    """What both visits begin with: package, ceilings, sweep, cache. None for the wrong package."""
    import gpu_precompile
    import gpu_sections as sections
    import gpu_visit as gpu
    from timing import Events, ceilings

    tiny = args.rehearse
    device = torch.device("cpu" if tiny else "cuda")
    visit = gpu.Visit(args.out.resolve(), args.seconds, device, Events(device), tiny)
    gpu_precompile.settle_keys()
    if "refused" in visit.item("about", lambda: gpu.about(visit)):
        return None
    size, copied = (64, 1 << 20) if tiny else (8192, 4 << 30)
    visit.item("ceilings", lambda: ceilings(visit.clock, device, size, copied))
    sections.sweep(visit, 90 if tiny else _capability(device))
    visit.item("cache", visit.cache.found)
    return visit


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def main() -> int:
    args = arguments(__doc__, 170.0)
    import gpu_sections as sections
    import gpu_visit as gpu
    import stand_in_cuda

    tiny = args.rehearse
    with gpu.own_table(), stand_in_cuda.stand_in() if tiny else contextlib.nullcontext():
        visit = begin(args)
        if visit is None:
            return 1
        large, *others = first_cases(tiny)
        visit.item("gemms", lambda: sections.gemms(visit, large))
        visit.item(f"tune {large}", lambda: sections.tuned(visit, large))
        visit.item(f"kernels {large}", lambda: sections.profiled(visit, large))
        for case in others:
            visit.item(f"tune {case}", lambda c=case: sections.tuned(visit, c))
        for case in (large, *others):
            visit.item(
                f"time {case}", lambda c=case: sections.timed(visit, c, 0.01 if tiny else 1.5)
            )
        visit.item("cache at the end", visit.cache.found)
        visit.item("tests", lambda: sections.tests(visit, visit.left()), apart=True)
        print(f"written to {visit.out}")
    return int(bool(visit.lost))


if __name__ == "__main__":
    sys.exit(main())
