"""What `generate` makes of gates, adapter names and routers: every sample as if it were alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from generating import NAMES, NEW, PROMPTS, WIDTH, append_best, generate, padded
from peft_models import small_llama, with_adapters
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, cache_utils

import fedms

# what `generate` is asked for, and rows a prompt
MODES = {
    "greedy": ({}, 1),
    "no cache": ({"use_cache": False}, 1),
    "static cache": ({"cache_implementation": "static"}, 1),
    "beams": ({"num_beams": 3}, 1),
    "beams, several returned": ({"num_beams": 3, "num_return_sequences": 2}, 2),
    "beams, no cache": ({"num_beams": 3, "use_cache": False}, 1),
    "beams, static cache": ({"num_beams": 2, "cache_implementation": "static"}, 1),
    "sampling": ({"do_sample": True, "top_k": 1, "num_return_sequences": 2}, 2),
    "chunked prefill": ({"prefill_chunk_size": 2}, 1),
}
# these take one prompt
ALONE = {
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": small_llama().eval()},
}


def _model():
    made = with_adapters(small_llama(), *NAMES, target_modules="all-linear", lora_alpha=16).eval()
    made.base_model.set_adapter(NAMES)
    fedms.accelerate(made)
    return made


@pytest.fixture(scope="module")
def model():
    return _model()


def _in_layout(gates):
    """Gates of each prompt's tokens, padded on the left like the prompts: [3, WIDTH, E]."""
    return torch.stack([nn.functional.pad(g, (0, 0, WIDTH - len(g), 0)) for g in gates])


def _rollout(model, prompt, gates):
    """Greedy, without a cache: gates [tokens, 2], the last going on."""
    ids = torch.tensor([prompt])
    for _ in range(NEW):
        more = gates[-1:].expand(ids.shape[1] - len(prompt), 2)
        with torch.no_grad(), fedms.gated(model, torch.cat([gates, more])[None]):
            ids = append_best(ids, model(input_ids=ids).logits)
    return ids[:, len(prompt) :]


@pytest.mark.parametrize("mode", MODES)
def test_gates_by_sample(model, mode):
    asked, rows = MODES[mode]
    gates = torch.tensor([[2.0, 0.0], [0.0, -2.0], [-1.0, 3.0]])
    want = []
    for prompt, own in zip(PROMPTS, gates, strict=True):
        with fedms.gated(model, own):
            want.append(generate(model, [prompt], **asked))
    with fedms.gated(model, gates):
        got = generate(model, PROMPTS, **asked)
    assert got.shape == (3 * rows, NEW)
    assert torch.equal(got, torch.cat(want))
    if mode == "greedy":  # the gates matter here
        with fedms.gated(model, gates.flip(0)):
            assert not torch.equal(generate(model, PROMPTS), got)
    fedms.set_gates(model, torch.zeros(2, 2))
    fedms.set_gates(model, gates)
    assert torch.equal(generate(copy.deepcopy(model), PROMPTS, **asked), got)
    fedms.set_gates(model, None)
    assert not model.get_base_model()._forward_pre_hooks


@pytest.mark.parametrize("mode", MODES)
def test_gates_by_token(model, mode):
    asked, rows = MODES[mode]
    torch.manual_seed(0)
    gates = [2 * torch.randn(len(prompt), 2) for prompt in PROMPTS]
    want = []
    for prompt, own in zip(PROMPTS, gates, strict=True):
        with fedms.gated(model, own[None]):
            want.append(generate(model, [prompt], **asked))
    with fedms.gated(model, _in_layout(gates)):
        got = generate(model, PROMPTS, **asked)
    assert torch.equal(got, torch.cat(want))
    if "beams" not in mode:
        rolled = [_rollout(model, *one) for one in zip(PROMPTS, gates, strict=True)]
        assert torch.equal(got, torch.cat(rolled).repeat_interleave(rows, 0))


@pytest.mark.parametrize("mode", ALONE)
@pytest.mark.parametrize("by_token", [False, True])
def test_assisted_generation(model, mode, by_token):
    gates = torch.tensor([2.0, -1.0]).expand(4, 2)
    if by_token:
        gates = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    want = _rollout(model, PROMPTS[0], gates)
    with fedms.gated(model, gates[None] if by_token else gates[:1]):
        assert torch.equal(generate(model, PROMPTS[:1], **ALONE[mode]), want)


