"""Codecs by hand, their bounds, and that what they lose comes later."""

from __future__ import annotations

import pytest
import torch

from fedms.fl.channel.codec import Fp16, Int8, TopK, decode, flatten, unflatten
from fedms.fl.channel.message import MessageError

CODECS = [Fp16(), Int8(), Int8(block=3), TopK(0.1), TopK(1.0)]


def values(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand():
    """Blocks of two: (127, -254) has scale 2; (0, 0) has none; (1) stands alone."""
    codec = Int8(block=2)
    arrays = codec.encode(torch.tensor([127.0, -254.0, 0.0, 0.0, 1.0]))
    assert arrays["values"].tolist() == [64, -127, 0, 0, 127]  # 63.5 rounds to even
    assert arrays["scales"].tolist() == pytest.approx([2, 0, 1 / 127])
    assert codec.decode(arrays, 5).tolist() == pytest.approx([128, -254, 0, 0, 1])


def test_top_k_by_hand():
    codec = TopK(0.5)
    arrays = codec.encode(torch.tensor([1.0, -8.0, 0.5, 4.0, 2.0]))
    assert arrays["indices"].tolist() == [1, 3, 4]
    assert codec.decode(arrays, 5).tolist() == [0, -8, 0, 4, 2]


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000])
def test_int8_is_off_by_half_a_step_at_most(n):
    x = values(n)
    found = Int8().decode(Int8().encode(x), n)
    for start in range(0, n, 128):
        block = x[start : start + 128]
        step = block.abs().max() / 127
        assert (found[start : start + 128] - block).abs().max() <= 0.5001 * step


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_bytes_follow_the_codec(codec):
    size = {Fp16: 2000, Int8: 1000, TopK: 600}
    sent = sum(array.nbytes for array in codec.encode(values(1000)).values())
    if codec == Int8():
        assert sent == 1000 + 4 * 8
    elif codec != TopK(1.0) and codec != Int8(block=3):
        assert sent == size[type(codec)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(codec, bad):
    """A codec must not turn a broken update into a plausible one: the server refuses by values."""
    x = values(300)
    x[17] = bad
    assert not torch.isfinite(codec.decode(codec.encode(x), 300)).all()


@pytest.mark.parametrize("codec", [Int8(), TopK(0.1)], ids=str)
def test_what_is_lost_comes_later(codec):
    """The sum of what arrives stays within one message's loss of the sum of what was meant."""
    late, meant, arrived = torch.zeros(500), torch.zeros(500), torch.zeros(500)
    without = torch.zeros(500)
    for step in range(200):
        x = values(500, step) + 0.03
        wanted = x + late
        got = codec.decode(codec.encode(wanted), 500)
        late = wanted - got
        meant, arrived = meant + x, arrived + got
        without += codec.decode(codec.encode(x), 500)
    assert torch.allclose(arrived + late, meant, atol=1e-3)
    assert (arrived - meant).norm() < 0.3 * (without - meant).norm()


def test_a_state_is_one_vector_and_back():
    state = {"a": values(6).view(2, 3), "s": torch.tensor(4.0), "b": torch.zeros(0, 3)}
    shapes, vector = flatten(state)
    assert shapes == {"a": [2, 3], "s": [], "b": [0, 3]}
    back = unflatten(vector, shapes)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert flatten({})[1].shape == (0,)


@pytest.mark.parametrize(
    ("codec", "changes", "message"),
    [
        (Fp16(), {"values": torch.zeros(5)}, r"its array values is torch.float32 \[5\], expected"),
        (Fp16(), {"more": torch.zeros(5)}, r"it sent the arrays \['more', 'values'\]"),
        (Int8(), {"values": torch.zeros(4, dtype=torch.int8)}, r"int8 \[4\], expected .* \[6\]"),
        (Int8(), {"scales": torch.zeros(2)}, r"its array scales is .* \[2\], expected .* \[1\]"),
        (TopK(0.5), {"indices": torch.tensor([0, 1, 6], dtype=torch.int32)}, "do not rise within"),
        (TopK(0.5), {"indices": torch.tensor([-1, 1, 2], dtype=torch.int32)}, "do not rise within"),
        (TopK(0.5), {"indices": torch.tensor([1, 1, 2], dtype=torch.int32)}, "do not rise within"),
        (TopK(0.5), {"indices": torch.tensor([0, 1, 2])}, "torch.int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(codec, changes, message):
    arrays = {**codec.encode(values(6)), **changes}
    with pytest.raises(MessageError, match=message):
        codec.decode(arrays, 6)


def test_nothing_is_allocated_for_a_claimed_size():
    """2**40 values in half a kilobyte: refused by what is expected, before any array is made."""
    arrays = TopK(1e-12).encode(values(6))
    with pytest.raises(MessageError, match=r"it sent w of shape \[1099511627776\], expected \[6\]"):
        decode(TopK(1e-12), arrays, {"w": [2**40]}, {"w": torch.zeros(6)})
