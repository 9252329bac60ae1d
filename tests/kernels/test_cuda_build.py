"""What nvcc makes of the CUDA kernels, where there is an nvcc; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_resources import ARCHITECTURES, NVCC, PTXAS, Kernel, measure, measure_all, parse

pytestmark = pytest.mark.skipif(NVCC is None or PTXAS is None, reason="nvcc is not installed")
STATIC_SHARED = 48 * 1024
REGISTER_FILE = 65536
THREADS = {"shrink": 256, "expand": 128, "outer": 128, "outer_sum": 256, "combine": 256,
           "upload": 128}  # fmt: skip


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return measure_all()


def test_every_kernel_was_compiled_for_every_architecture(kernels):
    """3 dtypes of shrink and outer, 3 x 3 of expand, outer_sum, combine, upload."""
    for architecture in ARCHITECTURES:
        names = [k.name for k in kernels if k.architecture == architecture]
        assert len(names) == len(set(names)) == 18
        assert {name.split()[0] for name in names} == set(THREADS)


def test_nothing_spills_and_shared_memory_is_static(kernels):
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.shared <= STATIC_SHARED, kernel


def test_two_blocks_fit_a_multiprocessor(kernels):
    """Else nobody computes while a block waits at its barriers."""
    for kernel in kernels:
        registers = -(-kernel.registers // 8) * 8 * THREADS[kernel.name.split()[0]]
        assert 2 * registers <= REGISTER_FILE, kernel


def test_a_spill_would_be_seen(tmp_path: Path):
    """Control: a sum per thread with a run-time index lives on the stack; too many ones spill."""
    source = tmp_path / "upload.cu"
    source.write_text(
        """
        namespace fedms { struct Upload { float* p; int n; };
        __global__ void __launch_bounds__(1024) upload(Upload call) {
            float sums[80];
            #pragma unroll
            for (int i = 0; i < 80; ++i) sums[i] = call.p[i * 4096 + threadIdx.x];
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < 80; ++i) call.p[(i + 80) * 4096] += sums[79 - i] * sums[i];
            call.p[0] = sums[call.n];
        } }
        """
    )
    for kernel in measure(source):
        assert kernel.stack > 0
        assert kernel.spills > 0


def test_a_report_without_shared_memory_is_read():
    text = """ptxas info : Compiling entry function '_ZN5fedms1_9outer_sumENS_5OuterE' for 'sm_90'
ptxas info    : Function properties for _ZN5fedms1_9outer_sumENS_5OuterE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""
    assert parse(text) == [Kernel("outer_sum", "sm_90", 32, 8, 16, 0)]
