"""Accuracy against float64 beside the arithmetic people use now, and bit-equal repetition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_problem import BACKENDS, Problem, errors, make_problem, peft_arithmetic
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, gated_lora_linear_reference, native

needs_native = pytest.mark.skipif(not native.available(), reason="the extension is not built")


@needs_native
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [(197, 384, 384), (100, 100, 600), (10, 64, 6000), (2500, 64, 64)],  # long sums too
)
@pytest.mark.parametrize("fast_bf16", [True, False])
def test_error_is_not_worse_than_pefts(base, adapter, shape, fast_bf16, monkeypatch):
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    problem = make_problem(*shape, ranks=(8, 16, 3))
    truth = problem.truth()
    cast = problem.to(base, adapter)
    ours, theirs = errors(cast.run("native"), truth), errors(cast.run(peft_arithmetic), truth)
    stacked = errors(cast.run("stacked"), truth)
    for name, error in ours.items():
        bound = 2 * max(theirs[name], stacked[name], torch.finfo(torch.float32).eps)
        assert error <= bound, f"{name}: {error:.2e}, peft {theirs[name]:.2e}"
    limit = 1e-5 if base is torch.float32 else 6e-3
    assert max(ours.values()) < limit


@needs_native
@pytest.mark.parametrize("fast_bf16", [True, False])
def test_fp32_adapters_on_bf16_round_once(fast_bf16, monkeypatch):
    """y is the correctly rounded sum of base and fp32 mixture; the base result was rounded before
    where torch's bf16 GEMM made it, and was not where the layer runs in fp32."""
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    problem = make_problem(64, 64, 96, ranks=(8,)).to(torch.bfloat16, torch.float32)
    y = problem.run("native")["y"]
    if fast_bf16:
        base = F.linear(problem.x, problem.weight, problem.bias).double()
    else:
        base = F.linear(problem.x.double(), problem.weight.double(), problem.bias.double())
    h = problem.x.double() @ problem.A[0].double().t()
    delta = (h * problem.gates.double() * problem.scaling[0]) @ problem.B[0].double().t()
    exact = (base + delta).float().bfloat16()
    assert (y != exact).double().mean() < 0.01  # only where fp32 sums fall on the other side


