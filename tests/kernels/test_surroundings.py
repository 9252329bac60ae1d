"""What the process was set to where a call, or the segments for it, were made."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from lora_problem import BACKENDS, make_problem

from fedms.kernels import Segments, gated_lora_linear

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@contextmanager
def _default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


OFFSETS, CHOSEN = torch.tensor([0, 5, 10, 20, 37]), torch.tensor([1, -1])


def _lists():
    return Segments([0, 10, 37], [[1, 0], []])


def _tensors():
    return Segments([0, 10, 37], CHOSEN)


CALLS = {
    "gates": {"gates": "token"},
    "gates of the layer, other ranks": {"gates": "layer", "ranks": (8, 3)},
    "dropout": {"dropout_p": 0.3},
    "listed": {"gates": "listed", "expert_idxs": torch.randint(2, (37, 2))},
    "nothing listed": {"gates": "listed", "expert_idxs": torch.zeros(37, 0, dtype=torch.int64)},
    "segments": {"segments": _lists},
    "segments of tensors, dropout": {"segments": _tensors, "dropout_p": 0.3},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("around", [torch.device, _default_device])
def test_the_default_device_says_nothing(around, name, backend):
    call = CALLS[name]
    # scales of its own, as tables of others are kept
    problem = make_problem(**{"scaling": [0.37, 1.83], **call, "segments": None}).to(torch.float32)
    segments = call.get("segments", lambda: None)
    with around("meta"):
        got = replace(problem, segments=segments()).run(backend)
    want = replace(problem, segments=segments()).run(backend)
    assert got.keys() == want.keys()
    for key, right in want.items():
        assert got[key] is None if right is None else torch.equal(got[key], right), key


def _strided():
    return Segments(OFFSETS[::2], CHOSEN)


@pytest.mark.parametrize("make", [_lists, _tensors, _strided])
def test_what_inference_mode_left_behind_trains(make, backend):
    problem = make_problem(scaling=[0.59, 1.41]).to(torch.float32)
    with torch.inference_mode():
        made = make()
        replace(problem, segments=made).call(gated_lora_linear, backend=backend)
    got, want = (replace(problem, segments=s).run(backend) for s in (made, make()))
    for key, right in want.items():
        assert got[key] is None if right is None else torch.equal(got[key], right), key
