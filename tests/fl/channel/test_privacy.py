"""What a client can move, what noise is added, and the accountant against known numbers."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from fedms.fl.channel.privacy import Clipped, Guarantee, Noised, guarantee, norm
from fedms.fl.channel.settings import PrivacyConfig
from fedms.fl.types import ConfigError

accounted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason='pip install "fedms[privacy]"'
)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_norm_is_of_all_tensors_together():
    assert norm({"a": torch.tensor([[3.0]]), "b": torch.tensor([0.0, 4.0])}) == 5


def test_a_change_is_clipped_to_the_norm():
    reference = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0, 1.0])}
    sent = {"a": torch.tensor([4.0]), "b": torch.tensor([1.0, 5.0])}  # changed by 3 and 0, 4
    found = Clipped(reference, 1.0)(sent)
    assert found["a"].tolist() == pytest.approx([0.6])
    assert found["b"].tolist() == pytest.approx([0.0, 0.8])
    assert norm(Clipped(reference, 9.0)(sent)) == 5  # a small one is left alone
    assert norm(Clipped(reference, 9.0)(reference)) == 0


def test_no_client_moves_the_sum_by_more_than_the_norm():
    reference = {"w": torch.zeros(40)}
    for scale in (1e-3, 1.0, 1e20, 3e38):
        sent = {"w": scale * torch.randn(40, generator=draw()).clamp(-1, 1)}
        assert norm(Clipped(reference, 0.5)(sent)) <= 0.5 * (1 + 1e-6)


def test_the_release_by_hand():
    """No noise: w + (0.6 + 0.2) / (q n = 4), whoever came."""
    reference = {"w": torch.tensor([1.0]), "v": torch.tensor([2.0])}
    after = Noised(reference, 0.0, 4.0, draw())(
        {"x": reference["w"]}, {"w": torch.tensor([0.8])}, {}
    )
    assert after["w"].tolist() == pytest.approx([1.2])
    assert after["v"].tolist() == [2]
    assert after["x"] is reference["w"]


def test_noise_has_the_deviation_that_was_promised():
    """z C / (q n), on what somebody sent and on what nobody sent."""
    reference = {"w": torch.zeros(20_000), "v": torch.zeros(20_000)}
    promise = Guarantee(noise=1.5, sampling=0.5, delta=1e-5)
    aggregate = promise.aggregate(reference, clip=2.0, expected=10.0, generator=draw())
    assert aggregate.weight == "clients"
    after = aggregate.finish({}, {"w": torch.zeros(20_000)}, {"w": 3.0})
    for tensor in after.values():
        assert tensor.std().item() == pytest.approx(0.3, rel=0.03)
        assert tensor.mean().item() == pytest.approx(0, abs=0.01)
    both = torch.corrcoef(torch.stack([after["w"], after["v"]]))
    assert abs(both[0, 1]) < 0.03


def test_an_empty_cohort_releases_noise():
    after = Noised({"w": torch.zeros(5)}, 1.0, 4.0, draw())({}, {}, {})
    assert (after["w"] != 0).all()


@accounted
def test_one_round_without_sampling_is_the_gaussian_mechanism():
    """Against the exact formula (Balle and Wang, arXiv 1805.06530, theorem 8), at sensitivity 1."""
    sigma, delta = 2.0, 1e-5
    phi = torch.distributions.Normal(0, 1).cdf

    def exact(epsilon: float) -> float:
        a, b = torch.tensor([1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma])
        return float(phi(a.double()) - math.exp(epsilon) * phi(b.double()))

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exact(middle) > delta else (low, middle)
    assert Guarantee(sigma, 1.0, delta).epsilon(1) == pytest.approx(high, rel=2e-3)


@accounted
def test_sampling_and_fewer_rounds_cost_less():
    spent = [Guarantee(1.0, 0.1, 1e-5).epsilon(rounds) for rounds in (0, 1, 5)]
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert Guarantee(1.0, 0.1, 1e-5).epsilon(1) < Guarantee(1.0, 1.0, 1e-5).epsilon(1) / 2
    assert Guarantee(0.0, 0.1, 1e-5).epsilon(5) == math.inf


@accounted
def test_the_budget_is_used_up_and_not_exceeded():
    promise = guarantee(PrivacyConfig(clip=1.0, epsilon=2.0), 0.5, clients=20, releases=7)
    assert 1.98 < promise.epsilon(7) <= 2
    assert promise.epsilon(6) < 1.94


def test_an_infinite_budget_needs_no_noise():
    assert guarantee(PrivacyConfig(clip=1.0, epsilon=math.inf), 0.5, 20, 7).noise == 0
    assert guarantee(PrivacyConfig(clip=1.0), 0.5, 20, 0).noise == 0  # nothing is released


def test_a_delta_that_allows_to_publish_a_client_is_refused():
    with pytest.raises(ConfigError, match=r"channel.privacy.delta must be less than 1 / 1000"):
        guarantee(PrivacyConfig(clip=1.0, delta=0.001), 0.5, 1000, 7)
