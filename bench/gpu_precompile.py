"""Everything slow of a visit to a GPU, done before it on a machine without one.

    python bench/gpu_precompile.py make --python PYTHON        here: .gpu/, about 7 MB
    python bench/gpu_precompile.py unpack .gpu/triton-cache.tar.xz /tmp/fedms-triton    there

PYTHON is an interpreter of the device's version with the device's triton, scikit-build-core,
pybind11, cmake and ninja; it needs no torch, and nvcc is found on PATH. This interpreter has torch
and the same triton. The wheel is built for sm_90 with its CUDA module; wheels/ has what the
federated part imports besides, for a machine that lacks it. The archive holds Triton's cache with
the kernels of both visits and the launchers that Triton compiles with gcc. The cache's files name
each other by absolute paths: there it must lie where it lay here (--cache).

How: the launches of the sweep and of the tuner run here on tensors without storage, with a driver
that stands in for the device, and Triton says how it specialised each kernel. PYTHON compiles those
from the kernels' files alone. Whether the device finds them hangs on its triton being byte for byte
the same, so `unpack` compiles what it does not find, on all cores, and says how many that were.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CAPABILITY = 90
KEPT = (".json", ".cubin", ".so")
"""What a launch needs of a cache folder; the rest is the compiler's intermediate text."""
FIRST = "tile"
"""The kernels' file whose functions those of the others call."""
LISTED = "launches.json"
"""In the cache: module, name and specialisation of every kernel in it."""
FEDERATED = ("pydantic>=2.11", "rich", "tomli-w")
"""The package's dependencies that a machine with torch and transformers may lack."""


def wheel(python: Path, out: Path) -> Path:
    """Build the package for `python` with its CUDA module; the only wheel in `out`."""
    for old in out.glob("*.whl"):
        old.unlink()
    words = [sys.executable, "-m", "pip", "--python", python, "wheel", ROOT, "-w", out]
    words += ["--no-deps", "--no-build-isolation", "-q", "-C", "cmake.define.FEDMS_CUDA=ON"]
    words += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={CAPABILITY}-real"]
    subprocess.run([str(word) for word in words], check=True)
    (built,) = out.glob("*.whl")
    return built


def fetch_wheels(python: Path, out: Path) -> Path:
    """The folder with FEDERATED and what these need, as wheels for `python`."""
    folder = out / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, "-m", "pip", "--python", python, "download", *FEDERATED]
    words += ["--only-binary=:all:", "-q", "-d", folder]
    subprocess.run([str(word) for word in words], check=True)
    return folder


def record(wanted: Iterable[tuple[Any, Any]]) -> list[dict[str, str]]:
    """How Triton specialises the kernels of these (case, choice): file, name, specialisation."""
    import stand_in_triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import OutOfResources, driver

    from fedms.kernels.triton import backend

    backend._multiprocessors = lambda device: stand_in_triton.H100["multiprocessor_count"]
    driver.set_active(stand_in_triton.Driver(GPUTarget("cuda", CAPABILITY, 32)))
    found: dict[str, dict[str, str]] = {}
    refused: set[str] = set()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        how = json.loads(compile["specialization_data"])
        del how["options"]["extern_libs"]  # a path here; the default there is the same library
        data = json.dumps(how)
        # The text loses tuples' names and what lies within them: those go beside it, exactly.
        parts = (compile["signature"], compile["constants"], compile["configs"][0])
        exact = pickle.dumps(parts).hex()
        entry = {"module": fn.module, "kernel": fn.name, "data": data, "exact": exact}
        found[f"{fn.name} {parts} {how['options']}"] = entry

    knobs.runtime.jit_post_compile_hook = note
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        for case, choice in wanted:
            try:
                launch(case, choice)
            except OutOfResources as error:  # refused there too
                refused.add(f"{choice.gemm} at R {case.ranks}: {error}")
    print(*sorted(refused), sep="\n")
    return list(found.values())


