"""What every test shares: a fixed seed, no clock, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

try:
    import hypothesis
except ImportError:  # a GPU machine's Python, where the tests that need it are not run
    pass
else:  # by default an example of 200 ms is a failure, as on a busy machine, and slow drawing too
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
