"""The Triton backend: one file a kernel, the ops' code in backend.py, tables in layout.py.

Importing this package does not import triton; the first call does. On a GPU, or on CPU tensors
under Triton's interpreter (`TRITON_INTERPRET=1` before triton is imported).
Nothing here has run on a GPU yet, so fedms.kernels.plan does not choose it by default.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from fedms.kernels.experts import expert_ranks, takes_stacks
from fedms.kernels.ops import define_backend

_INSTALLED = find_spec("triton") is not None  # looked up here: torch.compile 2.11 cannot trace it
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available() -> bool:
    """True when triton is installed."""
    return _INSTALLED


def supports(x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> bool:
    """True when there are kernels for x, adapters and base result of these dtypes."""
    return x in _DTYPES and adapter in _DTYPES and base == x


def interpreted() -> bool:
    """True when Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(device: torch.device, x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> None:
    """Raise RuntimeError (triton is missing) or ValueError (this call) unless it can run."""
    if not available():
        raise RuntimeError("backend='triton' needs the package triton, which is not installed")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(
            "backend='triton' must have tensors on a GPU, or on the CPU with TRITON_INTERPRET=1 "
            f"set before triton is imported, got {device}"
        )
    if not supports(x, adapter, base):
        raise ValueError(
            f"backend='triton' must have x, base result and adapters in {_DTYPES} and the base "
            f"result in x's dtype, got x {x}, base {base}, adapters {adapter}"
        )


@cache
def _backend() -> ModuleType:
    from fedms.kernels.triton import backend

    return backend


def _forward(*args: Any) -> Any:
    return _backend().forward(*args)


def _backward(*args: Any) -> Any:
    return _backend().backward(*args)


def _h_like(
    x: torch.Tensor, A: Any, expert_idxs: torch.Tensor | None, experts: torch.Tensor | None
) -> tuple[int, torch.dtype]:
    from fedms.kernels.segments import row_width

    return row_width(expert_ranks(A), experts), torch.promote_types(x.dtype, A[0].dtype)


forward, backward = takes_stacks(_forward, _backward)
define_backend(
    "triton", forward, backward, dispatch_key="CompositeExplicitAutograd", h_like=_h_like
)
