"""What is compiled before a visit to a GPU is what the visit asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import gpu_precompile  # noqa: E402

from fedms.kernels import triton  # noqa: E402

RECORD = """
import json
from itertools import islice
import gpu_precompile
print(json.dumps(gpu_precompile.record(islice(gpu_precompile.launches(), 1, 4))))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compilers are for Linux")
@pytest.mark.skipif(not triton.available(), reason="triton is not installed")
def test_a_recorded_launch_is_compiled_once_and_found_after_packing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RECORD], cwd=BENCH, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[-1])
    names = {entry["kernel"] for entry in listed}
    assert {"shrink_kernel", "gemm_kernel", "outer_kernel"} <= names
    cache, python = tmp_path / "cache", Path(sys.executable)
    cache.mkdir()
    (cache / gpu_precompile.LISTED).write_text(json.dumps(listed), "utf-8")
    first = gpu_precompile.fill(python, cache)
    # each by itself: a kernel that is compiled for one launch once stood in for all of its others
    assert first == f"triton: {len(listed)} kernels, {len(listed)} of them not in the cache"
    packed = gpu_precompile.pack(cache, tmp_path)
    gpu_precompile.unpack(packed, cache)
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {*gpu_precompile.KEPT}
    again = gpu_precompile.fill(python, cache)
    assert again == f"triton: {len(listed)} kernels, 0 of them not in the cache"
