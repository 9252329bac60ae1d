"""Every setting of a run: a tree of sections, a TOML file, dotted overrides (``stage1.rounds=4``).

Each room declares its own section; here they are put together. Defaults are the ones that DESIGN.md
gives reasons for. A key that does not exist or a value that
cannot be is a :class:`ConfigError` that names the key and, where there is one, the nearest right
key. ``fedms run --settings`` prints all of them.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, Strict, ValidationError, model_validator

from fedms.fl.algorithms import ALGORITHMS, Stage, StageConfig, stages_of
from fedms.fl.algorithms.centralised import Settings as CentralisedConfig
from fedms.fl.algorithms.ditto import Settings as DittoConfig
from fedms.fl.algorithms.fedavg_prior import Settings as FedAvgPriorConfig
from fedms.fl.algorithms.feddpa_f import Settings as FedDpaFConfig
from fedms.fl.algorithms.feddpa_t import Settings as FedDpaTConfig
from fedms.fl.algorithms.fedms import Settings as MofmConfig
from fedms.fl.algorithms.fedntd import Settings as FedNTDConfig
from fedms.fl.algorithms.fedprox import Settings as FedProxConfig
from fedms.fl.algorithms.fedrep import Settings as FedRepConfig
from fedms.fl.algorithms.fedrod import Settings as FedRoDConfig
from fedms.fl.algorithms.lp_ft import Settings as LpFtConfig
from fedms.fl.algorithms.not_true_ft import Settings as NotTrueFtConfig
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.data.settings import DataConfig
from fedms.fl.evaluate import EvalConfig
from fedms.fl.explain import explained, in_words
from fedms.fl.model.backbone import ModelConfig
from fedms.fl.model.slots import LoraConfig
from fedms.fl.sal import SalConfig
from fedms.fl.server import ServerConfig
from fedms.fl.settings import Finite, Natural, NotNegative, Section
from fedms.fl.tasks.task import TaskConfig
from fedms.fl.types import ConfigError

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(ALGORITHMS)]


class EngineConfig(Section):
    """Where clients run and what makes it fast. None changes a result by more than rounding."""

    kind: Literal["local", "flower-simulation"] = "local"
    """In this process, or in the workers of Flower's simulation (pip install 'fedms[flower]').
    Real sites run the app that `fedms flower new` writes."""
    deadline: NotNegative = 0.0
    """With Flower: seconds in which a client answers, else the round goes on without it; 0: as long
    as it likes."""
    cohort: Natural = 0
    """Clients trained and scored side by side; 0: one on a CPU, as many as fit on a GPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of torch, 0 for as many as it chooses.

    Sums are split by threads: another number changes the last digits.
    """
    prefix_cache_mb: Natural = 1024
    """Memory for hidden states below the lowest awake block; 0 computes them anew every time.

    What ``cache_global`` keeps may take as much again.
    """
    cache_global: bool = True
    """Keep the frozen global expert's output per example in stage 2."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay on the disk."""
    tensorboard: bool = False
    """Write TensorBoard's event files beside metrics.jsonl (pip install 'fedms[tensorboard]')."""


