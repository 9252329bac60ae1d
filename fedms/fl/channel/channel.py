"""The channel of one method's run: its link, how a round's updates become one, what it spends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from fedms.fl.algorithms import Stage, stages_of
from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.channel.link import Link
from fedms.fl.channel.privacy import Guarantee, guarantee
from fedms.fl.channel.robust import Robust, bound, least
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.data.sampling import cohort_size, draw_cohort, draw_each, generator
from fedms.fl.sal import SalConfig
from fedms.fl.types import ConfigError, State


@dataclass(frozen=True)
class Channel:
    """What the settings say for these stages and so many clients.

    Attributes:
        promise: of privacy, or None.
    """

    settings: ChannelConfig
    stages: tuple[Stage, ...]
    clients: int
    fraction: float
    seed: int
    promise: Guarantee | None

    @classmethod
    def of(cls, config: Any, clients: int) -> Self:
        """The channel of ``config.method`` on so many clients.

        Raises:
            ConfigError: the method or another setting voids what the channel's settings ask for.
        """
        settings, stages = config.channel, stages_of(config)
        fraction, promise = config.server.fraction_train, None
        _check_cohort(config.method, stages, cohort_size(clients, fraction))
        if settings.privacy.clip:
            _check_privacy(config.method, stages, config.sal)
            releases = sum(stage.settings.rounds for stage in stages if stage.shares)
            promise = guarantee(settings.privacy, fraction, clients, releases)
        channel = cls(settings, stages, clients, fraction, config.seed, promise)
        if settings.aggregate != "mean":
            _check_robust(config.method, channel, config.sal)
        return channel

    @property
    def link(self) -> Link:
        """Both ends of the wire."""
        return Link(self.settings)

    def cohort(self, client_ids: Sequence[str], round: int) -> list[str]:
        """One round's clients; under privacy each is drawn by itself."""
        draw = draw_each if self.promise else draw_cohort
        return draw(client_ids, self.fraction, self.seed, round)

    def aggregate(self, stage: Stage, reference: State, round: int) -> Aggregate:
        """How the updates of a round become one.

        Args:
            reference: what the stage shares, with the values that the server sent.
        """
        if self.promise:
            seed = int(generator(self.seed, "privacy", round).integers(2**63 - 1))
            draws, expected = torch.Generator().manual_seed(seed), self.fraction * self.clients
            return self.promise.aggregate(reference, self.settings.privacy.clip, expected, draws)
        rule = self.settings.aggregate
        if rule == "mean":
            return stage.aggregate
        return Aggregate(finish=Robust(rule, self.hostile, reference), weight="clients", each=True)

    @property
    def hostile(self) -> int:
        """How many of a cohort may be."""
        return bound(cohort_size(self.clients, self.fraction), self.settings.hostile)

    def epsilon(self, round: int) -> float | None:
        """What the rounds up to this one have spent; None without privacy or without noise."""
        if self.promise is None or not self.promise.noise:
            return None
        releases, left = 0, round
        for stage in self.stages:
            rounds = min(left, stage.settings.rounds)
            releases += rounds if stage.shares else 0
            left -= rounds
        return self.promise.epsilon(releases)


def _check_cohort(method: str, stages: tuple[Stage, ...], drawn: int) -> None:
    least = max(stage.least for stage in stages)
    if drawn < least:
        raise ConfigError(f"{method} as it is set needs a cohort of {least} clients, got {drawn}")


def _check_privacy(method: str, stages: tuple[Stage, ...], sal: SalConfig) -> None:
    """Refuse what would release something else than clipped, noised means of drawn clients."""
    _check_apart(method, stages, "none is drawn and clipped by itself, so no epsilon holds")
    _check_mean(method, stages, "has no bound on what one client moves, so no epsilon holds")
    if method == "fedavg_prior" or any(stage.prior or stage.priors for stage in stages):
        raise ConfigError(
            "prior, eval.priors and fedavg_prior tell clients everyone's label frequencies without "
            "noise: with channel.privacy leave them out"
        )
    if sal.order == "importance":  # it is asked for whatever the method, with SAL or without
        raise ConfigError(
            'sal.order = "importance" reads gradients of the clients\' data, without noise: '
            "with channel.privacy choose another order"
        )
    if sal.enabled and sal.trigger == "capability_queue" and any(stage.wakes for stage in stages):
        raise ConfigError(
            'sal.trigger = "capability_queue" lets scores on the clients\' data decide what is '
            'trained, without noise: with channel.privacy set sal.trigger to "every" or '
            '"all_at_once", or sal.enabled to false'
        )


def _check_robust(method: str, channel: Channel, sal: SalConfig) -> None:
    """Refuse what cannot be compared client by client, and cohorts that are too small."""
    rule, drawn = channel.settings.aggregate, cohort_size(channel.clients, channel.fraction)
    _check_apart(method, channel.stages, f"there are no updates for a {rule}")
    _check_mean(method, channel.stages, f"has no {rule}")
    if sal.scope == "client":
        raise ConfigError(
            f'channel.aggregate = "{rule}" compares whole updates; with sal.scope = "client" '
            "they hold different blocks"
        )
    if drawn < least(rule, channel.hostile):
        raise ConfigError(
            f'channel.aggregate = "{rule}" against {channel.hostile} hostile clients needs a '
            f"cohort of {least(rule, channel.hostile)}, got {drawn}: lower channel.hostile"
        )


def _check_apart(method: str, stages: tuple[Stage, ...], why: str) -> None:
    if any(stage.pooled for stage in stages):
        raise ConfigError(f"{method} trains on all clients' examples in one place: {why}")


def _check_mean(method: str, stages: tuple[Stage, ...], why: str) -> None:
    for stage in stages:
        if stage.shares and replace(stage.aggregate, weight="examples") != Aggregate():
            raise ConfigError(f"{method} aggregates by a rule of its own, which {why}")
