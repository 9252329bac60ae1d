"""Which backend runs a call: a short table by device and dtype.

CPU, fp32 or bf16: native, for every shape. bench/results shows no crossover worth a rule: it is the
faster one in all but a few rows and those are within the noise of a busy machine, as it does the
same R (K + N) M multiply-adds in fewer passes over memory. Other dtypes (fp16, fp64) and devices:
stacked. The cuda backend is in no row, because it has not run on a GPU yet.
"""

from __future__ import annotations

import torch

from fedms.kernels import cuda, native

BACKENDS = ("stacked", "native", "cuda")


def choose(
    device: torch.device,
    x: torch.dtype,
    adapter: torch.dtype,
    base: torch.dtype,
    backend: str | None,
) -> str:
    """The backend for these dtypes on this device; `backend` when the caller named one.

    Raises ValueError for an unknown name and RuntimeError when the named one cannot run here.
    """
    if backend is None:
        able = device.type == "cpu" and native.available() and native.supports(x, adapter, base)
        return "native" if able else "stacked"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend == "native":
        native.require(device, x, adapter, base)
    if backend == "cuda":
        cuda.require(device, x, adapter, base)
    return backend
