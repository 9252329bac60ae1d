"""Stacked experts: one tensor [S, r, K] is what S tensors [r, K] are, as one leaf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_problem import BACKENDS, Problem, assert_close, make_problem
from torch import Tensor

from fedms.kernels import Segments, gated_lora_linear

RANKS = (3, 3, 3, 5, 5)  # a stack of three and a stack of two
CUTS = (slice(0, 3), slice(3, 5))
COHORT = Segments([0, 9, 9, 20, 37], [(0, 3), (1, 3), (2, 4), 4])


def _stacked(problem: Problem) -> Problem:
    """The same experts as two stacks."""

    def stack(parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack(parts[cut]).detach().requires_grad_() for cut in CUTS]

    return replace(problem, A=stack(problem.A), B=stack(problem.B))


def _as_stacks(found: dict[str, Tensor | None], like: Problem) -> dict[str, Tensor | None]:
    """Gradients by expert as those of the stacks; an expert without one counts as zeros."""
    out = {name: t for name, t in found.items() if name[:2] not in ("dA", "dB")}
    for letter, parts in (("A", like.A), ("B", like.B)):
        for i, cut in enumerate(CUTS):
            mine = [found[f"d{letter}{e}"] for e in range(cut.start, cut.stop)]
            zeros = torch.zeros_like(parts[i][0], dtype=torch.float64)
            if any(g is not None for g in mine):
                stacked = torch.stack([zeros if g is None else g.double() for g in mine])
                out[f"d{letter}{i}"] = stacked
            else:
                out[f"d{letter}{i}"] = None
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gates": "layer", "dropout_p": 0.3},
        {"gates": None, "segments": COHORT},
        {"segments": COHORT, "dropout_p": 0.3},
        {"segments": Segments([0, 37], [(1, 2)])},  # the second stack has no rows: None
        {"gates": "listed", "expert_idxs": torch.randint(5, (37, 2))},
    ],
    ids=["dense", "dropout", "cohort", "cohort-dropout", "no-rows", "top-k"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_its_experts(backend, options, dtype):
    single = make_problem(ranks=RANKS, **options)
    stacked = _stacked(single)
    truth = _as_stacks(single.truth(), stacked)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(stacked.to(dtype, torch.float32).run(backend), truth, bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_is_one_leaf_and_frozen_as_a_whole(backend):
    """Two edges of the graph a layer, whatever S; a frozen stack has neither edge nor gradient."""
    problem = _stacked(make_problem(ranks=RANKS, segments=COHORT)).to(torch.float32)
    frozen = replace(problem, A=[problem.A[0].detach(), problem.A[1]],
                     B=[problem.B[0].detach(), problem.B[1]])  # fmt: skip
    y = frozen.call(gated_lora_linear, backend=backend)
    leaves = [node.variable for node, _ in y.grad_fn.next_functions if hasattr(node, "variable")]
    assert {id(t) for t in leaves} == {
        id(t) for t in (frozen.x, frozen.gates, frozen.A[1], frozen.B[1])
    }
    got = frozen.run(backend)
    assert "dA0" not in got
    assert_close(got, frozen.truth(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_for_all_and_one_a_client(backend):
    """lora_A alone as a tensor; and a shared expert beside a stack, by counting through."""
    slots, m = 4, 24
    problem = make_problem(m, ranks=(6, *[3] * slots), gates=None).to(torch.float32)
    A, B = torch.stack(problem.A[1:]), torch.stack(problem.B[1:])
    offsets = range(0, m + 1, m // slots)

    def call(a, b, experts, **kwargs):
        return gated_lora_linear(
            problem.x, problem.weight, a, b, segments=Segments(offsets, experts), **kwargs
        )

    alone = call(A, B, range(slots), backend=backend)
    shared = call([problem.A[0], A], [problem.B[0], B], [(0, 1 + s) for s in range(slots)],
                  scaling=0.5, backend=backend)  # fmt: skip
    for s in range(slots):
        rows = slice(offsets[s], offsets[s + 1])
        x = problem.x[rows]
        delta = x @ A[s].t() @ B[s].t()
        assert torch.allclose(alone[rows], x @ problem.weight.t() + delta, atol=1e-4)
        both = 0.5 * (delta + x @ problem.A[0].t() @ problem.B[0].t())
        assert torch.allclose(shared[rows], x @ problem.weight.t() + both, atol=1e-4)


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradcheck_of_stacks(contiguous):
    segments = Segments([0, 2, 5], [(0, 2), (1, 2)])
    problem = make_problem(5, 4, 3, (2, 2, 1), segments=segments)
    A = torch.stack(problem.A[:2]).detach()
    if not contiguous:
        A = A.transpose(1, 2).contiguous().transpose(1, 2)
    stack_A, stack_B = A.requires_grad_(), torch.stack(problem.B[:2]).detach().requires_grad_()

    def call(x, gates, a, b, a2, b2):
        changed = replace(problem, x=x, gates=gates, A=[a, a2], B=[b, b2])
        return changed.call(gated_lora_linear, backend="stacked")

    inputs = (problem.x, problem.gates, stack_A, stack_B, problem.A[2], problem.B[2])
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacks_compile_to_one_graph(backend):
    p = _stacked(make_problem(ranks=RANKS)).to(torch.float32)

    def layer(x, gates, *experts):
        return gated_lora_linear(
            x, p.weight, experts[:2], experts[2:], gates=gates, backend=backend
        ).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = (p.x, p.gates, *p.A, *p.B)
    got, want = compiled(*inputs), layer(*inputs)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_does_not_grow_with_the_slots(backend):
    """A row of h holds the ranks that the row uses, however many experts the stack has."""
    slots, r, m = 16, 3, 48
    p = make_problem(m, ranks=(r,) * slots, gates=None).to(torch.float32)
    A, B = torch.stack(p.A).detach(), torch.stack(p.B).detach()
    segments = Segments(range(0, m + 1, m // slots), range(slots))
    forward = getattr(torch.ops.fedms, f"{backend}_forward").default
    _, h = forward(
        p.x.detach(), p.weight, None, None, [A], [B], None, None, *segments.tensors, [1.0] * slots,
        0.0, None, True,
    )  # fmt: skip
    assert h.shape == (m, r)
