"""peft loads what was exported, and answers as we do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fedms.fl.model.backbone import load_backbone
from fedms.fl.model.slots import Slots
from fedms.fl.runs.export import save_adapter

peft = pytest.importorskip("peft")

TARGETS = ["query", "value", "attention.output.dense"]


@pytest.fixture
def slots(tiny_bert):
    backbone = load_backbone(str(tiny_bert), "cpu", "float32")
    slots = Slots(backbone, r=4, alpha=6.0, targets=TARGETS, head=torch.randn(3, 32))
    slots.set_awake((1, 3))
    return slots


def test_peft_loads_what_was_saved(slots, tiny_bert, tmp_path):
    from transformers import AutoModel

    ids = torch.arange(24).view(3, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    state = {name: torch.randn_like(t) / 4 for name, t in slots.fresh("local").items()}
    save_adapter(slots, state, "local", tmp_path / "deep" / "down", base_model="tiny")
    slots.load([state])
    with torch.no_grad():
        base = slots.backbone.model(**inputs).last_hidden_state
        with slots.routed(("local",), (3,)):
            ours = slots.backbone.model(**inputs).last_hidden_state
        theirs = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(tiny_bert), tmp_path / "deep" / "down"
        )(**inputs).last_hidden_state
    assert (ours - theirs).norm() / ours.norm() < 1e-6
    assert (ours - base).abs().max() > 1e-2
    saved = peft.LoraConfig.from_pretrained(tmp_path / "deep" / "down")
    assert (saved.r, saved.lora_alpha, saved.bias) == (4, 6.0, "none")
    assert saved.base_model_name_or_path == "tiny"
    assert len(saved.target_modules) == 2 * 3
    head = load_file(tmp_path / "deep" / "down" / "head.safetensors")["weight"]
    assert torch.equal(head, state["local.head.weight"])


def test_nothing_to_save(slots, tmp_path):
    with pytest.raises(ValueError, match="no awake layer holds the expert 'c'"):
        save_adapter(slots, slots.fresh("local"), "c", tmp_path)
    slots.set_awake(())
    with pytest.raises(ValueError, match="no awake layer holds the expert 'local'"):
        save_adapter(slots, slots.fresh("local"), "local", tmp_path)
