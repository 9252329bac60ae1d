"""The CUDA module: importable without a driver, clear when it cannot run, right when it can."""

from __future__ import annotations

import pytest
import torch
from lora_problem import make_problem
from torch.nn import functional as F

from fedms.kernels import cuda, gated_lora_linear_reference, native

needs_module = pytest.mark.skipif(not cuda.available(), reason="fedms.kernels._C_cuda is not built")


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_loads_and_says_why_it_cannot_run():
    assert native.build_info()["cuda"].startswith("built, cannot run: ")
    problem = make_problem(3).to(torch.float32)
    y = F.linear(problem.x, problem.weight).detach()
    with pytest.raises(RuntimeError, match=r"fedms.kernels._C_cuda cannot run: "):
        cuda.add_mixture(y, problem.x, problem.A, problem.B, problem.gates, problem.scaling)


@needs_module
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 7, 33])
def test_forward_on_a_gpu(m, dtype):
    problem = make_problem(m, 100, 130, (8, 3))
    truth = problem.call(gated_lora_linear_reference)
    low = problem.to(dtype, torch.float32)
    device = torch.device("cuda")
    x, y = low.x.detach().to(device), F.linear(low.x, low.weight, low.bias).detach().to(device)
    A, B = [a.detach().to(device) for a in low.A], [b.detach().to(device) for b in low.B]
    cuda.add_mixture(y, x, A, B, low.gates.detach().to(device), low.scaling)
    error = (y.cpu().double() - truth).norm() / truth.norm()
    assert error < (1e-5 if dtype is torch.float32 else 6e-3)
