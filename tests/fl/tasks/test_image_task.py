"""Images as a task: what is read when, pooling, and the three heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedms.fl.data.federation import Dataset
from fedms.fl.data.images import Images
from fedms.fl.model.bodies import image_tower
from fedms.fl.tasks.classify import ClassNames, Linear, Projected
from fedms.fl.tasks.images import ImageTask, Preprocessor

CPU = torch.device("cpu")
NAMES = ("red", "green", "blue")


def picture(index: int) -> Image.Image:
    draw = np.random.default_rng(index)
    return Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8))


class Recorded(Images):
    """Images that say which of them were decoded."""

    def __init__(self) -> None:
        super().__init__(picture, str, 4)
        self.decoded: list[int] = []

    def __getitem__(self, index):
        self.decoded.append(index)
        return super().__getitem__(index)


@pytest.fixture
def images() -> Recorded:
    return Recorded()


@pytest.fixture
def make(images):
    data = Dataset(images, np.array([0, 1, 2, 1]), NAMES)

    def task(head, preprocess=None, **more) -> ImageTask:
        preprocess = preprocess or Preprocessor(ViTImageProcessorPil(), 28)
        return ImageTask(data, preprocess, positions=5, head=head, **more)

    return task


def test_pixels_are_decoded_when_they_are_read_and_once(make, images):
    batch = make(Linear(3)).batch(np.array([2, 0]), CPU)
    assert len(batch) == 2
    assert batch.targets.tolist() == [2, 0]
    assert batch.outline["pixel_values"].shape == (2, 3, 28, 28)
    assert not images.decoded
    pixels = dict(batch.inputs)["pixel_values"]
    assert pixels.shape == (2, 3, 28, 28)
    assert batch.inputs["pixel_values"] is pixels
    assert images.decoded == [2, 0]


@pytest.mark.parametrize("size", [None, 14, 98])
def test_pixels_are_the_processors_own(size):
    own = ViTImageProcessorPil()
    preprocess = Preprocessor(own, size)
    sizes = {} if size is None else {"size": {"height": size, "width": size}}
    wanted = own(images=[picture(0), picture(1)], return_tensors="pt", **sizes)["pixel_values"]
    assert torch.equal(preprocess([picture(0), picture(1)]), wanted)
    assert preprocess.shape == (3, size or 224, size or 224)


def test_a_crop_follows_the_size():
    assert Preprocessor(CLIPImageProcessorPil(), 42)([picture(0)]).shape == (1, 3, 42, 42)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_and_a_trained_head(make, pooling):
    task = make(Linear(3), pooling=pooling)
    batch = task.batch(np.array([0, 1]), CPU)
    hidden, head = torch.randn(2, 5, 8), torch.randn(3, 8)
    z = task.pool(hidden, batch)
    assert_close(z, hidden[:, 0] if pooling == "cls" else hidden.sum(1) / 5)
    assert_close(task.logits(z, head), z @ head.T)
    assert task.fresh_head(8).shape == (3, 8)
    assert task.lengths.tolist() == [5] * 4
    assert task.score(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [1, 1, 0]


def test_projected_class_names(make):
    """Logits are cosines in the text tower's space, through a projection that is trained."""
    names = normalize(torch.randn(3, 4), dim=-1)
    task = make(Projected(7.0, 4), names=lambda: names)
    task.prepare(lambda batch: pytest.fail("the names come from the text tower"))
    head = task.fresh_head(8)
    assert head.shape == (4, 8)
    assert_close(head @ head.T, torch.eye(4))
    assert torch.equal(head, task.fresh_head(8))
    z = torch.randn(2, 8)
    cosines = torch.nn.functional.cosine_similarity((z @ head.T)[:, None], names[None], dim=-1)
    assert_close(task.logits(z, head), 7 * cosines)
    assert (task.logits(z, None) == 0).all()
    head.requires_grad_()
    task.logits(z, head)[:, 0].sum().backward()
    assert head.grad.abs().max() > 0


def test_two_towers_score_as_the_whole_model(make):
    """CLIP's class-name head: with its own scale, logits are its logits_per_image."""
    torch.manual_seed(0)
    blocks = {
        "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
        "num_hidden_layers": 2,
    }  # fmt: skip
    model = t.CLIPModel(
        t.CLIPConfig(
            text_config={**blocks, "vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**blocks, "image_size": 28, "patch_size": 7},
            projection_dim=24,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.logit_scale.fill_(2.0)
        ids = torch.randint(3, 61, (3, 7))
        names = normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        task = make(ClassNames(float(model.logit_scale.exp())), names=lambda: names)
        task.prepare(lambda batch: pytest.fail("the names come from the text tower"))
        batch = task.batch(np.arange(4), CPU)
        z = task.pool(image_tower(model).run(**batch.inputs), batch)
        wanted = model(input_ids=ids, pixel_values=batch.inputs["pixel_values"]).logits_per_image
        assert_close(task.logits(z, None), wanted, rtol=1e-5, atol=1e-5)
    assert task.fresh_head(24) is None
