"""The Triton kernels in every strategy and dtype: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_problem import (
    Problem,
    allowed,
    assert_close,
    errors,
    make_problem,
    on_cpu,
    on_device,
    peft_arithmetic,
)

from fedms.kernels import Segments, tiles, triton
from fedms.kernels.tiles import Choice, GemmTiles, Tiles

if not triton.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from fedms.kernels.triton import backend, launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


def choice(
    strategy: str, *, one_pass: bool = True, tma: bool = False, persistent: bool = False
) -> Choice:
    """Small tiles, so that small problems have several of each."""
    gemm = GemmTiles(32, 32, 32, 4, 2, tma=tma, persistent=persistent)
    other, outer = Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 2)
    return Choice("triton", strategy, strategy, gemm, gemm, other, other, outer, one_pass)


@pytest.fixture
def force(monkeypatch):
    """Make every call of the test run with this choice."""
    return lambda chosen: monkeypatch.setattr(backend, "choose", lambda *call: chosen)


def run(problem: Problem) -> dict[str, torch.Tensor | None]:
    return on_cpu(on_device(problem, DEVICE).run("triton"))


@pytest.mark.parametrize("strategy", tiles.STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(70, 72, 104, (8, 3)), (33, 100, 41, (16, 16, 4)), (16, 48, 64, (8,))], ids=str
)
def test_error_is_not_worse_than_pefts(force, strategy, dtype, shape):
    """Against float64: at most twice the error of peft's arithmetic in the same dtypes."""
    force(choice(strategy))
    m, k, n, ranks = shape
    problem = make_problem(m, k, n, ranks)
    truth = problem.truth()
    cast = problem.to(*DTYPES[dtype])
    ours, theirs = errors(run(cast), truth), errors(cast.run(peft_arithmetic), truth)
    for name, error in ours.items():
        bound = allowed(theirs[name], DTYPES[dtype][0], DEVICE)
        assert error <= bound, f"{name}: {error:.2e}, peft {theirs[name]:.2e}"


@pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("strategy", tiles.STRATEGIES)
@pytest.mark.parametrize(
    "variant",
    [
        {"gates": None},
        {"gates": "layer"},
        {"dropout_p": 0.3},
        {"gates": "listed", "expert_idxs": torch.arange(140).reshape(70, 2) * 3 // 2 % 3},
        {"segments": Segments([0, 5, 5, 40, 61, 70], [0, 2, (2, 0), (), (2, 1, 0)])},
        {"segments": Segments([0, 33, 70], [(0, 2), 1]), "dropout_p": 0.3},
    ],
    ids=["no-gates", "layer", "dropout", "top-k", "segments", "segments-dropout"],
)
def test_routing(force, strategy, variant, one_pass):
    force(choice(strategy, one_pass=one_pass))
    problem = make_problem(70, 40, 56, (8, 3, 16), **variant)
    assert_close(run(problem.to(torch.float32)), problem.truth(), 1e-5)


@pytest.mark.parametrize("strategy", ["fused", "extend"])
def test_descriptors_and_persistence_change_no_bit(force, strategy):
    problem = make_problem(70, 64, 96, (8, 8)).to(torch.bfloat16)
    force(choice(strategy))
    plain = run(problem)
    for tma, persistent in [(True, False), (False, True), (True, True)]:
        force(choice(strategy, tma=tma, persistent=persistent))
        for name, value in run(problem).items():
            assert torch.equal(value, plain[name]), name


def test_a_matrix_that_no_descriptor_takes_is_read_by_pointers(force):
    force(choice("extend", tma=True))
    problem = make_problem(33, 41, 43, (8,)).to(torch.bfloat16)  # rows of 82 and 86 bytes
    assert max(errors(run(problem), problem.truth()).values()) < 1e-2


@pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "two-pass"])
@pytest.mark.parametrize("strategy", tiles.STRATEGIES)
@pytest.mark.parametrize("trained", ["A", "B", "gates", "x", "A1 and B0"])
def test_only_what_is_asked_for(force, strategy, trained, one_pass):
    """Each gradient alone, and A and B of different experts: the launches differ with what is."""
    force(choice(strategy, one_pass=one_pass))
    problem = make_problem(40, 40, 56, (8, 4, 8))

    def only(name, t):
        asked = name in trained or (trained in ("A", "B") and name[0] == trained)
        return t if asked else t.detach()

    cut = replace(
        problem,
        x=only("x", problem.x),
        gates=only("gates", problem.gates),
        A=[only(f"A{e}", a) for e, a in enumerate(problem.A)],
        B=[only(f"B{e}", b) for e, b in enumerate(problem.B)],
    )
    assert_close(run(cut.to(torch.float32)), cut.truth(), 1e-5)


