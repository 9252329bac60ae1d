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
        ("hangs", "rank 0 did not answer"),
    ],
)
def test_a_failed_rank_is_named(how, said):
    seconds = 1 if how == "hangs" else 240
    with pytest.raises(AssertionError, match=said):
        run_ranks(_fail, how, ranks=1, seconds=seconds)
