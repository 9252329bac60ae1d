"""Every error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from lora_problem import BACKENDS
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, native, plan

X = torch.zeros(2, 5, 4)
W = torch.zeros(3, 4)
A = [torch.zeros(2, 4), torch.zeros(1, 4)]
B = [torch.zeros(3, 2), torch.zeros(3, 1)]
GOOD = {"x": X, "weight": W, "lora_A": A, "lora_B": B}
IDXS = torch.zeros(2, 5, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a Tensor, got list"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"x must be floating .*int32"),
        ({"x": X.to(torch.float8_e4m3fn)}, ValueError, r"x must be .*16, 32 or 64 .*float8_e4m3fn"),
        ({"x": X.to_sparse()}, ValueError, r"x must be .* strided, got .*torch.sparse_coo"),
        ({"weight": 3}, TypeError, r"weight must be a Tensor or a callable, got int"),
        (
            {"weight": torch.zeros(3, 5)},
            ValueError,
            r"weight must be \[N, K\] with K = 4, strided, got \[3, 5\]",
        ),
        ({"weight": W.to_sparse()}, ValueError, r"weight must be .* strided, got .*sparse_coo"),
        ({"weight": W.double()}, ValueError, r"weight must have x's dtype .*float64"),
        ({"weight": lambda x: x[..., :3], "bias": W[:, 0]}, ValueError, r"bias must be None"),
        ({"weight": lambda x: torch.zeros(9, 3)}, ValueError, r"weight\(x\) must be .* \[9, 3\]"),
        ({"weight": lambda x: None}, TypeError, r"weight\(x\) must be a Tensor, got NoneType"),
        (
            {"weight": lambda x: x[..., :3].int()},
            ValueError,
            r"weight\(x\) must be floating .*int32",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[3\] .* got \[4\]"),
        ({"bias": [0.0] * 3}, TypeError, r"bias must be a Tensor, got list"),
        ({"lora_A": torch.zeros(2, 2, 4)}, TypeError, r"lora_A and lora_B must both be .* list"),
        (
            {"lora_A": A[0], "lora_B": B[0]},
            ValueError,
            r"sequences of Tensors, or stacks \[S, r, K\] and \[S, N, r\], got \[2, 4\]",
        ),
        (
            {"lora_A": torch.zeros(0, 2, 4), "lora_B": torch.zeros(0, 3, 2)},
            ValueError,
            r"lora_A\[0\] must be \[r, K\], or a stack \[S, r, K\], S at least 1, with K = 4, got",
        ),
        (
            {"lora_A": torch.zeros(5, 2, 4), "lora_B": torch.zeros(4, 3, 2)},
            ValueError,
            r"lora_B\[0\] must be \[N, r\] = \[5, 3, 2\] as lora_A\[0\] is \[5, 2, 4\], got",
        ),
        ({"lora_B": B[:1]}, ValueError, r"lora_B must have one entry .* \(2\), got 1"),
        ({"lora_A": [A[0], torch.zeros(1, 5)]}, ValueError, r"lora_A\[1\] must be .* \[1, 5\]"),
        ({"lora_B": [B[0], torch.zeros(3, 2)]}, ValueError, r"lora_B\[1\] must be .* \[3, 2\]"),
        (
            {"lora_A": [A[0], A[1].double()]},
            ValueError,
            r"lora_A\[1\] and .* must have .*float64",
        ),
        ({"lora_A": [a.int() for a in A]}, ValueError, r"lora_A\[0\] must have .*int32"),
        ({"lora_A": None}, TypeError, r"must be sequences of Tensors, got NoneType and list"),
        ({"lora_A": [A[0], None]}, TypeError, r"lora_A\[1\] and .* must be Tensors, got NoneType"),
        ({"lora_B": [B[0].numpy(), B[1]]}, TypeError, r"lora_B\[0\] must be .* Tensor and ndarray"),
        ({"scaling": [1.0]}, ValueError, r"scaling must have one entry an expert \(2\), got 1"),
        ({"scaling": torch.ones(1, 2)}, TypeError, r"scaling must be a number or one an expert"),
        (
            {"scaling": torch.ones(2, requires_grad=True)},
            ValueError,
            r"scaling must not require a gradient",
        ),
        ({"gates": torch.zeros(3)}, ValueError, r"gates must be \[2\] or \[2, 5, 2\], got \[3\]"),
        ({"gates": torch.zeros(10, 2)}, ValueError, r"gates must be \[2\] or \[2, 5, 2\]"),
        (
            {"gates": torch.zeros(2, dtype=torch.int64)},
            TypeError,
            r"gates must be a floating .*int64",
        ),
        ({"gates": 0.5}, TypeError, r"gates must be a floating point Tensor, got .*float"),
        ({"expert_idxs": IDXS.int()}, TypeError, r"expert_idxs must be an int64 .* torch.int32"),
        ({"expert_idxs": [[0]]}, TypeError, r"expert_idxs must be an int64 Tensor, got .*list"),
        (
            {"x": X[0, 0], "expert_idxs": IDXS[0, 0, 0]},
            ValueError,
            r"expert_idxs must be .* got \[\]",
        ),
        ({"expert_idxs": IDXS[0]}, ValueError, r"expert_idxs must be .* \(2, 5\)"),
        (
            {"expert_idxs": IDXS + 2},
            ValueError,
            r"expert_idxs must be in \[0, 2\), got values 2 to 2",
        ),
        ({"expert_idxs": IDXS - 1}, ValueError, r"expert_idxs must be in \[0, 2\), got values -1"),
        ({"expert_idxs": IDXS, "gates": torch.zeros(2, 5, 2)}, ValueError, r"shape of expert_idxs"),
        (
            {"expert_idxs": IDXS, "segments": Segments([0, 10], [0])},
            ValueError,
            r"segments must be None beside expert_idxs",
        ),
        (
            {"segments": Segments([0, 9], [0])},
            ValueError,
            r"cover the 10 rows of x, the last one is 9",
        ),
        (
            {"segments": Segments([0, 10], [2])},
            ValueError,
            r"segments.experts\[0\] must be in \[0, 2\)",
        ),
        ({"segments": ([0, 10], [0])}, TypeError, r"segments must be Segments, got tuple"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1.5}, TypeError, r"seed must be an integer or an int64 Tensor, got 1.5"),
        ({"seed": torch.tensor(1.0)}, ValueError, r"seed must be int64 \[\] on cpu, got .*float32"),
        ({"seed": torch.tensor([1])}, ValueError, r"seed must be int64 \[\] on cpu, got \[1\]"),
        (
            {"seed": torch.tensor([1, 2]), "segments": Segments([0, 10], [0])},
            ValueError,
            r"seed must be int64 \[\] or one a segment \[1\] on cpu, got \[2\]",
        ),
        ({"backend": "magic"}, ValueError, r"backend must be None or one of .*'magic'"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        gated_lora_linear(**{**GOOD, **change})


def _never(x):
    raise AssertionError("called before x was looked at")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.long()}, ValueError, r"x must be floating .*int64"),
        ({"x": X.long(), "weight": _never}, ValueError, r"x must be floating .*int64"),
        ({"weight": W.to(torch.int8)}, ValueError, r"weight must have x's dtype .*int8"),
        ({"bias": torch.zeros(3, dtype=torch.int8)}, ValueError, r"bias must be \[3\] .*int8"),
        ({"bias": [0.0] * 3}, TypeError, r"bias must be a Tensor, got list"),
    ],
)
def test_autocast_hides_no_error(change, error, message):
    with pytest.raises(error, match=message), torch.autocast("cpu", torch.bfloat16):
        gated_lora_linear(**{**GOOD, **change})


def test_numbers_of_numpy():
    plain = gated_lora_linear(**GOOD, segments=Segments([0, 4, 10], [1, (0, 1)]), scaling=2.0)
    segments = Segments(np.array([0, 4, 10]), [np.int64(1), np.array([0, 1])])
    for scaling in (np.float32(2), np.full(2, 2.0)):
        assert torch.equal(gated_lora_linear(**GOOD, segments=segments, scaling=scaling), plain)


class MadeOnDemand(Sequence):
    """Matrices of a stack, each made anew wherever it is asked for."""

    def __init__(self, stack):
        self.stack = stack

    def __len__(self):
        return len(self.stack)

    def __getitem__(self, i):
        return self.stack[i].clone()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_kind_of_sequence(backend):
    x, weight = torch.rand(40, 320), torch.rand(240, 320)
    A, B = torch.rand(5, 4, 320), torch.rand(5, 240, 4)
    want = gated_lora_linear(x, weight, list(A), list(B), backend=backend)
    named = [dict(enumerate(stack)).values() for stack in (A, B)]
    for parts in ((MadeOnDemand(A), MadeOnDemand(B)), named, (iter(A), iter(B))):
        assert torch.equal(gated_lora_linear(x, weight, *parts, backend=backend), want)


def test_native_refuses_what_it_cannot_run(monkeypatch):
    if native.available():
        double = [t.double() for t in (*A, *B)]
        with pytest.raises(ValueError, match=r"backend='native' must have CPU tensors.*float64"):
            gated_lora_linear(X.double(), W.double(), double[:2], double[2:], backend="native")
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_why_not", "no such file")
    with pytest.raises(RuntimeError, match=r"needs the compiled extension .* no such file"):
        gated_lora_linear(**GOOD, backend="native")
    assert native.build_info()["cpu"] == "not loaded (no such file)"
    assert gated_lora_linear(**GOOD).shape == (2, 5, 3)  # the plan goes on without it


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_the_op_itself_takes_lists_of_none():
    """The public op asks no kernel then; empty lists are not missing ones."""
    x, A, B = torch.rand(5, 4), [torch.rand(2, 4)], [torch.rand(3, 2)]
    idxs, gates = torch.zeros(5, 0, dtype=torch.int64), torch.zeros(5, 0)
    routing = (gates, idxs, None, None, [1.0], 0.0, None)
    y, h = torch.ops.fedms.native_forward(x, W + 1, None, None, A, B, *routing, True)
    assert torch.equal(y, F.linear(x, W + 1))
    needs = (True, True, [True], [True])
    dx, _, dA, dB = torch.ops.fedms.native_backward(y, W + 1, x, h, A, B, *routing, *needs)
    torch.testing.assert_close(dx, y @ (W + 1))
    assert not torch.cat([dA[0].flatten(), dB[0].flatten()]).any()


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
@pytest.mark.parametrize("bad", [2, -1])
def test_the_op_itself_refuses_indices_out_of_range(bad):
    """A compiled graph skips the Python check."""
    idxs = IDXS[0].clone()
    idxs[-1] = bad
    routing = (None, idxs, None, None, [1.0, 1.0], 0.0, None)
    message = rf"expert_idxs must be in \[0, 2\), got {bad}"
    with pytest.raises(IndexError, match=message):
        torch.ops.fedms.native_forward(X[0], W, None, None, A, B, *routing, False)
    needs = (True, False, [True, True], [False, False])
    with pytest.raises(IndexError, match=message):
        torch.ops.fedms.native_backward(X[0, :, :3], W, X[0], None, A, B, *routing, *needs)


def test_plan():
    cpu, f32, bf16 = torch.device("cpu"), torch.float32, torch.bfloat16
    usual = "native" if native.available() else "stacked"
    assert plan.choose(cpu, f32, f32, f32, None) == usual
    assert plan.choose(cpu, bf16, f32, bf16, None) == usual
    assert plan.choose(cpu, torch.float64, torch.float64, torch.float64, None) == "stacked"
    assert plan.choose(torch.device("cuda"), bf16, f32, bf16, None) == "stacked"


def test_build_info_says_what_runs():
    info = native.build_info()
    assert "cuda" in info
    if native.available():
        assert info["isa"] in ("generic", "x86-64-v3", "x86-64-v4")
        assert info["threads"]
