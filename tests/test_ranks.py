"""Ranks say what they found, or why not, however their processes end."""

from __future__ import annotations

import atexit
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def _sum_then_abort_at_exit(addend):
    atexit.register(os.abort)
    total = torch.tensor(dist.get_rank() + addend)
    dist.all_reduce(total)
    return total


def test_the_end_of_a_process_decides_nothing():
    assert run_ranks(_sum_then_abort_at_exit, 10) == [torch.tensor(21)] * 2


def _fail(how):
    if how == "raises":
        raise KeyError("what went wrong")
    if how == "dies":
        os.abort()
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "rank 0 failed:(?s:.*)what went wrong"),
        ("dies", "rank 0 ended without"),
        ("hangs", r"ranks \[0\] did not answer"),
    ],
)
def test_a_failed_rank_is_named(how, said):
    seconds = 1 if how == "hangs" else 600
    with pytest.raises(AssertionError, match=said):
        run_ranks(_fail, how, ranks=1, seconds=seconds)


def _fail_on_the_second(how):
    if dist.get_rank() == 1:
        _fail(how)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(("how", "said"), [("raises", "failed:"), ("dies", "ended without")])
def test_a_failed_rank_is_named_while_others_wait_for_it(how, said):
    with pytest.raises(AssertionError, match=f"rank [01] {said}") as caught:
        run_ranks(_fail_on_the_second, how)
    if how == "raises":  # a dead one may take the first down before it is seen
        assert "rank 1 failed" in str(caught.value)
        assert "what went wrong" in str(caught.value)
