"""The two ends of the channel: what the server sends, what a client makes of it, and back.

    server   send     state -> bytes
    client   receive  bytes -> state
    client   reply    sent  -> bytes, and what it could not say yet
    server   accept   bytes -> sent, or a refusal

With a codec a client sends what it *changed*, and the server adds that to its own full-precision
state: no sum holds what the way down has rounded. Both tell a change from the values of
:func:`fedms.fl.server.expected`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedms.fl.channel.codec import Codec, Fp16, Int8, TopK, check_shapes, decode, flatten, unflatten
from fedms.fl.channel.message import Header, MessageError, most_bytes, pack, unpack
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.server import Sent
from fedms.fl.types import State

RESIDUAL = "channel.residual."
"""Before the names of what a client has not sent yet, among the states that it keeps."""


class Down(Header):
    """The header of what the server sends."""

    round: int
    codec: Literal["none", "fp16", "int8"]
    shapes: dict[str, list[int]]


class Up(Header):
    """The header of what a client sends. Under privacy without number of examples and loss."""

    round: int
    client_id: str
    codec: Literal["none", "fp16", "int8", "topk"]
    shapes: dict[str, list[int]]
    num_examples: int | None
    train_loss: float | None
    kept: bool


@dataclass(frozen=True)
class Link:
    """Both ends, by the same settings."""

    settings: ChannelConfig

    @property
    def holds_back(self) -> bool:
        """Whether clients keep what they could not say yet."""
        return self.settings.codec != "none" and self._codec(self.settings.codec).feedback

    def send(self, round: int, state: State) -> bytes:
        """The server's message; none at all where there is nothing to say."""
        if not state:
            return b""
        name = self.settings.codec_down
        if name == "none":
            return pack(Down(round=round, codec=name, shapes={}), state)
        shapes, values = flatten(state)
        return pack(Down(round=round, codec=name, shapes=shapes), self._codec(name).encode(values))

    def receive(self, message: bytes, round: int, expected: State) -> State:
        """What the server sent, as a client has it.

        Args:
            expected: names, shapes and dtypes.

        Raises:
            MessageError: it is not this message of this round.
        """
        if not message and not expected:
            return {}
        header, arrays = unpack(message, Down, most_bytes(expected))
        _check("round", header.round, round)
        _check("codec", header.codec, self.settings.codec_down)
        found = self._decoded(header.codec, header.shapes, arrays, expected)
        return {name: tensor.to(expected[name].dtype) for name, tensor in found.items()}

    def as_received(self, round: int, state: State) -> State:
        """What becomes of a state on its way down."""
        return self.receive(self.send(round, state), round, state)

    def reply(self, sent: Sent, began: State, late: State) -> tuple[bytes, State]:
        """A client's message.

        Args:
            began: the shared names, with the values that a change is told from.
            late: what it could not say yet.

        Returns:
            the message, and what it cannot say yet now.
        """
        name, shapes, arrays = self.settings.codec, {}, sent.shared
        if name != "none":
            change = {n: t - began[n] + late.get(n, 0) for n, t in sent.shared.items()}
            codec = self._codec(name)
            shapes, values = flatten(change)
            arrays = codec.encode(values)
            if codec.feedback:
                parts = unflatten(values - codec.decode(arrays, len(values)), shapes)
                late = {**late, **{n: part.clone() for n, part in parts.items()}}
        private = self.settings.privacy.clip > 0
        header = Up(
            round=sent.round,
            client_id=sent.client_id,
            codec=name,
            shapes=shapes,
            num_examples=None if private else sent.num_examples,
            train_loss=None if private else sent.train_loss,
            kept=sent.kept,
        )
        return pack(header, arrays), late

    def accept(self, message: bytes, client_id: str, round: int, reference: State) -> Sent:
        """A client's update, as the server reads it. Its values may still be anything.

        Args:
            reference: what the client is to send, with the values that a change is told from.

        Raises:
            MessageError: it is not this client's message of this round.
        """
        header, arrays = unpack(message, Up, most_bytes(reference))
        _check("round", header.round, round)
        _check("client", header.client_id, client_id)
        _check("codec", header.codec, self.settings.codec)
        shared = self._decoded(header.codec, header.shapes, arrays, reference)
        if header.codec != "none":
            shared = {n: reference[n] + change.to(reference[n]) for n, change in shared.items()}
        if missing := [name for name in reference if name not in shared]:
            raise MessageError(
                f"it sent {len(shared)} of {len(reference)} tensors, {missing[0]} is missing"
            )
        private = self.settings.privacy.clip > 0
        if private != (header.num_examples is None) or private != (header.train_loss is None):
            raise MessageError("it must say its number of examples and loss, or neither in privacy")
        return Sent(
            client_id=client_id,
            round=round,
            num_examples=1 if header.num_examples is None else header.num_examples,
            shared=shared,
            kept=header.kept,
            train_loss=header.train_loss,
        )

    def _codec(self, name: str) -> Codec:
        if name == "topk":
            return TopK(self.settings.topk_share)
        return Fp16() if name == "fp16" else Int8()

    def _decoded(
        self, name: str, shapes: dict[str, list[int]], arrays: State, expected: State
    ) -> State:
        if name != "none":
            return decode(self._codec(name), arrays, shapes, expected)
        check_shapes({name: list(tensor.shape) for name, tensor in arrays.items()}, expected)
        for name, tensor in arrays.items():
            if tensor.dtype != expected[name].dtype:
                raise MessageError(
                    f"it sent {name} as {tensor.dtype}, expected {expected[name].dtype}"
                )
        return arrays


def split_late(held: State) -> tuple[State, State]:
    """What a client's algorithm keeps, and what its codec has not sent yet."""
    late = {n[len(RESIDUAL) :]: t for n, t in held.items() if n.startswith(RESIDUAL)}
    return {n: t for n, t in held.items() if not n.startswith(RESIDUAL)}, late


def with_late(kept: State, late: State) -> State:
    """Both as one state, to be held until the next visit."""
    return {**kept, **{RESIDUAL + name: tensor for name, tensor in late.items()}}


def _check(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise MessageError(f"its message is of {what} {str(found)[:200]!r}, expected {wanted!r}")
