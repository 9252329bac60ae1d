"""Differential privacy of clients, with noise by the server (McMahan et al., arXiv 1710.06963).

Two federations are neighbours if one has one client more. A round is the Poisson-subsampled
Gaussian mechanism:

    cohort   every client joins with probability q = server.fraction_train, independently
    clip     d_k = (w_k - w) min(1, C / |w_k - w|), over all tensors of the update together
    release  w + (sum_k d_k + N(0, (z C)^2)) / (q n)

A client moves the sum by C at most, whoever it is and whatever it sends: the server clips what it
decoded. The denominator is the *expected* size of a cohort, a constant, and weights are 1: weights
by examples would make both the sum's sensitivity and the denominator a function of private data. A
client that fails counts as zero. Noise is added to every value that the stage shares, whether
somebody sent it or not, and an empty cohort releases noise.

Rounds compose by privacy loss distributions (dp-accounting). The budget decides z before the first
round; what has been spent is in every round's metrics.

The guarantee covers what the server releases (its states, the exported experts) to whoever does not
know the seed, from which a run draws cohorts and noise. It does not cover a simulation's own
records: scores, losses, who took part, label counts. Floating-point noise has gaps that a
determined reader can use (Mironov, CCS 2012); nothing is done about them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.channel.settings import PrivacyConfig
from fedms.fl.types import ConfigError, State


@dataclass(frozen=True)
class Clipped:
    """What an update changes, scaled to a norm of ``clip`` at most: a round's statistics.

    Attributes:
        reference: every name that the stage shares, with the value that clients began with.
    """

    reference: State
    clip: float

    def __call__(self, sent: State) -> State:
        change = {name: tensor - self.reference[name] for name, tensor in sent.items()}
        factor = min(1.0, self.clip / max(norm(change), 1e-30))
        return {name: factor * tensor for name, tensor in change.items()}


@dataclass(frozen=True)
class Noised:
    """What a round releases: every shared name moves, by the noise if by nothing else.

    Attributes:
        reference: as in :class:`Clipped`.
        deviation: z C.
        expected: q n.
        generator: what the noise is drawn from.
    """

    reference: State
    deviation: float
    expected: float
    generator: torch.Generator

    def __call__(self, server: State, sums: State, weights: dict[str, float]) -> State:
        moved: State = {}
        for name, began in self.reference.items():
            drawn = torch.randn(began.shape, generator=self.generator, dtype=torch.float64)
            total = sums.get(name, 0) + self.deviation * drawn
            moved[name] = (began + total / self.expected).to(began.dtype)
        return {**server, **moved}


def norm(state: State) -> float:
    """The Euclidean norm of all values of a state together."""
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in state.values()))


@dataclass(frozen=True)
class Guarantee:
    """What a run promises about each of its clients.

    Attributes:
        noise: z.
        sampling: q.
        delta: see :class:`PrivacyConfig`.
    """

    noise: float
    sampling: float
    delta: float

    def aggregate(
        self, reference: State, clip: float, expected: float, generator: torch.Generator
    ) -> Aggregate:
        """The aggregate of a round; see :class:`Clipped` and :class:`Noised`."""
        finish = Noised(reference, self.noise * clip, expected, generator)
        return Aggregate(Clipped(reference, clip), finish, weight="clients")

    def epsilon(self, releases: int) -> float:
        """Spent by so many rounds; infinite without noise."""
        if not releases:
            return 0.0
        return _epsilon(self.noise, self.sampling, self.delta, releases) if self.noise else math.inf


@lru_cache
def guarantee(settings: PrivacyConfig, sampling: float, clients: int, releases: int) -> Guarantee:
    """The least noise for which ``releases`` rounds stay within the budget.

    Raises:
        ConfigError: delta is no promise for so many clients, or dp-accounting is not installed.
    """
    if settings.delta * clients >= 1:
        raise ConfigError(
            f"channel.privacy.delta must be less than 1 / {clients} clients, got "
            f"{settings.delta:g}: with more, one of them could be published whole"
        )
    if not releases or math.isinf(settings.epsilon):
        return Guarantee(0.0, sampling, settings.delta)
    accounting = _accounting()
    noise = accounting.calibrate_dp_mechanism(
        _accountant,
        lambda noise: _event(noise, sampling, releases),
        settings.epsilon,
        settings.delta,
        tol=1e-3,
    )
    return Guarantee(float(noise), sampling, settings.delta)


@lru_cache
def _epsilon(noise: float, sampling: float, delta: float, releases: int) -> float:
    accountant = _accountant()
    accountant.compose(_event(noise, sampling, releases))
    return float(accountant.get_epsilon(delta))


def _accountant() -> Any:
    # ten times coarser than its default: as fast again, and epsilon is an upper bound, too large by
    # 0.02 % after 5,000 rounds
    return _accounting().pld.PLDAccountant(value_discretization_interval=1e-3)


def _event(noise: float, sampling: float, releases: int) -> Any:
    accounting = _accounting()
    gaussian = accounting.GaussianDpEvent(noise)
    return accounting.SelfComposedDpEvent(
        accounting.PoissonSampledDpEvent(sampling, gaussian), releases
    )


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError(
            'channel.privacy needs dp-accounting: pip install "fedms[privacy]"'
        ) from error
    return dp_accounting
