"""A kernel's launch, prepared once for a call signature: 1 us a call where Triton's own takes 10.

`JITFunction.run` binds, specialises and looks up every argument of every call. What it decides on
(dtypes, 16-byte alignment, strides, constants) is the same for all calls of one signature, so the
compiled kernel and everything but the tensors are kept from the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Launch:
    """`launch(*tensors)`: the kernel's first arguments; `fixed` has all others by name.

    The caller keeps one Launch for each combination of what Triton specialises the tensors on.
    grid: programs, one to three dimensions, none of them zero.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int, stream: int, **fixed: Any
    ) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._options = {"num_warps": warps, "num_stages": stages}
        names = kernel.arg_names[len(kernel.arg_names) - len(fixed) :]
        self._fixed = tuple(fixed[name] for name in names)
        self._stream = stream
        self._run: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        if self._run is not None:
            self._run(*tensors, *self._fixed, stream=self._stream)
            return
        compiled = self._kernel[self._grid](*tensors, *self._fixed, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[self._grid]
