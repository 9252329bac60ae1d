"""One visit of S clients side by side: what they begin with, their phases, what they leave.

The clients' examples stand one after the other in a batch and each row goes through its own
client's experts; the optimiser steps all of them at once. Nothing of one client reaches another: a
visit gives each what a visit of its own gives, and a value that is not finite stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fedms.fl.algorithms import Phase, Stage
from fedms.fl.data.federation import ClientData
from fedms.fl.data.sampling import draw_batches, generator
from fedms.fl.model.model import Model
from fedms.fl.model.view import View
from fedms.fl.types import ClientFailure, State, Update, select


@dataclass(frozen=True)
class Visit:
    """A client that is to be visited.

    Attributes:
        client: its data.
        kept: what it holds of its own.
        blocks: the awake blocks that it trains.
    """

    client: ClientData
    kept: State
    blocks: tuple[int, ...]


def prepare(model: Model, stage: Stage, awake: Sequence[int]) -> None:
    """Bring the model to a stage: the blocks whose experts take part, its small networks."""
    model.slots.set_awake(awake)
    model.build(dict(stage.modules))


def received(model: Model, stage: Stage, server: State) -> State:
    """What every client of a stage has from the server, over what nobody has trained yet."""
    sent = select(server, (*stage.sends_every_round, *stage.frozen))
    return {**model.fresh(stage.experts, stage.heads, stage.routers), **sent}


def class_counts(model: Model, clients: Iterable[ClientData]) -> Tensor:
    """int64 [S, C]: each client's own training and gate examples by class."""
    classes = model.task.num_classes
    counts = [np.bincount(model.task.targets(client.own), minlength=classes) for client in clients]
    return torch.from_numpy(np.stack(counts)).to(model.backbone.device)


def visit(
    model: Model, stage: Stage, visits: Sequence[Visit], server: State, round: int, seed: int
) -> list[Update | ClientFailure]:
    """Train S clients for one round.

    Args:
        model: its awake blocks are the server's, its modules the stage's.
        server: the server's state.
        round: counts from 1; with ``seed`` it decides the mini-batches and dropout.

    Returns:
        in the order of ``visits``, an update or why there is none: the client has nothing to train
        on, its loss is not finite, or what it leaves is not.
    """
    stage = stage.in_round(round)
    able = [each for each in visits if len(_examples(stage.phases[0], each.client))]
    done = dict(zip(map(id, able), _train(model, stage, able, server, round, seed), strict=True))
    nothing = ClientFailure("it has no training examples")
    return [done.get(id(each), nothing) for each in visits]


def _train(
    model: Model, stage: Stage, visits: Sequence[Visit], server: State, round: int, seed: int
) -> list[Update | ClientFailure]:
    if not visits:
        return []
    sent = received(model, stage, server)
    model.slots.load([stage.start(sent, each.kept) for each in visits], stage.trains)
    trained = select(model.slots.live, stage.trains)
    began = {**model.slots.live, **{name: leaf.clone() for name, leaf in trained.items()}}
    counts = class_counts(model, [each.client for each in visits])
    losses = [
        _run_phase(model, stage, number, visits, began, counts, round, seed)
        for number in range(len(stage.phases))
    ]
    history = torch.cat(losses).to("cpu", torch.float64)  # the only time a visit waits for a device
    now = {name: leaf.to("cpu") for name, leaf in model.slots.live.items()}
    before = {name: leaf.to("cpu") for name, leaf in began.items()}
    first = next(filter(None, map(len, losses)), 0)
    return [
        _leave(
            model,
            stage,
            each,
            model.slots.of(s, now),
            model.slots.of(s, before),
            history[:, s],
            first,
        )
        for s, each in enumerate(visits)
    ]


def _run_phase(
    model: Model,
    stage: Stage,
    number: int,
    visits: Sequence[Visit],
    began: State,
    counts: Tensor,
    round: int,
    seed: int,
) -> Tensor:
    """Optimise, and return the clients' losses [steps, S]."""
    phase = stage.phases[number]
    examples = [_examples(phase, each.client) for each in visits]
    leaves = select(model.slots.live, phase.trains)
    none = torch.zeros(0, len(visits), device=counts.device)
    if not leaves or not any(map(len, examples)):
        return none
    seeds = _seeds(visits, number, round, seed)
    own = [each.client.own for each in visits]
    idle = _idle(model, visits, examples, leaves)
    losses: list[Tensor] = []
    with learning(leaves.values()):
        optimizer = _optimizer(model, stage, phase, leaves)
        view: View | None = None
        for rows in _batches(model, stage, number, visits, examples, round, seed):
            if view is None or not phase.whole:
                view = View(model, rows, counts, began, seeds, own)
            loss = phase.loss(view)
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            view.forget_trained()
            with torch.no_grad():
                for name, slot in idle:
                    leaves[name][slot] = began[name][slot]
            losses.append(loss.detach())
    return torch.stack(losses) if losses else none


