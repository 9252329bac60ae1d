"""The server's mean, worked by hand on vectors of three."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.server import Totals, check_values, require_quorum
from fedms.fl.types import ClientFailure, Failure, QuorumError, State, Update


def update(num_examples: int, shared: State, kept: State | None = None) -> Update:
    return Update("c", num_examples, shared, kept or {}, train_loss=0.0, steps=1)


def vector(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def aggregate(state: State, updates: list[Update], how: Aggregate | None = None) -> State:
    totals = Totals(how or Aggregate())
    for one in updates:
        totals.add(one)
    return totals.finish(state)


def test_the_mean_is_weighted_by_examples():
    state = {"w": vector(9, 9, 9)}
    mean = aggregate(state, [update(1, {"w": vector(4, 0, -8)}), update(3, {"w": vector(0, 4, 8)})])
    assert mean["w"].tolist() == [1.0, 3.0, 4.0]  # (4 + 0) / 4, (0 + 12) / 4, (-8 + 24) / 4
    assert state["w"].tolist() == [9, 9, 9]


def test_each_parameter_is_the_mean_of_those_who_sent_it():
    """Budgets differ: two sent a, one sent b, nobody sent c."""
    state = {"a": vector(0, 0, 0), "b": vector(0, 0, 0), "c": vector(7, 8, 9)}
    updates = [
        update(1, {"a": vector(2, 4, 6), "b": vector(1, 2, 3)}),
        update(1, {"a": vector(4, 8, 2)}),
    ]
    mean = aggregate(state, updates)
    assert mean["a"].tolist() == [3, 6, 4]
    assert mean["b"].tolist() == [1, 2, 3]
    assert mean["c"] is state["c"]


def test_no_updates_leave_the_state_as_it_is():
    state = {"a": vector(1, 2, 3)}
    assert aggregate(state, [])["a"] is state["a"]


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_the_mean_of_16_bits_is_in_fp32(dtype, step):
    """300 senders of 1 + one rounding step: summed in 16 bits the total would stall."""
    sent = vector(1 + step, -1 - step, 0.5, dtype=dtype)
    assert sent[0] == 1 + step
    mean = aggregate({}, [update(1, {"w": sent}) for _ in range(300)])["w"]
    assert mean.dtype == torch.float32
    assert torch.equal(mean, sent.float())


def test_large_weights_do_not_overflow_16_bits():
    mean = aggregate(
        {"w": vector(0, dtype=torch.float16)},
        [update(100_000, {"w": vector(3, dtype=torch.float16)})],
    )
    assert mean["w"].item() == 3


def test_every_client_can_weigh_the_same():
    updates = [update(1, {"w": vector(4, 0, -8)}), update(3, {"w": vector(0, 4, 8)})]
    mean = aggregate({}, updates, Aggregate(weight="clients"))
    assert mean["w"].tolist() == [2, 2, 0]


def test_a_stage_says_what_is_summed_and_what_is_made_of_it():
    """The sum of squares, added to what the server has."""
    squares = Aggregate(
        lambda sent: {"w": sent["w"] ** 2},
        lambda server, sums, weights: {
            "w": server["w"] + sums["w"],
            "n": torch.tensor(weights["w"]),
        },
        weight="clients",
    )
    updates = [update(1, {"w": vector(1, 2, 3)}), update(3, {"w": vector(1, 0, 1)})]
    found = aggregate({"w": vector(10, 10, 10)}, updates, squares)
    assert found["w"].tolist() == [12, 14, 20]
    assert found["n"] == 2


def test_each_clients_own_where_an_aggregate_wants_them():
    """The median of each coordinate; who came first does not show."""

    def median(server: State, sent: dict[str, State], weights: dict[str, float]) -> State:
        stack = torch.stack([state["w"] for state in sent.values()])
        assert list(sent) == list(weights) == ["a", "b", "c"]
        return {**server, "w": stack.median(dim=0).values, "n": torch.tensor([*weights.values()])}

    totals = Totals(Aggregate(finish=median, each=True))
    for client, count, values in (("b", 2, (1, 5, 0)), ("c", 1, (9, 6, 1)), ("a", 7, (2, 7, -99))):
        totals.add(replace(update(count, {"w": vector(*values)}), client_id=client))
    after = totals.finish({"v": vector(3)})
    assert after["w"].tolist() == [2, 6, 0]
    assert after["n"].tolist() == [7, 2, 1]
    assert after["v"].tolist() == [3]


@pytest.mark.parametrize("each", [False, True])
def test_totals_of_parts_are_those_of_the_whole(each):
    """Numbers of such different size that fp32 sums would hang on the order."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(32, 5, generator=draw) * 10.0 ** torch.arange(-4, 4).repeat(4)[:, None]
    updates = [
        replace(update(1 + k % 7, {"w": row}), client_id=f"c{k:02d}")
        for k, row in enumerate(values)
    ]

    def mean(server: State, sent: dict[str, State], weights: dict[str, float]) -> State:
        return {"w": sum(sent[c]["w"].double() * weights[c] for c in sent)}

    how = Aggregate(finish=mean, each=True) if each else Aggregate()
    whole = aggregate({}, updates, how)
    for cuts in ((7,), (1, 9, 30)):
        parts = []
        for some in np.split(np.arange(32), cuts):
            parts.append(Totals(how))
            for i in some:
                parts[-1].add(updates[i])
        for part in parts[1:]:
            parts[0].merge(part)
        assert torch.equal(parts[0].finish({})["w"], whole["w"])
    assert whole["w"].dtype == torch.float32


