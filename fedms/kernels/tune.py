"""Measure what the plan chooses from, for one shape on one device.

Every candidate's result is compared with float64 before its time counts; one that fails to compile,
needs more shared memory than there is, or is wrong, is listed with the reason and never chosen.
Forward and backward are tuned apart, one kernel after the other: strategy and GEMM tiles first,
then the shrink's tiles (forward) or the outer kernel's (backward). Last, the best Triton call races
the other backends, plain torch (cuBLAS and addmm) among them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fedms.kernels import plan
from fedms.kernels.agreement import BOUND, difference
from fedms.kernels.tiles import Choice, GemmTiles, Shape, Tiles, device_name, heuristic

Clock = Callable[[Callable[[], object]], float]
"""Median microseconds of a call."""


@dataclass(frozen=True)
class Attempt:
    """One candidate: what ran, its median time, or why it does not count."""

    direction: str
    what: str
    microseconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Tuned:
    shape: Shape
    choice: Choice
    attempts: list[Attempt]


def gemm_tiles(capability: int) -> list[GemmTiles]:
    """Tiles worth trying for a GEMM of more than 64 rows.

    capability: 80, 90, ..., and 0 for a GPU that is not NVIDIA's.
    """
    if capability == 0:
        return [GemmTiles(128, 128, 32, 8, 2), GemmTiles(64, 128, 32, 4, 2)]
    pointers = [GemmTiles(128, 128, 64, 8, 3), GemmTiles(64, 128, 64, 4, 4)]
    if capability < 90:
        return pointers
    described = [
        GemmTiles(128, 256, 64, 8, 3, tma=True),
        GemmTiles(128, 128, 64, 8, 4, tma=True),
    ]
    return [*pointers, *described, *[replace(t, persistent=True) for t in described]]


def few_rows_tiles(m: int) -> list[GemmTiles]:
    """Tiles worth trying for a GEMM of up to 64 rows, which reads W and little else: deep, narrow,
    so that W comes in long pieces and every multiprocessor has a column tile."""
    block_m = _rows(m, 64)
    return [GemmTiles(block_m, 32, 256, 4, 3), GemmTiles(block_m, 64, 128, 4, 4)]


def shrink_tiles(m: int, fp32: bool) -> list[Tiles]:
    """Tiles worth trying for the shrink; fp32: x and adapters are, and three products cost more."""
    block_m = _rows(m, 64)
    if fp32:
        return [Tiles(min(32, block_m), 32, 4, 3)]
    if block_m < 64:
        return [Tiles(block_m, 64, 4, 4)]
    return [Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 4), Tiles(32, 128, 4, 3)]


def expand_tiles(m: int, fp32: bool) -> list[Tiles]:
    """Tiles worth trying for the mixture alone, which writes a matrix: long rows of it at once."""
    block_m = _rows(m, 64)
    if fp32:
        return [Tiles(min(32, block_m), 64, 4, 2), Tiles(min(32, block_m), 128, 4, 2)]
    if block_m < 64:
        return [Tiles(block_m, 128, 4, 2), Tiles(block_m, 256, 4, 2)]
    return [Tiles(64, 128, 4, 2), Tiles(32, 256, 4, 2), Tiles(128, 128, 8, 2), Tiles(64, 256, 8, 2)]


def outer_tiles(x: str, adapter: str) -> list[Tiles]:
    """Tiles worth trying for the weight gradients; the wide ones have fewer partial sums of u.

    What is left out spills with one of the tritons that are tested.
    """
    if x == "float32":
        return [Tiles(32, 64, 4, 2)]
    found = [Tiles(32, 512, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 3)]
    return found if adapter == "float32" else [*found, Tiles(32, 256, 8, 3)]


def launches(capability: int, shape: Shape) -> list[tuple[str, GemmTiles]]:
    """Strategies and GEMM tiles worth trying for a shape, without those that cannot fit."""
    found = [("split", heuristic(shape).gemm)]
    if shape.x == "float32":
        return found
    grid = gemm_tiles(capability) if shape.m > 64 else few_rows_tiles(shape.m)
    limit = SHARED_MEMORY.get(capability, 227) * 1024
    for tiles in grid:
        strategies = ["extend"]
        # A second accumulator must fit beside the GEMM's, and fp32 adapters would widen x for it.
        # 256 columns of a beside those of x and w spill.
        if shape.r <= 64 and shape.adapter == shape.x and tiles.block_k < 256:
            strategies.append("fused")
        found += [(s, tiles) for s in strategies if shared_memory(s, tiles, shape) <= limit]
    return found


SHARED_MEMORY = {0: 64, 80: 163, 86: 99, 89: 99, 120: 99}
"""KiB that a program can have, by capability; 227 where it is not listed."""


def shared_memory(strategy: str, tiles: GemmTiles, shape: Shape) -> int:
    """Bytes of shared memory that the GEMM kernel takes at least.

    The stages hold x and w (fused: and a) of the loop; b, and p without fused, lie beside them, as
    they are loaded before it and used after it.
    """
    x = 2 if shape.x != "float32" else 4
    c = 4 if "float32" in (shape.x, shape.adapter) else 2
    r = min(128, shape.r)
    stage = (tiles.block_m + tiles.block_n) * tiles.block_k * x
    outside = r * tiles.block_n * c
    if strategy == "fused":
        stage += r * tiles.block_k * x
    else:
        outside += r * tiles.block_m * c
    return tiles.stages * stage + outside


def _rows(m: int, most: int) -> int:
    """The power of two of rows, 16 at least, that a tile of a call of m rows has."""
    return min(most, max(16, 1 << (m - 1).bit_length()))


def tune(
    m: int,
    k: int,
    n: int,
    ranks: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype = torch.bfloat16,
    clock: Clock | None = None,
) -> Tuned:
    """The fastest right way to run M x K -> N with experts of these ranks, gated per token.

    The first expert is frozen when there are several, as in stage 2 of FedMS. clock
    None: CUDA events, or the wall clock off a GPU (under the interpreter, where the times mean
    nothing). Raises RuntimeError when not even plain torch agrees with float64.
    """
    shape = Shape.of(device_name(device), dtype, adapter, m, k, n, sum(ranks))
    race = _Race(_inputs(m, k, n, ranks, dtype, adapter, device), clock or _clock(device))
    best = heuristic(shape)
    if "triton" in race.backends:
        grid = launches(_capability(device), shape)
        fp32 = shape.x == shape.adapter == "float32"
        split = replace(best, forward="split")
        split = race.fastest(
            "forward", [replace(split, expand=t) for t in expand_tiles(m, fp32)], split
        )
        best = replace(best, expand=split.expand)
        best = race.fastest("forward", [replace(best, forward=s, gemm=t) for s, t in grid], best)
        tiles = shrink_tiles(m, fp32)
        best = race.fastest("forward", [replace(best, shrink=t) for t in tiles], best)
        choices = [replace(best, backward=s, dx_gemm=t) for s, t in grid]
        best = race.fastest("backward", choices, best)
        passes = [(t, one) for t in outer_tiles(shape.x, shape.adapter) for one in (False, True)]
        choices = [replace(best, outer=t, one_pass=one) for t, one in passes]
        best = race.fastest("backward", choices, best)
    totals = {b: race.total(b, best) for b in race.backends}
    right = {backend: t for backend, t in totals.items() if t is not None}
    if "stacked" not in right:
        raise RuntimeError(f"plain torch must agree with float64 on {shape}, and it does not")
    winner = min(right, key=right.__getitem__)
    return Tuned(shape, replace(best, backend=winner, measured=True), race.attempts)


class _Race:
    """Runs candidates on one problem, checks them against float64 and keeps their times."""

    def __init__(self, args: dict[str, Any], clock: Clock) -> None:
        self.args, self.clock = args, clock
        self.attempts: list[Attempt] = []
        x, A = args["x"], args["A"]
        self.backends = [b for b in plan.BACKENDS if plan.runs(b, x.device, x.dtype, A[0].dtype)]
        self.truth = _results("stacked", _double(args), None)
        self.bound = BOUND[x.dtype]

    def fastest(self, direction: str, candidates: list[Choice], start: Choice) -> Choice:
        """The candidate of the least time in this direction; `start` when none is right."""
        timed = [(self._time("triton", direction, c), c) for c in candidates]
        right = [(t, c) for t, c in timed if t is not None]
        return min(right, key=lambda pair: pair[0])[1] if right else start

    def total(self, backend: str, choice: Choice) -> float | None:
        """Forward and backward of one backend, None when either is wrong."""
        times = [self._time(backend, d, choice) for d in ("forward", "backward")]
        return None if None in times else sum(t for t in times if t is not None)

    def _time(self, backend: str, direction: str, choice: Choice) -> float | None:
        chosen = choice if backend == "triton" else None
        what = backend if chosen is None else f"triton {choice.describe(direction)}"
        try:
            found = _results(backend, self.args, chosen)
            problem = difference(found, self.truth, self.bound)
            if not problem:
                forward, backward = _steps(backend, self.args, chosen)
                time_us = self.clock(forward if direction == "forward" else backward)
                self.attempts.append(Attempt(direction, what, time_us))
                return time_us
        except Exception as error:  # a compiler's or a launch's own; the list says which
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        self.attempts.append(Attempt(direction, what, None, problem))
        return None


def _inputs(
    m: int, k: int, n: int, ranks: Sequence[int], dtype: torch.dtype, adapter: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Random inputs of order one, as the ops take them."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(to)

    return {
        "x": draw(m, k),
        "weight": draw(n, k, scale=k**-0.5),
        "A": [draw(r, k, scale=k**-0.5, to=adapter) for r in ranks],
        "B": [draw(n, r, to=adapter) for r in ranks],
        "gates": draw(m, len(ranks), to=torch.float32),
        "dy": draw(m, n),
        "need": [e > 0 or len(ranks) == 1 for e in range(len(ranks))],
    }


def _double(args: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [t.double() for t in value] if name in "AB" else value
        if name == "need" else value.double()
        for name, value in args.items()
    }  # fmt: skip


def _steps(
    backend: str, args: dict[str, Any], choice: Choice | None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and backward from a forward that ran once."""
    if choice is not None:
        from fedms.kernels.triton.backend import backward as run_backward
        from fedms.kernels.triton.backend import forward as run_forward

        extra = {"choice": choice}
    else:
        run_forward = getattr(torch.ops.fedms, f"{backend}_forward").default
        run_backward = getattr(torch.ops.fedms, f"{backend}_backward").default
        extra = {}
    x, weight, A, B = args["x"], args["weight"], args["A"], args["B"]
    routing = (A, B, args["gates"], None, None, None, [1.0] * len(A), 0.0, None)

    def forward() -> Any:
        return run_forward(x, weight, None, None, *routing, True, **extra)

    _, h = forward()

    def backward() -> Any:
        need = args["need"]
        return run_backward(args["dy"], weight, x, h, *routing, True, True, need, need, **extra)

    return forward, backward


def _results(backend: str, args: dict[str, Any], choice: Choice | None) -> list[Tensor]:
    forward, backward = _steps(backend, args, choice)
    dx, dg, dA, dB = backward()
    need = args["need"]
    return [forward()[0], dx, dg, *compress(dA, need), *compress(dB, need)]


def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _clock(device: torch.device) -> Clock:
    if device.type == "cuda":
        from triton.testing import do_bench

        def events(run: Callable[[], object]) -> float:
            milliseconds: Any = do_bench(run, warmup=20, rep=60, return_mode="median")
            return 1e3 * milliseconds

        return events

    def wall(run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return 1e6 * statistics.median(times)

    return wall
