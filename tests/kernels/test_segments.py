"""Invariants of routing by segments, for any segmentation."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_problem import BACKENDS, Problem, assert_close, make_problem
from torch._dynamo.testing import CompileCounterWithBackend

from fedms.kernels import Segments, gated_lora_linear
from fedms.kernels.segments import read_runs

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
    runs = read_runs(*segments.tensors, None, segments.offsets[-1], EXPERTS)
    listed = [
        (row, e)
        for run in runs
        for row in range(run.row_begin, run.row_end)
        for e in range(run.expert_begin, run.expert_end)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == _pairs(segments)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
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


def test_lists_and_tensors_say_the_same():
    lists = Segments(torch.tensor([0, 3, 5]), [0, [2, 1]])
    assert (lists.offsets, lists.experts) == ((0, 3, 5), ((0,), (2, 1)))
    tensors = Segments([0, 3, 5], torch.tensor([[0, -1], [2, 1]]))
    for a, b in zip(lists.tensors, tensors.tensors, strict=True):
        assert torch.equal(a, b)
    runs = read_runs(*tensors.tensors, None, 5, 3)
    assert [run[:4] for run in runs] == [(0, 3, 0, 1), (3, 5, 1, 3)]


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


def _of_tensors(segments: Segments) -> Segments:
    return Segments(*segments.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(segments=segmentations())
def test_tensors_compute_what_lists_compute(backend, segments):
    """Bit for bit; but an expert without rows has a gradient of zeros."""
    lists = make_problem(segments.offsets[-1], 24, 20, (3, 8, 1, 4), segments=segments)
    lists = lists.to(torch.float32)
    want = lists.run(backend)
    got = replace(lists, segments=_of_tensors(segments)).run(backend)
    for name, value in got.items():
        expected = torch.zeros_like(value) if want[name] is None else want[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_shuffled_batches_are_one_compiled_graph(backend):
    """A batch of adapters a sample, in other orders: never another graph, nothing eager."""
    p = make_problem(24, 16, 20, (4, 2, 3), gates=None).to(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    offsets = torch.arange(0, 25, 6)

    def layer(x, experts):
        return gated_lora_linear(
            x, p.weight, p.A, p.B, segments=Segments(offsets, experts), backend=backend
        ).sin()

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    orders = [[0, 1, 2, 0], [2, 2, 1, -1], [1, 0, 0, 2], [-1, -1, 2, 1]]
    for order in orders:
        experts = torch.tensor(order)
        got, want = compiled(p.x, experts), layer(p.x, experts)
        assert torch.equal(got, want)
        by_hand = torch.stack([
            x @ p.weight.t() + (x @ p.A[e].t() @ p.B[e].t() if e >= 0 else 0)
            for e, (begin, end) in zip(order, pairwise(offsets.tolist()), strict=True)
            for x in p.x[begin:end]
        ])  # fmt: skip
        assert torch.allclose(got, by_hand.sin(), atol=1e-4)
        leaves = [p.x, *p.A, *p.B]
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, want)), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def _bad(offsets: list[int], experts: list[list[int]]) -> Problem:
    segments = Segments(torch.tensor(offsets), torch.tensor(experts))
    return make_problem(9, ranks=(2, 2), segments=segments).to(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("offsets", "experts", "message"),
    [
        ([0, 5, 8], [[0], [1]], "cover the 9 rows of x, the last one is 8"),
        ([0, 5, 10], [[0], [1]], "cover the 9 rows of x, the last one is 10"),
        ([1, 5, 9], [[0], [1]], "start at 0 and never decrease"),
        ([0, 10, 9], [[0], [1]], "start at 0 and never decrease"),
        ([0, 5, 9], [[0], [2]], r"experts\[1\] must be in \[0, 2\), got"),
        ([0, 5, 9], [[0], [-2]], r"experts\[1\] must"),
        ([0, 5, 9], [[1, 1], [0, -1]], r"experts\[0\] must hold distinct indices"),
    ],
)
def test_bad_values_of_tensors(backend, offsets, experts, message):
    with pytest.raises(ValueError, match=message):
        _bad(offsets, experts).run(backend)


@pytest.mark.parametrize(
    ("offsets", "experts", "error", "message"),
    [
        ([0, 4], torch.tensor([0], dtype=torch.int32), TypeError, r"experts must be int64 \[S\]"),
        ([0, 4], torch.tensor(0), TypeError, r"experts must be int64 \[S\] or \[S, W\], got \[\]"),
        ([0, 4], torch.tensor([0, 1]), ValueError, r"offsets must be int64 \[3\], .* got \[2\]"),
        (
            torch.tensor([0.0, 4.0]),
            torch.tensor([0]),
            ValueError,
            "offsets must be int64 .*float32",
        ),
    ],
)
def test_bad_tensors(offsets, experts, error, message):
    with pytest.raises(error, match=message):
        Segments(offsets, experts)
