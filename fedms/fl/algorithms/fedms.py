"""FedMS: Federated Learning with Mixture of Sparsely Activated Foundation Models.

The paper is arXiv 2312.15926. Stage 1 trains the global expert by federated averaging while SAL
wakes the blocks. Stage 2 freezes it; every client trains a local expert and a gate network, and
only the gate adapter is sent and averaged. What is this library's reading of it is in DESIGN.md.

With ``clusters`` the last rounds of stage 1 train a middle expert a cluster of like clients on the
frozen global one, whose place their sum takes in the mixture: HiLoRA's root, cluster and leaf.

Trained: stage 1 the awake blocks' global expert, then each cluster's; stage 2 a local expert, then
the gate network.
Sent: stage 1 the awake blocks' expert, global or of the cluster; stage 2 the gate adapter.
Kept: the local expert and the gate's last linear.
Predicted: by the mixture of both experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedms.fl.algorithms.clusters import PATH, cluster_of, clustered
from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import from_global, under_global_head
from fedms.fl.algorithms.losses import NotTrueDivergence, balanced_nll
from fedms.fl.algorithms.stage import Examples, Phase, Rounds, Stage, StageConfig
from fedms.fl.model.gate import (
    Gate,
    gate_width,
    log_prior_of_counts,
    mixed_features,
    mixed_log_p,
    statistics,
)
from fedms.fl.model.slots import Path
from fedms.fl.model.view import View
from fedms.fl.settings import Count, Natural, NotNegative, Positive, Section, Share
from fedms.fl.types import select


class Settings(Section):
    """The Mixture of Foundation Models and its gate network."""

    combine: Literal["probabilities", "features", "logits", "layer"] = "probabilities"
    """What of the two experts is mixed; "layer": both inside every linear."""
    gate_input: Literal["experts", "base", "both"] = "experts"
    """What the gate reads: what the experts say, the frozen base's feature, or both."""
    gate_data: Literal["held_out", "train"] = "held_out"
    """Whether the gate trains on ``data.gate``'s examples or on the experts' own. Where ``combine``
    is "layer" it trains with the local expert, by one loss, on all of a client's: what follows on
    the gate's own steps, its anchor and the balance of its loss is without effect there."""
    gate: Literal["learned", "fixed"] = "learned"
    """"fixed": the local expert always weighs ``weight``."""
    weight: Share = 0.5
    """What the local expert weighs where the gate is fixed; what a learned one is anchored to."""
    share_adapter: bool = True
    """False: the gate adapter stays on its client (an ablation)."""
    local_from: Literal["global", "zero", "residual"] = "global"
    """What a local expert starts from; "residual": from zero, on top of the frozen global one. A
    trained head starts as the global one's."""
    local_loss: Literal["own", "mixture", "balanced", "not_true"] = "own"
    """What the local expert lowers: its own cross-entropy or the mixture's; its own with all
    classes alike; or its own, distilled from the global expert over the wrong classes. A layer
    mixture has the mixture's."""
    distill: NotNegative = 1.0
    """Weight of the distillation of ``local_loss = "not_true"``."""
    head_steps: Natural = 0
    """Full-batch steps in one visit of a head of the local expert's own, on features that are
    computed once; then expert and head are trained together (LP-FT). 0: no such steps, and a head
    of its own only where the task has a trained one."""
    orthogonal: NotNegative = 0.0
    """Weight of |B_global' B_local|^2, summed over linears, in the local expert's loss (HiLoRA)."""
    clusters: Natural = 0
    """Clusters of clients, each with an expert on top of the global one (HiLoRA); 0: none. A local
    expert that begins from the global one, or lies on top of it, does so with its cluster's."""
    cluster_rounds: Count = 2
    """The last of stage 1's rounds, in which the clusters' experts are trained."""
    eigengap: bool = False
    """Between two and ``clusters``: as many as the clients' likeness says (largest eigengap)."""
    bottleneck: Annotated[int, Field(ge=1, le=4096)] = 16
    """Width of the gate adapter."""
    gate_steps: Natural = 30
    """Full-batch steps of the gate in one visit."""
    gate_lr: Positive = 0.01
    """Adam's learning rate for the gate."""
    balance: NotNegative = 1.0
    """Exponent of the class weights of the gate's loss: 0 weighs examples alike, 1 classes."""
    anchor: NotNegative = 3.0
    """Weight of KL(``weight`` || the gate's weights) in the gate's loss.

    A client's own data alone always asks for the local expert.
    """

    @property
    def shared(self) -> Path:
        """The experts of the mixture's first half, which a client does not have alone."""
        return PATH if self.clusters else ("global",)

    @property
    def local(self) -> Path:
        """The experts of its second half."""
        under = {"global": self.shared[:-1], "zero": (), "residual": self.shared}
        return (*under[self.local_from], "local")

    @model_validator(mode="after")
    def _is_no_residual_of_a_layer(self) -> Self:
        if self.combine == "layer" and self.local_from == "residual":
            raise ValueError(
                'local_from must not be "residual" where combine = "layer" adds both experts in '
                'every linear anyway: "zero" is the same'
            )
        return self

    @model_validator(mode="after")
    def _is_no_layer_of_three(self) -> Self:
        if self.combine == "layer" and self.clusters:
            raise ValueError(
                'combine = "layer" weighs two experts in every linear, and with '
                f"mofm.clusters = {self.clusters} there are three: choose another, or no clusters"
            )
        return self

    @model_validator(mode="after")
    def _is_no_layer_with_a_loss_of_its_own(self) -> Self:
        if self.combine == "layer" and self.local_loss not in ("own", "mixture"):
            raise ValueError(
                'combine = "layer" trains gate and local expert together, by the mixture\'s '
                f'cross-entropy: mofm.local_loss must not be "{self.local_loss}"'
            )
        return self

    @model_validator(mode="after")
    def _gate_can_read_its_inputs(self) -> Self:
        if self.combine == "layer" and self.gate_input != "base":
            raise ValueError(
                'combine = "layer" mixes the experts inside every linear, before either has said '
                f'anything: mofm.gate_input must be "base", got "{self.gate_input}"'
            )
        return self


