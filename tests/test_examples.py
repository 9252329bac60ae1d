"""The examples run as a user runs them, and reach what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_finetune_encoder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_encoder.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 LoRA layers run fused, 0 do not" in done.stdout
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    accuracy = re.search(r"unseen sentences: (\S+)", done.stdout)
    assert float(accuracy[1]) > 0.6  # chance is 0.25
    difference = re.search(r"up to (\S+)", done.stdout)
    assert float(difference[1]) < 1e-5
    assert (tmp_path / "adapter_model.safetensors").exists()
