"""A world that runs in a second: a BERT of four narrow blocks, 240 short texts, four clients."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from spy import Change, Spy

from fedms.fl.config import Config, load_config
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.model.model import Model
from fedms.fl.round import Run
from fedms.fl.runs.method import MakeEngine, run_method

CLASSES = {
    "lung": ["cough", "breath", "wheeze", "sputum", "chest"],
    "heart": ["pulse", "beat", "murmur", "valve", "pressure"],
    "bone": ["fracture", "joint", "spine", "knee", "hip"],
    "skin": ["rash", "itch", "burn", "blister", "wound"],
}
COMMON = [
    "acute",
    "chronic",
    "left",
    "right",
    "mild",
    "severe",
    "old",
    "new",
    "other",
    "unspecified",
]
WARDS = ("north", "south", "east", "west")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer():
    from transformers import BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *CLASSES,
        *chain(*CLASSES.values()),
        *COMMON,
    ]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT with its tokenizer: 4 blocks, width 32, 2 heads."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    tokenizer = make_tokenizer()
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.2, **sizes
        )
        model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 rows text, label, ward: four words of which about two belong to the class."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "notes.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "ward"])
        for i in range(240):
            label = list(CLASSES)[i % len(CLASSES)]
            words = [
                draw.choice(CLASSES[label] if draw.random() < 0.5 else COMMON)
                for _ in range(draw.randint(3, 6))
            ]
            writer.writerow([" ".join(words), label, draw.choice(WARDS)])
    return path


@pytest.fixture(scope="session")
def settings(tiny_bert: Path, table: Path) -> list[str]:
    """The overrides that make a run small."""
    return [
        f"model.path={tiny_bert}",
        "model.dtype=float32",
        "model.max_tokens=12",
        f"data.source={table}",
        "data.num_clients=4",
        "data.unseen_clients=1",
        "data.min_partition_size=8",
        "data.alpha=0.5",
        "data.train=0.5",
        "data.gate=0.15",
        "data.val=0.1",
        "data.test=0.25",
        'lora.targets=["query", "value", "attention.output.dense"]',
        "lora.r=2",
        "lora.alpha=4.0",
        "stage1.rounds=2",
        "stage1.local_steps=2",
        "stage1.batch_size=8",
        "stage1.lr=0.01",
        "stage2.rounds=2",
        "stage2.local_steps=2",
        "stage2.batch_size=8",
        "stage2.lr=0.01",
        "sal.max_blocks=2",
        "sal.wake_blocks=1",
        "sal.threshold=0.1",
        "mofm.bottleneck=4",
        "mofm.gate_steps=3",
        "eval.pooled_examples=20",
        "rivals=[]",
    ]


@pytest.fixture(scope="session")
def config(settings: list[str]) -> Callable[..., Config]:
    """``config("stage1.rounds=3")``: the small run with overrides on top."""
    return lambda *overrides: load_config(None, [*settings, *overrides])


@pytest.fixture
def model(world: World) -> Model:
    return world.model


@pytest.fixture
def quiet() -> Progress:
    return Progress(quiet=True)


@pytest.fixture
def world(config: Callable[..., Config], quiet: Progress) -> World:
    return World(config(), quiet)


@pytest.fixture
def execute(quiet: Progress) -> Callable[..., Run]:
    """``execute(config, folder)``: carry a run to its end, on a new world unless one is given."""

    def carry(
        config: Config, folder: Path, world: World | None = None, engine: MakeEngine = LocalEngine
    ) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        return run_method(config, world or World(config, quiet), folder, quiet, engine)

    return carry


@pytest.fixture(scope="session")
def read_lines() -> Callable[[Path], list[dict]]:
    """The lines of a .jsonl file, less what differs between two equal runs."""

    def read(path: Path) -> list[dict]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mb")}
            for line in lines
        ]

    return read


@pytest.fixture
def in_float64() -> str:
    """The setting that makes a run one of float64, where only a mistake can differ.

    The fast paths give their products other shapes. Those round otherwise, and Adam amplifies it.
    """
    return "model.dtype=float64"


@pytest.fixture
def metrics(config, execute, tmp_path, read_lines):
    """``metrics("key=value")``: the lines of a whole run, metrics and clients."""

    def run(*overrides: str, name: str = "run", world: World | None = None) -> tuple[list, list]:
        folder = tmp_path / name
        execute(config(*overrides), folder, world)
        return read_lines(folder / "metrics.jsonl"), read_lines(folder / "clients.jsonl")

    return run


@pytest.fixture
def spied(config, execute, tmp_path_factory) -> Callable[..., Spy]:
    """``spied("key=value")``: a whole run's engine, which has recorded what passed.

    ``engine.folder`` is the run's, with all of its checkpoints.
    """

    def run(
        *overrides: str,
        world: World | None = None,
        change: Change = lambda order, found: found,
        folder: Path | None = None,
    ) -> Spy:
        made: list[Spy] = []

        def engine(*args) -> Spy:
            made.append(Spy(*args, change=change))
            return made[-1]

        folder = folder or tmp_path_factory.mktemp("spied")
        execute(config("engine.keep_checkpoints=99", *overrides), folder, world, engine)
        made[0].folder = folder
        return made[0]

    return run


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """``full_disk(nth)``: within it the disk has no room at the nth sync, from 0."""

    @contextmanager
    def at(nth: int) -> Iterator[None]:
        real, calls = os.fsync, count()

        def fsync(handle: int) -> None:
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return at
