"""Fixtures of the tests against peft."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs


@pytest.fixture
def _transformers_takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24's add_adapter asks for peft 0.22, which was not out when this was written.

    What it calls is in 0.21.
    """
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


@pytest.fixture
def recorder() -> EagerAndRecordGraphs:
    """A backend of torch.compile that runs a graph as it is, and keeps it in ``graphs``."""
    torch.compiler.reset()
    return EagerAndRecordGraphs()
