"""The C++ backend where rows are few or the mixture is zero: whose product y is made of.

Wide layers of few rows without gradients (decoding), and bf16 on a CPU without bf16 instructions,
take the kernels' own product; everything else, and every call whose mixture is zero, has the bits
of torch's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_problem import Problem, errors, make_problem
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, native

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension is not built")

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def forward(problem: Problem) -> torch.Tensor:
    with torch.no_grad():
        return problem.call(gated_lora_linear, backend="native")


def error_of(y: torch.Tensor, problem: Problem) -> float:
    return errors({"y": y}, {"y": problem.truth()["y"]})["y"]


@pytest.fixture
def any_width(monkeypatch):
    """Narrow weights are read by the kernels too."""
    monkeypatch.setattr(native, "_MIN_WEIGHTS_OF_FEW_ROWS", 0)


@pytest.mark.parametrize("isa", ["generic", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize(("base", "adapter"), DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 13, 16])
@pytest.mark.parametrize("gates", [None, "layer", "token"])
def test_few_rows_without_gradients(isa, base, adapter, m, gates, any_width):
    best = native._C.isa()
    if not native._C.set_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        for k, n, ranks in [(1, 1, (1,)), (31, 45, (3, 2)), (515, 600, (8, 20, 16))]:
            problem = make_problem(m, k, n, ranks, gates=gates)
            y = forward(problem.to(base, adapter))
            assert y.dtype == base
            assert error_of(y, problem) < (1e-6 if base is torch.float32 else 4e-3)
    finally:
        assert native._C.set_isa(best)


@pytest.mark.parametrize("strides", [(6, 2), (1, 7), (0, 1), (2,)], ids=str)
def test_few_rows_with_gates_of_any_stride(strides, any_width):
    problem = make_problem(5, 50, 19, (3, 2, 4))
    gates = torch.rand(64).as_strided((5, 3)[-len(strides) :], strides)
    y = forward(replace(problem.to(torch.float32), gates=gates))
    assert error_of(y, replace(problem, gates=gates.double().contiguous())) < 1e-6


def test_few_rows_by_two_threads(any_width):
    problem = make_problem(16, 700, 901, (8, 40))
    single = problem.to(torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert error_of(forward(single), problem) < 1e-6
    finally:
        torch.set_num_threads(before)


def test_few_rows_without_a_bias_and_of_a_strided_weight(any_width):
    problem = make_problem(6, 50, 19, (3,)).to(torch.float32)
    no_bias = forward(replace(problem, bias=None))
    assert torch.allclose(no_bias + problem.bias, forward(problem), atol=1e-5)
    strided = replace(problem, weight=problem.weight.t().contiguous().t())
    assert torch.allclose(forward(strided), forward(problem), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 32, 32), (7, 31, 45), (40, 20, 30)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradients_of_tiny_layers(shape, dtype, dropout_p, monkeypatch):
    """The kernels compute the frozen part of a tiny dx themselves, a GEMM that of a larger."""
    problem = make_problem(*shape, (3, 2), dropout_p=dropout_p)
    cast, truth = problem.to(dtype, torch.float32), problem.truth()
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert max(errors(cast.run("native"), truth).values()) < bound
    monkeypatch.setattr(native, "_MAX_SMALL_BASE", -1)
    assert max(errors(cast.run("native"), truth).values()) < bound


@pytest.mark.parametrize("fast_bf16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", ["B", "scaling", "no expert", "no pair", "no rows"])
def test_a_zero_mixture_leaves_the_bits_of_the_base(
    fast_bf16, dtype, grad, bias, what, monkeypatch
):
    """For every number of rows, flattened or not, the result is `F.linear`'s, as in peft."""
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    for k, n in [(8, 8), (32, 48), (100, 37), (384, 700)]:
        weight, factor = torch.randn(n, k, dtype=dtype), torch.randn(n, 4)
        A = [torch.randn(4, k, requires_grad=grad)] * (what != "no expert")
        B = [factor * (what != "B")] * (what != "no expert")
        b = torch.randn(n, dtype=dtype) if bias else None
        for m in (1, 2, 5, 16, 17, 33, 300):
            for x in (torch.randn(m, k, dtype=dtype), torch.randn(1, m, k, dtype=dtype)):
                more = {"bias": b, "scaling": 0.0 if what == "scaling" else 2.0}
                if what == "no pair":
                    more["expert_idxs"] = torch.zeros(*x.shape[:-1], 0, dtype=torch.int64)
                if what == "no rows":
                    more["segments"] = Segments([0, m], [()])
                y = gated_lora_linear(x, weight, A, B, backend="native", **more)
                assert torch.equal(y, F.linear(x, weight, b)), (m, k, n)


STRIDED = {
    "transposed": lambda *shape: torch.randn(*reversed(shape)).permute(2, 1, 0),
    "another order of rows": lambda b, t, k: torch.randn(t, b, k).transpose(0, 1),
    "expanded": lambda b, t, k: torch.randn(1, t, k).expand(b, t, k),
    "half of each row": lambda b, t, k: torch.randn(b, t, 2 * k)[..., :k],
    "every other row": lambda b, t, k: torch.randn(b, 2 * t, k)[:, ::2],
    "a matrix": lambda b, t, k: torch.randn(k, t).t(),
    "a vector": lambda b, t, k: torch.randn(2 * k)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strides", STRIDED)
def test_the_bits_of_the_base_whatever_the_strides_of_x(strides, grad, dtype):
    """torch's product of strided rows has a bias added after it, and sums in another order."""
    weight, bias = torch.randn(260, 300, dtype=dtype), torch.randn(260, dtype=dtype)
    A, B = [torch.randn(4, 300, dtype=dtype, requires_grad=grad)], [weight.new_zeros(260, 4)]
    for b in (bias, None):
        for rows in (1, 2, 7, 40):
            x = STRIDED[strides](2, rows, 300).to(dtype)
            assert torch.equal(gated_lora_linear(x, weight, A, B, bias=b), F.linear(x, weight, b))


@pytest.mark.parametrize("fast_bf16", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_nan_is_not_taken_for_zero(fast_bf16, grad, monkeypatch):
    """0 times NaN is NaN: a broken A shows although B is zero, as in peft."""
    monkeypatch.setattr(native, "_FAST_BF16", fast_bf16)
    A = [torch.full((4, 300), float("nan"), requires_grad=grad)]
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(8, 300, dtype=dtype), torch.randn(400, 300, dtype=dtype)
        y = gated_lora_linear(x, weight, A, [torch.zeros(400, 4)], backend="native")
        assert y.isnan().all()
