"""The backbone: a forward cut in two is the whole forward; its device, dtype and attention."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from fedms.fl.engines.world import load_federation, load_model
from fedms.fl.model.backbone import (
    Backbone,
    choose_attention,
    choose_device,
    choose_dtype,
    load_backbone,
)
from fedms.fl.model.bodies import Body
from fedms.fl.types import ConfigError, FedMSError


@pytest.fixture
def backbone(tiny_bert):
    return load_backbone(str(tiny_bert), "cpu", "float32")


@pytest.fixture
def batch(model):
    return model.task.batch(np.arange(5), torch.device("cpu"))


def test_entry_and_rest_make_the_whole(backbone, batch):
    with torch.no_grad():
        whole = backbone.hidden(batch)
        entries = backbone.entering(batch, [1, 3])
        assert sorted(entries) == [1, 3]
        for depth, entry in entries.items():
            rest = backbone.hidden(batch, entry, depth)
            torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)
        assert torch.equal(backbone.hidden(batch), whole)


def test_the_base_is_frozen_and_counted(backbone):
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert backbone.parameter_count == sum(p.numel() for p in backbone.model.parameters())
    assert (backbone.width, len(backbone.blocks)) == (32, 4)


def test_what_is_trained_on_a_16_bit_base_is_fp32(tiny_bert, batch):
    backbone = load_backbone(str(tiny_bert), "cpu", "bfloat16")
    assert (backbone.dtype, backbone.master) == (torch.bfloat16, torch.float32)
    assert backbone.model.config._attn_implementation == "eager"
    hidden, exact = backbone.hidden(batch), load_backbone(str(tiny_bert), "cpu", "float64")
    assert (exact.dtype, exact.master) == (torch.float64, torch.float64)
    assert hidden.dtype == torch.float32
    difference = (hidden - exact.hidden(batch)).norm() / exact.hidden(batch).norm()
    assert 1e-4 < difference < 2e-2
    assert backbone.entering(batch, [2])[2].dtype == torch.bfloat16


def test_how_device_dtype_and_attention_are_chosen():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_device("cpu") == cpu
    assert choose_dtype("auto", gpu) == torch.bfloat16
    assert choose_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    assert choose_dtype("float32", gpu) == torch.float32
    assert choose_attention("auto", cpu, torch.bfloat16) == "eager"
    assert choose_attention("auto", cpu, torch.float32) == "sdpa"
    assert choose_attention("auto", gpu, torch.bfloat16) == "sdpa"
    assert choose_attention("sdpa", cpu, torch.bfloat16) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match=r'model\.device is "cuda", and torch sees no GPU'):
        choose_device("cuda")


def test_the_gradient_stops_at_the_lowest_awake_block(model, batch):
    """Nothing that enters block 2 asks for a gradient, and nothing below it is saved."""
    entries: dict[int, bool] = {}
    for i in range(4):
        model.backbone.blocks[i].register_forward_pre_hook(
            lambda _, args, i=i: entries.__setitem__(i, args[0].requires_grad)
        )
    saved: list[int] = []

    def count(awake: tuple[int, ...]) -> int:
        model.slots.set_awake(awake)
        model.slots.load([model.slots.fresh("global")], ("global.*",))
        for leaf in model.slots.live.values():
            leaf.requires_grad_()
        saved.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t),
            model.slots.routed(("global",), (5,)),
        ):
            model.backbone.hidden(batch).square().sum().backward()
        assert all(leaf.grad is not None for leaf in model.slots.live.values())
        return len(saved)

    one, two = count((3,)), count((2, 3))
    assert entries == {0: False, 1: False, 2: False, 3: True}
    assert 0 < one < two
    assert all(p.grad is None for p in model.backbone.model.parameters())


def test_a_model_without_a_list_of_blocks():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Settings", (), {"num_hidden_layers": 4})()
            self.one = nn.ModuleList([nn.Linear(2, 2)])

    flat = Flat()
    with pytest.raises(FedMSError, match="Flat has no list of 4 blocks"):
        Backbone(Body(flat, flat, flat.forward, 2))


def test_texts_longer_than_the_model_can_read(config):
    federation = load_federation(config())
    load_model(config("model.max_tokens=32"), federation)
    with pytest.raises(ConfigError, match=r"model\.max_tokens must be at most 32, .* got 33"):
        load_model(config("model.max_tokens=33"), federation)


def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FedMSError, match=r"model.path: .*none' cannot be loaded"):
        load_backbone(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FedMSError, match=r"model.path: .* cannot be loaded"):
        load_backbone(str(tmp_path))


def test_weights_that_are_damaged(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FedMSError, match=r"model\.path: .* cannot be loaded"):
        load_backbone(str(folder))
