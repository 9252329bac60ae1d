"""What a run has trained, in formats that others read: experts as peft adapters.

Small networks beside the backbone (the gate) are safetensors of the network's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import save

from fedms.fl.journal.files import replace_file
from fedms.fl.journal.progress import Progress
from fedms.fl.model.model import Model
from fedms.fl.model.slots import Slots
from fedms.fl.runs.opened import open_run
from fedms.fl.types import FedMSError, State, matches, renamed, select

PEFT_PREFIX = "base_model.model."
PLAIN = re.compile(r"[a-z0-9_][a-z0-9_. -]{0,62}[a-z0-9_-]|[a-z0-9_]")
DIGEST = re.compile(r"-[0-9a-f]{16}$")


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
    replace_file(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    tensors = {f"{PEFT_PREFIX}{name}.weight": t.contiguous() for name, t in own.items()}
    # not save_file: what a full disk answers is to be an OSError
    replace_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    if head is not None:
        replace_file(folder / "head.safetensors", save({"weight": head.contiguous()}))


def export_common(slots: Slots, state: State, folder: Path, base_model: str) -> None:
    """Write what the server holds: experts below ``adapters/``, small networks beside it."""
    for part in sorted({name.partition(".")[0] for name in state}):
        if any(".lora_" in name for name in select(state, (f"{part}.*",))):
            save_adapter(slots, state, part, folder / "adapters" / part, base_model=base_model)
        else:
            _save_module(state, part, folder)


def export_clients(folder: Path, client_ids: Sequence[str], progress: Progress) -> Iterator[Path]:
    """Write clients' own experts and small networks to ``adapters/clients/<id>/``.

    Each expert that is not frozen for everybody has a folder of its name there. Yields the folder
    of each client. ``client_ids`` empty: all that took part, and the unseen ones.

    Raises:
        FedMSError: no such run or client, or nothing of it is trained.
    """
    run = open_run(folder, client_ids, progress)
    own = [name for name in run.stage.experts if not matches(f"{name}.", run.stage.frozen)]
    if not own:
        raise FedMSError(f"the clients of {folder} have no expert of their own to export")
    for client_id in client_ids or run.counts:
        place = folder / "adapters" / "clients" / folder_name(client_id)
        write_client(run.model, run.client(client_id), own, place, run.config.model.path)
        yield place


def write_client(
    model: Model, state: State, experts: Sequence[str], folder: Path, base_model: str
) -> None:
    """Write these experts of a client's model to folders of their names, and its networks."""
    for expert in experts:
        save_adapter(model.slots, state, expert, folder / expert, base_model=base_model)
    for module in model.modules:
        _save_module(state, module, folder)


def folder_name(client_id: str) -> str:
    """A client's id as a file name: the id where that is one, else what is readable and a digest.

    Whatever a table may call a client, nothing leaves the run's folder, and two of them have two
    folders, also on a disk that knows no case.
    """
    if PLAIN.fullmatch(client_id) and not DIGEST.search(client_id):
        return client_id
    readable = quote(client_id, safe=" ", errors="replace").replace(".", "%2E")[:60]
    return f"{readable}-{hashlib.sha256(client_id.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _save_module(state: State, module: str, folder: Path) -> None:
    tensors = {name: t.contiguous() for name, t in select(state, (f"{module}.*",)).items()}
    replace_file(folder / f"{module}.safetensors", save(tensors))
