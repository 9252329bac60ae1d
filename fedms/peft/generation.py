"""What gates and adapter names mean in transformers' `generate`: whose row, which token.

`generate` calls its model with other shapes than the prompt's: each sample's rows are repeated for
beams and returned sequences, side by side, and with a cache a call holds only the new tokens. So
while row-wise gates are in force, a hook on the generating model notes what `generate` makes of
each call: from its own configuration, how often it repeats a sample, and from the cache, at which
column of the padded sequence the call begins. Then

    a row of gates, or an adapter's name, is that of its sample, on every repeated row;
    column t of gates [B, T, E] is that of column t of the sequence (with the padding on the left),
    and columns after the last take the last one's gates.

Gates that a function of the layer's input computes need none of it. Outside `generate` nothing is
repeated or taken for another shape. In a call that torch.compile traces nothing is noted: gates
that do not fit its rows and tokens as they are raise.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin

from fedms.peft.routing import AdapterRouting


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call | None] = []  # of generating models, the innermost last


_THREAD = _Thread()
_LOCK = threading.Lock()  # over putting hooks on a model and taking them off
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model by `generate`.

    Attributes:
        config: of the `generate`.
        rows, columns: its tokens.
        first: the column of the sequence that its first token is.
        repeats: rows that `generate` makes of one sample.
        not_by_token: None, or why gates by token have no meaning in it.
    """

    config: Any
    rows: int
    columns: int
    first: int
    repeats: int
    not_by_token: str | None
    _fitted: dict[AdapterRouting, AdapterRouting] = field(default_factory=dict)

    def fit(self, routing: AdapterRouting) -> AdapterRouting:
        """The routing with one entry for each row, and token, of the call.

        As it is, where the `generate` has failed and left this note to another model's calls.
        Raises ValueError when it has neither an entry a row nor one a sample.
        """
        if routing not in self._fitted:
            if not any(config is self.config for config in _generation_configs(None)):
                return routing
            self._fitted[routing] = self._fit(routing)
        return self._fitted[routing]

    def _fit(self, routing: AdapterRouting) -> AdapterRouting:
        if routing.samples is not None:
            repeats = self._repeats(len(routing.samples), "adapter names")
            samples = tuple(sample for sample in routing.samples for _ in range(repeats))
            return replace(routing, samples=samples, sample_idxs=None)
        gates, idxs = routing.gates, routing.expert_idxs
        if not isinstance(gates, Tensor) or gates.dim() == 1:
            return routing
        return replace(
            routing,
            gates=self._spread(gates),
            expert_idxs=None if idxs is None else self._spread(idxs),
        )

    def _spread(self, values: Tensor) -> Tensor:
        """values [B, C] or [B, T, C] as [rows, C] or [rows, columns, C]."""
        if values.dim() == 3:
            if self.not_by_token is not None:
                raise ValueError(f"gates must not be by token here: {self.not_by_token}")
            columns = torch.arange(self.first, self.first + self.columns, device=values.device)
            values = values[:, columns.clamp_(max=values.shape[1] - 1)]
        return values.repeat_interleave(self._repeats(values.shape[0], "gates"), dim=0)

    def _repeats(self, samples: int, what: str) -> int:
        if samples == self.rows:
            return 1
        if samples * self.repeats == self.rows:
            return self.repeats
        raise ValueError(
            f"{what} must have one entry for each of the {self.rows} rows of the call, or of the "
            f"samples, which `generate` repeats {self.repeats} times here, got {samples}"
        )


def generating_call() -> Call | None:
    """The call of a model by `generate` that this thread is in, if a hook has noted it."""
    return _THREAD.calls[-1] if _THREAD.calls else None


def generating_models(model: nn.Module) -> list[nn.Module]:
    """The modules within `model` that have a `generate` of their own."""
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def watch(model: nn.Module) -> list[RemovableHandle]:
    """Hooks on a generating model that note its calls.

    Not `always_call`: torch.compile guards on the numbers of such hooks, one graph a block. So a
    call that fails leaves its note; the next call of the model puts its own on top.
    """
    return [
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave),
    ]


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """The calls of the generating models within `model` are noted in the block.

    Copies and pickles that are made of them meanwhile have no hooks of it.
    """
    with _LOCK:
        opened = {module: watch(module) for module in generating_models(model)}
        for module, handles in opened.items():
            held = vars(module).setdefault("_fedms_hooks", [])
            held += handles
            vars(module)["__reduce_ex__"] = partial(_without_blocks, module)
    before = len(_THREAD.calls)
    try:
        yield
    finally:
        with _LOCK:
            for module, handles in opened.items():
                held = vars(module)["_fedms_hooks"]
                for handle in handles:
                    handle.remove()
                    held.remove(handle)
                if not held:
                    del vars(module)["_fedms_hooks"], vars(module)["__reduce_ex__"]
        del _THREAD.calls[before:]  # calls that failed leave some


def _without_blocks(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What `module.__reduce_ex__(protocol)` is without the hooks of open blocks.

    In the module's own attributes, where copy and pickle look first.
    """
    reduced: Any = type(module).__reduce_ex__(module, protocol)
    make, args, held, *rest = reduced
    state = dict(held)
    del state["__reduce_ex__"]
    ids = {handle.id for handle in state.pop("_fedms_hooks")}
    for name in _HOOKS:
        state[name] = OrderedDict((key, v) for key, v in state[name].items() if key not in ids)
    return make, args, state, *rest


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        _THREAD.calls.append(_call(module, args, kwargs))


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling() and _THREAD.calls:
        _THREAD.calls.pop()


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    config = next(_generation_configs(module), None)
    if config is None:
        return None
    names = ("decoder_input_ids", "decoder_inputs_embeds", "inputs_embeds", "input_ids")
    given = [kwargs[name] for name in names if kwargs.get(name) is not None] or [*args]
    if not given:
        return None
    rows, columns = given[0].shape[:2]
    first = _first_column(module, kwargs, config)
    reason = None
    if module.config.is_encoder_decoder:  # type: ignore[union-attr]
        reason = "the encoder's tokens are not the decoder's; use a function of the layer's input"
    elif config.guidance_scale not in (None, 1):
        reason = "guidance_scale runs a second, unconditional sequence, which has other tokens"
    elif first is None:
        reason = (
            "the model's cache does not say how many tokens it has seen; generate with "
            "use_cache=False, or use a function of the layer's input"
        )
    return Call(
        config=config,
        rows=rows,
        columns=columns,
        first=first or 0,
        repeats=max(config.num_beams or 1, config.num_return_sequences or 1),
        not_by_token=reason,
    )


def _first_column(module: Any, kwargs: dict[str, Any], config: Any) -> int | None:
    """The column of the sequence that a call begins at, None where its cache cannot say."""
    cache = next((v for v in kwargs.values() if hasattr(v, "get_seq_length")), None)
    if cache is not None:
        return tokens_held(cache)
    elsewhere = module._is_stateful and config.use_cache is not False  # RWKV's state, say
    return None if elsewhere else 0


def tokens_held(cache: Any) -> int | None:
    """How many tokens a cache holds, None where all of its layers hold a state of fixed size."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # transformers' word for it
        return None


def _generation_configs(module: nn.Module | None) -> Iterator[Any]:
    """The configurations of the `generate`s that run the caller, of this module or of any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and (
            module is None or frame.f_locals.get("self") is module
        ):
            yield frame.f_locals.get("generation_config")
        frame = frame.f_back
