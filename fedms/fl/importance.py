"""Which blocks matter, for ``sal.order = "importance"``.

The measure is the gradient norm of each block's fresh LoRA on a few clients' data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedms.fl.client import learning
from fedms.fl.resident import Resident
from fedms.fl.types import Federation

PROBE_CLIENTS = 8
PROBE_EXAMPLES = 32


def block_importance(resident: Resident, federation: Federation) -> list[float]:
    """One score per block: the fresh global expert's squared gradient norm, summed over probes."""
    foundation = resident.foundation
    before = foundation.awake
    foundation.set_awake(range(foundation.num_blocks))
    resident.load(foundation.fresh_expert("global"))
    parameters = resident.parameters(("global.",))
    scores = [0.0] * foundation.num_blocks
    for client in federation.clients[:PROBE_CLIENTS]:
        batch = client.train[:PROBE_EXAMPLES]
        with learning(parameters.values()):
            F.nll_loss(
                resident.log_probs(resident.features(batch, ("global",))), resident.labels[batch]
            ).backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    scores[foundation.block_of(name)] += float(torch.sum(parameter.grad**2))
    foundation.set_awake(before)
    return scores
