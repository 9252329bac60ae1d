"""Which backend runs a call: a short table by device and dtype."""

from __future__ import annotations

import torch

from fedms.kernels import native

BACKENDS = ("stacked", "native")


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
    return backend
