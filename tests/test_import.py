"""`import fedms` is light: it loads neither torch nor any optional package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fedms

HEAVY = ("triton", "peft", "transformers", "matplotlib", "flwr", "sklearn")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light():
    """Over torch, `fedms` with its kernels takes under 0.2 s of processor time."""
    code = (
        "import sys, time, torch, torch.library; t = time.process_time(); import fedms;"
        "fedms.gated_lora_linear; t = time.process_time() - t;"
        f"print(t, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    seconds, heavy = _run(code).split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.2


def test_bare_import_does_not_load_torch():
    assert _run("import sys, fedms; print('torch' in sys.modules)") == "False"


def test_public_names():
    for name in set(fedms.__all__) - {"__version__"}:
        assert getattr(fedms, name).__name__ == name
        assert name in dir(fedms)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedms.nothing
