"""The MoFM's parts against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedms.fl.model.gate import (
    Gate,
    gate_width,
    log_prior_of_counts,
    mixed_features,
    mixed_log_p,
    statistics,
)

HOW = ("probabilities", "logits", "features")


def combine(how, weights, z_g, z_l, head):
    """The mixture of two experts with unit features and one head."""
    if how == "features":
        return F.log_softmax(mixed_features(weights, z_g, z_l) @ head.T, dim=-1)
    log_g, log_l = (F.log_softmax(z @ head.T, dim=-1) for z in (z_g, z_l))
    return mixed_log_p(how, weights, log_g, log_l)


def test_mixed_features_have_the_mean_length():
    """Any weights: a trained head reads lengths too."""
    z_g, z_l = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    mixed = mixed_features(torch.tensor([[0.25, 0.75]]), z_g, z_l)
    torch.testing.assert_close(mixed, torch.tensor([[1.0, 1.0]]) / math.sqrt(2) * 1.5)


def test_statistics_of_two_classes():
    log_g = torch.tensor([[0.75, 0.25]]).log()
    log_l = torch.tensor([[0.5, 0.5]]).log()
    prior = torch.tensor([0.25, 0.75]).log()
    found = statistics(log_g, log_l, prior)
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    familiar_g = (0.75 * math.log2(0.25) + 0.25 * math.log2(0.75)) + 1
    familiar_l = (0.5 * math.log2(0.25) + 0.5 * math.log2(0.75)) + 1
    overlap = math.sqrt(0.375) + math.sqrt(0.125)
    wanted = [entropy, 0.75, 0.25, familiar_g, 1.0, 0.5, 0.5, familiar_l, 1.0, overlap]
    torch.testing.assert_close(found, torch.tensor([wanted]), rtol=0, atol=1e-6)


def test_statistics_of_three_classes_that_disagree():
    log_g = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    log_l = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    found = statistics(log_g, log_l, torch.full((3,), 1 / 3).log())
    assert found.shape == (2, 10)
    assert found[:, 8].tolist() == [0.0, 1.0]  # whether the most probable class is the same
    torch.testing.assert_close(
        found[:, [3, 7]], torch.zeros(2, 2), rtol=0, atol=1e-6
    )  # a uniform prior says nothing
    torch.testing.assert_close(found[1, [1, 2, 5, 6]], torch.tensor([0.6, 0.2, 0.7, 0.2]))
    torch.testing.assert_close(found[0, 0], torch.tensor(1.5 * math.log(2) / math.log(3)))
    overlap = 2 * math.sqrt(0.125) + 0.25
    torch.testing.assert_close(found[0, 9], torch.tensor(overlap))


def test_log_prior_counts_one_more_of_each_class():
    torch.testing.assert_close(
        log_prior_of_counts(torch.tensor([0, 2, 5])).exp(), torch.tensor([0.1, 0.3, 0.6])
    )


def experts(classes: int = 3, examples: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z_g, z_l = F.normalize(torch.randn(2, examples, 4), dim=-1)
    return z_g, z_l, 5 * torch.randn(classes, 4)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chosen", [0, 1])
def test_all_the_weight_on_one_expert_is_that_expert(how, chosen):
    z_g, z_l, head = experts()
    weights = torch.eye(2)[chosen].expand(5, 2)
    alone = F.log_softmax((z_g, z_l)[chosen] @ head.T, dim=-1)
    torch.testing.assert_close(combine(how, weights, z_g, z_l, head), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_a_mixture_is_a_distribution(how):
    z_g, z_l, head = experts()
    weights = torch.rand(5, 2)
    weights = weights / weights.sum(1, keepdim=True)
    sums = combine(how, weights, z_g, z_l, head).exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones(5))


def test_the_ways_to_combine_by_hand():
    """Two classes, features of two dimensions: each expert is sure of another class by e to 1."""
    z_g, z_l = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    head, weights = torch.eye(2), torch.tensor([[0.75, 0.25]])
    high = math.e / (math.e + 1)
    probability = 0.75 * high + 0.25 * (1 - high)
    logit = 1 / (1 + math.exp(0.25 - 0.75))
    feature = 1 / (1 + math.exp((0.25 - 0.75) / math.hypot(0.25, 0.75)))
    for how, wanted in (("probabilities", probability), ("logits", logit), ("features", feature)):
        found = combine(how, weights, z_g, z_l, head).exp()
        torch.testing.assert_close(found, torch.tensor([[wanted, 1 - wanted]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_exact_zero_weight_gives_finite_gradients(weight):
    """A softmax in float32 reaches 0 and 1; the mixture's log must not answer with NaN."""
    z_g, z_l, head = experts()
    scores = (
        torch.tensor([[120.0, -120.0] if weight else [-120.0, 120.0]]).repeat(5, 1).requires_grad_()
    )
    weights = scores.softmax(-1)
    assert weights[0].tolist() == [weight, 1 - weight]
    (slope,) = torch.autograd.grad(
        combine("probabilities", weights, z_g, z_l, head)[:, 0].sum(), scores
    )
    assert torch.isfinite(slope).all()


def test_the_gate_starts_near_one_half():
    gate = Gate(10, 4)
    weights = gate(torch.randn(50, 10))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert (weights - 0.5).abs().max() < 0.05
    assert gate.linear.bias.tolist() == [0, 0]


def test_the_adapter_is_what_is_named_adapter():
    gate = Gate(6, 3)
    shapes = {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()}
    assert shapes == {
        "adapter.0.weight": (3, 6),
        "adapter.0.bias": (3,),
        "adapter.2.weight": (6, 3),
        "adapter.2.bias": (6,),
        "linear.weight": (2, 6),
        "linear.bias": (2,),
    }


def test_the_adapter_is_a_residual_bottleneck():
    gate, inputs = Gate(6, 3), torch.randn(4, 6)
    with torch.no_grad():
        hidden = F.gelu(inputs @ gate.adapter[0].weight.T + gate.adapter[0].bias)
        adapted = inputs + hidden @ gate.adapter[2].weight.T + gate.adapter[2].bias
        wanted = (adapted @ gate.linear.weight.T + gate.linear.bias).softmax(-1)
        torch.testing.assert_close(gate(inputs), wanted)


def test_gate_widths():
    assert [gate_width(kind, 32) for kind in ("experts", "base", "both")] == [10, 32, 42]
