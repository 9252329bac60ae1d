"""One client's visit: load what was received and kept, train, hand back what is shared and kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedms.fl.algorithms import Stage
from fedms.fl.data.federation import ClientData
from fedms.fl.data.sampling import draw_batches, generator
from fedms.fl.model.gate import Gate, log_prior_of_counts
from fedms.fl.model.resident import Resident
from fedms.fl.types import ClientFailure, State, Update


def initial_kept(resident: Resident, stage: Stage, server_state: State) -> State:
    """What a client has before its first visit of a stage: local expert, its part of the gate."""
    kept: State = {}
    if "local." in stage.trains:
        fresh = resident.foundation.fresh_expert("local")
        for name in resident.parameters(("local.",)):
            source = (
                server_state.get(name.replace("local.", "global.", 1))
                if stage.local_from == "global"
                else None
            )
            kept[name] = fresh[name] if source is None else source
    if "gate." in stage.trains:
        kept.update(
            {
                name: tensor
                for name, tensor in fresh_gate(resident).items()
                if not name.startswith(stage.shares)
            }
        )
    return kept


def fresh_gate(resident: Resident) -> State:
    """An untrained gate network, the same for everybody."""
    gate = Gate(resident.gate.linear.in_features, resident.config.mofm.bottleneck)
    return {f"gate.{name}": parameter.detach() for name, parameter in gate.named_parameters()}


def log_prior(resident: Resident, client: ClientData) -> Tensor:
    """Log label frequencies [C] of a client's own training and gate examples."""
    own = np.concatenate([client.train, client.gate])
    return log_prior_of_counts(torch.bincount(resident.labels[own], minlength=len(resident.head)))


def visit(
    resident: Resident,
    stage: Stage,
    client: ClientData,
    received: State,
    kept: State,
    blocks: Iterable[int],
    round: int,
) -> Update:
    """Train one client for one round.

    Args:
        resident: the model; its awake blocks are the server's.
        stage: what is trained and shared.
        client: its data.
        received, kept: states from the server and from the client's last visit.
        blocks: the awake blocks that this client trains.
        round: counts from 1; seeds the mini-batches.

    Raises:
        ClientFailure: the loss is not finite, or the client has nothing to train on.
    """
    seed, trained_blocks = resident.config.seed, set(blocks)
    resident.load(received)
    resident.load(kept)
    gate = resident.parameters([name for name in stage.trains if name.startswith("gate.")])
    experts = {
        name: parameter
        for name, parameter in resident.parameters(stage.trains).items()
        if name not in gate and resident.foundation.block_of(name) in trained_blocks
    }
    examples = client.train if stage.holds_out_gate else np.union1d(client.train, client.gate)
    if not len(examples):
        raise ClientFailure("it has no training examples")
    prior = log_prior(resident, client)
    batches = draw_batches(
        examples,
        resident.lengths[examples],
        stage.settings.batch_size,
        stage.settings.local_steps,
        generator(seed, "batches", round, client.client_id),
    )
    joint = gate if resident.config.mofm.combine == "layer" else {}
    with (
        learning([*experts.values(), *joint.values()]),
        resident.foundation.dropping_out(generator(seed, "dropout", round, client.client_id)),
    ):
        loss = _train_experts(
            resident, stage, [*experts.values()], [*joint.values()], batches, prior
        )
    if gate and not joint:
        with learning(gate.values()):
            held_out = client.gate if stage.holds_out_gate else examples
            _train_gate(resident, held_out, [*gate.values()], prior)
    state = {name: parameter.detach().clone() for name, parameter in {**experts, **gate}.items()}
    shared = {name: tensor for name, tensor in state.items() if name.startswith(stage.shares)}
    return Update(
        client_id=client.client_id,
        num_examples=len(examples),
        shared=shared,
        kept={**kept, **{name: t for name, t in state.items() if name not in shared}},
        train_loss=loss,
        steps=len(batches),
    )


class learning:
    """Within the block these parameters, and no others, require a gradient."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _train_experts(
    resident: Resident,
    stage: Stage,
    experts: list[Tensor],
    gate: list[Tensor],
    batches: list[np.ndarray],
    prior: Tensor,
) -> float:
    settings, mofm = stage.settings, resident.config.mofm
    groups = [{"params": experts}, {"params": gate, "lr": mofm.gate_lr}] if gate else experts
    optimizer = torch.optim.AdamW(
        groups, lr=settings.lr, weight_decay=settings.weight_decay, foreach=True
    )
    total = 0.0
    for step, batch in enumerate(batches):
        loss = _expert_loss(resident, stage, batch, prior)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ClientFailure(
                f"its training loss became {value} at local step {step + 1} of {len(batches)}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += value
    return total / len(batches)


def _expert_loss(resident: Resident, stage: Stage, batch: np.ndarray, prior: Tensor) -> Tensor:
    mofm, labels = resident.config.mofm, resident.labels[batch]
    if stage.predicts == "mixture" and (mofm.local_loss == "mixture" or mofm.combine == "layer"):
        return F.nll_loss(resident.mixture(batch, prior)[0], labels)
    expert = "local" if stage.predicts in ("local", "mixture") else "global"
    return F.nll_loss(resident.log_probs(resident.features(batch, (expert,))), labels)


def _train_gate(
    resident: Resident, examples: np.ndarray, gate: list[Tensor], prior: Tensor
) -> None:
    """Full-batch steps on the gate with both experts fixed.

    The loss is the mixture's, classes weighing frequency ** -balance, plus the anchor.
    """
    mofm = resident.config.mofm
    if not len(examples):
        return
    labels = resident.labels[examples]
    counts = torch.bincount(labels, minlength=len(resident.head)).clamp(min=1).to(prior.dtype)
    class_weights = counts**-mofm.balance
    with torch.no_grad():
        z_g, z_l = resident.expert_pair(examples)
    optimizer = torch.optim.Adam(gate, lr=mofm.gate_lr, foreach=True)
    for _ in range(mofm.gate_steps):
        log_p, weights = resident.mixture_of(examples, prior, z_g, z_l)
        drift = -0.5 * (2.0 * weights).log().sum(-1).mean()  # KL(one half || weights)
        optimizer.zero_grad(set_to_none=True)
        (F.nll_loss(log_p, labels, weight=class_weights) + mofm.anchor * drift).backward()
        optimizer.step()
