"""What tests of `generate` share: prompts, and the tokens that a model makes of them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

NAMES = ["one", "two"]
PROMPTS = [[5, 9, 2, 7], [11, 3], [8, 8, 30, 1, 6]]
WIDTH = max(map(len, PROMPTS))
NEW = 5
EOS = LlamaConfig().eos_token_id


def padded(prompts):
    """Prompts padded on the left, as decoders take them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, prompts, **asked):
    """The new tokens, [rows, NEW]."""
    batch = padded(prompts)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    rows = model.generate(**batch, **{**options, **asked})
    return rows[:, batch["input_ids"].shape[1] :]


def append_best(ids, logits):
    logits[..., EOS] = -torch.inf  # as min_new_tokens has it
    return torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