class Config(Section):
    method: Method = "fedms"
    """The algorithm that is trained."""
    rivals: Annotated[tuple[Method, ...], Strict(False)] = ("zero_shot", "fedavg", "fedavg_ft")
    """Run after the method, on the same clients with as many local steps, for the final table."""
    prior: Finite = 0.0
    """Own data against everyone's, by any method: a client's answers are moved by this times the
    log of its own label frequencies over everyone's.

    0: as the method answers. Above it, better on a client's own data and worse on everyone's; below
    it the other way round. What differs from 0 lets the server know the clients' mean label
    frequencies.
    """
    seed: Natural = 0
    """Of every random draw; the same seed and settings give the same run."""
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    stage1: StageConfig = StageConfig(rounds=6, local_steps=5, lr=0.006)
    stage2: StageConfig = StageConfig(rounds=1, local_steps=5, lr=0.002)
    sal: SalConfig = SalConfig()
    mofm: MofmConfig = MofmConfig()
    fedavg_prior: FedAvgPriorConfig = FedAvgPriorConfig()
    not_true_ft: NotTrueFtConfig = NotTrueFtConfig()
    lp_ft: LpFtConfig = LpFtConfig()
    fedntd: FedNTDConfig = FedNTDConfig()
    fedprox: FedProxConfig = FedProxConfig()
    ditto: DittoConfig = DittoConfig()
    centralised: CentralisedConfig = CentralisedConfig()
    feddpa_f: FedDpaFConfig = FedDpaFConfig()
    feddpa_t: FedDpaTConfig = FedDpaTConfig()
    fedrep: FedRepConfig = FedRepConfig()
    fedrod: FedRoDConfig = FedRoDConfig()
    server: ServerConfig = ServerConfig()
    channel: ChannelConfig = ChannelConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _has_a_round(self) -> Self:
        if not self.stage1.rounds + self.stage2.rounds:
            raise ValueError("stage1.rounds and stage2.rounds must not both be 0")
        return self

    @model_validator(mode="after")
    def _has_rounds_as_its_methods_need_them(self) -> Self:
        self._stages()
        return self

    def _stages(self) -> dict[str, tuple[Stage, ...]]:
        """Of the method and its rivals, by name."""
        return {method: stages_of(self, method) for method in (self.method, *self.rivals)}

    @model_validator(mode="after")
    def _has_the_heads_that_are_trained(self) -> Self:
        if self.task.kind != "causal_lm":
            return self
        for method, stages in self._stages().items():
            if any(stage.heads for stage in stages):
                raise ValueError(
                    f'{method} trains a head of its own, and task.kind = "causal_lm" has none to '
                    "train: its head is the model's output embedding"
                )
        return self

    @model_validator(mode="after")
    def _has_heads_to_fit(self) -> Self:
        linear = self.task.head == "linear"
        for name, settings in (("stage1", self.stage1), ("stage2", self.stage2)):
            if not (settings.head_steps or settings.head_lr):
                continue
            methods = self._stages()
            trained = [
                bool(stage.heads_of(phase, linear))
                for stages in methods.values()
                for stage in stages
                for phase in stage.phases
                if stage.name == name
            ]
            if trained and not any(trained):
                raise ValueError(
                    f"{name}.head_steps and {name}.head_lr are for heads that are trained, and "
                    f"{', '.join(methods)} train none in {name}: leave them at 0"
                    + ("" if self.task.kind == "causal_lm" else ', or set task.head = "linear"')
                )
        return self

    @model_validator(mode="after")
    def _has_the_examples_that_are_asked_for(self) -> Self:
        sal, data = self.sal, self.data
        queue = sal.enabled and sal.trigger == "capability_queue"
        for method, stages in self._stages().items():
            gated = any(p.examples == "gate" for stage in stages for p in stage.phases)
            if gated and not data.gate:
                raise ValueError(
                    f"{method} trains its gate on the examples of data.gate, which is 0: set "
                    "mofm.gate_data=train, or data.gate above 0"
                )
            wakes = queue and sal.start_blocks < sal.max_blocks and any(s.wakes for s in stages)
            if wakes and not data.val:
                raise ValueError(
                    'sal.trigger = "capability_queue" watches scores on the examples of data.val, '
                    "which is 0: choose another sal.trigger, or data.val above 0"
                )
        return self

    @model_validator(mode="after")
    def _has_clusters_to_choose_from(self) -> Self:
        if self.mofm.eigengap and self.mofm.clusters < 3:
            raise ValueError(
                "mofm.eigengap chooses between two and mofm.clusters clusters: mofm.clusters must "
                f"be at least 3, got {self.mofm.clusters}"
            )
        return self

    @model_validator(mode="after")
    def _has_budgets_where_they_can_be(self) -> Self:
        if self.sal.scope == "global":
            return self
        for method, stages in self._stages().items():
            if not all(stage.budgets for stage in stages):
                raise ValueError(
                    f'{method} needs every block of every client; sal.scope = "client" gives some '
                    'clients fewer: set it to "global"'
                )
        return self


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file (or the defaults) with ``key=value`` overrides on top.

    A value is read as TOML where it parses as TOML, else as a plain string: ``data.alpha=0.1``,
    ``method=fedavg``.

    Raises:
        ConfigError: a line for every mistake.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"the configuration {path} cannot be read: {error.strerror}"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration {path} is not valid TOML: {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"an override must look like key=value, e.g. stage1.rounds=4; got {override!r}"
            )
        _put(tree, key, _parse(text))
    try:
        return Config.model_validate(_over(Config(), tree))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(in_words(detail, Config) for detail in error.errors())
        ) from None


def to_toml(config: Config) -> str:
    """Every setting as TOML; :func:`load_config` reads it back equal."""
    return tomli_w.dumps(_plain(config.model_dump()))


def explain(config: Config) -> str:
    """The same with each setting's meaning and limits as a comment above it."""
    return "\n".join(explained(config)) + "\n"


def explain_methods(config: Config) -> str:
    """The card of every method and its own settings, as they are in ``config``."""
    cards: list[str] = []
    for name, (module, section) in ALGORITHMS.items():
        lines = [name, textwrap.indent((module.__doc__ or "").strip(), "  ")]
        if section is not None:
            own = "\n".join((f"[{section}]", *explained(getattr(config, section))))
            lines += ["", textwrap.indent(own, "  ")]
        cards.append("\n".join(lines))
    return "\n\n".join(cards) + "\n"


# Reading ------------------------------------------------------------------------------------------


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _names(key: str) -> list[str]:
    """The parts of a dotted key as TOML reads them: ``data.class_names."J18.9"`` has three."""
    names: list[str] = []
    try:
        found: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        found = 0
    while found:
        [(name, found)] = found.items()
        names.append(name)
    return names or key.split(".")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = _names(key)
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    tree[leaf] = value


def _over(section: Section, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A section's settings with those of ``tree`` in their place, at any depth."""
    merged = dict(section)
    for key, value in tree.items():
        known = merged.get(key)
        if isinstance(known, Section) and isinstance(value, dict):
            value = _over(known, value)
        merged[key] = value
    return merged


def _plain(value: Any) -> Any:
    """What TOML can hold: no None (an absent key means the default), lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