@needs_native
@pytest.mark.parametrize("fast_bf16", [True, False])
@pytest.mark.parametrize("gates", [None, "layer", "token"])
@pytest.mark.parametrize("routing", ["dense", "segments", "listed"])
def test_both_ways_to_compute_bf16(fast_bf16, gates, routing, monkeypatch):
    """In bf16 kernels after a bf16 GEMM, and in fp32 throughout: same truth, same dtypes."""
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    monkeypatch.setattr(native, "_MIN_ROWS_IN_FP32", 4)
    extra: dict = {}
    if routing == "segments":
        extra["segments"] = Segments([0, 50, 130], [0, (0, 1)])
    if routing == "listed":
        if gates == "layer":
            pytest.skip("listed experts have a gate a pair")
        gates = "listed" if gates else None
        extra["expert_idxs"] = torch.stack([torch.randperm(3)[:2] for _ in range(130)])
    problem = make_problem(130, 500, 421, (8, 3, 5), gates=gates, **extra)
    got = problem.to(torch.bfloat16, torch.float32).run("native")
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    assert got["dA0"].dtype == torch.float32
    assert max(errors(got, problem.truth()).values()) < 6e-3


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("least", [0, 1 << 40], ids=["base last", "base first"])
def test_the_base_gemm_first_or_last(least, dropout_p, bias, monkeypatch):
    """Small layers add to the base result; large ones write y and dx, and the GEMM adds to them."""
    monkeypatch.setattr(native, "_MIN_ELEMENTS_BASE_LAST", least)
    problem = make_problem(50, 31, 45, (8, 3), dropout_p=dropout_p)
    if not bias:
        problem = replace(problem, bias=torch.zeros_like(problem.bias))
    truth, single = problem.truth(), problem.to(torch.float32)
    if not bias:
        single = replace(single, bias=None)
    assert max(errors(single.run("native"), truth).values()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 250], ids=["stride-0 view", "whole"])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"segments": Segments([0, 130, 130, 200, 250], [0, 1, (1, 0), ()])},
        {"expert_idxs": torch.arange(500).reshape(250, 2) // 3 % 2, "gates": "listed"},
    ],
    ids=["dense", "segments", "top-k"],
)
def test_a_callable_base_is_left_as_it_is(backend, dtype, rows, routing):
    """What the callable returned may be its own to keep: it is read, in several blocks of rows."""
    problem = make_problem(250, 31, 45, (8, 3), **routing)
    base = torch.randn(rows, 45).to(dtype)
    before = base.clone()

    def call(problem: Problem, op, result: torch.Tensor, **extra: str) -> torch.Tensor:
        return op(
            problem.x, lambda _: result.expand(250, 45), problem.A, problem.B, **extra,
            gates=problem.gates, segments=problem.segments, expert_idxs=problem.expert_idxs,
        )  # fmt: skip

    cast = problem.to(dtype, torch.float32)
    y = call(cast, gated_lora_linear, base, backend=backend)
    truth = call(cast.to(torch.float64), gated_lora_linear_reference, base.double())
    assert torch.equal(base, before)
    assert (y - base).norm() > 1
    bound = 1e-5 if dtype is torch.float32 else 5e-2  # top-k rounds once a listed pair
    assert torch.allclose(y.double(), truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("routing", ["dense", "segments", "listed"])
def test_two_runs_are_bit_equal(backend, dropout_p, routing):
    def build() -> Problem:
        torch.manual_seed(5)
        extra: dict = {}
        if routing == "segments":
            extra["segments"] = Segments([0, 100, 300, 600], [0, (0, 1), 2])
        if routing == "listed":
            extra |= {"expert_idxs": torch.randint(0, 3, (600, 2)), "gates": "listed"}
        return make_problem(600, 64, 96, (8, 8, 8), dropout_p=dropout_p, **extra)

    first, second = (build().to(torch.float32).run(backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@needs_native
@pytest.mark.parametrize("isa", ["generic", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(8, 3, 5), (16, 16), (1,), (4, 40)], ids=str)
@pytest.mark.parametrize("m", [61, 5])
def test_every_instruction_set(isa, dtype, dropout_p, ranks, m, monkeypatch):
    """The row kernels are compiled once per instruction set: run each one this CPU has."""
    monkeypatch.setattr(native, "_FAST_BF16", True)  # the bf16 kernels, whatever this CPU has
    best = native._C.isa()
    if not native._C.set_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        assert native._C.isa() == isa
        problem = make_problem(m, 477, 183, ranks, dropout_p=dropout_p)
        bound = 1e-5 if dtype is torch.float32 else 6e-3
        worst = max(
            errors(problem.to(dtype, torch.float32).run("native"), problem.truth()).values()
        )
        assert worst < bound
    finally:
        assert native._C.set_isa(best)


@needs_native
@pytest.mark.parametrize("isa", ["generic", "x86-64-v3", "x86-64-v4"])
def test_bf16_rounds_ties_to_even_and_keeps_every_nan(isa):
    """Half of a last bit is added to 1 and to the number after it, in y, dA and dB. Then a NaN that
    is all ones, which rounding would carry into the sign.
    """
    best = native._C.isa()
    if not native._C.set_isa(isa):
        pytest.skip(f"no {isa} here")
    half = 2.0**-8
    start = torch.tensor([1.0, 1 + 2 * half]).repeat(20).bfloat16()
    even = torch.tensor([1.0, 1 + 4 * half]).repeat(20).bfloat16()
    first = torch.zeros(40).bfloat16()
    first[0] = 1.0

    def run(gates):
        x = torch.stack([start, torch.full_like(start, half)]).requires_grad_()
        A, B = first.clone().view(1, 40).requires_grad_(), torch.ones(40, 1).bfloat16()
        B.requires_grad_()
        base = start.expand(2, 40)
        y = gated_lora_linear(x, lambda _: base, [A], [B], gates=gates, backend="native")
        return y, *torch.autograd.grad(y, [A, B, x], first.expand(2, 40))

    try:
        y, dA, dB, _ = run(torch.ones(2, 1))
        assert torch.equal(y[1], even)
        assert torch.equal(dA[0], even)
        assert torch.equal(dB[:, 0], first)
        nan = torch.full((2, 1), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        for result in run(nan):
            assert result.isnan().all()
    finally:
        assert native._C.set_isa(best)


@needs_native
def test_threads_follow_torch_and_agree():
    problem = make_problem(500, 64, 96, (8, 8))
    truth = problem.truth()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            worst = max(errors(problem.to(torch.float32).run("native"), truth).values())
            assert worst < 1e-5
    finally:
        torch.set_num_threads(before)


@needs_native
def test_an_error_on_a_worker_thread_arrives():
    with pytest.raises(RuntimeError, match="thrown in a parallel body"):
        native._C.parallel_for_throws(8)


@needs_native
@pytest.mark.parametrize("fast_bf16", [True, False])
def test_bf16_keeps_nan_and_infinity(fast_bf16, monkeypatch):
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    problem = make_problem(5, 32, 40, (8,), gates=None).to(torch.bfloat16, torch.float32)
    with torch.no_grad():
        problem.x[1, 3] = float("nan")
        problem.x[2, 3] = float("inf")
    y = problem.run("native")["y"]
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[[0, 3, 4]].isfinite().all()
