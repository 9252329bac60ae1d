"""Images of a configuration: the encoder or image tower, its preprocessing, and the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedms.fl.config import Config
from fedms.fl.data.federation import Dataset
from fedms.fl.engines.texts import backbone_of, text_task, tokenizer_of
from fedms.fl.model.backbone import Backbone, load_pretrained, resolve
from fedms.fl.model.bodies import Body, encoder, has_two_towers, image_tower
from fedms.fl.tasks.classify import ClassNames, Linear, Projected
from fedms.fl.tasks.images import ImageTask, Preprocessor
from fedms.fl.tasks.task import Batch


def image_task(config: Config, dataset: Dataset) -> tuple[Backbone, ImageTask]:
    """The backbone and the task of ``task.kind = "images"``."""
    from transformers import AutoImageProcessor, AutoModel

    settings = config.model
    path, size = resolve(settings.path), settings.image_size or None

    def body(model: Any) -> Body:
        return image_tower(model, size) if has_two_towers(model) else encoder(model, size)

    backbone = backbone_of(config, AutoModel, body)
    # Pillow's, whether torchvision is there or not: both resize, a little differently.
    processor = load_pretrained(AutoImageProcessor, path, "model.path", backend="pil")
    preprocess = Preprocessor(processor, size)
    positions = _positions(backbone, preprocess)
    head, names = _head(config, backbone, dataset.class_names)
    task = ImageTask(
        dataset,
        preprocess,
        positions=positions,
        pooling=_pooling(settings.pooling, backbone, preprocess, positions),
        head=head,
        names=names,
    )
    return backbone, task


def _positions(backbone: Backbone, preprocess: Preprocessor) -> int:
    """T, the length of an image's hidden state in the blocks."""
    pixels = torch.zeros(1, *preprocess.shape, device=backbone.device)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch({"pixel_values": pixels}, nothing, nothing)
    return backbone.entering(batch, [0])[0].shape[1]


def _head(
    config: Config, backbone: Backbone, class_names: tuple[str, ...]
) -> tuple[ClassNames | Projected | Linear, Callable[[], Tensor] | None]:
    """The head, and what the class names' features are made by."""
    prompts = [config.model.prompt.replace("{}", name) for name in class_names]
    if config.task.head == "linear":
        return Linear(len(class_names)), None
    model: Any = backbone.model
    if has_two_towers(model):
        scale = float(model.logit_scale.detach().exp())
        return ClassNames(scale), lambda: _through_the_text_tower(config, backbone, prompts)
    features = _through_a_text_model(config, class_names)
    head = Projected(config.model.logit_scale, features.shape[1])
    return head, lambda: features.to(backbone.device, backbone.master)


@torch.no_grad()
def _through_the_text_tower(config: Config, backbone: Backbone, prompts: list[str]) -> Tensor:
    """Unit features [C, E] of a two-tower model's own text tower."""
    model: Any = backbone.model
    # At full length, as such models are trained: SigLIP reads its last position, padding or not.
    tokens = tokenizer_of(config.model.path)(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(backbone.device)
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1).to(backbone.master)


def _through_a_text_model(config: Config, class_names: tuple[str, ...]) -> Tensor:
    """Unit features [C, E] of the text model that ``task.text_model`` names."""
    nothing = Dataset((), np.zeros(0, dtype=np.int64), class_names)
    path = config.task.text_model
    settings = config.model.replace(path=path, pooling="auto")
    backbone, task = text_task(config.replace(model=settings), nothing)
    return task.name_features(lambda batch: backbone.hidden(batch.to(backbone.device))).cpu()


def _pooling(
    wanted: Literal["auto", "mean", "cls"],
    backbone: Backbone,
    preprocess: Preprocessor,
    positions: int,
) -> Literal["mean", "cls"]:
    """ "auto": the class token, or the mean where there is a position a patch and no other."""
    if wanted != "auto":
        return wanted
    if has_two_towers(backbone.model):
        return "cls"  # the tower's one embedding
    _, height, width = preprocess.shape
    model: Any = backbone.model
    patch = getattr(model.config, "patch_size", 0)
    only_patches = patch and positions == (height // patch) * (width // patch)
    return "mean" if only_patches else "cls"
