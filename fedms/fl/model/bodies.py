"""Transformers models as the backbone runs them: what goes in, and the last hidden state.

An encoder of texts or images gives its own last hidden state. A causal language model is run
without its output embedding, which is the task's head. A two-tower model (CLIP, SigLIP) is run as
its image tower, up to the embedding that it compares with its texts. In each case experts are put
on the whole model, so that an adapter's names are those that peft finds in it.

B examples, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedms.fl.types import FedMSError


@dataclass(frozen=True)
class Body:
    """A model and how it is run.

    Attributes:
        model: the whole model.
        tower: the part of it that has the blocks; the model itself, or one of two towers.
        run: the model's inputs -> last hidden state [B, T, D], after all norms; [B, 1, D] where a
            tower makes one embedding of its own.
        width: D.
        task_type: what peft calls what such a model is used for; None: peft has no name for it.
        fan_in_fan_out: peft's word for a model whose linears keep their weights transposed.
    """

    model: nn.Module
    tower: nn.Module
    run: Callable[..., Tensor]
    width: int
    task_type: str | None = None
    fan_in_fan_out: bool = False


def encoder(model: Any, image_size: int | None = None) -> Body:
    """A text or vision encoder; images of another size than the model's get stretched positions."""
    more = _stretched(model.forward, model.config, image_size)
    return Body(
        model,
        model,
        lambda **inputs: model(**inputs, **more).last_hidden_state,
        model.config.hidden_size,
        task_type="FEATURE_EXTRACTION" if model.main_input_name == "input_ids" else None,
    )


def decoder(model: Any) -> Body:
    """A causal language model less its output embedding.

    GPT-2's own kind of linear, of a transposed weight, becomes an ``nn.Linear`` in its place.
    """
    transposed = {
        name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }
    for name, module in transposed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _plain(module))
    body = model.base_model
    return Body(
        model,
        model,
        lambda **inputs: body(**inputs, use_cache=False).last_hidden_state,
        model.config.get_text_config().hidden_size,
        task_type="CAUSAL_LM",
        fan_in_fan_out=bool(transposed),
    )


def image_tower(model: Any, image_size: int | None = None) -> Body:
    """The image tower of a model that compares images with texts."""
    more = _stretched(model.get_image_features, model.config.vision_config, image_size)
    return Body(
        model,
        model.vision_model,
        lambda **inputs: model.get_image_features(**inputs, **more).pooler_output.unsqueeze(1),
        getattr(model.config, "projection_dim", None) or model.config.vision_config.hidden_size,
    )


def has_two_towers(model: Any) -> bool:
    """Whether a model compares images with texts."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


class Vocabulary:
    """A causal language model's head: last hidden states [P, D] -> logits [P, V].

    That is its output embedding, and what some models do to the logits then: a scale (Cohere,
    Granite) and a soft cap (Gemma). It is compared with the model's own logits when it is made.

    Args:
        model: the causal language model.

    Attributes:
        size: V.

    Raises:
        FedMSError: the model's head does something else.
    """

    def __init__(self, model: Any) -> None:
        embedding = model.get_output_embeddings()
        if not isinstance(embedding, nn.Linear):
            raise FedMSError(f"{type(model).__name__} has no output embedding, got {embedding}")
        config = model.config.get_text_config()
        self._weight, self._bias = embedding.weight, embedding.bias
        self._scale = getattr(config, "logit_scale", None) or 1.0
        self._scale /= getattr(config, "logits_scaling", None) or 1.0
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.size = len(self._weight)
        self._check(model)

    def __call__(self, z: Tensor) -> Tensor:
        """z [P, D] -> logits [P, V] of z's dtype."""
        logits = nn.functional.linear(z.to(self._weight.dtype), self._weight, self._bias)
        logits = logits.to(z.dtype) * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        ids = torch.arange(min(8, self.size), device=self._weight.device)[None]
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        found = self(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        if not torch.allclose(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max())):
            raise FedMSError(
                f"{type(model).__name__} makes its logits in a way that fedms does not know: they "
                f"differ by {float((found - wanted).abs().max()):.2g} from those of its output "
                "embedding"
            )


def _plain(conv: Any) -> nn.Linear:
    linear = nn.Linear(*conv.weight.shape, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def _stretched(forward: Callable[..., Any], config: Any, size: int | None) -> Mapping[str, bool]:
    differs = size is not None and size != getattr(config, "image_size", size)
    takes = "interpolate_pos_encoding" in inspect.signature(forward).parameters
    return {"interpolate_pos_encoding": True} if differs and takes else {}
