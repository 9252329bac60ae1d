"""A kernel's launch, prepared once for a call signature: 0.3 us a call where Triton's takes 10.

`JITFunction.run` binds, specialises and looks up every argument of every call. What it decides on
(dtypes, 16-byte alignment, strides, constants) is the same for all calls of one signature, so the
compiled kernel and everything but the tensors are kept from the first. Triton's launch hooks are
not called after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Launch:
    """`launch(*tensors)`: the kernel's first arguments; `fixed` has all others by name.

    From the second call on an integer may stand for a tensor: its address. The caller keeps one
    Launch for each combination of what Triton specialises the tensors on. grid: programs, one to
    three dimensions, none of them zero.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, stream: int, **fixed: Any
    ) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        # fused multiply-adds: Triton 3.9 warns where they are left to its default, 3.10's is none
        self._options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        names = kernel.arg_names[len(kernel.arg_names) - len(fixed) :]
        self._fixed = tuple(fixed[name] for name in names)
        self._stream = stream
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        if self._run is not None:
            self._run(*tensors, *self._fixed)
            return
        kernel = self._kernel[self._grid](*tensors, *self._fixed, **self._options)
        if kernel is not None:  # the interpreter compiles nothing
            no_hooks = (None, None, None)
            self._run = partial(
                kernel.run, *self._grid, self._stream, kernel.function, kernel.packed_metadata,
                *no_hooks,
            )  # fmt: skip
