"""What a run has trained, in formats that others read: experts as peft adapters."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from fedms.fl.model.slots import Slots
from fedms.fl.types import State, renamed

PEFT_PREFIX = "base_model.model."


def save_adapter(
    slots: Slots, state: State, expert: str, folder: Path, *, base_model: str = ""
) -> None:
    """Write the awake blocks' part of one expert of ``state`` as peft's two files.

    The files are adapter_config.json and adapter_model.safetensors. A trained head [C, D] is not
    part of peft's format: it is head.safetensors beside them.
    """
    own = {name: t for name, t in renamed(state, f"{expert}.", "").items() if slots.is_awake(name)}
    head = own.pop("head.weight", None)
    layers = sorted({name.rpartition(".lora_")[0] for name in own})
    if not layers:
        raise ValueError(f"no awake layer holds the expert {expert!r}; there is nothing to save")
    folder.mkdir(parents=True, exist_ok=True)
    body = slots.backbone.body
    config = {
        "peft_type": "LORA",
        "task_type": body.task_type,
        "fan_in_fan_out": body.fan_in_fan_out,
        "base_model_name_or_path": base_model,
        "r": slots.r,
        "lora_alpha": slots.alpha,
        "lora_dropout": slots.dropout,
        "target_modules": layers,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    tensors = {f"{PEFT_PREFIX}{name}.weight": t.contiguous() for name, t in own.items()}
    # not save_file: what a full disk answers is to be an OSError
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    if head is not None:
        (folder / "head.safetensors").write_bytes(save({"weight": head.contiguous()}))