def _examples(phase: Phase, client: ClientData) -> np.ndarray:
    return {"train": client.train, "gate": client.gate, "own": client.own}[phase.examples]


def _batches(
    model: Model,
    stage: Stage,
    number: int,
    visits: Sequence[Visit],
    examples: Sequence[np.ndarray],
    round: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, ...]]:
    """For each step the examples of each client, one step at a time."""
    phase = stage.phases[number]
    steps = stage.settings.local_steps if phase.steps is None else phase.steps
    if phase.whole:
        return repeat(tuple(examples), steps)
    names = (round, number) if number else (round,)
    return zip(
        *(
            draw_batches(
                own,
                model.task.lengths[own],
                stage.settings.batch_size,
                steps,
                generator(seed, "batches", *names, each.client.client_id),
            )
            for own, each in zip(examples, visits, strict=True)
        ),
        strict=True,
    )


def _seeds(visits: Sequence[Visit], number: int, round: int, seed: int) -> list[torch.Generator]:
    """What each client's dropout draws from."""
    names = (round, number) if number else (round,)
    return [
        torch.Generator().manual_seed(
            int(generator(seed, "dropout", *names, each.client.client_id).integers(2**63 - 1))
        )
        for each in visits
    ]


def _idle(
    model: Model, visits: Sequence[Visit], examples: Sequence[np.ndarray], leaves: State
) -> list[tuple[str, int]]:
    """(name, slot) of what a client does not train: a block beyond its budget, or no examples.

    AdamW moves a slot without a gradient too, so these are put back after each step.
    """
    return [
        (name, s)
        for s, (each, own) in enumerate(zip(visits, examples, strict=True))
        for name in leaves
        if not len(own) or not _trains(model, each, name)
    ]


def _trains(model: Model, visit: Visit, name: str) -> bool:
    block = model.slots.block_of(name)
    return block is None or block in visit.blocks


def _optimizer(model: Model, stage: Stage, phase: Phase, leaves: State) -> torch.optim.Optimizer:
    usual = stage.settings.lr if model.slots.heads_are_trained else 0.001
    rates = (*phase.rates, ("*.head.weight", stage.settings.head_lr or usual))
    own_rates = [(select(leaves, (pattern,)), lr) for pattern, lr in rates]
    apart = {name for group, _ in own_rates for name in group}
    rest = [leaf for name, leaf in leaves.items() if name not in apart]
    lr, decay = phase.lr, phase.weight_decay
    return torch.optim.AdamW(
        [{"params": rest}, *({"params": [*group.values()], "lr": lr} for group, lr in own_rates)],
        lr=stage.settings.lr if lr is None else lr,
        weight_decay=stage.settings.weight_decay if decay is None else decay,
        foreach=True,
    )


def _leave(
    model: Model,
    stage: Stage,
    visit: Visit,
    now: State,
    began: State,
    losses: Tensor,
    first: int,
) -> Update | ClientFailure:
    """A client's update; ``losses`` [steps] of all phases, ``first`` of them the first one's."""
    for step, value in enumerate(losses.tolist()):
        if not math.isfinite(value):
            where = f"local step {step + 1} of {first}" if step < first else "a later phase"
            return ClientFailure(f"its training loss became {value} at {where}")
    left = {
        name: tensor.clone()
        for name, tensor in stage.leaves(now, began).items()
        if _trains(model, visit, name)
    }
    for name, tensor in left.items():
        if not torch.isfinite(tensor).all():
            return ClientFailure(f"its {name} is not finite")
    shared = select(left, stage.shares)
    return Update(
        client_id=visit.client.client_id,
        num_examples=len(_examples(stage.phases[0], visit.client)),
        shared=shared,
        kept={**visit.kept, **{name: t for name, t in left.items() if name not in shared}},
        train_loss=float(losses[:first].mean()),
        steps=first,
    )


class learning:
    """Within the block these leaves, and no others, require a gradient."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self._leaves = list(leaves)

    def __enter__(self) -> None:
        for leaf in self._leaves:
            leaf.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for leaf in self._leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
