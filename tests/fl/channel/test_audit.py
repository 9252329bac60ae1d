"""Every byte that leaves a client, searched for what must not: texts, labels, what is its own."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.channel.link import Link, Up, split_late
from fedms.fl.engines.engine import Message, Order
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.types import Failure, matches

RUNS = [
    (),
    ("channel.codec=int8",),
    ("channel.privacy.clip=1.0", "channel.privacy.epsilon=inf"),
    ("mofm.combine=layer", "mofm.gate_input=base"),
    ("mofm.share_adapter=false",),
    ("stage1.rounds=2", "mofm.clusters=2", "mofm.cluster_rounds=1"),
    ("method=fedavg_ft",),
    ("method=fedsa_lora", "channel.codec=int8"),
    ("method=ditto",),
    ("method=local_only",),
]
SHORT = ("stage1.rounds=1", "sal.trigger=all_at_once", "channel.privacy.delta=0.01")


class Tapped(LocalEngine):
    """Keeps every message that leaves a client, by round and client."""

    taps: dict[tuple[int, str], bytes]

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        for found in super().visits(order):
            assert isinstance(found, Message)
            self.taps[order.round, found.client_id] = found.content
            yield found


@pytest.fixture
def tapped(config, execute, tmp_path, quiet):
    def run(*overrides: str):
        Tapped.taps = {}
        settings = config(*SHORT, *overrides)
        world = World(settings, quiet)
        return execute(settings, tmp_path, world, Tapped), world, dict(Tapped.taps)

    return run


def tensors_of(content: bytes) -> dict[str, bytes]:
    """A message's tensors, read by hand: 8 bytes of length, a JSON table, the values."""
    (length,) = struct.unpack_from("<Q", content)
    table = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    spans = {name: entry["data_offsets"] for name, entry in table.items() if name[:2] != "__"}
    order = sorted(spans.values())
    assert all(one[1] == other[0] for one, other in pairwise(order))  # no byte between them
    assert not order or (order[0][0], order[-1][1]) == (0, len(body))  # nor around
    return {name: body[start:end] for name, (start, end) in spans.items()}


def header_of(content: bytes) -> dict:
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["json"])


def as_written(tensor: torch.Tensor) -> list[bytes]:
    """How a tensor's first values could stand in a message."""
    flat = tensor.detach().flatten()[:8].double()
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return [bytes(flat.to(kind).view(torch.uint8).tolist()) for kind in kinds]


@pytest.mark.parametrize("overrides", RUNS, ids=lambda found: " ".join(found) or "fedms")
def test_nothing_private_leaves_a_client(tapped, overrides):
    run, world, taps = tapped(*overrides)
    stages = stages_of(run.config)
    assert len(taps) == 4 * sum(stage.settings.rounds for stage in stages)
    for (round, client_id), content in taps.items():
        stage = [stage for stage in stages for _ in range(stage.settings.rounds)][round - 1]
        header = header_of(content)
        assert set(header) == set(Up.model_fields)
        private = run.config.channel.privacy.clip > 0
        assert (header["num_examples"] is None) == (header["train_loss"] is None) == private
        # names: those that the stage shares and no others
        tensors = tensors_of(content)
        if header["codec"] == "none":
            names = [name.removeprefix("values/") for name in tensors]
        else:
            names = list(header["shapes"])
            assert set(tensors) == {"values/values", "values/scales"}
        assert all(matches(name, stage.shares) for name in names)
        assert bool(names) == bool(stage.shares)
        assert not any(name.startswith(("local.", "gate.linear")) for name in names)
        # fields: each holds what it is called, so nothing else has a place in it
        client = world.federation.client(client_id)
        assert header["num_examples"] in (None, len(client.train), len(client.own))
        assert (header["round"], header["client_id"]) == (round, client_id)
        assert header["codec"] == run.config.channel.codec
        assert isinstance(header["kept"], bool)
        coded = {} if header["codec"] == "none" else {n: run.server.state[n].shape for n in names}
        assert header["shapes"] == {name: list(shape) for name, shape in coded.items()}
        # data: no text, no class, no count of labels
        dataset = world.federation.dataset
        for said in (*(dataset.inputs[i] for i in client.own), *dataset.class_names):
            assert said.encode() not in content
        counts = np.bincount(dataset.labels[client.own], minlength=len(dataset.class_names))
        for kind in (np.int64, np.int32, np.float32, np.float64):
            assert counts.astype(kind).tobytes() not in content
        shares = counts / counts.sum()
        for kind in (np.float32, np.float64):
            assert shares.astype(kind).tobytes() not in content
        assert header["train_loss"] not in (*counts.tolist(), *shares.tolist())
        # what it keeps: no value of it, whatever it were called
        kept, late = split_late(run.journal.states.read(client_id, round) or {})
        for name, tensor in {**kept, **late}.items():
            assert header["train_loss"] not in tensor.flatten().tolist()
            if tensor.numel() >= 4 and tensor.abs().max() > 0:
                assert not any(written in content for written in as_written(tensor)), name


def test_the_tap_sees_what_the_server_averages_and_counts(tapped, tmp_path, read_lines):
    """The audit searches the messages that count: their mean is the server's next state."""
    run, world, taps = tapped("method=fedavg", "stage1.rounds=1", "stage2.rounds=0")
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["bytes_up"] == sum(map(len, taps.values()))
    examples = {client.client_id: len(client.own) for client in world.federation.clients}
    link, state = Link(run.config.channel), run.server.state
    sent = [
        (examples[client], link.accept(content, client, 1, state).shared)
        for (_, client), content in taps.items()
    ]
    for name, tensor in state.items():
        mean = sum(count * shared[name].double() for count, shared in sent)
        assert torch.allclose(mean / sum(examples.values()), tensor.double(), atol=1e-6)
