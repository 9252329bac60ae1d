"""Registers, stack and shared memory of every CUDA kernel, from ptxas; needs no GPU.

python tests/kernels/cuda_resources.py      the table, a markdown row a kernel and architecture
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
NVCC, PTXAS = shutil.which("nvcc"), shutil.which("ptxas")
_KERNEL = re.compile(
    r"\d(shrink|expand|outer_sum|outer|combine|upload)"
    r"(?:I(f|6__half|13__nv_bfloat16)(?:Li(\d)E)?(?:Lb(\d)E)?E)?E?v?NS_"
)
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture. stack, spills and shared in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


def measure(source: Path) -> list[Kernel]:
    """The kernels of a .cu file, compiled once to PTX and from there for each architecture."""
    assert NVCC is not None
    assert PTXAS is not None
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        _run(NVCC, "-std=c++17", "-O3", "-arch=compute_80", "-ptx", f"-I{CSRC}", source, "-o", ptx)
        for architecture in ARCHITECTURES:
            text = _run(PTXAS, f"-arch={architecture}", "-v", ptx, "-o", Path(folder) / "cubin")
            kernels += parse(text)
    return kernels


def parse(text: str) -> list[Kernel]:
    """What `ptxas -v` says of each entry function."""
    found = []
    for match in _REPORT.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Kernel(
                name=_name(match["name"]),
                architecture=match["arch"],
                registers=int(match["registers"]),
                stack=int(match["stack"]),
                spills=int(match["stores"]) + int(match["loads"]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return found


def measure_all() -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(measure, SOURCES) for kernel in kernels]


def _name(mangled: str) -> str:
    match = _KERNEL.search(mangled)
    if match is None:
        raise ValueError(f"kernel must be one that {__name__} knows, got {mangled}")
    name, dtype, columns, selective = match.groups()
    parts = [DTYPES[dtype]] if dtype else []
    if columns:
        parts.append(f"{columns} columns a lane")
    if selective == "1":
        parts.append("selective")
    return " ".join([name, *parts])


def _run(*arguments: str | Path) -> str:
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


if __name__ == "__main__":
    print("| kernel | architecture | registers | spills | stack | shared |")
    print("| --- | --- | --- | --- | --- | --- |")
    for k in sorted(measure_all(), key=lambda k: (k.name, len(k.architecture), k.architecture)):
        print(
            f"| {k.name} | {k.architecture} | {k.registers} | {k.spills} | {k.stack} | {k.shared} |"
        )
