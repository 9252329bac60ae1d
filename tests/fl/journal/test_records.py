"""What a run measures of itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedms.fl.journal.records import mebibytes, peak_memory_mb


def test_macos_counts_bytes_and_linux_kibibytes():
    assert mebibytes(512 * 2**20, "darwin") == 512
    assert mebibytes(512 * 2**10, "linux") == 512


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_the_system_says():
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_memory_mb() == pytest.approx(kibibytes / 1024, rel=0.02)
