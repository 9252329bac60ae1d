"""The CUDA kernels on a CPU: built by g++ against csrc/cuda/host, put in the backend's place.

python tests/kernels/cuda_host.py MODULE    every problem of cuda_problems.py, under a sanitizer
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.cpp_extension import include_paths  # torch carries pybind11's headers

from fedms.kernels import cuda, functional, plan
from fedms.kernels.tables import TableStore

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
COMPILER = shutil.which("g++")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class HostBuild:
    """Builds of the module in folders below `root`; no source is compiled twice alike."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._objects: dict[tuple[Path, tuple[str, ...]], Path] = {}
        self._count = 0

    def build(self, *flags: str, kernels: list[Path] = KERNELS) -> Path:
        """The module, its kernels compiled with `flags`. Raises with the compiler's words."""
        self._count += 1
        folder = self._root / f"build{self._count}"
        folder.mkdir()
        wanted = [(CSRC / "cuda/bindings.cpp", ()), *((kernel, flags) for kernel in kernels)]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda one: self._compiled(*one, folder), wanted))
        module = folder / "_C_cuda.so"
        self._run("-shared", *flags, *objects, "-o", module)
        return module

    def _compiled(self, source: Path, flags: tuple[str, ...], folder: Path) -> Path:
        if (source, flags) in self._objects:
            return self._objects[source, flags]
        to = folder / f"{source.stem}.o"
        ours = [flag for path in (CSRC / "cuda/host", CSRC) for flag in ("-I", path)]
        others = (*include_paths(), sysconfig.get_path("include"))
        system = [flag for path in others for flag in ("-isystem", path)]
        self._run(
            "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DFEDMS_CUDA_HOST", "-Wall",
            "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE",
            *flags, *ours, *system, "-x", "c++", "-c", source, "-o", to,
        )  # fmt: skip
        self._objects[source, flags] = to
        return to

    @staticmethod
    def _run(*arguments: str | Path) -> None:
        assert COMPILER is not None
        done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)


def load(path: Path) -> Any:
    """The module at `path`. Its name has the path in it: pybind11 makes a name only once."""
    loader = ExtensionFileLoader(f"{path.parent}._C_cuda", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def installed(module: Any, multiprocessors: int, *, reverse: bool = False) -> Iterator[None]:
    """`backend="cuda"` runs on CPU tensors inside.

    multiprocessors: of the device that the backend believes in; many of them split the columns
    and narrow the strips. reverse: the order in which a block's threads run between barriers.
    """
    runtime = cuda._Runtime(module, lambda _: 0, lambda: False, lambda _: multiprocessors)
    ops = {("cuda", "forward"): cuda._forward, ("cuda", "backward"): cuda._backward}
    module.set_schedule(reverse)
    with (
        mock.patch.object(cuda, "_load", return_value=(runtime, "")),
        mock.patch.object(cuda, "STORE", TableStore()),
        mock.patch.object(plan, "choose", return_value="cuda"),
        mock.patch.dict(functional._OPS, ops),
    ):
        yield


def _main(path: str) -> None:
    from cuda_problems import PROBLEMS, SANITIZED

    module = load(Path(path))
    for name in SANITIZED:
        torch.manual_seed(0)
        with installed(module, 132):
            PROBLEMS[name]().to(torch.bfloat16, torch.float32).run("cuda")
        print(name, flush=True)
    short = torch.zeros(1, dtype=torch.int64)
    print("past the end", flush=True)
    module.upload(0, 0, short.data_ptr(), bytes(16))


if __name__ == "__main__":
    _main(sys.argv[1])
