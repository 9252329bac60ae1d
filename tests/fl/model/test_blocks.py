"""From every block on, each architecture gives what transformers' own whole forward gives."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from architectures import DECODERS, ENCODERS, inputs_of, random_weights

from fedms.fl.model.blocks import Blocks
from fedms.fl.types import FedMSError


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_from_every_block_on_it_is_the_whole_forward(name):
    model = random_weights({**ENCODERS, **DECODERS}[name])
    inputs = inputs_of(model)
    more = {} if name in ENCODERS else {"use_cache": False}
    body = model if name in ENCODERS else model.base_model
    blocks = Blocks(model)
    assert len(blocks) == 4

    def forward(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = body(**changed, **more).last_hidden_state
        mask = inputs.get("attention_mask")
        return hidden if mask is None else hidden * mask.unsqueeze(-1)

    # What is read below the start may be anything of the same shape: images need not be decoded.
    other = {
        key: torch.zeros(()).expand(value.shape) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    if "input_ids" in other:
        other["input_ids"] = torch.full_like(inputs["input_ids"], 5)
    with torch.no_grad():
        whole = forward(inputs)
        entering = blocks.entering(lambda: forward(inputs), [1, 2, 3])
        for depth in (1, 2, 3):
            with blocks.starting_at(depth, entering[depth]):
                torch.testing.assert_close(forward(other), whole, rtol=0, atol=1e-6)
            with blocks.starting_at(depth, entering[depth].roll(1, 0)):
                assert (forward(other) - whole).abs().max() > 1e-2
        assert torch.equal(forward(inputs), whole)  # everything is back in its place


def test_a_forward_is_left_when_all_is_seen():
    model = random_weights(ENCODERS["vit"])
    blocks, run = Blocks(model), []
    for index in range(4):
        blocks[index].register_forward_hook(lambda *_, index=index: run.append(index))
    seen = blocks.entering(lambda: model(**inputs_of(model)), [2])
    assert list(seen) == [2]
    assert run == [0, 1]


def test_models_that_are_not_one_list_of_blocks():
    swin = t.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2
    )
    swin.num_hidden_layers = 4
    with pytest.raises(FedMSError, match="SwinModel has no list of 4 blocks"):
        Blocks(t.SwinModel(swin))
    t5 = t.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(FedMSError, match="T5Model is an encoder and a decoder"):
        Blocks(t.T5Model(t5))
