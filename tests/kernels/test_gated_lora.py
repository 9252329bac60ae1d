"""Values and gradients of every backend against the float64 definition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lora_problem import BACKENDS, assert_close, errors, make_problem
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, reference

FP32 = 1e-5
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(
    ("m", "k", "n", "ranks"),
    [
        (0, 40, 56, (8,)),  # no tokens
        (1, 40, 56, (8,)),  # decoding one token
        (15, 16, 16, (8,)),  # one below a vector
        (16, 16, 16, (16,)),
        (17, 17, 17, (17,)),  # one above, in every dimension
        (127, 100, 600, (4, 4)),  # neither K nor N a multiple of the width
        (129, 64, 2049, (8,)),  # a last column alone
        (197, 768, 100, (8, 8)),  # ViT-B's tokens, more rows than a block
        (257, 33, 96, (24,)),  # ViT-L's tokens
        (33, 40, 56, (1,)),
        (35, 391, 397, (3, 2)),  # so few ranks that columns share a vector; an odd one is left
        (33, 40, 56, (3, 1)),  # ranks below a tile, mixed
        (33, 40, 56, (256,)),  # R larger than K and N
        (33, 40, 56, (64, 0, 3, 16)),  # an expert of rank 0 among others
        (19, 40, 56, (8,) * 8),
        (19, 40, 56, (2,) * 32),
    ],
)
def test_shapes(backend, m, k, n, ranks):
    problem = make_problem(m, k, n, ranks)
    assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)


@pytest.mark.parametrize("gates", [None, "layer", "token"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gates_and_dropout(backend, gates, dropout_p):
    problem = make_problem(150, ranks=(8, 3, 16), gates=gates, dropout_p=dropout_p)
    assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_few_ranks_routed(backend, dropout_p):
    segments = Segments([0, 20, 50], [1, (0, 2)])
    problem = make_problem(50, 45, 31, (3, 2, 1), segments=segments, dropout_p=dropout_p)
    assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)
    idxs = torch.randint(0, 3, (50, 2))
    listed = make_problem(
        50, 45, 31, (3, 2, 1), gates="listed", expert_idxs=idxs, dropout_p=dropout_p
    )
    assert_close(listed.to(torch.float32).run(backend), listed.truth(), FP32)


@pytest.mark.parametrize("gates", [None, "listed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_listed_experts(backend, gates, dropout_p, top_k):
    idxs = torch.randint(0, 6, (150, top_k))
    idxs[3] = 2  # one pair listed top_k times counts top_k times
    problem = make_problem(
        150, ranks=(8, 3, 16, 0, 4, 4), gates=gates, expert_idxs=idxs, dropout_p=dropout_p
    )
    assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)


def test_listed_experts_equal_dense_gates_with_zeros(backend):
    idxs = torch.stack([torch.randperm(4)[:2] for _ in range(50)])
    listed = make_problem(50, ranks=(8,) * 4, gates="listed", expert_idxs=idxs).to(torch.float32)
    dense_gates = torch.zeros(50, 4).scatter(1, idxs, listed.gates.detach()).requires_grad_()
    dense = replace(listed, gates=dense_gates, expert_idxs=None)
    got, want = listed.run(backend), dense.run(backend)
    want["dgates"] = want["dgates"].gather(1, idxs)
    assert_close(got, want, 1e-6)


def test_an_expert_nobody_lists_changes_nothing(backend):
    idxs = torch.randint(0, 2, (50, 2))
    problem = make_problem(50, ranks=(8, 8, 8), gates="listed", expert_idxs=idxs).to(torch.float32)
    broken = replace(problem, A=[*problem.A[:2], torch.full_like(problem.A[2], 1e30)])
    assert torch.equal(problem.run(backend)["y"], broken.run(backend)["y"])


@pytest.mark.parametrize("gates", [None, "layer", "token"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_segments(backend, gates, dropout_p):
    segments = Segments([0, 5, 5, 90, 140, 150], [0, 3, (3, 0), (), (2, 1, 0)])
    problem = make_problem(
        150, ranks=(8, 3, 16, 4), gates=gates, segments=segments, dropout_p=dropout_p
    )
    assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)


def test_segments_equal_one_call_a_segment(backend):
    problem = make_problem(70, ranks=(8, 8, 4), gates=None).to(torch.float32)
    cuts, experts = [0, 20, 31, 70], [(0, 2), 1, (0, 1)]
    whole = replace(problem, segments=Segments(cuts, experts)).run(backend)["y"]
    for i, ids in enumerate(experts):
        ids = (ids,) if isinstance(ids, int) else ids
        part = replace(
            problem,
            x=problem.x[cuts[i] : cuts[i + 1]],
            A=[problem.A[e] for e in ids],
            B=[problem.B[e] for e in ids],
            scaling=[problem.scaling[e] for e in ids],
        ).run(backend)["y"]
        assert torch.allclose(whole[cuts[i] : cuts[i + 1]], part, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([0.0, 0.0], "a zero gate still has its gradient"),
        ([-1.5, 2.0], "negative, not summing to one"),
        ([1.0, 0.0], "one closed"),
    ],
)
def test_gate_values(backend, values, why):
    problem = make_problem(gates="token")
    problem = replace(problem, gates=torch.tensor([values] * 37).double().requires_grad_())
    got = problem.to(torch.float32).run(backend)
    assert_close(got, problem.truth(), FP32)
    assert got["dgates"].abs().min() > 0, why


def test_expanded_gates_and_upstream(backend):
    """Stride-0 gates (one per sample) and a stride-0 dy, as a mean or a sum gives it."""
    problem = make_problem(24).to(torch.float32)
    per_sample = torch.rand(4, 1, 2, requires_grad=True)
    gates = per_sample.expand(4, 6, 2)
    results = []
    for view in (gates, gates.contiguous()):
        y = gated_lora_linear(
            problem.x.view(4, 6, -1), problem.weight, problem.A, problem.B, gates=view,
            backend=backend,
        )  # fmt: skip
        assert y.shape == (4, 6, 56)
        results.append(torch.autograd.grad(y.sum(), [problem.x, per_sample, *problem.A]))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


STRIDED = {
    "every other column": lambda *shape: torch.rand(*shape[:-1], 2 * shape[-1])[..., ::2],
    "another order": lambda *shape: torch.rand(*reversed(shape)).permute(*range(len(shape))[::-1]),
    "one row for all": lambda *shape: torch.rand(shape[-1]).expand(shape),
}


@pytest.mark.parametrize("strides", STRIDED)
@pytest.mark.parametrize("what", ["layer", "token", "listed"])
def test_gates_of_any_stride(what, strides, backend):
    idxs = torch.randint(3, (37, 2)) if what == "listed" else None
    problem = make_problem(ranks=(3, 2, 4), gates=what, expert_idxs=idxs)
    gates = STRIDED[strides](*problem.gates.shape).requires_grad_()
    got = replace(problem.to(torch.float32), gates=gates).run(backend)
    exact = gates.detach().double().contiguous().requires_grad_()
    assert_close(got, replace(problem, gates=exact).truth(), FP32)


def test_non_contiguous_x_and_parameters(backend):
    problem = make_problem(40).to(torch.float32)
    tied = [a.detach().t().contiguous().t().requires_grad_() for a in problem.A]
    strided = problem.x.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    assert not tied[0].is_contiguous()
    got = replace(problem, x=strided, A=tied).run(backend)
    assert_close(got, problem.truth(), FP32)


def test_no_experts_equals_the_base_bit_for_bit(backend):
    problem = make_problem(ranks=(8,)).to(torch.float32)
    base = F.linear(problem.x, problem.weight, problem.bias)
    for A, B in (([], []), ([torch.empty(0, 40)], [torch.empty(56, 0)])):
        y = gated_lora_linear(problem.x, problem.weight, A, B, bias=problem.bias, backend=backend)
        assert torch.equal(y, base)
    everyone_out = replace(problem, gates=None, segments=Segments([0, 37], [()]))
    assert torch.equal(everyone_out.run(backend)["y"], base)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_pairs_equal_the_base_and_train_nothing(dropout_p, lead, backend):
    """k = 0: the base's own bits, its gradient for x and zeros for the rest."""
    defined = reference.gated_lora_linear_reference
    for op in (partial(gated_lora_linear, backend=backend), defined):
        _assert_nothing_is_trained(lead, partial(op, dropout_p=dropout_p))


