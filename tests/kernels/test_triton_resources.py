"""Every launch that the plan can choose compiles for every target, fits and does not spill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lora_problem import triton

SCRIPT = Path(__file__).with_name("triton_resources.py")


@pytest.mark.slow
@pytest.mark.skipif(not triton.available(), reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compilers are for Linux")
def test_cross_compilation(capsys):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-W", "error::UserWarning", SCRIPT]  # Triton's own announcements
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        kernels = {row.split("|")[2].strip() for row in done.stdout.splitlines() if target in row}
        assert len(kernels) == 7, f"{target}: only {kernels} were compiled"
