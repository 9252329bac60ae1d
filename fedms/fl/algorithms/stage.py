"""A federated algorithm's stages: each declares what is trained, sent and predicted with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedms.fl.config import StageConfig


@dataclass(frozen=True)
class Stage:
    """Some rounds with one rule.

    Attributes:
        name: as written in the metrics.
        settings: rounds, local steps, batch size, learning rate.
        trains: prefixes of the parameter names that a client trains (``global.``, ``local.``,
            ``gate.``).
        shares: prefixes of those that it sends; the server averages them. What is trained and not
            shared stays with the client.
        frozen: prefixes that a client needs but nobody trains any more; sent once.
        predicts: whose prediction is a client's own: "base", "global", "local" or the "mixture" of
            both experts.
        local_from: what a client's local expert starts from.
        holds_out_gate: whether the client's gate examples are kept out of the experts' training.
        wakes: whether SAL watches the global score in these rounds; without such a stage all its
            blocks are awake from the start.
    """

    name: str
    settings: StageConfig
    trains: tuple[str, ...]
    shares: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    predicts: Literal["base", "global", "local", "mixture"] = "global"
    local_from: Literal["global", "zero"] = "global"
    holds_out_gate: bool = False
    wakes: bool = False
