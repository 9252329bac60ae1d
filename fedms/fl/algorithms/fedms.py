"""FedMS: Federated Learning with Mixture of Sparsely Activated Foundation Models.

The paper is arXiv 2312.15926. Stage 1 trains the global expert by federated averaging while SAL
wakes the blocks. Stage 2 freezes it; every client trains a local expert and a gate network, and
only the gate adapter is sent and averaged.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    mofm = config.mofm
    learned = mofm.gate == "learned"
    holds_out_gate = learned and mofm.gate_data == "held_out"
    return (
        replace(global_expert("stage1", config.stage1), holds_out_gate=holds_out_gate, wakes=True),
        Stage(
            name="stage2",
            settings=config.stage2,
            trains=("local.", "gate.") if learned else ("local.",),
            shares=("gate.adapter.",) if learned and mofm.share_adapter else (),
            frozen=("global.",),
            predicts="mixture",
            local_from=mofm.local_from,
            holds_out_gate=holds_out_gate,
        ),
    )