def test_listed_pairs_by_token(model):
    gates = torch.full((1, 4, 1), 2.0)
    idxs = torch.tensor([0, 1, 0, 1]).view(1, 4, 1)
    dense = torch.zeros(4, 2).scatter(1, idxs[0], gates[0])
    with fedms.gated(model, (gates, idxs)):
        assert torch.equal(generate(model, PROMPTS[:1]), _rollout(model, PROMPTS[0], dense))


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_a_sample(model, mode):
    asked, _ = MODES[mode]
    names = ["two", "__base__", ["one", "two"]]
    want = []
    for prompt, own in zip(PROMPTS, names, strict=True):
        with fedms.mixed_adapters(model, [own]):
            want.append(generate(model, [prompt], **asked))
    with fedms.mixed_adapters(model, names):
        got = generate(model, PROMPTS, **asked)
    assert torch.equal(got, torch.cat(want))
    with fedms.gated(model, None, adapters=()):
        assert torch.equal(got.view(3, -1, NEW)[1], generate(model, PROMPTS[1:2], **asked))


@pytest.mark.parametrize(
    ("mode", "top_k"), [*((mode, None) for mode in (*MODES, *ALONE)), ("greedy", 1), ("beams", 1)]
)
def test_routed_model(model, mode, top_k):
    torch.manual_seed(3)
    routed = fedms.RoutedModel(model, fedms.Router(32, 2, top_k=top_k), NAMES).eval()
    nn.init.normal_(routed.router.layers[0].weight, std=3.0)
    asked, rows = MODES.get(mode) or (ALONE[mode], 1)
    prompts = PROMPTS[:1] if mode in ALONE else PROMPTS
    got = generate(routed, prompts, **asked)
    if "beams" not in mode:  # greedy, without a cache, one by one
        want = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(NEW):
                with torch.no_grad():
                    ids = append_best(ids, routed(input_ids=ids, use_cache=False).logits)
            want.append(ids[:, len(prompt) :])
        assert torch.equal(got, torch.cat(want).repeat_interleave(rows, 0))
    else:
        alone = [generate(routed, [prompt], **{**asked, "use_cache": False}) for prompt in prompts]
        assert torch.equal(got, torch.cat(alone))
    assert not vars(model.get_base_model()).keys() & {"forward", "_fedms_watch"}


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no fp8 cache")
def test_a_quantised_cache(model):
    """Equal gates in each form: quantisation is by tensor, so no other batch is comparable."""
    asked = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    router = fedms.Router(32, 2)
    router.layers[0].bias.data = torch.tensor([1.0, -1.0])
    gates = router(torch.zeros(32)).detach()
    with fedms.gated(model, gates):
        want = generate(model, PROMPTS, **asked)
    for wide in (gates.expand(3, 2), gates.expand(3, WIDTH, 2)):
        with fedms.gated(model, wide):
            assert torch.equal(generate(model, PROMPTS, **asked), want)
    routed = fedms.RoutedModel(model, router, NAMES).eval()
    assert torch.equal(generate(routed, PROMPTS, **asked), want)


def test_a_routed_model_goes_on_from_its_own_cache_only(model):
    routed = fedms.RoutedModel(model, fedms.Router(32, 2), NAMES).eval()
    nn.init.normal_(routed.router.layers[0].weight, std=3.0)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        output = routed.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
        name, cache = next((k, v) for k, v in output.items() if hasattr(v, "get_seq_length"))
        whole = torch.cat([output.sequences, torch.tensor([PROMPTS[2]])], dim=1)
        want = routed(input_ids=whole, use_cache=False).logits[:, -1]
        rest = whole[:, cache.get_seq_length() :]
        torch.testing.assert_close(routed(input_ids=rest, **{name: cache}).logits[:, -1], want)
        other = model(input_ids=ids, use_cache=True)[name]
        with pytest.raises(ValueError, match="must be empty or come from a RoutedModel"):
            routed(input_ids=rest, **{name: other})


