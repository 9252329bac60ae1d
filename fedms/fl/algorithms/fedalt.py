"""FedALT: a client's own expert and the frozen rest of the world, weighed per layer and token.

arXiv 2503.11880. In every linear y = W x + s (g_0 B_0 A_0 + g_1 B_1 A_1) x with g = softmax(R x),
where 0 is the mean of the other clients' experts (of A and of B apart) and 1 is the client's own,
which no average ever replaces. Here the server holds the mean of all, which is a newcomer's 0, and
clients send by how much theirs has changed; so a cohort may be a part of the clients.

Trained: the client's own expert and the mixer R.
Sent: the change of the own expert; the mean of all is sent back.
Kept: the own expert, the mixer, and what was last sent.
Predicted: by both experts under the mixer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedms.fl.algorithms.stage import Aggregate, Phase, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.types import State, renamed, select

LORA = ("own.*.lora_?",)
OWN = ("own.*", "mixer.*")


def start(received: State, kept: State) -> State:
    """Rest = (n mean - own last) / (n - 1), n being the clients that are in the mean."""
    one = torch.zeros(1)
    was, members = kept.get("members.last", one), received.get("members.sum", one)
    begun = {**select(received, OWN), **kept, "members.last": was}
    for name, fresh in select(received, LORA).items():
        layer = name.removeprefix("own.")
        last = kept.get(f"last.{layer}", torch.zeros(fresh.shape, dtype=fresh.dtype))
        total = members * received.get(f"rest.{layer}", last)
        others = (total - last) / torch.clamp(members - was, min=1.0)
        begun |= {f"last.{layer}": last, f"rest.{layer}": others}
    return begun


def end(now: State, began: State) -> State:
    """Send the change; keep the expert, the mixer, and what the mean now holds of the client."""
    own = renamed(select(now, LORA), "own.", "")
    last, change = ({f"{x}.{n}": t for n, t in own.items()} for x in ("last", "sum"))
    change = {name: t - began[name.replace("sum.", "last.", 1)] for name, t in change.items()}
    joins = 1.0 - began["members.last"]
    members = {"members.sum": joins, "members.last": torch.ones_like(joins)}
    return {**select(now, OWN), **last, **change, **members}


def add(server: State, sums: State, weights: dict[str, float]) -> State:
    """The mean of all, of as many more as have joined."""
    before = server.get("members.sum", torch.zeros(1))
    members = before + sums["members.sum"]
    after = {"members.sum": members}
    for name, change in select(sums, ("sum.*",)).items():
        rest = name.replace("sum.", "rest.", 1)
        after[rest] = (before * server.get(rest, 0.0) + change) / torch.clamp(members, min=1.0)
    return {**server, **after}


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the mixture, [S]."""

    def __call__(self, view: View) -> Tensor:
        return view.mean(view.nll("rest", "own", router="mixer"))


def predict(view: View) -> Tensor:
    """Log-probabilities [P, C] of the mixture."""
    return view.log_p("rest", "own", router="mixer")


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    both = {"phases": (Phase(OWN, Loss()),), "start": start, "end": end, "predict": predict}
    sums = Aggregate(finish=add, weight="clients", adds=True)
    sent = {"shares": ("sum.*", "members.sum"), "receives": ("rest.*", "members.sum")}
    # members are counted, not the blocks that each of them sends
    mixed = {"experts": ("own",), "routers": (("mixer", 2),), "budgets": False}
    return tuple(
        Stage(*each, **both, **sent, **mixed, aggregate=sums, common=None) for each in rounds
    )