def test_what_is_not_finite_is_refused():
    check_values(update(1, {"w": torch.ones(2, 3)}))
    check_values(update(1, {}))
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = torch.ones(2, 3)
        bad[1, 2] = value
        with pytest.raises(ClientFailure, match="its w is not finite"):
            check_values(update(1, {"w": bad}))


def test_an_update_without_examples_is_refused():
    for count in (0, -3):
        with pytest.raises(ClientFailure, match=f"trained on {count} examples"):
            check_values(update(count, {"w": vector(1)}))


@pytest.mark.parametrize(
    ("returned", "cohort", "quorum", "enough"),
    [
        (2, 4, 0.5, True),
        (1, 4, 0.5, False),
        (4, 4, 1.0, True),
        (3, 4, 1.0, False),
        (0, 0, 0.5, True),
        (0, 3, 0.01, False),
    ],
)
def test_quorum(returned, cohort, quorum, enough):
    failed = [Failure(f"c{k}", "away") for k in range(cohort - returned)]
    if enough:
        require_quorum(cohort, failed, quorum)
        return
    with pytest.raises(
        QuorumError, match=f"{returned} of {cohort} clients came back, .*server.quorum = {quorum}"
    ):
        require_quorum(cohort, failed, quorum)


def test_a_quorum_that_is_a_hair_above_whole_counts_as_whole():
    """0.55 * 20 is 11.000000000000002 in floating point."""
    failed = [Failure(f"c{k}", "away") for k in range(10)]
    require_quorum(20, failed[:9], 0.55)
    with pytest.raises(QuorumError):
        require_quorum(20, failed, 0.55)


def test_below_quorum_the_reasons_are_said_and_what_helps():
    """A resume alone repeats the same draws, so it is not what helps."""
    reasons = ["loss nan", "no disk", "loss nan", "loss nan"]
    failed = [Failure(f"c{k}", reason) for k, reason in enumerate(reasons)]
    with pytest.raises(QuorumError) as caught:
        require_quorum(5, failed, 0.5)
    text = str(caught.value)
    assert "What stopped the others: loss nan (3 clients); no disk (1 clients)" in text
    assert "A resume draws the same clients and batches and ends here again unless" in text
    assert "lower server.quorum in the folder's config.toml" in text