def test_more_ranks_than_a_program_takes(force):
    """R over 128: several rank tiles, an expert that lies in two of them."""
    for one_pass in (True, False):
        force(choice("extend", one_pass=one_pass))
        problem = make_problem(40, 40, 48, (100, 60, 16))
        assert_close(run(problem.to(torch.float32)), problem.truth(), 1e-5)


def test_more_experts_than_one_launch_writes(force):
    """10 of 11 are trained: two launches of outer_sum, and dg in the first alone."""
    force(choice("split", one_pass=False))
    problem = make_problem(40, 40, 48, (4,) * 11)
    problem.A[3].requires_grad_(False)
    problem.B[10].requires_grad_(False)
    assert_close(run(problem.to(torch.float32)), problem.truth(), 1e-5)


@pytest.mark.parametrize("lie", ["one matrix", "apart", "strided", "an empty one", "many"])
def test_experts_however_they_lie(force, lie):
    """As views of one matrix, or packed: as tensors of their own, with any strides, of rank 0."""
    force(choice("extend"))
    ranks = {"an empty one": (8, 0, 3), "many": (2,) * 11}.get(lie, (8, 4, 3))
    problem = make_problem(20, 40, 48, ranks).to(torch.float32)
    A, B = ([t.detach() for t in parts] for parts in (problem.A, problem.B))
    if lie == "one matrix":
        A, B = torch.cat(A).split(ranks), torch.cat(B, 1).split(ranks, 1)
    if lie == "strided":
        A = [a.t().contiguous().t() for a in A]
        B = [torch.stack([b, b], 2)[:, :, 1] for b in B]
    A, B = ([t.requires_grad_() for t in parts] for parts in (A, B))
    assert_close(run(replace(problem, A=list(A), B=list(B))), problem.truth(), 1e-5)


def test_few_rows_split_the_columns(force, monkeypatch):
    """One row tile and many columns: several programs share them, combine adds their sums."""
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: 8)
    monkeypatch.setattr(launches, "_SPLIT_PAYS", 1000)
    for gates, one_pass in (("token", False), (None, False), ("token", True)):
        force(replace(choice("split", one_pass=one_pass), shrink=Tiles(16, 16, 4, 2)))
        problem = make_problem(5, 300, 280, (8, 3), gates=gates)
        assert_close(run(problem.to(torch.float32)), problem.truth(), 1e-5)


def test_negative_controls(force):
    for strategy in tiles.STRATEGIES:
        force(choice(strategy))
        problem = make_problem(40, ranks=(8, 8)).to(torch.float32)
        truth = problem.truth()
        swapped = replace(problem, gates=problem.gates.detach().flip(1).requires_grad_())
        assert errors(run(swapped), truth)["y"] > 0.1
        assert errors(run(replace(problem, B=problem.B[::-1])), truth)["dx"] > 0.1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_rows(force):
    for strategy in tiles.STRATEGIES:
        force(choice(strategy))
        problem = make_problem(5, 32, 40, (8,), gates=None).to(torch.bfloat16)
        with torch.no_grad():
            problem.x[1, 3], problem.x[2, 3] = float("nan"), float("inf")
        y = run(problem)["y"]
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[[0, 3, 4]].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_and_without_the_interpreter_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    problem = make_problem(3).to(torch.float32)
    with pytest.raises(ValueError, match=r"backend='triton' must have tensors on a GPU"):
        problem.run("triton")


def test_dtypes_it_has_no_kernels_for():
    with pytest.raises(ValueError, match=r"backend='triton' must have x, base result and adapters"):
        on_device(make_problem(3), DEVICE).run("triton")  # float64
