"""Host time of a forward + backward of the op on tiny tensors: what Python costs beside a GPU.

    python bench/host_time.py [--rounds 30]

Triton has a driver that stands in for a device's: kernels are specialised and compiled for sm_90,
launches end where the C launcher would begin (3 to 4 us each on a device), and results are rubbish.
The rows beside it run on the CPU, their arithmetic included. Microseconds of thread CPU time,
medians of interleaved rounds. With a GPU it is the same command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from stand_in_triton import Driver
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fedms.kernels import gated_lora_linear, plan, tiles
from fedms.kernels.triton import backend as triton_backend

M, K, N, RANKS = 16, 64, 64, (8, 8)
SCALE = 2.0
STEPS = 200
"""Calls a round."""


def problem() -> tuple[dict[str, Any], list[Tensor], Tensor]:
    """Arguments of the op, the leaves that are trained (expert 0 is frozen), and dy."""
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    A = [torch.randn(r, K, requires_grad=e > 0) for e, r in enumerate(RANKS)]
    B = [torch.randn(N, r, requires_grad=e > 0) for e, r in enumerate(RANKS)]
    gates = torch.rand(M, len(RANKS), requires_grad=True)
    args = {"x": x, "weight": torch.randn(N, K), "lora_A": A, "lora_B": B, "gates": gates}
    return args, [x, gates, A[1], B[1]], dy


def peft(args: dict[str, Any]) -> Tensor:
    """peft's arithmetic, adapter by adapter, gated."""
    x = args["x"]
    y = F.linear(x, args["weight"])
    for e, (a, b) in enumerate(zip(args["lora_A"], args["lora_B"], strict=True)):
        y = y + F.linear(F.linear(x, a), b) * SCALE * args["gates"][:, e : e + 1]
    return y


def rows() -> dict[str, Callable[[], object]]:
    args, leaves, dy = problem()

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    def op(backend: str) -> Callable[[], Tensor]:
        return lambda: gated_lora_linear(**args, scaling=SCALE, backend=backend)

    def frozen() -> None:
        torch.autograd.grad(F.linear(args["x"], args["weight"]), args["x"], dy)

    found = {"frozen layer": frozen, "peft, gated": step(lambda: peft(args))}
    for name in plan.BACKENDS:
        if name not in ("triton", "cuda") and plan.runs(name, dy.device, dy.dtype, dy.dtype):
            found[name] = step(op(name))
    return found | {f"triton {s}": chosen(s, step(op("triton"))) for s in tiles.STRATEGIES}


def chosen(strategy: str, run: Callable[[], object]) -> Callable[[], object]:
    """The step with this strategy and each side's own shrink, as small layers have it."""
    shape = tiles.Shape.of("any", torch.bfloat16, torch.bfloat16, M, K, N, sum(RANKS))
    choice = replace(tiles.heuristic(shape), forward=strategy, backward=strategy, one_pass=False)

    def with_choice() -> None:
        triton_backend.choose = lambda *call: choice
        run()

    return with_choice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    stand_in = Driver(GPUTarget("cuda", 90, 32))
    if not torch.cuda.is_available():
        driver.set_active(stand_in)
        plan.triton.require = lambda *call: None
    torch.set_num_threads(1)
    todo, counts = rows(), {}
    for name, run in todo.items():
        run()
        before = stand_in.launches
        run()
        counts[name] = stand_in.launches - before
    times: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, run in todo.items():
            begin = time.thread_time()
            for _ in range(STEPS):
                run()
            times[name].append((time.thread_time() - begin) / STEPS * 1e6)
    print(f"M {M}, K {K}, N {N}, ranks {RANKS}, gated per token, expert 0 frozen, fp32\n")
    print("| forward + backward | us | Triton launches |\n| --- | --- | --- |")
    for name, found in times.items():
        print(f"| {name} | {statistics.median(found):.0f} | {counts[name] or ''} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
