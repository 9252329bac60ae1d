"""Which backend runs a call.

CPU, fp32 or bf16: native, for every shape: it was slower than stacked in none of the rows of
bench/results, as it does the same R (K + N) M multiply-adds in fewer passes over memory.
GPU: what the measured table of fedms.kernels.tiles says for the device, dtypes and shape. Without a
row it is stacked (cuBLAS and addmm), which always is one of the tuner's candidates too: Triton and
CUDA kernels are not chosen where nobody has seen them pass.
Other dtypes (fp64) and devices: stacked.
"""

from __future__ import annotations

import torch

from fedms.kernels import cuda, native, tiles, triton

BACKENDS = ("stacked", "native", "triton", "cuda")


def choose(
    device: torch.device,
    x: torch.dtype,
    adapter: torch.dtype,
    base: torch.dtype,
    backend: str | None,
    m: int = 1,
    k: int = 1,
    n: int = 1,
    r: int = 1,
) -> str:
    """The backend for these dtypes and sizes on this device; `backend` when the caller named one.

    m, k, n, r: rows, widths in and out, stacked ranks. Raises ValueError for an unknown name and
    RuntimeError or ValueError when the named one cannot run here.
    """
    if backend is None:
        if device.type == "cpu":
            able = native.available() and native.supports(x, adapter, base)
            return "native" if able else "stacked"
        if device.type != "cuda" or x != base:
            return "stacked"
        return tiles.choose(device, x, adapter, m, k, n, r).backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend == "native":
        native.require(device, x, adapter, base)
    if backend == "triton":
        triton.require(device, x, adapter, base)
    if backend == "cuda":
        cuda.require(device, x, adapter, base)
    return backend


def runs(backend: str, device: torch.device, x: torch.dtype, adapter: torch.dtype) -> bool:
    """Whether a backend can run on this device with these dtypes."""
    try:
        return choose(device, x, adapter, x, backend) == backend
    except (RuntimeError, ValueError):
        return False
