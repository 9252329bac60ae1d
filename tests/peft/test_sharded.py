"""FSDP (version 1) with peft's own policy, which makes a unit of every factor, on two ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from peft_models import assert_same, small_llama, with_adapters
from ranks import run_ranks
from torch.distributed.fsdp import FullyShardedDataParallel

import fedms

NAMES = ["one", "two"]
GATES = torch.tensor([0.3, 1.7])
WAYS = [(True, True), (False, False)]  # use_orig_params, activation checkpointing


def _model():
    model = with_adapters(small_llama(), *NAMES, target_modules=["q_proj", "down_proj"]).train()
    model.set_requires_grad(NAMES, True)
    model.base_model.set_adapter(NAMES)
    fedms.accelerate(model)
    return model


def _train(model, rows):
    """Losses of two steps, the second with gates."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for gates in (None, GATES):
        with fedms.gated(model, gates, adapters=None if gates is None else NAMES):
            loss = model(input_ids=rows, labels=rows).loss
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _rows():
    return torch.arange(24).reshape(4, 6) * 7 % 40


def _sharded():
    """For each of WAYS: losses, all factors, counts, reasons in the report."""
    found = []
    for use_orig_params, checkpointed in WAYS:
        model = _model()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = fsdp_auto_wrap_policy(model)
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )  # fmt: skip
        layer = model.base_model.model.model.layers[0].module.self_attn.q_proj
        assert isinstance(layer.lora_A["one"], FullyShardedDataParallel)
        losses = _train(wrapped, _rows().chunk(2)[dist.get_rank()])
        stats, report = fedms.stats(wrapped), fedms.accelerate(wrapped)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            factors = {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in wrapped.named_parameters()
                if "lora_" in name
            }
        counts = stats.fused, stats.fallback, {*report.at_each_call.values()}
        found.append((losses, factors, counts))
    return found


def test_fsdp_with_pefts_policy_trains_as_one_process_does():
    ranks = run_ranks(_sharded)
    model = _model()
    losses = _train(model, _rows())
    factors = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    start = dict(_model().named_parameters())
    assert min((p - start[name]).abs().max() for name, p in factors.items()) > 1e-4
    for way, (_, checkpointed) in enumerate(WAYS):
        mean = sum(rank[way][0] for rank in ranks) / len(ranks)
        torch.testing.assert_close(mean, losses, rtol=1e-5, atol=1e-6)
        for _, trained, (fused, fallback, undecided) in (rank[way] for rank in ranks):
            assert_same(trained, factors, 1e-4)
            assert (fused, fallback) == (2 * 4 * (1 + checkpointed), {})
            assert undecided == {"FSDP holds adapter 'one' in units of its own"}
