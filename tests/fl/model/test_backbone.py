"""The foundation: a forward cut in two is the whole forward, and sleeping blocks cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedms.fl.model.backbone import EXPERTS, Foundation, load_foundation, pad
from fedms.fl.model.prefix import PrefixCache
from fedms.fl.types import ConfigError, FedMSError

TEXTS = ["acute cough", "left knee fracture old", "rash", "murmur valve chest pressure beat new"]


def tokens_of(foundation: Foundation):
    return pad(foundation.tokenize(TEXTS))


def train_a_little(foundation: Foundation) -> None:
    """Every expert's B away from zero, so that experts change the output."""
    with torch.no_grad():
        for expert in EXPERTS:
            for name, parameter in foundation.expert_parameters(expert).items():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1)


def test_texts_become_rows_cut_at_max_tokens(foundation):
    rows = foundation.tokenize([*TEXTS, "acute " * 50, ""])
    assert [len(row) for row in rows] == [4, 6, 3, 8, 12, 2]
    tokens = pad(rows)
    assert tokens.ids.shape == (6, 12)
    assert tokens.mask.sum(1).tolist() == [4, 6, 3, 8, 12, 2]
    assert torch.equal(tokens.ids[1, :6], rows[1])


def test_padding_changes_nothing(foundation):
    together = foundation.features(tokens_of(foundation))
    for text, row in zip(TEXTS, together, strict=True):
        alone = foundation.features(pad(foundation.tokenize([text])))
        torch.testing.assert_close(alone[0], row, rtol=0, atol=1e-6)


