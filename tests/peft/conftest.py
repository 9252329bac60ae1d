"""Fixtures of the tests against peft."""

from __future__ import annotations

import pytest


@pytest.fixture
def _transformers_takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24's add_adapter asks for peft 0.22, which was not out when this was written.

    What it calls is in 0.21.
    """
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
