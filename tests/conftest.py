"""What every test shares: a fixed seed, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