@pytest.mark.parametrize("awake", [(), (3,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("path", [(), ("global",), ("global", "local")])
def test_prefix_and_rest_make_the_whole(foundation, awake, path):
    train_a_little(foundation)
    foundation.set_awake(awake)
    tokens = tokens_of(foundation)
    with torch.no_grad(), foundation.route(path):
        whole = foundation.features(tokens)
        depths = list(range(1, foundation.depth + 1))
        hidden = foundation.prefix(tokens, depths) if depths else {}
        for depth in depths:
            found = foundation.features(tokens, hidden[depth], depth)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
        again = foundation.features(tokens)
    assert torch.equal(again, whole)  # the list of blocks is back in its place


def test_one_pass_gives_the_hidden_states_of_all_depths(foundation):
    tokens = tokens_of(foundation)
    together = foundation.prefix(tokens, [1, 3])
    assert sorted(together) == [1, 3]
    for depth in (1, 3):
        assert torch.equal(foundation.prefix(tokens, [depth])[depth], together[depth])
        assert together[depth].shape == (*tokens.ids.shape, 32)
    states = foundation.model(
        input_ids=tokens.ids, attention_mask=tokens.mask, output_hidden_states=True
    ).hidden_states
    torch.testing.assert_close(together[3], states[3], rtol=0, atol=1e-6)


def test_awake_blocks_change_the_output_and_sleeping_ones_do_not(foundation):
    tokens = tokens_of(foundation)
    train_a_little(foundation)
    with torch.no_grad():
        with foundation.route(()):
            base = foundation.features(tokens)
        seen = {}
        for awake in ((), (0,), (3,), (0, 3)):
            foundation.set_awake(awake)
            with foundation.route(("global",)):
                seen[awake] = foundation.features(tokens)
            with foundation.route(()):
                assert torch.equal(foundation.features(tokens), base)
    assert torch.equal(seen[()], base)
    outputs = list(seen.values())
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_the_gradient_stops_at_the_lowest_awake_block(foundation):
    """Nothing that enters block 2 asks for a gradient, and nothing below it is saved."""
    foundation.set_awake((2, 3))
    parameters = foundation.expert_parameters("global", awake_only=True)
    entries: dict[int, bool] = {}
    for i, block in enumerate(foundation.blocks):
        block.register_forward_pre_hook(
            lambda _, args, i=i: entries.__setitem__(i, args[0].requires_grad)
        )
    tokens = tokens_of(foundation)
    for parameter in parameters.values():
        parameter.requires_grad_()
    saved: list[int] = []

    def count(awake: tuple[int, ...]) -> int:
        foundation.set_awake(awake)
        saved.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t),
            foundation.route(("global",)),
        ):
            foundation.features(tokens).sum()
        return len(saved)

    two, one = count((2, 3)), count((3,))
    assert entries == {0: False, 1: False, 2: False, 3: False}
    count((2, 3))
    assert entries == {0: False, 1: False, 2: False, 3: True}
    assert 0 < one < two
    with foundation.route(("global",)):
        foundation.features(tokens)[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    trained = {id(parameter) for parameter in parameters.values()}
    others = [p for p in foundation.model.parameters() if id(p) not in trained]
    assert all(p.grad is None and not p.requires_grad for p in others)


def test_a_fresh_expert_is_the_same_for_everybody_and_says_nothing(foundation, config):
    torch.manual_seed(99)
    other = load_foundation(config().model, config().lora)
    one, two = foundation.fresh_expert("global"), other.fresh_expert("global")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert (tensor == 0).all() == name.endswith("lora_B")
    local = foundation.fresh_expert("local")
    assert {n.replace("global.", "local.", 1) for n in one} == set(local)
    foundation.set_awake(range(4))
    tokens = tokens_of(foundation)
    with foundation.route(()):
        base = foundation.features(tokens)
    with foundation.route(("global",)):
        torch.testing.assert_close(foundation.features(tokens), base, rtol=0, atol=1e-6)


def test_names_and_counts(foundation):
    """Per block three linears [32, 32], each with A [2, 32] and B [32, 2]."""
    everything = foundation.expert_parameters("local")
    assert len(everything) == 4 * 3 * 2
    assert "local.encoder.layer.2.attention.self.query.lora_A" in everything
    assert foundation.block_of("local.encoder.layer.2.attention.self.query.lora_A") == 2
    foundation.set_awake((1,))
    awake = foundation.expert_parameters("local", awake_only=True)
    assert {foundation.block_of(name) for name in awake} == {1}
    assert sum(p.numel() for p in awake.values()) == 3 * 2 * (2 * 32)
    plain = sum(p.numel() for n, p in foundation.model.named_parameters() if "lora" not in n)
    assert foundation.parameter_count == plain


def test_pooling_by_hand(foundation):
    tokens = tokens_of(foundation)
    with torch.no_grad():
        out = foundation.model(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        lengths = tokens.mask.sum(1)
        means = torch.stack([row[:n].mean(0) for row, n in zip(out, lengths, strict=True)])
        for pooling, pooled in (("mean", means), ("cls", out[:, 0])):
            foundation.pooling = pooling
            wanted = pooled / pooled.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(foundation.features(tokens), wanted, rtol=0, atol=1e-6)


def test_pooling_is_what_was_recorded_beside_the_model(config, tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    lora = config().lora
    settings = config().model.replace(path=str(folder))
    assert load_foundation(settings, lora).pooling == "mean"
    (folder / "1_Pooling").mkdir()
    record = folder / "1_Pooling" / "config.json"
    record.write_text('{"pooling_mode_cls_token": true}')
    assert load_foundation(settings, lora).pooling == "cls"
    assert load_foundation(settings.replace(pooling="mean"), lora).pooling == "mean"
    record.write_text('{"pooling_mode_cls_token": false}')
    assert load_foundation(settings, lora).pooling == "mean"


def test_the_head_is_the_frozen_model_on_the_class_names(config):
    foundation = load_foundation(config("model.prompt=chronic {}").model, config().lora)
    train_a_little(foundation)
    foundation.set_awake(range(4))
    with foundation.route(("global",)):
        head = foundation.encode_classes(["lung", "heart"])
        base_like = foundation.features(pad(foundation.tokenize(["chronic lung"])))
    with foundation.route(()):
        wanted = foundation.features(pad(foundation.tokenize(["chronic lung", "chronic heart"])))
    assert torch.equal(head, wanted)
    assert (base_like[0] - head[0]).abs().max() > 1e-3
    assert not head.requires_grad


def test_dropout_acts_only_where_it_is_asked_for_and_by_the_given_seed(config):
    foundation = load_foundation(config().model, config("lora.dropout=0.5").lora)
    train_a_little(foundation)
    foundation.set_awake(range(4))
    tokens = tokens_of(foundation)

    def features() -> torch.Tensor:
        with torch.no_grad(), foundation.route(("global",)):
            return foundation.features(tokens)

    still, state = features(), torch.get_rng_state()
    dropped = []
    for seed in (1, 2, 1):
        with foundation.dropping_out(np.random.default_rng(seed)):
            dropped.append(features())
    assert torch.equal(features(), still)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropped[0], dropped[2])
    for one in (dropped[1], still):
        assert (dropped[0] - one).abs().max() > 1e-3


def test_linears_that_do_not_exist(config):
    lora = config().lora.replace(targets=("query", "qeury"))
    with pytest.raises(
        ConfigError, match=r"lora.targets: .*'qeury'; its linears end in dense, key, query"
    ):
        load_foundation(config().model, lora)


def test_a_model_without_a_list_of_blocks(config):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Settings", (), {"num_hidden_layers": 4})()
            self.one = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(FedMSError, match="Flat has no list of 4 blocks"):
        Foundation(Flat(), None, config().model, config().lora, "mean")


def test_texts_longer_than_the_model_can_read(config):
    load_foundation(config("model.max_tokens=32").model, config().lora)
    with pytest.raises(ConfigError, match=r"model\.max_tokens must be at most 32, .* got 33"):
        load_foundation(config("model.max_tokens=33").model, config().lora)


def test_a_model_that_cannot_be_loaded(config, tmp_path):
    model = config().model.replace(path=str(tmp_path / "none"))
    with pytest.raises(FedMSError, match=r"model.path: .*none' cannot be loaded"):
        load_foundation(model, config().lora)
    (tmp_path / "config.json").write_text("{}")
    model = config().model.replace(path=str(tmp_path))
    with pytest.raises(FedMSError, match=r"model.path: .* cannot be loaded"):
        load_foundation(model, config().lora)


def test_weights_that_are_damaged(config, tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = config().model.replace(path=str(folder))
    with pytest.raises(FedMSError, match=r"model\.path: .* cannot be loaded"):
        load_foundation(model, config().lora)


def other_models() -> dict:
    import transformers as t

    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "distilbert": (
            lambda n: t.DistilBertModel(
                t.DistilBertConfig(vocab_size=n, dim=32, n_heads=2, hidden_dim=64, n_layers=4)
            ),
            ("q_lin", "v_lin"),
        ),
        "roberta": (
            lambda n: t.RobertaModel(
                t.RobertaConfig(vocab_size=n, num_hidden_layers=4, **small, **ids)
            ),
            ("query", "value"),
        ),
        "modernbert": (
            lambda n: t.ModernBertModel(
                t.ModernBertConfig(
                    vocab_size=n,
                    num_hidden_layers=4,
                    local_attention=4,
                    **small,
                    **ids,
                    cls_token_id=2,
                    sep_token_id=3,
                )
            ),
            ("Wqkv",),
        ),
        "mpnet": (
            lambda n: t.MPNetModel(
                t.MPNetConfig(vocab_size=n, num_hidden_layers=4, **small, **ids)
            ),
            ("q", "v"),
        ),
    }


@pytest.mark.parametrize("name", ["distilbert", "roberta", "modernbert", "mpnet"])
def test_another_architecture(config, tiny_bert: Path, tmp_path, name):
    """From every depth, with the experts of the blocks above it awake, as the whole forward."""
    from transformers import AutoTokenizer

    make, targets = other_models()[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    make(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = config().model.replace(path=str(tmp_path))
    foundation = load_foundation(model, config().lora.replace(targets=targets))
    assert foundation.num_blocks == 4
    train_a_little(foundation)
    tokens = tokens_of(foundation)
    for depth in (1, 2, 3):
        foundation.set_awake(range(depth, 4))
        with torch.no_grad():
            hidden = foundation.prefix(tokens, [depth])[depth]
            with foundation.route(("global",)):
                whole = foundation.features(tokens)
                rest = foundation.features(tokens, hidden, depth)
            with foundation.route(()):
                base = foundation.features(tokens)
        torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)
        assert (whole - base).abs().max() > 1e-3


@pytest.mark.parametrize("megabytes", [100, 0.03, 0])
def test_the_prefix_cache_gives_what_the_model_gives(foundation, megabytes):
    """Also past its bound, where some examples are stored and some are not."""
    train_a_little(foundation)
    rows = foundation.tokenize(TEXTS * 20)
    limit = int(megabytes * 2**20)
    cache = PrefixCache(foundation, rows, limit)
    foundation.set_awake((3,))
    cache.fill(np.arange(len(rows)), [1, 3])
    assert cache.bytes <= limit
    whole = sum(len(row) for row in rows) * 32 * 4 * 2
    assert cache.bytes == whole if megabytes == 100 else cache.bytes < whole
    batch = np.array([7, 0, 79, 33])
    for awake, depth in (((3,), 3), ((2, 3), 2), ((1, 3), 1), ((0, 3), 0)):
        foundation.set_awake(awake)
        tokens, hidden, start = cache.batch(batch)
        with torch.no_grad(), foundation.route(("global",)):
            found = foundation.features(tokens, hidden, start)
            wanted = foundation.features(pad([rows[i] for i in batch]))
        assert start == depth
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    cache.forget_above(2)
    if megabytes == 100:
        assert cache.bytes == whole // 2
