"""A message there and back, and everything that can be wrong with one."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from fedms.fl.channel.link import Down, Link, Up, split_late, with_late
from fedms.fl.channel.message import MessageError, most_bytes
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.server import Sent
from fedms.fl.types import State
from fedms.fl.wire import pack

CODECS = ("none", "fp16", "int8", "topk")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REFERENCE: State = {"a.lora_A": numbers(4, 96), "a.lora_B": numbers(96, 4), "gate": numbers(3)}


def link(**settings) -> Link:
    return Link(ChannelConfig.model_validate(settings))


def update(step: float = 0.01, **changes) -> Sent:
    shared = {n: t + step * numbers(*t.shape, seed=1) for n, t in REFERENCE.items()}
    return replace(Sent("c7", 3, 40, shared, kept=True, train_loss=0.5), **changes)


def message(one: Link, sent: Sent | None = None) -> bytes:
    return one.reply(sent or update(), REFERENCE, {})[0]


# There and back --------------------------------------------------------------------------------


def test_without_a_codec_the_very_bits_arrive():
    sent = update()
    found = link().accept(message(link(), sent), "c7", 3, REFERENCE)
    assert found.shared.keys() == sent.shared.keys()
    assert all(torch.equal(found.shared[name], t) for name, t in sent.shared.items())
    assert replace(found, shared={}) == replace(sent, shared={})


@pytest.mark.parametrize(("codec", "within"), [("fp16", 2e-5), ("int8", 2e-4), ("topk", 0.05)])
def test_with_a_codec_what_changed_arrives(codec, within):
    sent, one = update(), link(codec=codec)
    found = one.accept(message(one, sent), "c7", 3, REFERENCE)
    for name, tensor in sent.shared.items():
        assert (found.shared[name] - tensor).abs().max() < within
        assert not torch.equal(found.shared[name], tensor)


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_what_was_lost_is_in_the_next_message(codec):
    one, sent = link(codec=codec), update()
    first, late = one.reply(sent, REFERENCE, {})
    got = one.accept(first, "c7", 3, REFERENCE).shared
    for name, tensor in sent.shared.items():
        assert torch.allclose(got[name] + late[name], tensor, atol=1e-6)
    again, _ = one.reply(replace(sent, shared=dict(REFERENCE)), REFERENCE, late)  # nothing new
    then = one.accept(again, "c7", 3, REFERENCE).shared
    before = sum((late[n] ** 2).sum() for n in late)
    left = sum(((late[n] - (then[n] - REFERENCE[n])) ** 2).sum() for n in late)
    assert left < 0.95 * before


def test_what_is_not_sent_this_time_waits():
    """RoLoRA sends A and B in turn."""
    late = {"gate": numbers(3, seed=5)}
    some = update(shared={n: t for n, t in update().shared.items() if n != "gate"})
    _, after = link(codec="int8").reply(some, REFERENCE, late)
    assert after.keys() == REFERENCE.keys()
    assert after["gate"] is late["gate"]


@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_where_next_to_nothing_is_lost_nothing_is_held(codec):
    assert link(codec=codec).reply(update(), REFERENCE, {})[1] == {}


def test_what_is_held_until_the_next_visit_comes_apart_again():
    kept, late = {"local.a": numbers(2)}, {"a.lora_A": numbers(3)}
    held = with_late(kept, late)
    assert len(held) == 2
    assert split_late(held) == (kept, late)
    assert split_late(kept) == (kept, {})


def test_sizes_are_those_of_the_codec():
    count = sum(tensor.numel() for tensor in REFERENCE.values())
    sizes = {codec: len(message(link(codec=codec))) for codec in CODECS}
    assert 4 * count < sizes["none"] < 4 * count + 800
    assert 2 * count < sizes["fp16"] < 2 * count + 800
    assert count < sizes["int8"] < count + 4 * (count / 128 + 1) + 800
    assert 0.05 * 6 * count < sizes["topk"] < 0.05 * 6 * count + 800


@pytest.mark.parametrize(("codec", "within"), [("none", 0), ("fp16", 2e-3), ("int8", 0.02)])
def test_what_the_server_sends_arrives(codec, within):
    one = link(codec_down=codec)
    found = one.receive(one.send(3, REFERENCE), 3, REFERENCE)
    for name, tensor in REFERENCE.items():
        assert (found[name] - tensor).abs().max() <= within
    assert one.send(3, {}) == b""
    assert one.receive(b"", 3, {}) == {}


@pytest.mark.parametrize("codec", CODECS)
def test_a_lossy_way_down_is_in_no_sum(codec):
    """A client that learns nothing leaves the server's state as it is, however it was sent."""
    one = link(codec=codec if codec != "none" else "fp16", codec_down="int8")
    began = one.receive(one.send(3, REFERENCE), 3, REFERENCE)
    idle = update(shared=dict(began))
    found = one.accept(one.reply(idle, began, {})[0], "c7", 3, REFERENCE)
    assert all(torch.equal(found.shared[name], t) for name, t in REFERENCE.items())


