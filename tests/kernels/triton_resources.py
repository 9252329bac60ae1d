"""Cross-compile every Triton kernel that the plan or the tuner can launch, without a GPU.

    python tests/kernels/triton_resources.py [--tuner] [sm_80 sm_90 sm_100 gfx942]

prints a table (registers, spilled bytes, shared memory, wgmma) and fails when a kernel spills more
than a register, wants more shared memory than the target has, or is a Hopper GEMM without wgmma.
The launches are those of the backend itself for what the heuristic and the committed table choose,
on small CPU tensors: a stand-in driver names the target, so Triton specialises and compiles as it
would there, and nothing is run. --tuner adds the tuner's candidates.
"""

from __future__ import annotations

import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from fedms.kernels import Segments, tiles, tune
from fedms.kernels.tiles import Choice, Shape
from fedms.kernels.triton import backend, launches
from fedms.kernels.triton.launch import Launch

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 80, 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 90, 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 100, 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 0, 64),
}
"""Triton's target, the tuner's capability, and KiB of shared memory a program can have."""

ONE_REGISTER = 4
"""Bytes a thread may spill: ptxas gives up as much where another program then fits on the processor
(128 registers: with Triton 3.9 the shrink of bf16 rows and fp32 adapters, with dropout, on sm_80).
"""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAIRS = [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")]
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "BLOCK_R", "BLOCK_S_A", "BLOCK_S_B")
FLAGS = ("TMA", "TOP_K", "SPLIT")
GIVEN = ("a", "b", "a_ptr", "base_ptr", "dg_ptr", "dropout")
"""What a row names: a launch's blocks and flags, and the arguments that it may do without."""


@dataclass(frozen=True)
class Row:
    target: str
    kernel: str
    launch: str
    registers: int
    spilled: int
    shared: int
    wgmma: bool

    @property
    def problem(self) -> str:
        limit = TARGETS[self.target][2] * 1024
        if self.spilled > ONE_REGISTER:
            return f"spills {self.spilled} bytes"
        if self.shared > limit:
            return f"wants {self.shared} bytes of shared memory, there are {limit}"
        gemm = self.kernel == "gemm_kernel" and self.launch.startswith("bf16/bf16 128x")
        if self.target == "sm_90" and gemm and not self.wgmma:
            return "no wgmma"
        return ""


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder(Launch):
    """Compiles instead of launching, and keeps what came out."""

    found: ClassVar[dict[tuple[str, str], Any]] = {}
    pair = ""

    def __init__(self, kernel: Any, *args: Any, **fixed: Any) -> None:
        super().__init__(kernel, *args, **fixed)
        blocks = "x".join(str(v) for k, v in fixed.items() if k in BLOCKS)
        flags = [f"{k.lower()} {v}" for k, v in fixed.items() if k in FLAGS and v]
        self.what = f"{self.pair} {blocks} w{args[1]} {' '.join(flags)}"

    def __call__(self, *tensors: Any) -> None:
        names = self._kernel.arg_names
        given = dict(zip(names, tensors, strict=False))
        there = [n.removesuffix("_ptr") for n, t in given.items() if n in GIVEN and t is not None]
        where = given.get("where")
        there += ["pieces"] if where is not None and where.table is not None else []
        for side in (given.get("a"), given.get("b")):
            there += ["u"] if getattr(side, "b", None) is not None else []
        compiled = self._kernel.warmup(*tensors, *self._fixed, grid=self._grid, **self._options)
        key = (self._kernel.fn.__name__, f"{self.what} {' '.join(there)}")
        self.found[key] = compiled