def test_no_pairs_in_a_compiled_graph(backend):
    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def op(*args, **kwargs):
        return gated_lora_linear(*args, **kwargs, backend=backend)

    _assert_nothing_is_trained((2, 3), op)


def _assert_nothing_is_trained(lead, op):
    weight, idxs = torch.rand(24, 16), torch.zeros(*lead, 0, dtype=torch.int64)
    x = torch.randn(*lead, 16, requires_grad=True)
    A = [torch.randn(r, 16, requires_grad=True) for r in (3, 2)]
    B = [torch.randn(24, r, requires_grad=True) for r in (3, 2)]
    gates = torch.rand(idxs.shape, requires_grad=True)
    base = F.linear(x, weight)
    y = op(x, weight, A, B, gates=gates, expert_idxs=idxs)
    assert torch.equal(y, base)
    dx, *rest = torch.autograd.grad(y.sum(), [x, *A, *B, gates])
    torch.testing.assert_close(dx, torch.autograd.grad(base.sum(), x)[0])
    for grad, t in zip(rest, [*A, *B, gates], strict=True):
        assert torch.equal(grad, torch.zeros_like(t))
    assert torch.equal(op(x, weight, A, B, expert_idxs=idxs), base)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0), (0, 0)])
def test_no_columns_equal_the_base(k, n, backend):
    x, weight = torch.randn(2, 3, k), torch.randn(n, k)
    bias, A, B = torch.randn(n), [torch.randn(4, k)], [torch.randn(n, 4)]
    y = gated_lora_linear(x, weight, A, B, bias=bias, backend=backend)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dims_and_a_change_of_the_result_in_place(lead, backend):
    """Everything has the leading dims of x, and y may be overwritten like any result."""
    problem = make_problem(math.prod(lead), 16, 24, (3, 2))

    def run(problem, op):
        x = problem.x.detach().reshape(*lead, 16).requires_grad_()
        gates = problem.gates.detach().reshape(*lead, 2).requires_grad_()
        y = op(x, problem.weight, problem.A, problem.B, gates=gates, bias=problem.bias)
        y.mul_(2)
        y.square().sum().backward()
        return y, x.grad, gates.grad

    got = run(problem.to(torch.float32), partial(gated_lora_linear, backend=backend))
    for ours, exact in zip(got, run(problem, reference.gated_lora_linear_reference), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


def test_callable_base_and_trainable_base(backend):
    problem = make_problem(30).to(torch.float32)
    weight = problem.weight.clone().requires_grad_()
    calls = []

    def base(x):
        calls.append(x.shape)
        return torch.relu(F.linear(x, weight, problem.bias))  # relu saves its own output

    args = (problem.A, problem.B)
    y = gated_lora_linear(problem.x, base, *args, gates=problem.gates, backend=backend)
    want = torch.relu(F.linear(problem.x, weight, problem.bias)) + (
        gated_lora_linear(problem.x, problem.weight, *args, gates=problem.gates, backend=backend)
        - F.linear(problem.x, problem.weight)
    )
    assert calls == [(30, 40)]
    assert torch.allclose(y, want, atol=1e-5)
    got = torch.autograd.grad(y.square().sum(), [problem.x, weight])
    right = torch.autograd.grad(want.square().sum(), [problem.x, weight])
    for a, b in zip(got, right, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    plain = gated_lora_linear(problem.x, weight, *args, bias=problem.bias, backend=backend)
    assert torch.autograd.grad(plain.sum(), weight)[0].norm() > 0


def test_the_comparison_can_fail(backend):
    """Negative controls: a swapped gate and a wrong expert are wrong by O(1), not by rounding."""
    problem = make_problem(ranks=(8, 8))
    truth = problem.truth()
    single = problem.to(torch.float32)
    swapped = replace(single, gates=single.gates.detach().flip(1).requires_grad_())
    assert errors(swapped.run(backend), truth)["y"] > 0.1
    wrong = replace(single, A=single.A[::-1])
    assert errors(wrong.run(backend), truth)["dx"] > 0.1


def test_outputs_do_not_depend_on_uninitialised_memory(backend):
    """Every torch.empty is filled with NaN; C++ scratch is dirtied by a larger call before."""
    big = make_problem(200, 96, 130, (16, 16), dropout_p=0.2).to(torch.float32)
    replace(big, x=(big.x.detach() * 1e20).requires_grad_()).run(backend)
    segments = Segments([0, 10, 37], [1, ()])
    cases = [
        make_problem(ranks=(8, 3)),
        make_problem(ranks=(8, 3), dropout_p=0.2),
        make_problem(ranks=(8, 3), segments=segments),
        make_problem(ranks=(8, 3), gates="listed", expert_idxs=torch.randint(0, 2, (37, 1))),
    ]
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        for problem in cases:
            assert_close(problem.to(torch.float32).run(backend), problem.truth(), FP32)
    finally:
        torch.use_deterministic_algorithms(False)
