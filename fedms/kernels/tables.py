"""Small tables on a device: sent once, found again by content, never freed under a CUDA graph.

One store for all backends. In a steady state nothing is sent, nothing waits, and a call can be
captured. Tables hold values of a call (scales, ranks, row ranges), never addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor


class TableStore:
    """Device copies of tables, by content, device and stream.

    An entry belongs to one stream: its copy is ordered before its uses, and its memory before who
    gets it next. The least recently used is dropped beyond `limit`, but a table that a capture uses
    is kept for good, because replays read it.

    A table that is new during a capture becomes part of the graph where `launched` says that a
    kernel fills it; nobody else finds it, since only replays fill it. Otherwise it must be here
    already, on any stream, as an eager run before the capture leaves it: else RuntimeError.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._lock = Lock()
        self._tables: OrderedDict[tuple[torch.device, Hashable, int], Tensor] = OrderedDict()
        self._captured: dict[int, Tensor] = {}

    def get(
        self, content: Hashable, device: torch.device, stream: int, capturing: bool,
        make: Callable[[], Tensor], *, launched: bool = False,
    ) -> Tensor:  # fmt: skip
        """The table of this content; make() where there is none.

        make: by a launch on the current stream (`launched`), or by a copy that the host waits for.
        """
        key = (device, content, stream)
        with self._lock:  # autograd runs backward passes on a thread of its own
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
            elif capturing and not launched:
                table = self._on_another_stream(device, content)
            if table is not None:
                if capturing:
                    self._captured[table.data_ptr()] = table
                return table
            with torch.inference_mode(False):  # it may be used in training, too
                table = make()
            if not capturing:
                self._tables[key] = table
                if len(self._tables) > self._limit:
                    self._tables.popitem(last=False)
            return table

    def values(
        self, values: Sequence[float], dtype: torch.dtype, device: torch.device, stream: int,
        capturing: bool,
    ) -> Tensor:  # fmt: skip
        """A 1-D tensor of these values."""
        content = (dtype, tuple(values))

        def make() -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu").to(device)

        return self.get(content, device, stream, capturing, make)

    def _on_another_stream(self, device: torch.device, content: Hashable) -> Tensor:
        """Its copy has ended: the host waited for it."""
        for (where, what, _), table in self._tables.items():
            if where == device and what == content:
                return table
        raise RuntimeError(
            "a CUDA graph's capture must find the op's tables on the device: run the step once "
            "with the same shapes, scales and segments before capturing it"
        )


STORE = TableStore()
"""What all backends of the process use."""


def stream_state(device: torch.device) -> tuple[int, bool]:
    """The current stream of a device as an integer, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index), torch.cuda.is_current_stream_capturing()


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A kept 1-D tensor of these values: a copy a call would wait, and forbids CUDA graphs."""
    return STORE.values(values, dtype, device, *stream_state(device))
