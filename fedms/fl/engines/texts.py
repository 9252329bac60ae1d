"""Texts of a configuration, to be classified or to be continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedms.fl.config import Config
from fedms.fl.data.corpus import Windows, cut_to_windows
from fedms.fl.data.federation import Dataset
from fedms.fl.model.backbone import Backbone, load_backbone, load_pretrained, resolve
from fedms.fl.model.bodies import Body, Vocabulary, decoder, encoder
from fedms.fl.tasks.causal_lm import CausalLMTask
from fedms.fl.tasks.text import TextTask, recorded_pooling
from fedms.fl.types import ConfigError


def text_task(config: Config, dataset: Dataset) -> tuple[Backbone, TextTask]:
    """The backbone and the task of ``task.kind = "text"``."""
    from transformers import AutoModel

    settings = config.model
    backbone = backbone_of(config, AutoModel, encoder)
    _check_length(config, backbone)
    pooling = settings.pooling
    task = TextTask(
        dataset,
        tokenizer_of(settings.path),
        max_tokens=settings.max_tokens,
        pooling=recorded_pooling(resolve(settings.path)) if pooling == "auto" else pooling,
        head=config.task.head,
        prompt=settings.prompt,
        logit_scale=settings.logit_scale,
    )
    return backbone, task


def causal_lm_task(config: Config, dataset: Dataset) -> tuple[Backbone, CausalLMTask]:
    """The backbone and the task of ``task.kind = "causal_lm"``."""
    from transformers import AutoModelForCausalLM

    backbone = backbone_of(config, AutoModelForCausalLM, decoder)
    _check_length(config, backbone)
    assert isinstance(dataset.inputs, Windows)
    output = Vocabulary(backbone.model)
    return backbone, CausalLMTask(dataset.inputs, output, output.size)


def windows_of(config: Config, dataset: Dataset) -> Dataset:
    """Texts as windows of ``model.max_tokens`` tokens."""
    tokenizer = tokenizer_of(config.model.path)

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return tokenizer(list(texts), verbose=False)["input_ids"]

    return cut_to_windows(dataset, encode, config.model.max_tokens)


def backbone_of(config: Config, auto: Any, body: Callable[[Any], Body]) -> Backbone:
    """The model of ``model.path``, on the device and in the dtype that are asked for."""
    settings = config.model
    return load_backbone(
        resolve(settings.path),
        settings.device,
        settings.dtype,
        settings.attention,
        auto=auto,
        body=body,
    )


def tokenizer_of(path: str) -> Any:
    """The tokenizer of ``model.path``."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, resolve(path), "model.path")


def _check_length(config: Config, backbone: Backbone) -> None:
    longest = getattr(backbone.model.config, "max_position_embeddings", None)
    if longest is not None and config.model.max_tokens > longest:
        raise ConfigError(
            f"model.max_tokens must be at most {longest}, the positions that the model has, "
            f"got {config.model.max_tokens}"
        )
