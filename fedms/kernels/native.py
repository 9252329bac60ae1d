"""The C++ backend. Placeholder until the extension's kernels are bound: nothing is supported."""

from __future__ import annotations

import torch


def available() -> bool:
    """True when the compiled extension could be loaded."""
    return False


def supports(x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> bool:
    """True when the extension has kernels for these dtypes."""
    return False


def require(device: torch.device, x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> None:
    """Raise RuntimeError when the backend cannot run a call."""
    raise RuntimeError("backend='native' needs the compiled extension")
