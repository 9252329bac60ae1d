"""pytest plugin for peft's own tests: they run on fused layers, and it is counted that they do.

Loaded by run.py with `-p fused_peft`, in every worker, and told by its environment:

    FEDMS_SUITE_STOCK      1 leaves peft's layers as they are, to compare
    FEDMS_SUITE_KEEP       JSON, file name -> text that the ids of its tests must hold to be kept
    FEDMS_SUITE_MIN_FUSED  the session fails when fewer tests than this ran the fused op: it would
                           prove nothing
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

STOCK = os.environ["FEDMS_SUITE_STOCK"] == "1"
KEEP: dict[str, str] = json.loads(os.environ["FEDMS_SUITE_KEEP"])
MIN_FUSED = int(os.environ["FEDMS_SUITE_MIN_FUSED"])


class _Everything(dict):
    """A dict that has every key: peft's `hub_online_once` then never goes online."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> object:
    """Have the look-alike models in the folder too that test_arrow.py's fixture changes to."""
    before = Path.cwd()
    made = yield
    if Path.cwd() != before:
        for folder in before.glob("*-internal-testing"):
            Path(folder.name).symlink_to(folder)
    return made


class _Count:
    """How often the op ran, in this process and reported by the workers."""

    def __init__(self) -> None:
        self.calls = 0
        self.tests = 0
        self.fused_tests = 0


_KEY = pytest.StashKey[_Count]()


def pytest_configure(config: pytest.Config) -> None:
    # peft's tests declare these in a pyproject.toml that the run does not use
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: peft's")
    count = config.stash[_KEY] = _Count()
    if STOCK:
        return
    import fedms.peft
    from fedms.peft import layer

    fedms.peft.enable_peft()
    op = layer.gated_lora_linear

    def counted(*args: object, **kwargs: object) -> object:
        count.calls += 1
        return op(*args, **kwargs)  # type: ignore[arg-type]

    layer.gated_lora_linear = counted  # type: ignore[assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if KEEP.get(item.path.name, "") in item.nodeid]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.items:
        return
    from tests import testing_utils  # peft's, in the folder that the run is in

    testing_utils._HUB_MODEL_ACCESSES = _Everything()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    count = item.config.stash[_KEY]
    before = count.calls
    result = yield
    count.tests += 1
    count.fused_tests += count.calls > before
    return result


def pytest_testnodedown(node: object, error: object) -> None:
    """xdist, in the main process: add up what the workers counted."""
    found = getattr(node, "workeroutput", {}).get("fused")
    if found:
        count = node.config.stash[_KEY]  # type: ignore[attr-defined]
        count.calls += found[0]
        count.tests += found[1]
        count.fused_tests += found[2]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    count = session.config.stash[_KEY]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["fused"] = (count.calls, count.tests, count.fused_tests)
    elif exitstatus == pytest.ExitCode.OK and count.fused_tests < MIN_FUSED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = terminalreporter.config.stash[_KEY]
    which = "peft's own layers" if STOCK else "fused layers"
    terminalreporter.write_line(
        f"{which}: the fused op ran {count.calls} times, in {count.fused_tests} of "
        f"{count.tests} tests (at least {MIN_FUSED} must)"
    )
