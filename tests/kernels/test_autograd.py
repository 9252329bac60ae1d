"""The autograd side: gradcheck, opcheck, compile, what is saved, who gets a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_problem import BACKENDS, Problem, assert_close, make_problem

from fedms.kernels import Segments, gated_lora_linear
from fedms.kernels import functional as op_module


def _gradcheck(problem: Problem) -> bool:
    e = len(problem.A)

    def call(x, gates, *experts):
        return replace(problem, x=x, gates=gates, A=experts[:e], B=experts[e:]).call(
            gated_lora_linear, backend="stacked"
        )

    inputs = (problem.x, problem.gates, *problem.A, *problem.B)
    return torch.autograd.gradcheck(call, inputs, fast_mode=False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("gates", [None, "layer", "token"])
def test_gradcheck(gates, dropout_p):
    assert _gradcheck(make_problem(5, 4, 3, (2, 1), gates=gates, dropout_p=dropout_p))


def test_gradcheck_routing():
    segments = Segments([0, 2, 5], [1, (0, 1)])
    assert _gradcheck(make_problem(5, 4, 3, (2, 1), segments=segments))
    idxs = torch.tensor([[0, 1], [1, 1], [2, 0], [0, 0], [2, 1]])
    assert _gradcheck(make_problem(5, 4, 3, (2, 1, 2), gates="listed", expert_idxs=idxs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("listed", [False, True])
def test_opcheck(backend, listed):
    # Equal ranks and no absent pair: h's entries of pairs that do not exist are never written, and
    # opcheck compares every byte of every output.
    p = make_problem(9, 8, 12, (4, 4)).to(torch.float32)
    A, B = [a.detach() for a in p.A], [b.detach() for b in p.B]
    x, gates = p.x.detach(), p.gates.detach()
    idxs = torch.randint(0, 2, (9, 2)) if listed else None
    segments = (None, None) if listed else Segments([0, 5, 9], [(0, 1), (1, 0)]).tensors
    routing = (A, B, gates, idxs, *segments, [1.0, 2.0], 0.4, torch.tensor(7))
    forward = getattr(torch.ops.fedms, f"{backend}_forward").default
    backward = getattr(torch.ops.fedms, f"{backend}_backward").default
    torch.library.opcheck(forward, (x, p.weight, p.bias, None, *routing, True))
    y, h = forward(x, p.weight, p.bias, None, *routing, True)
    need = [True, False]
    torch.library.opcheck(
        backward, (torch.ones_like(y), p.weight, x, h, *routing, True, True, need, need)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    """One graph, also when the number of rows changes."""

    def by_tensors(x, weight, gates, a, b):
        return gated_lora_linear(x, weight, [a], [b], gates=gates, backend=backend).sin()

    compiled = torch.compile(by_tensors, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (7, 12, 19):
        p = make_problem(m, ranks=(4,)).to(torch.float32)
        args = (p.x, p.weight, p.gates, p.A[0], p.B[0])
        want, got = by_tensors(*args), compiled(*args)
        assert torch.allclose(got, want, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(got.sum(), [p.x, p.gates, p.A[0]]),
            torch.autograd.grad(want.sum(), [p.x, p.gates, p.A[0]]),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_experts_get_none_and_no_work(backend, monkeypatch):
    """A frozen expert counts in y and dx; its gradients are None, not zeros, and never computed."""
    problem = make_problem(ranks=(8, 4, 8))
    frozen = replace(
        problem,
        A=[problem.A[0].detach(), *problem.A[1:]],
        B=[problem.B[0].detach(), problem.B[1].detach(), problem.B[2]],
    )
    asked = []
    original = op_module._OPS[backend, "backward"]

    def spy(*args):
        asked.append((list(args[-2]), list(args[-1])))
        return original(*args)

    monkeypatch.setitem(op_module._OPS, (backend, "backward"), spy)
    got = frozen.to(torch.float32).run(backend)
    assert_close(got, frozen.truth(), 1e-5)
    assert asked == [([False, True, True], [False, False, True])]
    assert "dA0" not in got


def test_a_tensor_left_of_a_functorch_transform():
    """It is one like any other once the transform has ended, as for torch's own layers."""
    problem = make_problem(gates=None).to(torch.float32)
    left = []
    torch.func.grad(lambda t: (left.append(t), t.sum())[1])(problem.x.detach())
    got = replace(problem, x=left[0]).call(gated_lora_linear)
    torch.testing.assert_close(got, problem.call(gated_lora_linear))


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_against_zero_gradients(backend):
    """An expert without rows in `segments`: None. One that nobody lists, or of gate 0: zeros."""
    segments = Segments([0, 37], [1])
    got = make_problem(segments=segments).to(torch.float32).run(backend)
    assert got["dA0"] is None
    assert got["dB0"] is None
    assert got["dA1"].norm() > 0
    idxs = torch.zeros(37, 1, dtype=torch.int64)
    listed = make_problem(gates="listed", expert_idxs=idxs).to(torch.float32).run(backend)
    assert listed["dA1"].eq(0).all()
    assert listed["dB1"].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_gradient_only_where_asked(backend):
    problem = make_problem().to(torch.float32)
    quiet = replace(problem, x=problem.x.detach()).run(backend)
    assert "dx" not in quiet
    truth = replace(problem.to(torch.float64), x=problem.x.detach().double()).truth()
    assert_close(quiet, truth, 1e-5)
    with torch.no_grad():
        assert not problem.call(gated_lora_linear, backend=backend).requires_grad


def _saved_bytes(problem: Problem, backend: str) -> int:
    """Bytes kept for backward beyond the parameters, which are there anyway."""
    parameters = {t.data_ptr() for t in (problem.weight, *problem.A, *problem.B)}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        problem.call(gated_lora_linear, backend=backend)
    return sum(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_n_wide_is_saved(backend):
    m, k, n, r, e = 64, 40, 5000, 16, 2
    problem = make_problem(m, k, n, (8, 8), dropout_p=0.1).to(torch.float32)
    x, h, gates, seed = 4 * m * k, 4 * m * r, 4 * m * e, 8
    assert _saved_bytes(problem, backend) == x + h + gates + seed
    frozen_a = replace(problem, A=[a.detach() for a in problem.A])
    place = 4  # x's, for derivatives of derivatives
    assert _saved_bytes(frozen_a, backend) == h + gates + seed + place
    only_dx = replace(frozen_a, B=[b.detach() for b in problem.B], gates=problem.gates.detach())
    assert _saved_bytes(only_dx, backend) == gates + seed


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_adapters_in_fp32(backend):
    problem = make_problem(40)
    single = problem.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = single.run(backend)
    assert got["y"].dtype == torch.bfloat16
    assert got["dA0"].dtype == torch.float32
    plain = problem.to(torch.bfloat16, torch.float32).run(backend)
    assert torch.equal(got["y"], plain["y"])
    assert_close(got, problem.truth(), 1e-2)