def choices(capability: int, pair: tuple[str, str], tuner: bool) -> Iterator[Choice]:
    """Every choice of the heuristic, the committed table and the tuner for one pair of dtypes."""
    x, adapter = (str(DTYPES[d]).removeprefix("torch.") for d in pair)
    committed = resources.files("fedms.kernels").joinpath("plan.json").read_text("utf-8")
    for shape, choice in tiles.parse(committed, "plan.json").items():
        if (shape.x, shape.adapter) == (x, adapter) and shape.device.startswith("NVIDIA"):
            yield choice
    for m, width in ((16, 1024), (8192, 1024), (8192, 4096)):
        shape = Shape("any", x, adapter, m, width, width, 32)
        start = tiles.heuristic(shape)
        yield start
        if tuner:
            fp32 = pair == ("fp32", "fp32")
            for strategy, gemm in tune.launches(capability, shape):
                yield replace(start, forward=strategy, backward=strategy, gemm=gemm, dx_gemm=gemm)
            for shrink in tune.shrink_tiles(m, fp32):
                yield replace(start, forward="extend", shrink=shrink)
            for expand in tune.expand_tiles(m, fp32):
                yield replace(start, forward="split", backward="split", expand=expand)
            for outer, one_pass in itertools.product(tune.outer_tiles(x, adapter), (False, True)):
                yield replace(start, backward="extend", outer=outer, one_pass=one_pass)


def compiled(target: str, pair: tuple[str, str], tuner: bool) -> list[Row]:
    gpu, capability, _ = TARGETS[target]
    driver.set_active(_Driver(gpu))
    torch.version.hip = "0" if gpu.backend == "hip" else None
    launches.Launch = _Recorder
    _Recorder.pair = "/".join(pair)
    for chosen in dict.fromkeys(choices(capability, pair, tuner)):
        _launch_all(chosen, pair)
    return [_row(target, name, launch, c) for (name, launch), c in _Recorder.found.items()]


NONE = (None, None)


def _launch_all(chosen: Choice, pair: tuple[str, str]) -> None:
    """Forward and backward: dense, top-k, and dropout on all rows and on segments."""
    x, adapter = (DTYPES[d] for d in pair)
    m, k, n, ranks = 256, 256, 512, (16, 16)
    A = [torch.empty(r, k, dtype=adapter) for r in ranks]
    B = [torch.empty(n, r, dtype=adapter) for r in ranks]
    weight, gates = torch.empty(n, k, dtype=x), torch.empty(m, 2)
    idxs = torch.zeros(m, 2, dtype=torch.int64)
    x_MK, dy, need = torch.empty(m, k, dtype=x), torch.empty(m, n, dtype=x), [False, True]
    segments = Segments([0, 96, m], [0, 1]).tensors
    seed = torch.zeros((), dtype=torch.int64)
    for idx, runs, p in [(None, NONE, 0.0), (idxs, NONE, 0.0), (None, NONE, 0.1),
                         (None, segments, 0.1)]:  # fmt: skip
        routing = (A, B, gates, idx, *runs, [1.0, 2.0], p, seed if p else None)
        _, h = backend.forward(x_MK, weight, None, None, *routing, True, choice=chosen)
        backend.backward(dy, weight, x_MK, h, *routing, True, True, need, need, choice=chosen)


def _row(target: str, name: str, launch: str, kernel: Any) -> Row:
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        asm = kernel.asm["amdgcn"]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm)[1])  # type: ignore[index]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1])  # type: ignore[index]
        return Row(target, name, launch, registers, spilled, shared, False)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], "utf-8")
        assembler = get_ptxas(TARGETS[target][0].arch).path  # the one that Triton itself takes
        arch = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]  # type: ignore[index]
        said = subprocess.run(
            [assembler, "-v", f"-arch={arch}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    return Row(target, name, launch, registers, spilled, shared, "wgmma" in kernel.asm["ptx"])


def main() -> int:
    tuner = "--tuner" in sys.argv
    targets = [t for t in sys.argv[1:] if t in TARGETS] or list(TARGETS)
    jobs = [(target, pair, tuner) for target in targets for pair in PAIRS]
    # a process each: a kernel remembers the first target that it was specialised for
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        rows = [row for part in pool.map(compiled, *zip(*jobs, strict=True)) for row in part]
    print("| target | kernel | launch | registers | spilled | shared, KiB | wgmma | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r.target} | {r.kernel} | {r.launch} | {r.registers} | {r.spilled} "
              f"| {r.shared / 1024:.0f} | {'yes' if r.wgmma else ''} | {r.problem} |")  # fmt: skip
    bad = [r for r in rows if r.problem]
    print(f"\n{len(rows)} kernels compiled with triton {triton.__version__}, {len(bad)} refused")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