def test_an_encoder_and_its_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=39,
    )  # fmt: skip
    model = with_adapters(T5ForConditionalGeneration(config), *NAMES, target_modules=["q", "v"])
    model.base_model.set_adapter(NAMES)
    fedms.accelerate(model.eval())
    gates = torch.tensor([[3.0, 0.0], [0.0, -3.0]])
    asked = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    ids, want = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]), []
    for row, own in zip(ids, gates, strict=True):
        with fedms.gated(model, own):
            want.append(model.generate(input_ids=row[None], **asked))
    with fedms.gated(model, gates):
        got = model.generate(input_ids=ids, **asked)
    assert [r.tolist() for r in got] == [r.tolist() for part in want for r in part]
    with (
        fedms.gated(model, torch.ones(2, 4, 2)),
        pytest.raises(ValueError, match="encoder's tokens are not the decoder's"),
    ):
        model.generate(input_ids=ids, **asked)


def test_no_guess_outside_generate_or_about_other_rows(model):
    batch = padded(PROMPTS)
    doubled = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    with fedms.gated(model, torch.ones(3, 2)):
        with pytest.raises(ValueError, match=r"one row a sample \[6, E\]"):
            model(**doubled)
        with pytest.raises(ValueError, match=r"each of the 6 rows.*repeats 1 times here, got 3"):
            model.generate(**doubled, max_new_tokens=1, pad_token_id=0)
    with fedms.gated(model, torch.ones(3, WIDTH, 2)):
        with pytest.raises(ValueError, match="gates must be"):
            model(input_ids=batch["input_ids"][:, :2])
        with pytest.raises(ValueError, match="guidance_scale"):
            generate(model, PROMPTS, guidance_scale=1.5)
    with fedms.mixed_adapters(model, NAMES), pytest.raises(ValueError, match="got 2"):
        generate(model, PROMPTS)
    with fedms.gated(model, torch.ones(3, 2)):
        generate(model, PROMPTS, guidance_scale=1.5)
    model(**doubled)


def test_blocks_of_row_wise_gates_share_a_compiled_graph(model, recorder):
    compiled, ids = torch.compile(model, backend=recorder), torch.tensor(PROMPTS[:1])
    for _ in range(3):
        with torch.no_grad(), fedms.gated(model, torch.randn(1, 4, 2)):
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(recorder.graphs) == 1


def test_a_generate_that_failed_says_nothing_about_another_model(model):
    """An interrupted one, an out-of-memory error: gates that stay set, then an encoder's."""
    encoder = with_adapters(nn.Sequential(nn.Linear(8, 8)), *NAMES, target_modules=["0"])
    encoder.base_model.set_adapter(NAMES)
    fedms.accelerate(encoder)
    x, gates, calls = torch.randn(3, 6, 8), torch.rand(3, 6, 2), []
    with fedms.gated(encoder, gates):
        want = encoder(x)

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.base_model.model.model.norm.register_forward_hook(interrupt)
    fedms.set_gates(model, torch.rand(len(PROMPTS), 2))
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPTS)
        with fedms.gated(encoder, gates):
            assert torch.equal(encoder(x), want)
    finally:
        hook.remove()
        fedms.set_gates(model, None)


def test_no_hooks_of_a_block_are_on_copies():
    """A copy made within by-row gates, in blocks in each other, and beside gates that are set."""
    model = _model()  # one that was called cannot be pickled: transformers leaves hooks of its own
    ids = torch.tensor([PROMPTS[2]] * 2)

    def found(module):
        """The generating model's attributes and hooks."""
        own = next(m for m in module.modules() if isinstance(m, type(model.base_model.model)))
        return [*vars(own)], len(own._forward_pre_hooks), len(own._forward_hooks)

    plain, before = copy.deepcopy(model), found(model)
    with torch.no_grad(), fedms.gated(model, torch.rand(2, 2)):
        with fedms.gated(model, torch.rand(2, 2)):
            copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, pickled, copy.deepcopy(model)):
            assert found(other) == found(plain) == before
            assert torch.equal(other(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert found(model) == before

    fedms.set_gates(model, torch.rand(2, 2))
    try:
        with fedms.gated(model, torch.rand(2, 2)):
            held = copy.deepcopy(model)
        assert found(held) == found(model) != before
    finally:
        fedms.set_gates(model, None)
    assert found(model) == before