def test_float64_stays_float64():
    reference = {name: tensor.double() for name, tensor in REFERENCE.items()}
    sent = update(shared={name: tensor + 0.1 for name, tensor in reference.items()})
    for codec in CODECS:
        one = link(codec=codec)
        found = one.accept(one.reply(sent, reference, {})[0], "c7", 3, reference)
        assert all(tensor.dtype == torch.float64 for tensor in found.shared.values())


def test_in_privacy_neither_examples_nor_loss_leave():
    one = link(privacy={"clip": 1.0})
    content = message(one, update(num_examples=98765, train_loss=0.123456789))
    assert b"98765" not in content
    assert b"0.1234" not in content
    found = one.accept(content, "c7", 3, REFERENCE)
    assert (found.num_examples, found.train_loss) == (1, None)
    with pytest.raises(MessageError, match="must say its number of examples and loss"):
        link().accept(content, "c7", 3, REFERENCE)


# What can be wrong -----------------------------------------------------------------------------


def reheaded(content: bytes, **changes) -> bytes:
    """The message with another header; a field that becomes ... is left out."""
    (length,) = struct.unpack_from("<Q", content)
    record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["json"])
    record = {k: v for k, v in {**record, **changes}.items() if v is not ...}
    return with_record(content, json.dumps(record))


def with_record(content: bytes, text: str) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    whole = {**json.loads(content[8 : 8 + length]), "__metadata__": {"json": text}}
    header = json.dumps(whole).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


HEADERS = [
    ({"round": 4}, "its message is of round '4', expected 3"),
    ({"client_id": "c8"}, "its message is of client 'c8', expected 'c7'"),
    ({"codec": "topk"}, "its message is of codec 'topk', expected 'int8'"),
    ({"codec": "zip"}, r"header is wrong: codec: Input should be 'none', 'fp16', 'int8' or 'topk'"),
    ({"round": "3"}, "header is wrong: round: Input should be a valid integer"),
    ({"num_examples": 1.5}, "header is wrong: num_examples"),
    ({"num_examples": None}, "must say its number of examples and loss"),
    ({"train_loss": float("nan")}, "header is wrong"),
    ({"more": 1}, "header is wrong: more: Extra inputs are not permitted"),
    ({"kept": ...}, "header is wrong: kept: Field required"),
    ({"shapes": {}}, r"its array values is torch.int8 \[771\], expected torch.int8 \[0\]"),
    ({"shapes": {"b": [4]}}, "it sent b, which is not expected"),
    ({"shapes": {"gate": [2**40]}}, r"it sent gate of shape \[1099511627776\], expected \[3\]"),
    ({"shapes": {"gate": [-3]}}, r"it sent gate of shape \[-3\], expected \[3\]"),
    (
        {"shapes": {"gate": [3]}},
        r"its array values is torch.int8 \[771\], expected torch.int8 \[3\]",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), HEADERS)
