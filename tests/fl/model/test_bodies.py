"""Every kind of model gives the hidden states and logits that transformers gives."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from architectures import DECODERS, ENCODERS, clip, inputs_of, random_weights, siglip
from torch import nn
from torch.testing import assert_close

from fedms.fl.model.blocks import Blocks
from fedms.fl.model.bodies import Vocabulary, decoder, encoder, has_two_towers, image_tower
from fedms.fl.types import FedMSError


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    model = random_weights(ENCODERS[name])
    inputs = inputs_of(model)
    body = encoder(model)
    with torch.no_grad():
        assert_close(body.run(**inputs), model(**inputs).last_hidden_state, rtol=0, atol=0)
    assert body.run(**inputs).shape[-1] == body.width
    assert not has_two_towers(model)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_and_its_vocabulary_make_the_models_own_logits(name):
    model = random_weights(DECODERS[name])
    inputs = inputs_of(model)
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        body = decoder(model)
        hidden = body.run(**inputs)
        vocabulary = Vocabulary(model)
        assert_close(vocabulary(hidden.flatten(0, 1)), wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert vocabulary.size == 61
    assert hidden.shape[-1] == body.width
    in_blocks = list(model.get_submodule(Blocks(model).name).modules())
    linears = [m for m in in_blocks if isinstance(m, nn.Linear)]
    assert linears
    assert not any("Conv1D" in type(m).__name__ for m in in_blocks)


class Louder(t.LlamaForCausalLM):
    """Does to its logits what nobody has heard of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output


def test_a_head_that_does_more_than_a_linear_is_refused():
    config = random_weights(DECODERS["llama"]).config
    with pytest.raises(FedMSError, match="Louder makes its logits in a way"):
        Vocabulary(random_weights(lambda: Louder(config)))


@pytest.mark.parametrize("make", [clip, siglip])
def test_the_image_tower_of_two(make):
    """With the text tower's features, its embeddings are the model's own scores."""
    model = random_weights(make)
    assert has_two_towers(model)
    body = image_tower(model)
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 28, 28, generator=draw)
    ids = torch.randint(3, 61, (2, 7), generator=draw)
    with torch.no_grad():
        image = body.run(pixel_values=pixels)
        assert image.shape == (3, 1, body.width)
        text = model.get_text_features(input_ids=ids).pooler_output
        cosines = nn.functional.normalize(image[:, 0], dim=-1) @ nn.functional.normalize(text).T
        scores = model(input_ids=ids, pixel_values=pixels).logits_per_image
        bias = getattr(model, "logit_bias", torch.zeros(()))
        assert_close(cosines * model.logit_scale.exp() + bias, scores, rtol=1e-5, atol=1e-5)
    blocks = Blocks(model, body.tower)
    assert blocks.name == "vision_model.encoder.layers"
    seen = blocks.entering(lambda: body.run(pixel_values=pixels), [1, 3])
    for depth in (1, 3):
        with torch.no_grad(), blocks.starting_at(depth, seen[depth]):
            assert_close(body.run(pixel_values=pixels * 0), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip", "deit"])
def test_images_of_another_size_than_the_models(name):
    model = random_weights(ENCODERS[name])
    body = encoder(model, image_size=14)
    with torch.no_grad():
        hidden = body.run(pixel_values=torch.randn(2, 3, 14, 14))
    assert 4 <= hidden.shape[1] <= 6  # four patches, and class and distillation tokens
