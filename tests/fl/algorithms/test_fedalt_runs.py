"""FedALT's server holds what its clients do, whatever becomes of a message."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from spy import servers

from fedms.fl.channel.link import split_late
from fedms.fl.engines.local import LocalEngine
from fedms.fl.journal.journal import last_counted
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.export import PEFT_PREFIX
from fedms.fl.runs.folder import start
from fedms.fl.types import Failure

SHORT = ("method=fedalt", "stage1.rounds=3", "stage2.rounds=0")


def assert_in_step(run, atol):
    """n times the mean and all that is not sent yet are what clients last had, added up."""
    rounds = last_counted(run.journal.folder, run.done)
    states = [run.journal.states.read(c, rounds.get(c, 0)) or {} for c in run.clients]
    kept, late = zip(*map(split_late, states), strict=True)
    server = dict(run.server.state)
    members = server.pop("members.sum")
    assert members == sum("members.last" in each for each in kept)
    for name, mean in server.items():
        sent, last = (name.replace("rest.", part, 1) for part in ("sum.", "last."))
        said = members * mean + sum(each.get(sent, 0) for each in late)
        wanted = sum(each.get(last, torch.zeros_like(said)) for each in kept)
        torch.testing.assert_close(said, wanted, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize(
    ("codec", "atol"), [("none", 1e-12), ("fp16", 1e-3), ("int8", 1e-6), ("topk", 1e-6)]
)
def test_what_is_not_in_the_sum_yet_is_on_its_way(
    config, execute, tmp_path, in_float64, codec, atol
):
    """fp16 alone remembers nothing of what it loses."""
    overrides = (*SHORT, f"channel.codec={codec}", "server.fraction_train=0.75")
    run = execute(config(in_float64, *overrides), tmp_path)
    assert len(run.server.state) == 2 * 2 * 3 + 1
    assert_in_step(run, atol)


def test_what_is_not_sent_moves_nothing(config, execute, tmp_path):
    """Of three clients' changes a tenth each: n times the mean moves in no more places, ever."""
    tenth = ("channel.codec=topk", "channel.topk_share=0.1", "server.fraction_train=0.75")
    execute(config(*SHORT, *tenth, "engine.keep_checkpoints=99"), tmp_path)
    held = servers(tmp_path)
    size = sum(t.numel() for t in held[0].values())
    totals = [
        {name: each["members.sum"] * t for name, t in each.items() if "lora" in name}
        for each in held
    ]
    for now, before in zip(totals, [{}, *totals], strict=False):
        # n times a mean is the sum but for its last bits
        moved = [(t - before.get(name, 0)).abs() > 1e-5 for name, t in now.items()]
        assert 0 < sum(int(each.sum()) for each in moved) <= 3 * math.ceil(size / 10)


@pytest.mark.parametrize("codec", ["none", "topk"])
def test_a_visit_whose_answer_is_lost_has_not_happened(
    config, execute, tmp_path, in_float64, codec
):
    """Lost after the client has written what it keeps: at first, later, and at the end."""

    class Loses(LocalEngine):
        def visits(self, order):
            for found in super().visits(order):
                lost = order.round in (1, 3, 5) and found.client_id == "client-01"
                yield Failure(found.client_id, "it did not answer") if lost else found

    rounds = ("stage1.rounds=5", f"channel.codec={codec}")
    run = execute(config(in_float64, *SHORT, *rounds), tmp_path, engine=Loses)
    assert last_counted(tmp_path, 5) == dict.fromkeys(run.clients, 5) | {"client-01": 4}
    assert run.server.state["members.sum"] == 4
    assert_in_step(run, 1e-6)


def test_what_is_shared_is_the_mean_of_the_clients_experts(config, quiet, tmp_path):
    folder = tmp_path / "run"
    start(config(*SHORT), folder, quiet)
    (place,) = (folder / "adapters").iterdir()
    found = load_file(place / "adapter_model.safetensors")
    states = [ClientStates(folder / "clients").read(f"client-0{i}", 3) or {} for i in range(4)]
    assert len(found) == 2 * 2 * 3
    for name, mean in found.items():
        own = f"own.{name.removeprefix(PEFT_PREFIX).removesuffix('.weight')}"
        torch.testing.assert_close(mean, sum(each[own] for each in states) / 4)
