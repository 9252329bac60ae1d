"""A driver for Triton in place of a device's: kernels are specialised, compiled and "launched".

Nothing is run and no result exists. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

H100 = {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    """What Triton asks of a driver, for one target; `launches` counts what was launched."""

    def __init__(self, target: Any) -> None:
        self.target, self.launches = target, 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: H100,
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.launches += 1

        return launch

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
