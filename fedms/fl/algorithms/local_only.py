"""Every client on its own: a local expert on its own data from start to end, nothing sent."""

from __future__ import annotations

from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return tuple(
        Stage(name=name, settings=settings, trains=("local.",), predicts="local", local_from="zero")
        for name, settings in (("stage1", config.stage1), ("stage2", config.stage2))
    )
