"""The table of the study: tasks, methods, and the cells (task, alpha, seed, method) they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

from fedms.fl.algorithms import ALGORITHMS
from fedms.fl.config import Config, load_config
from fedms.fl.fetch import RECIPES

if TYPE_CHECKING:
    from study_lines import Lines

NATURAL = "natural"
PRIORS = (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0)
"""The knob on the label prior, beside 0: own data against everyone's."""
SCALES = (1.0, 0.5)
"""Both stages' learning rates are these times the defaults; then on from the best, see Lines."""
BOUNDS = (1 / 32, 8.0)
"""How far a choice of scales may go on."""
SCHEDULE = (
    "stage1.batch_size=16", "stage2.batch_size=16",
    "model.dtype=bfloat16", "engine.threads=1", "engine.keep_checkpoints=2",
    "eval.every=1000", "eval.clients=0", "eval.pooled_examples=200",
)  # fmt: skip
TWO_STEPS = ("stage1.local_steps=2", "stage2.local_steps=2")  # where clients are many and small


@dataclass(frozen=True)
class Task:
    """A task of the study.

    Attributes:
        settings: beside the schedule.
        rounds: of stage 1 and of stage 2.
        alphas: of its settings; the first is the one that rates are chosen on.
        classes: whether answers are classes, so that there is a knob on their prior.
        tuned: whether learning rates are chosen for each method; else they are the defaults.
    """

    settings: tuple[str, ...] = ()
    rounds: tuple[int, int] = (6, 3)
    alphas: tuple[str, ...] = (NATURAL,)
    classes: bool = True
    tuned: bool = True


