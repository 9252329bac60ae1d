"""The store of device tables: what is sent, found again, dropped, and kept for CUDA graphs."""

from __future__ import annotations

import weakref

import pytest
import torch

from fedms.kernels.tables import TableStore, constant

CPU = torch.device("cpu")


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def ask(sent: list[str]):
    store = TableStore(limit=2)

    def get(
        content: str, stream: int = 0, capturing: bool = False, launched: bool = False
    ) -> torch.Tensor:
        def make() -> torch.Tensor:
            sent.append(content)
            return torch.zeros(1)

        return store.get(content, CPU, stream, capturing, make, launched=launched)

    return get


def test_equal_tables_are_sent_once_a_stream(ask, sent):
    first = ask("a")
    assert ask("b") is not first
    assert ask("".join(["a"])) is first
    assert ask("a", stream=7) is not first
    assert sent == ["a", "b", "a"]


def test_the_least_recently_used_is_dropped(ask, sent):
    first = ask("a")
    ask("b")
    assert ask("a") is first
    ask("c")
    assert ask("a") is first
    ask("b")
    assert sent == ["a", "b", "c", "b"]


def test_a_capture_fills_its_own_table(ask, sent):
    """One that a kernel fills inside a capture is filled by replays alone: nobody may find it."""
    inside = ask("a", capturing=True, launched=True)
    outside = ask("a", launched=True)
    assert outside is not inside
    assert sent == ["a", "a"]


@pytest.mark.parametrize("stream", [0, 7], ids=["its own stream", "the capture's stream"])
def test_what_a_capture_reads_is_never_dropped(ask, stream):
    """A copied table is found from any stream then, as its copy has ended."""
    unused, used = weakref.ref(ask("z")), weakref.ref(ask("a"))
    assert ask("a", stream=stream, capturing=True) is used()
    for content in "bcd":
        ask(content)
    assert unused() is None
    assert used() is not None
    assert ask("a") is not used()  # dropped from the store all the same


def test_a_capture_cannot_copy(ask, sent):
    with pytest.raises(RuntimeError, match="run the step once with the same shapes"):
        ask("a", capturing=True)
    assert sent == []


def test_values_by_content():
    first = constant((1.0, 2.0), torch.bfloat16, CPU)
    assert first.tolist() == [1.0, 2.0]
    assert first.dtype == torch.bfloat16
    assert constant((1.0, 2.0), torch.bfloat16, CPU) is first
    assert constant((1.0, 2.0), torch.float32, CPU) is not first
