"""The federated algorithms by name.

Each is a file with the paper as its docstring and ``stages(config)`` as its declaration.
"""

from fedms.fl.algorithms import fedavg, fedavg_ft, fedms, local_only, zero_shot
from fedms.fl.algorithms.stage import Stage as Stage
from fedms.fl.config import Config

_STAGES = {
    "fedms": fedms.stages,
    "fedavg": fedavg.stages,
    "fedavg_ft": fedavg_ft.stages,
    "local_only": local_only.stages,
    "zero_shot": zero_shot.stages,
}


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of ``config.method`` that have rounds."""
    return tuple(stage for stage in _STAGES[config.method](config) if stage.settings.rounds)
