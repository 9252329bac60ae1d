"""The federated algorithms by name.

Each is a file with the paper and a card (what is trained, sent, kept; by what is predicted) as its
docstring and ``stages(rounds)`` as its declaration, or ``stages(settings, rounds)`` where it has
settings of its own. This is the one list of them; `fedms run --methods` prints the cards.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from fedms.fl.algorithms import (
    balanced_ft,
    centralised,
    ditto,
    fedalt,
    fedavg,
    fedavg_ft,
    fedavg_prior,
    feddpa_f,
    feddpa_t,
    fedex_lora,
    fedms,
    fedntd,
    fedper,
    fedprox,
    fedrep,
    fedrod,
    fedsa_lora,
    ffa_lora,
    flexlora,
    local_only,
    lp_ft,
    not_true_ft,
    rolora,
    zero_shot,
)
from fedms.fl.algorithms.stage import Phase as Phase
from fedms.fl.algorithms.stage import Stage as Stage
from fedms.fl.algorithms.stage import StageConfig as StageConfig

ALGORITHMS: dict[str, tuple[ModuleType, str | None]] = {
    "fedms": (fedms, "mofm"),
    "fedavg": (fedavg, None),
    "fedavg_ft": (fedavg_ft, None),
    "fedavg_prior": (fedavg_prior, "fedavg_prior"),
    "balanced_ft": (balanced_ft, None),
    "not_true_ft": (not_true_ft, "not_true_ft"),
    "lp_ft": (lp_ft, "lp_ft"),
    "fedntd": (fedntd, "fedntd"),
    "fedprox": (fedprox, "fedprox"),
    "ffa_lora": (ffa_lora, None),
    "rolora": (rolora, None),
    "flexlora": (flexlora, None),
    "feddpa_f": (feddpa_f, "feddpa_f"),
    "feddpa_t": (feddpa_t, "feddpa_t"),
    "fedalt": (fedalt, None),
    "fedper": (fedper, None),
    "fedrep": (fedrep, "fedrep"),
    "fedrod": (fedrod, "fedrod"),
    "fedsa_lora": (fedsa_lora, None),
    "fedex_lora": (fedex_lora, None),
    "ditto": (ditto, "ditto"),
    "centralised": (centralised, "centralised"),
    "local_only": (local_only, None),
    "zero_shot": (zero_shot, None),
}
"""By name: the file, and the section of the configuration that holds its settings."""


def title(method: str) -> str:
    """A method's name for people: how its docstring begins."""
    return (ALGORITHMS[method][0].__doc__ or "").partition(":")[0]


def stages_of(config: Any, method: str | None = None) -> tuple[Stage, ...]:
    """The stages of ``method`` (default: ``config.method``) that have rounds.

    ``config`` has ``method``, ``prior``, ``eval``, ``task``, ``stage1``, ``stage2`` and the
    sections named in :data:`ALGORITHMS`.
    """
    module, section = ALGORITHMS[method or config.method]
    rounds = (("stage1", config.stage1), ("stage2", config.stage2))
    build: Callable[..., tuple[Stage, ...]] = module.stages
    stages = build(rounds) if section is None else build(getattr(config, section), rounds)
    knob = {"prior": config.prior, "priors": config.eval.priors}
    linear = config.task.head == "linear"
    fitted = (stage.with_fitted_heads(linear) for stage in stages if stage.settings.rounds)
    return tuple(replace(stage, **knob) for stage in fitted)
