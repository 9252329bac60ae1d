"""torch.cuda's events, streams and graphs on a CPU, for rehearsals of what only a GPU runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Graph:
    """Keeps the operators that torch dispatched inside `_Capture` and runs them again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # where the calls were seen
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, result))
        return result


class _Stream:
    def wait_stream(self, other: _Stream) -> None: ...


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """torch.cuda's events, streams, graphs and counters as far as the CPU can stand in for them."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def inside(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    names = dict.fromkeys(
        ("synchronize", "set_sync_debug_mode", "empty_cache", "reset_peak_memory_stats"), nothing
    )
    names |= dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda: 0)
    names |= {"stream": inside, "graph": _Capture, "current_stream": _Stream}
    names |= {"Event": _Event, "Stream": _Stream, "CUDAGraph": _Graph}
    with contextlib.ExitStack() as stack:
        for name, stand_in in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield
