"""The federated algorithms by name.

Each is a file with the paper as its docstring and ``stages(...)`` as its declaration.
"""

from fedms.fl.algorithms import fedavg, fedavg_ft, fedms, local_only, zero_shot
from fedms.fl.algorithms.stage import Phase as Phase
from fedms.fl.algorithms.stage import Stage as Stage
from fedms.fl.config import Config


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of ``config.method`` that have rounds."""
    rounds = (("stage1", config.stage1), ("stage2", config.stage2))
    stages = {
        "fedms": lambda: fedms.stages(config.mofm, rounds),
        "fedavg": lambda: fedavg.stages(rounds),
        "fedavg_ft": lambda: fedavg_ft.stages(rounds),
        "local_only": lambda: local_only.stages(rounds),
        "zero_shot": lambda: zero_shot.stages(rounds),
    }[config.method]()
    return tuple(stage for stage in stages if stage.settings.rounds)