def launches() -> Iterator[tuple[Any, Any]]:
    """The (case, choice) of the visits: the sweep's, and what the tuner tries for their layers."""
    from cases import Case, first_cases, tuned_cases, varied
    from gpu_sections import SWEEP, sweep_choices

    from fedms.kernels import tiles, tune

    for rank in (16, 32, 64):
        swept = Case(*SWEEP, r=rank // 2, frozen=1)
        choices = list(sweep_choices(CAPABILITY, rank, False).values())
        yield from ((swept, choice) for choice in choices)
        if rank == 32:
            routed = [replace(swept, top_k=1), replace(swept, dropout_p=0.1)]
            routed += [replace(swept, experts=3, segments=3, gated=False, frozen=0)]
            yield from ((case, choice) for case in routed for choice in choices[:3])
    for case in dict.fromkeys([*first_cases(), *tuned_cases()]):
        shape = tiles.Shape.of("any", *_dtypes(case), case.m, case.k, case.n, case.ranks)
        start = tiles.heuristic(shape)
        for strategy, gemm in tune.launches(CAPABILITY, shape):
            yield case, replace(start, forward=strategy, backward=strategy, gemm=gemm, dx_gemm=gemm)
        for shrink in tune.shrink_tiles(case.m, False):
            yield case, replace(start, forward="extend", shrink=shrink)
        for expand in tune.expand_tiles(case.m, False):
            yield case, replace(start, forward="split", backward="split", expand=expand)
        for outer, one_pass in product(tune.outer_tiles(shape.x, shape.adapter), (False, True)):
            yield case, replace(start, backward="extend", outer=outer, one_pass=one_pass)
    for case in varied(first_cases()[0]):
        shape = tiles.Shape.of("any", *_dtypes(case), case.m, case.k, case.n, case.ranks)
        yield case, tiles.heuristic(shape)


def _dtypes(case: Any) -> tuple[Any, Any]:
    from cases import DTYPES

    return DTYPES[case.base], DTYPES[case.adapter]


def launch(case: Any, choice: Any) -> None:
    """Forward and backward of a case on tensors without storage."""
    import torch

    from fedms.kernels import Segments
    from fedms.kernels.dropout import as_seed
    from fedms.kernels.triton import backend

    base, adapter = _dtypes(case)

    def empty(*shape: int, dtype: Any = base) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    e, m, k, n = case.experts, case.m, case.k, case.n
    x = empty(m, k)
    A = [empty(case.r, k, dtype=adapter) for _ in range(e)]
    B = [empty(n, case.r, dtype=adapter) for _ in range(e)]
    gates = empty(m, case.top_k or e, dtype=torch.float32) if case.gated else None
    idxs = empty(m, case.top_k, dtype=torch.int64) if case.top_k else None
    ranges, seed = (None, None), None
    if case.segments:
        step = m // case.segments
        ends = [*range(0, step * case.segments, step), m]
        ranges = Segments(ends, range(case.segments)).tensors
    if case.dropout_p:
        seed = as_seed(7, x.device)
    routing = (A, B, gates, idxs, *ranges, [2.0] * e, case.dropout_p, seed)
    weight, need = empty(n, k), [i >= case.frozen for i in range(e)]
    y, h = backend.forward(x, weight, None, None, *routing, True, choice=choice)
    grad = torch.empty_like(y)
    backend.backward(
        grad, weight, x, h, *routing, True, gates is not None, need, need, choice=choice
    )


def compile_listed(listed: list[dict[str, str]], jobs: int) -> int:
    """Make sure that Triton's cache has these kernels and their launchers; how many it had not."""
    with ProcessPoolExecutor(jobs, initializer=_without_torch) as pool:
        return sum(pool.map(_compile, listed, chunksize=4))


def _without_torch() -> None:
    """The kernels' files alone, importable by their own names, and a stand-in for the device."""
    for package in ("fedms", "fedms.kernels", "fedms.kernels.triton"):
        shell = types.ModuleType(package)  # the package's own first lines would import torch
        shell.__path__ = [str(ROOT / Path(*package.split(".")))]
        sys.modules[package] = shell
    import stand_in_triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import driver

    sys.setdlopenflags(os.RTLD_LAZY)  # a stub has none of the functions that nobody calls here
    stand_in = stand_in_triton.Driver(GPUTarget("cuda", CAPABILITY, 32))
    stand_in.utils = CudaUtils()
    driver.set_active(stand_in)
    settle_keys()


def settle_keys() -> None:
    """Give every kernel the cache key that it has in any process.

    Triton 3.6 puts a global that a called function reads into the caller's key only when the
    function has its own key already, so keys depend on which kernel came first.
    """
    files = (ROOT / "fedms/kernels/triton").glob("*.py")
    names = {path.stem for path in files if "@triton.jit" in path.read_text("utf-8")}
    for name in (FIRST, *sorted(names - {FIRST})):
        module = importlib.import_module(f"fedms.kernels.triton.{name}")
        for value in list(vars(module).values()):
            getattr(value, "cache_key", None)


def _compile(entry: dict[str, str]) -> bool:
    """Whether the kernel had to be compiled."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher

    missed = []
    knobs.compilation.listener = lambda *, cache_hit, **_: missed.append(not cache_hit)
    kernel = getattr(importlib.import_module(entry["module"]), entry["kernel"])
    signature, constants, attrs = pickle.loads(bytes.fromhex(entry["exact"]))
    do_compile = type(kernel)._do_compile  # the kernel's own is that of the entry before
    kernel._do_compile = lambda key, _, device, _constants, options, _attrs, warmup: do_compile(
        kernel, key, signature, device, constants, options, attrs, warmup
    )
    compiled = kernel.preload(entry["data"])
    CudaLauncher(compiled.src, compiled.metadata)
    return missed == [True]


def fill(python: Path, cache: Path) -> str:
    """Run `compile` in `python`, with an empty library in place of the CUDA driver's."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libcuda.so.1"
        words = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", stub]
        subprocess.run([str(word) for word in words], check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
        words = [str(python), __file__, "compile", str(cache)]
        return subprocess.run(
            words, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()


def pack(cache: Path, out: Path) -> Path:
    """The cache without its intermediate texts, as a compressed archive."""
    packed = out / "triton-cache.tar.xz"
    with tarfile.open(packed, "w:xz", preset=9) as archive:
        for path in sorted(cache.rglob("*")):
            if path.is_file() and path.suffix in KEPT:
                archive.add(path, path.relative_to(cache))
    return packed


def unpack(packed: Path, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    with tarfile.open(packed) as archive:
        archive.extractall(cache, filter="data")


def triton_of(python: Path | str) -> str:
    code = "import importlib.metadata as m; print(m.version('triton'))"
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="wheel and cache, on a machine without a GPU")
    make.add_argument("--python", type=Path, default=Path(sys.executable))
    make.add_argument("--cache", type=Path, default=Path("/tmp/fedms-triton"))
    make.add_argument("--out", type=Path, default=ROOT / ".gpu")
    put = commands.add_parser("unpack", help="on the machine with one; compiles what is missing")
    put.add_argument("packed", type=Path)
    put.add_argument("cache", type=Path)
    compile_ = commands.add_parser("compile", help="what a cache lists and has not")
    compile_.add_argument("cache", type=Path)
    args = parser.parse_args()
    cache = args.cache.resolve()
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    os.environ.pop("TRITON_INTERPRET", None)
    if args.command == "unpack":
        unpack(args.packed, cache)
    if args.command != "make":
        listed = json.loads((cache / LISTED).read_text("utf-8"))
        missed = compile_listed(listed, min(12, os.cpu_count() or 1))
        print(f"triton: {len(listed)} kernels, {missed} of them not in the cache")
        return 0
    here, there = triton_of(sys.executable), triton_of(args.python)
    if here != there:
        parser.error(f"both interpreters must have the same triton, got {here} and {there}")
    args.out.mkdir(parents=True, exist_ok=True)
    listed = record(launches())
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    (cache / LISTED).write_text(json.dumps(listed), "utf-8")
    print(fill(args.python, cache), flush=True)
    packed = pack(cache, args.out)
    unpack(packed, cache)
    print(f"unpacked again: {fill(args.python, cache)}", flush=True)
    for path in (wheel(args.python, args.out), packed):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    wheels = list(fetch_wheels(args.python, args.out).iterdir())
    size = sum(path.stat().st_size for path in wheels)
    print(f"{args.out / 'wheels'}: {len(wheels)} wheels, {size / 1e6:.2f} MB")
    print(f"for triton {there} with TRITON_CACHE_DIR={cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