CLIENTS = ("data.num_clients=12", "data.unseen_clients=3")
EMOJI = (*RECIPES["emoji"].settings, "model.image_size=56", "data.unseen_clients=2")
HALF_RATES = ("stage1.lr=0.003", "stage2.lr=0.001")
HEADS = (
    "stage1.head_steps=20",
    "stage2.head_steps=20",
    "stage1.head_lr=0.001",
    "stage2.head_lr=0.001",
)  # FedRep's
TASKS = {
    "icd10": Task(CLIENTS, alphas=("0.3", "0.1", "1.0")),
    "icd10-long": Task(CLIENTS, (24, 6), alphas=("0.3",)),
    "emoji": Task(EMOJI, (12, 6)),
    "emoji-heads": Task(
        (*EMOJI, *HALF_RATES, *HEADS),
        (12, 6),
        tuned=False,  # the rates are those that nearly all chose on emoji
    ),
    "wordnet-topics": Task((*RECIPES["wordnet-topics"].settings, *TWO_STEPS, "eval.clients=20")),
    "debian": Task((*RECIPES["debian"].settings, *TWO_STEPS, "eval.clients=20")),
    "sotu": Task(
        (
            *RECIPES["sotu"].settings, *TWO_STEPS, "stage1.batch_size=2", "stage2.batch_size=2",
            "model.max_tokens=64", "server.fraction_train=0.25",
            "data.train=0.94", "data.gate=0.02", "data.val=0.02", "data.test=0.02",
            "eval.clients=8", "eval.pooled_examples=40", "eval.val_examples=40",
        ),
        (4, 2),
        classes=False,
        tuned=False,  # a run is minutes
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        settings: what makes it.
        like: whose learning rates it takes; default: its own choice.
        late: two thirds of stage 2's rounds go to stage 1: more of the same steps for what is
            shared.
        longer: stage 1 has this many times its rounds.
    """

    settings: tuple[str, ...]
    like: str | None = None
    late: bool = False
    longer: float = 1.0


NO_SAL, HALF, LOGITS = "sal.enabled=false", "mofm.gate=fixed", "mofm.combine=logits"
OWN_HEAD = "mofm.head_steps=20"  # as many as LP-FT has
A_BLOCK_A_ROUND = ("sal.trigger=every", "sal.every=1", "sal.wake_blocks=1")
NOT_TRUE, BALANCED = "mofm.local_loss=not_true", "mofm.local_loss=balanced"
METHODS = {
    **{
        name: Method((f"method={name}",), "zero_shot" if name == "zero_shot" else None)
        for name in ALGORITHMS
        if name != "fedavg_prior"  # is fedavg at a knob of 1
    },
    **{
        name: Method(("method=fedms", *settings), like="fedms")
        for name, settings in {
            "fedms, no SAL": (NO_SAL,),
            "fedms, one half": (HALF,),
            "fedms, no SAL, own head": (NO_SAL, OWN_HEAD),
            "fedms, gate not anchored": ("mofm.anchor=0.0",),
            "fedms, gate adapter not shared": ("mofm.share_adapter=false",),
            "fedms, layer mixture": ("mofm.combine=layer", "mofm.gate_input=base"),
            "fedms, local expert from zero": ("mofm.local_from=zero",),
            "fedms, no SAL, logits": (NO_SAL, LOGITS),
            "fedms, no SAL, logits, one half": (NO_SAL, HALF, LOGITS),
            "fedms, no SAL, logits, one half, not-true": (NO_SAL, HALF, LOGITS, NOT_TRUE),
        }.items()
    },
    "centralised": Method(("method=centralised", "centralised.clients=12")),  # as icd10 has
    "fedms, SAL at the bytes of no SAL": Method(("method=fedms",), like="fedms", longer=7 / 6),
    "fedms, late, SAL at the bytes of no SAL": Method(
        ("method=fedms",), like="fedms, late", late=True, longer=7 / 6
    ),
    **{
        name: Method((f"method={method}", *settings), late=True)
        for name, (method, *settings) in {
            "fedms, late": ("fedms",),
            "fedms, one half, late": ("fedms", HALF),
            "fedms, no SAL, late": ("fedms", NO_SAL),
            "fedms, own head, late": ("fedms", OWN_HEAD),
            "fedms, no SAL, own head, late": ("fedms", NO_SAL, OWN_HEAD),
            "fedms, a block a round, late": ("fedms", *A_BLOCK_A_ROUND),
            "fedms, no SAL, one half, late": ("fedms", NO_SAL, HALF),
            "fedms, logits, late": ("fedms", LOGITS),
            "fedms, no SAL, logits, late": ("fedms", NO_SAL, LOGITS),
            "fedms, no SAL, logits, one half, late": ("fedms", NO_SAL, LOGITS, HALF),
            "fedms, no SAL, logits, one half, balanced, late": (
                "fedms",
                NO_SAL,
                LOGITS,
                HALF,
                BALANCED,
            ),
            "fedavg_ft, late": ("fedavg_ft",),
        }.items()
    },
}
"""By name. Those without ``like`` choose rates of their own."""
LABELS = {
    "fedms": "FedMS",
    "fedavg": "FedAvg-LoRA",
    "fedavg_ft": "FedAvg-LoRA + fine-tuning",
    "local_only": "local only",
    "zero_shot": "zero-shot",
    "fedprox": "FedProx",
    "ffa_lora": "FFA-LoRA",
    "fedsa_lora": "FedSA-LoRA",
    "fedex_lora": "FedEx-LoRA",
    "ditto": "Ditto",
    "rolora": "RoLoRA",
    "fedntd": "FedNTD",
    "balanced_ft": "fine-tuning, balanced softmax",
    "not_true_ft": "fine-tuning, not-true distillation",
    "lp_ft": "LP-FT",
    "flexlora": "FlexLoRA",
    "fedper": "FedPer",
    "fedrep": "FedRep",
    "fedrod": "FedRoD",
    "fedalt": "FedALT",
    "feddpa_f": "FedDPA-F",
    "feddpa_t": "FedDPA-T",
    "centralised": "centralised",
}


def label(method: str) -> str:
    """A method's name for people."""
    name, comma, more = method.partition(",")
    return LABELS.get(name, name) + comma + more


class Cell(NamedTuple):
    task: str
    alpha: str
    seed: int
    method: str


@dataclass(frozen=True)
class Group:
    """Cells of one (task, alpha, seed): the same clients and the same model.

    Attributes:
        kind: "run", or "choice": scored on validation examples.
        cells: with the scale of the learning rates.
    """

    kind: str
    cells: list[tuple[Cell, float]] = field(default_factory=list)

    @classmethod
    def of_choices(cls, task: str, tries: Sequence[tuple[str, float]]) -> Self:
        """Methods, each with a scale."""
        place = (task, TASKS[task].alphas[0], 0)
        return cls("choice", [(Cell(*place, method), scale) for method, scale in tries])

    @classmethod
    def of_runs(cls, cells: Sequence[Cell], lines: Lines) -> Self:
        return cls("run", [(cell, lines.chosen(cell.task, cell.method).scale) for cell in cells])


def overrides(cell: Cell, scale: float, kind: str) -> list[str]:
    """All settings of a cell that are not defaults."""
    task, method, defaults = TASKS[cell.task], METHODS[cell.method], Config()
    first, second = round(task.rounds[0] * method.longer), task.rounds[1]
    moved = second - max(1, second // 3) if method.late else 0
    rates = [
        f"{stage}.lr={scale * getattr(defaults, stage).lr:g}" for stage in ("stage1", "stage2")
    ]
    return [
        f"seed={cell.seed}",
        *([] if cell.alpha == NATURAL else [f"data.alpha={cell.alpha}"]),
        *([f"eval.priors={list(PRIORS)}"] if task.classes else []),
        *(["eval.split=val"] if kind == "choice" else []),
        f"stage1.rounds={first + moved}",
        f"stage2.rounds={second - moved}",
        *SCHEDULE,
        *task.settings,
        *(rates if scale != 1 else []),
        *method.settings,
    ]


def config_of(cell: Cell, scale: float, kind: str) -> Config:
    return load_config(None, overrides(cell, scale, kind)).replace(rivals=())
