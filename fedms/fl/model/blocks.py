"""A transformers model's list of blocks, and its own forward from any of them on.

Nothing here knows an architecture. The model's forward runs as it is: the blocks below the start
hand on what they are given, and a hook puts the hidden state in at the start. So positions, rotary
tables, causal and sliding masks and final norms are the model's own, and blocks keep their places
in the list, by which some models choose a block's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedms.fl.types import FedMSError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Blocks:
    """The blocks of a transformers encoder or decoder, the first nearest to the input.

    Args:
        model: a model whose blocks are one ``nn.ModuleList``.
        tower: the part of it that has them, if it has two; the model itself by default.

    Attributes:
        name: of that list within the model, e.g. ``encoder.layer``.

    Raises:
        FedMSError: the model has no such list, or is an encoder and a decoder.
    """

    def __init__(self, model: nn.Module, tower: nn.Module | None = None) -> None:
        self.name, self._blocks = _find(model, model if tower is None else tower)
        self._in_tuple = False

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self._blocks[index]

    def entering(self, forward: Callable[[], object], depths: Sequence[int]) -> dict[int, Tensor]:
        """The hidden states [B, T, D] that enter the blocks ``depths`` in a forward of the model.

        The forward is left as soon as the last of them is known.
        """
        seen: dict[int, Tensor] = {}
        last = max(depths)

        def record(depth: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[depth] = _hidden(args, kwargs)
                if depth == last:
                    raise _EnoughSeen

            return hook

        def learn(module: nn.Module, args: object, output: object) -> None:
            self._in_tuple = isinstance(output, tuple)

        handles = [
            self._blocks[depth].register_forward_pre_hook(record(depth), with_kwargs=True)
            for depth in depths
        ]
        handles.append(self._blocks[0].register_forward_hook(learn))
        try:
            forward()
        except _EnoughSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def starting_at(self, depth: int, hidden: Tensor) -> Iterator[None]:
        """Within the block forwards of the model begin with ``hidden`` at block ``depth``.

        What the model reads below is not used, only its shape: ids and masks must be those of
        ``hidden``, the values of pixels are free. ``hidden`` is from :meth:`entering`.
        """

        def put_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            given = _hidden(args, kwargs)
            return (given,) if self._in_tuple else given

        handle = self._blocks[depth].register_forward_pre_hook(put_in, with_kwargs=True)
        skipped = self._blocks[:depth]
        for block in skipped:
            block.forward = hand_on
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward


class _EnoughSeen(Exception):
    """Stops a forward whose remaining blocks nobody asked for."""


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _find(model: nn.Module, tower: nn.Module) -> tuple[str, list[nn.Module]]:
    kind = type(tower).__name__
    if getattr(tower.config, "is_encoder_decoder", False):
        raise FedMSError(f"{kind} is an encoder and a decoder; fedms needs one list of blocks")
    count = getattr(tower.config, "num_hidden_layers", None)
    within = {id(module) for module in tower.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in within:
            return name, list(module)
    raise FedMSError(
        f"{kind} has no list of {count} blocks; fedms needs a model made of one list of blocks"
    )
