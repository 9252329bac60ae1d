"""The frozen prefix: what it gives is what the model gives, within its bound and past it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedms.fl.model.prefix import Outputs, Prefix

CPU = torch.device("cpu")
A_STATE = 32 * 4
"""Bytes of a position."""


@pytest.fixture
def prefix(model):
    groups = [np.arange(0, 70), np.arange(70, 90)]
    return lambda max_bytes: Prefix(model.backbone, model.task, groups, max_bytes)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.0])
def test_a_batch_starts_from_what_the_model_would_have_there(model, prefix, share):
    """Examples 88 and 200 are the last to be kept and in no group."""
    lengths = model.task.lengths[:90]
    cache = prefix(int(share * 2 * lengths.sum() * A_STATE))
    cache.keep([1, 3])
    for indices in (np.array([7, 0, 33]), np.array([88, 3]), np.array([200, 3])):
        batch = model.task.batch(indices, CPU)
        for depth in (1, 3):
            wanted = model.backbone.entering(batch, [depth])[depth]
            found = cache.entry(indices, batch, depth)
            for row, i in enumerate(indices):
                own = slice(0, model.task.lengths[i])
                torch.testing.assert_close(found[row, own], wanted[row, own], rtol=0, atol=1e-6)
        assert cache.entry(indices, batch, 0) is None
    assert cache.bytes <= share * 2 * lengths.sum() * A_STATE
    assert (cache.bytes > 0) == (share > 0)


def test_only_what_is_asked_for_is_computed_and_once(model, prefix):
    runs = []
    handle = model.backbone.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    cache = prefix(2**20)
    cache.keep([3])
    assert cache.bytes == 0
    indices = np.array([75, 80])
    batch = model.task.batch(indices, CPU)
    cache.entry(indices, batch, 3)
    assert cache.bytes == model.task.lengths[70:90].sum() * A_STATE  # the group, no more
    cache.entry(indices, batch, 3)
    handle.remove()
    assert len(runs) == 1


def test_depths_that_nobody_starts_from_again_are_freed(model, prefix):
    cache = prefix(2**20)
    cache.keep([1, 3])
    indices = np.array([75])
    batch = model.task.batch(indices, CPU)
    cache.entry(indices, batch, 3)
    both = cache.bytes
    cache.keep([1])
    assert cache.bytes == both // 2
    known = cache.entry(indices, batch, 1)
    wanted = model.backbone.entering(batch, [1])[1]
    torch.testing.assert_close(known, wanted, rtol=0, atol=1e-6)
    assert cache.bytes == both // 2


def test_outputs_are_kept_for_the_paths_that_are_frozen():
    outputs, indices = Outputs(), np.array([4, 2, 9])
    assert outputs.missing(("global",), indices) is None
    outputs.keep([("global",)], "one")
    assert outputs.missing(("local",), indices) is None
    assert outputs.missing(("global",), indices).tolist() == [4, 2, 9]
    outputs.put(("global",), indices[:2], [torch.ones(1, 3), torch.ones(2, 3) * 2])
    assert outputs.missing(("global",), indices).tolist() == [9]
    assert outputs.get(("global",), np.array([2, 4, 2]))[:, 0].tolist() == [2, 2, 1, 2, 2]
    outputs.keep([("global",)], "one")
    assert outputs.missing(("global",), indices).tolist() == [9]
    outputs.keep([("global",)], "another")
    assert outputs.missing(("global",), indices).tolist() == [4, 2, 9]
    off = Outputs(enabled=False)
    off.keep([("global",)], "one")
    assert off.missing(("global",), indices) is None


def test_outputs_past_their_bound_make_room():
    """What is held never exceeds the bound by more than one batch."""
    outputs, path, every = Outputs(max_bytes=100), ("global",), np.arange(30)
    outputs.keep([path], "one")
    known = []
    for start in range(0, 30, 5):
        batch = every[start : start + 5]
        assert outputs.missing(path, batch).tolist() == batch.tolist()
        outputs.put(path, batch, [torch.full((1, 2), float(i)) for i in batch])  # 40 bytes
        assert outputs.get(path, batch)[:, 0].tolist() == batch.tolist()
        known.append(30 - len(outputs.missing(path, every)))
    assert known == [5, 10, 0, 5, 10, 0]
