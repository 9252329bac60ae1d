"""Run the tests that peft publishes, unedited, on fused layers: one command, three minutes.

    pip install -e ".[test,peft-suite]" && python tests/peft/suite/run.py
    python tests/peft/suite/run.py --stock           the same tests on peft's own layers
    python tests/peft/suite/run.py -- -k "merge" -x  what follows -- goes to pytest

pip downloads the source distribution of the installed peft, which holds its tests. They run offline
from there, with models of random weights for the hub's (lookalikes.py); fused_peft.py swaps the
layers before anything is collected and counts how often the fused op ran. Tests in deselected.txt
are left out, each with its reason. Exit status: pytest's, or 1 when the fused op ran in fewer than
MIN_FUSED tests: then the swap did not happen.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import lookalikes

HERE = Path(__file__).parent
# Tests of LoRA on linears and of what is built on them, and what a test's id must hold.
FILES = {
    "test_custom_models.py": "-LoraConfig-",  # the dashes leave out AdaLoraConfig and others
    "test_initialization.py": "",
    "test_lora_variants.py": "",
    "test_mixed.py": "",
    "test_lora_ga.py": "",
    "test_loraplus.py": "",
    "test_lorafa.py": "",
    "test_bdlora.py": "",
    "test_velora.py": "",
    "test_decoder_models.py": "[LoraConfig-",
    "test_encoder_decoder_models.py": "[LoraConfig-",
    "test_feature_extraction_models.py": "[LoraConfig-",
    "test_seq_classifier.py": "[LoraConfig-",
    "test_lora_conversion.py": "",
    "test_lora_intruders.py": "",
    "test_target_parameters.py": "",
    "test_xlora.py": "",
    "test_arrow.py": "",
}
MIN_FUSED = 500
# peft's own settings, and transformers' announcements, which are not about the layers
OPTIONS = [
    "-p", "fused_peft", "-p", "no:cacheprovider", "-o", "addopts=", "-q",
    *[
        f"-Wignore:`{name}` is deprecated:FutureWarning"
        for name in (
            "is_gradient_checkpointing", "gradient_checkpointing_enable",
            "gradient_checkpointing_disable",
        )
    ],
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stock", action="store_true", help="leave peft's own layers")
    parser.add_argument("--folder", type=Path, help="keep the sources here instead of a temporary")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = unpack(args.folder or Path(temporary))
        lookalikes.build(source)
        return run(source, args.stock, args.workers, args.pytest)


def unpack(folder: Path) -> Path:
    """The folder of peft's sources, in the installed version, below `folder`."""
    version = importlib.metadata.version("peft")
    source = folder / f"peft-{version}"
    if source.exists():
        return source
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-binary", ":all:", "--dest", folder, f"peft=={version}"],
        check=True,
    )
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    # Only the tests are wanted: the installed package is what they import. The published tests
    # lack the file that makes them a package.
    (source / "tests" / "__init__.py").touch()
    return source


def run(source: Path, stock: bool, workers: int, more: list[str]) -> int:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(source / "no-hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "FEDMS_SUITE_STOCK": str(int(stock)),
        "FEDMS_SUITE_MIN_FUSED": str(0 if stock or more else MIN_FUSED),
        "FEDMS_SUITE_KEEP": json.dumps(FILES),
    }
    skip = [f"--deselect=tests/{name}" for name in deselected()]
    workers_args = ["-n", str(workers)] if workers > 1 else []
    files = [f"tests/{name}" for name in FILES]
    command = [sys.executable, "-m", "pytest", *OPTIONS, *workers_args, *skip, *files, *more]
    return subprocess.run(command, cwd=source, env=environment, check=False).returncode


def deselected() -> list[str]:
    """The test ids of deselected.txt; a line that gives no reason after its id is an error."""
    found = []
    for line in (HERE / "deselected.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+#\s+(\S.*)", line)
        if match is None:
            raise ValueError(f"deselected.txt must hold lines 'test id  # reason', got {line!r}")
        found.append(match[1])
    return found


if __name__ == "__main__":
    sys.exit(main())
