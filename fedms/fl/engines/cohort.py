"""How many clients are trained side by side."""

from __future__ import annotations

import torch

from fedms.fl.model.model import Model

SAVED = 34
"""Numbers of a token's width that a block saves for its backward, at most.

Korthikanti et al., arXiv 2205.05198, count 34 bytes in 16 bits for linears, norms and attention.
"""
SHARE = 0.5
"""Of the free memory; the rest is for logits, optimiser and fragments."""


def side_by_side(model: Model, wanted: int, batch_size: int) -> int:
    """S for mini-batches of ``batch_size``: ``wanted``, or 0 for what pays.

    One on a CPU, where a larger batch gains nothing, and as many as the free memory is good for on
    a GPU. That estimate has not been tried on one; a cohort that does not fit is visited client by
    client.
    """
    device = model.backbone.device
    if wanted or device.type == "cpu":
        return wanted or 1
    free, _ = torch.cuda.mem_get_info(device)
    blocks = len(model.backbone.blocks) - model.slots.depth
    tokens = batch_size * float(model.task.lengths.mean())
    client = tokens * blocks * SAVED * model.backbone.width * model.backbone.dtype.itemsize
    return max(1, int(SHARE * free / client))
