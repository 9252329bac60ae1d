"""Losses of more than one algorithm, worked by hand, and what they become at their limits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import tensor
from visits import a_view

from fedms.fl.algorithms.losses import (
    BalancedSoftmax,
    CrossEntropy,
    NotTrue,
    NotTrueDivergence,
    balanced_nll,
)
from fedms.fl.types import renamed

DOUBLE = {"dtype": torch.double}


def test_the_balanced_softmax_by_hand():
    """Counts 1, 4, 0 turn (0.5, 0.2, 0.3) into 0.5 : 0.8 : 0."""
    client = SimpleNamespace(counts=tensor([[7, 7, 7], [1, 4, 0]]))
    log_p = tensor([[0.5, 0.2, 0.3]] * 2, **DOUBLE).log().requires_grad_()
    found = balanced_nll(client, 1, tensor([0, 1]), log_p)
    torch.testing.assert_close(found.exp(), tensor([1.3 / 0.5, 1.3 / 0.8], **DOUBLE))
    found.sum().backward()
    wanted = tensor([[5, 8, 0]] * 2, **DOUBLE) / 13 - tensor([[1, 0, 0], [0, 1, 0]], **DOUBLE)
    torch.testing.assert_close(log_p.grad, wanted)


def test_the_not_true_divergence_by_hand():
    """Class 1 is true: the teacher's 0.6, 0.2 are 3/4, 1/4; the expert's 0.1, 0.4 are 1/5, 4/5."""
    teacher = tensor([[0.6, 0.2, 0.2]], **DOUBLE).log()
    expert = tensor([[0.1, 0.5, 0.4]], **DOUBLE).log()
    found = NotTrueDivergence(1.0)(None, 0, tensor([1]), expert, teacher)
    q, p = tensor([0.2, 0.8], **DOUBLE), tensor([0.75, 0.25], **DOUBLE)
    torch.testing.assert_close(found, (p * (p / q).log()).sum()[None])
    # at temperature 2 both are roots, and a constant added to the logits changes nothing
    found = NotTrueDivergence(2.0)(None, 0, tensor([1]), expert + 5, teacher - 3)
    q, p = q.sqrt() / q.sqrt().sum(), p.sqrt() / p.sqrt().sum()
    torch.testing.assert_close(found, (p * (p / q).log()).sum()[None])


def test_the_not_true_divergence_says_nothing_about_the_true_class():
    """Its gradient there is 0, and so is the whole of it where there is one wrong class."""
    expert = torch.randn(6, 4, **DOUBLE, requires_grad=True)
    targets = tensor([0, 1, 2, 3, 0, 1])
    loss = NotTrueDivergence(1.5)(None, 0, targets, expert, torch.randn(6, 4, **DOUBLE))
    loss.sum().backward()
    assert expert.grad.gather(1, targets[:, None]).abs().max() == 0
    assert expert.grad.abs().max() > 0.01
    two = [torch.randn(5, 2, **DOUBLE) for _ in range(2)]
    assert NotTrueDivergence(1.0)(None, 0, tensor([0, 1, 1, 0, 0]), *two).abs().max() == 0


@pytest.fixture
def view(setting):
    """A view whose expert has moved from where it and its copy "anchor" began."""
    stage, model, clients = setting("method=fedntd")
    view = a_view(stage, model, clients[0], {}, moved=0.3)
    assert renamed(view.live, "global.", "anchor.").keys() < view.live.keys()
    return view


def test_limits(view):
    plain = CrossEntropy("global")(view)
    torch.testing.assert_close(NotTrue("global", "anchor", 0.0, 1.0)(view), plain)
    torch.testing.assert_close(NotTrue("global", "global", 3.0, 2.0)(view), plain)
    assert (NotTrue("global", "anchor", 3.0, 2.0)(view) > plain + 1e-4).all()


def test_balanced_softmax_is_cross_entropy_where_all_classes_are_alike(setting):
    stage, model, clients = setting("method=fedavg")
    for counts, alike in (([3, 3, 3, 3], True), ([3, 9, 3, 3], False)):
        view = a_view(stage, model, clients[0], {}, moved=0.3, counts=torch.tensor([counts]))
        far = (BalancedSoftmax("global")(view) - CrossEntropy("global")(view)).abs()
        assert far < 1e-12 if alike else far > 1e-3


def test_the_weight_of_the_divergence_is_beta_tau_squared(view):
    plain = CrossEntropy("global")(view)
    kl = view.over(NotTrueDivergence(2.0), ("global",), ("anchor",)).mean()
    torch.testing.assert_close(NotTrue("global", "anchor", 0.5, 2.0)(view), plain + 0.5 * 4 * kl)