def test_a_wrong_header_is_refused(changes, reason):
    one = link(codec="int8")
    content = message(one)
    one.accept(reheaded(content), "c7", 3, REFERENCE)
    with pytest.raises(MessageError, match=reason):
        one.accept(reheaded(content, **changes), "c7", 3, REFERENCE)


@pytest.mark.parametrize("codec", CODECS)
def test_a_message_cut_anywhere_is_refused(codec):
    one = link(codec=codec)
    content = message(one)
    for end in [*range(0, 400, 7), len(content) // 2, len(content) - 1]:
        with pytest.raises(MessageError):
            one.accept(content[:end], "c7", 3, REFERENCE)
    with pytest.raises(MessageError):
        one.accept(content + b"\0", "c7", 3, REFERENCE)


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_refused_or_harmless(codec):
    """Never another error than the one that drops the client, and never another name or shape."""
    one = link(codec=codec)
    content = message(one)
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(min(len(content), 1500), (300,), generator=draw).tolist()
    refused = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        try:
            found = one.accept(bytes(changed), "c7", 3, REFERENCE)
        except MessageError:
            refused += 1
        else:
            shapes = {name: tensor.shape for name, tensor in found.shared.items()}
            assert shapes == {name: tensor.shape for name, tensor in REFERENCE.items()}
    assert refused > 30


def test_an_oversized_message_is_not_even_read():
    most = most_bytes(REFERENCE)
    content = message(link()) + bytes(most)
    with pytest.raises(MessageError, match=rf"has {len(content)} bytes, at most {most} are read"):
        link().accept(content, "c7", 3, REFERENCE)
    assert all(len(message(link(codec=codec))) < most for codec in CODECS)
    long_names = {f"{'layer.' * 80}{i}": torch.zeros(1) for i in range(500)}
    one = link()
    assert one.receive(one.send(1, long_names), 1, long_names).keys() == long_names.keys()


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04K.", b"\xff" * 40, save({})])
def test_what_is_no_message_is_refused(content):
    with pytest.raises(MessageError, match=r"its message cannot be read: .* that are no message"):
        link().accept(content, "c7", 3, REFERENCE)


@pytest.mark.parametrize("text", ["[" * 50_000, "{" * 50_000, "1" * 9_000, "null", "[]", '"x"'])
def test_a_header_that_is_made_to_hurt_is_refused(text):
    content = with_record(message(link()), text)
    with pytest.raises(MessageError, match=r"its message('s header is wrong| cannot be read)"):
        link().accept(content, "c7", 3, REFERENCE)


def test_other_parts_are_refused():
    header = {"round": 3, "codec": "none", "shapes": {}}
    content = pack(header, values=REFERENCE, more={"x": torch.zeros(1)})
    with pytest.raises(MessageError, match=r"has the parts \['more', 'values'\]"):
        link().receive(content, 3, REFERENCE)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {**s, "b": torch.zeros(2)}, "it sent b, which is not expected"),
        (lambda s: {**s, "gate": torch.zeros(2)}, r"it sent gate of shape \[2\], expected \[3\]"),
        (lambda s: {n: t for n, t in s.items() if n != "gate"}, "2 of 3 tensors, gate is missing"),
    ],
)
def test_other_names_and_shapes_are_refused(codec, change, reason):
    one = link(codec=codec)
    shared = change(update().shared)
    began = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    content, _ = one.reply(update(shared=shared), began, {})
    with pytest.raises(MessageError, match=reason):
        one.accept(content, "c7", 3, REFERENCE)


def test_another_dtype_is_refused():
    shared = {name: tensor.half() for name, tensor in update().shared.items()}
    with pytest.raises(MessageError, match=r"as torch.float16, expected torch.float32"):
        link().accept(message(link(), update(shared=shared)), "c7", 3, REFERENCE)


def test_the_headers_are_all_that_is_said_beside_tensors():
    assert set(Down.model_fields) == {"round", "codec", "shapes"}
    assert set(Up.model_fields) - set(Down.model_fields) == {
        "client_id", "num_examples", "train_loss", "kept",
    }  # fmt: skip
