"""Invariants of routing by segments, for any segmentation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_problem import BACKENDS, assert_close, make_problem

from fedms.kernels import Segments

EXPERTS = 4


@st.composite
def segmentations(draw: st.DrawFn) -> Segments:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    ids = st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS)
    experts = [tuple(draw(ids)) for _ in lengths]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return Segments(offsets, experts)


def _pairs(segments: Segments) -> set[tuple[int, int]]:
    return {
        (row, e)
        for i, ids in enumerate(segments.experts)
        for row in range(segments.offsets[i], segments.offsets[i + 1])
        for e in ids
    }


@given(segmentations())
def test_runs_list_each_pair_once(segments):
    runs = segments.runs()
    listed = [
        (row, e)
        for i in range(0, len(runs), 4)
        for row in range(runs[i], runs[i + 1])
        for e in range(runs[i + 2], runs[i + 3])
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == _pairs(segments)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(segments=segmentations())
def test_segments_equal_dense_gates_with_zeros(backend, segments):
    """A pair that does not exist is as if its gate were zero, and has no gradient."""
    m = segments.offsets[-1]
    problem = make_problem(m, 24, 20, (3, 8, 1, 4), segments=segments).to(torch.float32)
    exists = torch.zeros(m, EXPERTS)
    for row, e in _pairs(segments):
        exists[row, e] = 1.0
    dense = replace(
        problem, gates=(problem.gates.detach() * exists).requires_grad_(), segments=None
    )
    got, want = problem.run(backend), dense.run(backend)
    want["dgates"] = want["dgates"] * exists
    for e in range(EXPERTS):
        if exists[:, e].sum() == 0:
            assert got[f"dA{e}"] is None
            want[f"dA{e}"] = want[f"dB{e}"] = None
    assert_close(got, {k: None if v is None else v.double() for k, v in want.items()}, 1e-5)


def test_segments_take_tensors_and_compare_equal():
    a = Segments(torch.tensor([0, 3, 5]), [0, [2, 1]])
    assert a == Segments([0, 3, 5], [(0,), (2, 1)])
    assert a.runs() == [0, 3, 0, 1, 3, 5, 1, 3]


@pytest.mark.parametrize(
    ("offsets", "experts", "message"),
    [
        ([0, 4], [0, 1], "one entry more than segments.experts"),
        ([1, 4], [0], "start at 0 and never decrease"),
        ([0, 4, 2], [0, 1], "start at 0 and never decrease"),
        ([0, 4], [(1, 1)], "distinct indices"),
        ([0, 4], [-1], "distinct indices"),
    ],
)
def test_bad_segments(offsets, experts, message):
    with pytest.raises(ValueError, match=message):
        Segments(offsets, experts)
