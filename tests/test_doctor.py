"""What `fedms doctor` and `fedms tune` say of the kernels on this machine."""

from __future__ import annotations

import pytest
import torch

from fedms import __version__
from fedms.fl.cli import main


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (__version__, "torch", "kernels", "float32", "bfloat16", "stacked"):
        assert part in out
    assert "WRONG" not in out


def test_doctor_shows_what_the_plan_chooses(capsys):
    assert main(["doctor", "--shape", "8192", "4096", "4096", "32"]) == 0
    out = capsys.readouterr().out
    assert "8192 x 4096 -> 4096, R 32" in out
    assert "not measured" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu(capsys):
    assert main(["tune", "64", "64", "64"]) == 2
    assert (
        capsys.readouterr().err == "fedms: tune needs a GPU that torch can use, and there is none\n"
    )


def test_doctor_tells_a_kernel_that_is_wrong(capsys, monkeypatch):
    from fedms import doctor

    real = doctor.gated_lora_linear
    monkeypatch.setattr(doctor, "gated_lora_linear", lambda *a, **k: real(*a, **k) * 1.01)
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert "WRONG" in out
    assert "a kernel disagrees with the reference" in err