def _what_they_say(view: View, slot: int, targets: Tensor, log_g: Tensor, log_l: Tensor) -> Tensor:
    """The gate's inputs [p, 10] for some answers of one client."""
    return statistics(log_g, log_l, log_prior_of_counts(view.counts[slot].to(log_g.dtype)))


@dataclass(frozen=True)
class Weights:
    """What the gate says: weights [P, 2] of the global and the local expert."""

    settings: Settings

    def __call__(self, view: View) -> Tensor:
        if self.settings.gate == "fixed":
            local = view.constant(self.settings.weight, 1)
            return torch.cat([1.0 - local, local], dim=-1)
        inputs: list[Tensor] = []
        if self.settings.gate_input != "base":
            shared, local = self.settings.shared, self.settings.local
            inputs.append(view.over(_what_they_say, shared, local, detached=True))
        if self.settings.gate_input != "experts":
            inputs.append(view.features())
        return view.call("gate", torch.cat(inputs, dim=-1))


@dataclass(frozen=True)
class Mixture:
    """The mixture's log-probabilities [P, C]."""

    settings: Settings

    def __call__(self, view: View) -> Tensor:
        return self.log_p(view, Weights(self.settings)(view))

    def log_p(self, view: View, weights: Tensor) -> Tensor:
        """Of experts that weigh ``weights`` [P, 2]."""
        how = self.settings.combine
        shared, local = self.settings.shared, self.settings.local
        if how == "layer":
            return view.log_p("global", "local", gates=view.first(weights))
        if how == "features":
            z = mixed_features(weights, view.features(*shared), view.features(*local))
            return view.log_p_of(z, "local")
        return mixed_log_p(how, weights, view.log_p(*shared), view.log_p(*local))

    def nll(self, view: View, weights: Tensor) -> Tensor:
        """The right answers' negative log-probabilities [P], of experts that weigh ``weights``."""
        if self.settings.combine != "probabilities":
            return -self.log_p(view, weights).gather(-1, view.targets[:, None]).squeeze(-1)
        shared, local = self.settings.shared, self.settings.local
        each = -torch.stack([view.nll(*shared), view.nll(*local)], dim=-1)
        # at a weight of exactly 0 the log's gradient would be NaN
        return -(weights.clamp(min=torch.finfo(weights.dtype).tiny).log() + each).logsumexp(-1)


