"""Which runs may be compared, by their settings: what is learnt from, and how it is learnt.

A block has one seed, one problem (``data``, ``task``, ``model``, who is scored on what, the share
of clients in a round) and one amount of training (rounds, local steps and examples of a client,
over both stages). How a method learns from it is the rest: its name, its own settings, ``lora``,
``sal`` where it wakes blocks, the channel, learning rates, how its rounds are split into stages.
What changes no result beyond rounding is neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from fedms.fl.algorithms import ALGORITHMS, stages_of, title
from fedms.fl.config import Config
from fedms.fl.runs.origin import flat_settings

PROBLEM = ("data.", "task.", "model.", "eval.split", "eval.clients", "eval.pooled_examples",
           "server.fraction_train")  # fmt: skip
NEITHER = ("seed", "method", "rivals", "engine.", "server.quorum", "model.device",
           "model.attention", "eval.batch_size", "eval.every", "eval.priors")  # fmt: skip
Settings = Mapping[str, Any]
DEFAULTS: Settings = dict(flat_settings(Config()))


@dataclass(frozen=True)
class Identity:
    """What a run is compared as.

    Attributes:
        problem: its settings, and the amount of training.
        content: digests of examples, clients and model: files of one name may have been changed.
        how: the settings of the method that it takes notice of.
    """

    algorithm: str
    seed: int
    problem: Settings
    content: tuple[str, ...]
    how: Settings


def identity_of(config: Config, content: Sequence[str] = ()) -> Identity:
    """Of one method's settings, as they are in its folder."""
    stages = (config.stage1, config.stage2)
    amount = {
        "rounds": sum(s.rounds for s in stages),
        "local_steps": sum(s.rounds * s.local_steps for s in stages),
        "local_examples": sum(s.rounds * s.local_steps * s.batch_size for s in stages),
    }
    noticed = _noticed(config)
    problem, how = {}, {}
    for key, value in flat_settings(config):
        if key.startswith(NEITHER):
            continue
        if key.startswith(PROBLEM):
            problem[key] = value
        elif noticed(key):
            how[key] = value
    return Identity(config.method, config.seed, {**problem, **amount}, tuple(content), how)


def _noticed(config: Config) -> Callable[[str], bool]:
    """Which settings a method takes notice of: a rival has those of its run's method, too.

    Not of numbers for what it has not switched on.
    """
    stages = stages_of(config)
    trains, sends, wakes = (
        any(getattr(stage, name) for stage in stages) for name in ("phases", "shares", "wakes")
    )
    others = {section for _, section in ALGORITHMS.values()} - {ALGORITHMS[config.method][1]}

    channel, wakes_by_scores = config.channel, wakes and config.sal.enabled
    switched_on = {
        "channel.topk_share": channel.codec == "topk",
        "channel.hostile": channel.aggregate != "mean",
        "channel.privacy.clip": True,
        "sal.max_blocks": True,
        "sal.order": True,
        "sal.scope": True,
        "sal.min_budget": config.sal.scope == "client",
        "sal.enabled": wakes,
        "eval.val_examples": wakes_by_scores,
    }

    def noticed(key: str) -> bool:
        section = key.partition(".")[0]
        if not trains:
            return key == "prior"
        if section == "channel" and not sends:
            return False
        if key in switched_on:
            return switched_on[key]
        if key.startswith("channel.privacy."):
            return channel.privacy.clip > 0.0
        if section == "sal":
            return wakes_by_scores
        return section not in others

    return noticed


# Names ------------------------------------------------------------------------------------------


def setting_names(identities: Sequence[Identity]) -> list[str]:
    """What is compared in, but for the seed: the data's name, and what differs beside it."""
    problems = [each.problem for each in identities]
    short = [_problem_name(problem, problems, whole=False) for problem in problems]
    names: dict[Hashable, str] = {}
    for problem, name in zip(problems, short, strict=True):
        key = _frozen(problem)
        if name in (other for k, other in names.items() if k != key):  # two files of one name
            name = _problem_name(problem, problems, whole=True)
        names.setdefault(key, name)
    contents: dict[Hashable, list[tuple[str, ...]]] = {}
    found = []
    for each in identities:
        known = contents.setdefault((_frozen(each.problem), each.seed), [])
        if each.content not in known:
            known.append(each.content)
        version = known.index(each.content)
        changed = f", data or model changed ({version})" if version else ""
        found.append(names[_frozen(each.problem)] + changed)
    return found


def _problem_name(problem: Settings, problems: Sequence[Settings], *, whole: bool) -> str:
    source = problem["data.source"]
    alike = [other for other in problems if other["data.source"] == source]
    parts = [source if whole else PurePath(source).name or source]
    parts += [_said(key, problem[key], whole) for key in _varying(alike) if key in problem]
    return ", ".join(parts)


def labels(identities: Sequence[Identity]) -> list[str]:
    """A method's name, and those of its settings that differ among the runs and are no default."""
    found = []
    for each in identities:
        alike = [other.how for other in identities if other.algorithm == each.algorithm]
        parts = [
            _said(key, each.how[key], whole=True)
            for key in _varying(alike)
            if key in each.how and each.how[key] != DEFAULTS[key]
        ]
        found.append(", ".join([title(each.algorithm), *parts]))
    return found


def _varying(settings: Sequence[Settings]) -> list[str]:
    """The keys that have several values, in order."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({_frozen(each.get(key)) for each in settings}) > 1]


def _said(key: str, value: Any, whole: bool) -> str:
    if isinstance(value, str):
        return f"{key}={value if whole else PurePath(value).name or value}"
    return f"{key}={json.dumps(value)}"


def _frozen(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True)
