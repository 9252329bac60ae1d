"""Results by hand."""

from __future__ import annotations

from typing import Any

from fedms.fl.compare.result import Block, Point, Result
from fedms.fl.tasks.classify import ACCURACY


def result(
    method: str, own: float, everyone: float | None = 0.5, seed: int = 0, **more: Any
) -> Result:
    """A run of a method in the setting "one", with equal costs."""
    plain: dict[str, Any] = {
        "block": Block(more.pop("setting", "one"), seed), "method": method, "label": method.title(),
        "algorithm": method.partition(",")[0], "metric": ACCURACY,
        "scores": Point(own, own / 2, everyone, None), "by_knob": {}, "bytes_up": 10**6,
        "bytes_down": 10**6, "seconds": 2.0, "cpu_seconds": None, "trained_share": 0.01,
        "gate": None,
    }  # fmt: skip
    return Result(**{**plain, **more})