@dataclass(frozen=True)
class LocalLoss:
    """What the local expert (and the gate of a layer mixture) lowers, [S]."""

    settings: Settings

    def __call__(self, view: View) -> Tensor:
        settings = self.settings
        how = "mixture" if settings.combine == "layer" else settings.local_loss
        if how == "mixture":
            loss = Mixture(settings).nll(view, Weights(settings)(view))
        elif how == "balanced":
            loss = view.over(balanced_nll, settings.local)
        else:
            loss = view.nll(*settings.local)
        if how == "not_true":
            kl = view.over(NotTrueDivergence(1.0), settings.local, settings.shared)
            loss = loss + settings.distill * kl
        if settings.orthogonal == 0.0:
            return view.mean(loss)
        return view.mean(loss) + settings.orthogonal * overlap(view)


def overlap(view: View) -> Tensor:
    """|B_global' B_local|^2, summed over the linears, [S]: 0 where they write apart."""
    products = [
        view.live[name.replace("local.", "global.", 1)].mT @ local
        for name, local in select(view.live, ("local.*.lora_B",)).items()
    ]
    return torch.stack([product.square().sum((1, 2)) for product in products]).sum(0)


@dataclass(frozen=True)
class GateLoss:
    """The mixture's loss with classes weighing frequency ** -balance, plus the anchor, [S]."""

    settings: Settings

    def __call__(self, view: View) -> Tensor:
        weights = Weights(self.settings)(view)
        balance = view.class_counts() ** -self.settings.balance
        nll = view.mean(Mixture(self.settings).nll(view, weights), balance)
        local = view.constant(self.settings.weight, 1)
        wanted = torch.cat([1.0 - local, local], dim=-1)
        kl = torch.xlogy(wanted, wanted / weights).sum(-1)
        return nll + self.settings.anchor * view.mean(kl)


@dataclass(frozen=True)
class BuildGate:
    """The gate network for a backbone of some width D, for any number of classes C."""

    settings: Settings

    def __call__(self, width: int, num_classes: int) -> nn.Module:
        return Gate(gate_width(self.settings.gate_input, width), self.settings.bottleneck)


STARTS = {"global": from_global, "zero": under_global_head, "residual": under_global_head}


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    """ValueError: the clusters' experts are to be trained in more rounds than stage 1 has."""
    first, (name, second) = rounds
    learned, in_layers = settings.gate == "learned", settings.combine == "layer"
    held_out = learned and not in_layers and settings.gate_data == "held_out"
    examples = "train" if held_out else "own"
    expert = Phase(("local.*",), LocalLoss(settings), examples)
    if not learned:
        phases = (expert,)
    elif in_layers:
        rates = (("gate.*", settings.gate_lr),)
        phases = (replace(expert, trains=("local.*", "gate.*"), rates=rates),)
    else:
        gate = Phase(
            ("gate.*",),
            GateLoss(settings),
            "gate" if held_out else "own",
            whole=True,
            steps=settings.gate_steps,
            lr=settings.gate_lr,
            weight_decay=0.0,
        )
        phases = (expert, gate)
    if settings.head_steps:
        phases = (expert.fitting(("local.head.*",), settings.head_steps), *phases)
    return (
        *_shared_experts(settings, *first, examples),
        Stage(
            name=name,
            settings=second,
            phases=phases,
            experts=(*settings.shared, "local"),
            heads=("local",) if settings.head_steps else (),
            shares=("gate.adapter.*",) if learned and settings.share_adapter else (),
            frozen=tuple(f"{expert}.*" for expert in settings.shared),
            group=cluster_of if settings.clusters else None,
            modules=(("gate", BuildGate(settings)),) if learned else (),
            start=STARTS[settings.local_from],
            predict=Mixture(settings),
            weights=Weights(settings),
        ),
    )


def _shared_experts(
    settings: Settings, name: str, first: StageConfig, examples: Examples
) -> tuple[Stage, ...]:
    """Stage 1: the global expert, then one a cluster."""
    later = settings.cluster_rounds if settings.clusters else 0
    if later > first.rounds:
        raise ValueError(
            f"mofm.cluster_rounds are the last of stage1.rounds = {first.rounds}, got {later}"
        )
    stage = global_expert(name, first.replace(rounds=first.rounds - later))
    stage = replace(stage, phases=(replace(stage.phases[0], examples=examples),), wakes=True)
    if not settings.clusters:
        return (stage,)
    middle = clustered(first.replace(rounds=later), settings.clusters, settings.eigengap, examples)
    return stage, middle
