"""Linears that hold several LoRA experts by name, over :func:`fedms.kernels.gated_lora_linear`.

Parameters carry peft's names (``lora_A.<expert>.weight`` [r, in], ``lora_B.<expert>.weight``
[out, r]), and :func:`save_adapter` / :func:`load_adapter` speak peft's file format, so an expert
trained here is an ordinary peft adapter.

Which experts take part in a forward, on which rows and with which gates, is said for the whole
model at once with :func:`routed`; a layer on which none of them is active computes its base linear
and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedms.kernels import Segments, gated_lora_linear

PEFT_PREFIX = "base_model.model."


@dataclass
class Routing:
    """What the layers of one model read in a forward.

    Attributes:
        paths: equal parts of the batch, in order; each names the experts that its rows use. One
            path covers all rows.
        gates: None, or [batch, E] for the E experts of a single path; differentiable.
    """

    paths: tuple[tuple[str, ...], ...] = ((),)
    gates: Tensor | None = None


class GatedLoraLinear(nn.Module):
    """A frozen linear and the experts on it.

    Args:
        base_layer: the linear; its parameters are frozen here.
        routing: shared by all layers of a model.
    """

    def __init__(self, base_layer: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.awake = True
        self._routing = routing

    def add_expert(self, name: str, r: int, alpha: float, dropout: float = 0.0) -> None:
        """Add an expert of rank ``r`` that scales by ``alpha / r``.

        A is Kaiming-uniform, B zero, as in peft.
        """
        weight = self.base_layer.weight
        place = {
            "device": weight.device,
            "dtype": torch.float32 if weight.dtype.itemsize < 4 else weight.dtype,
        }
        self.lora_A[name] = nn.Linear(self.base_layer.in_features, r, bias=False, **place)
        self.lora_B[name] = nn.Linear(r, self.base_layer.out_features, bias=False, **place)
        A, B = self.factors(name)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)
        self.scaling[name] = alpha / r
        self.dropout[name] = dropout

    def factors(self, expert: str) -> tuple[Tensor, Tensor]:
        """The live parameters A [r, in] and B [out, r] of an expert."""
        A, B = self.lora_A[expert], self.lora_B[expert]
        assert isinstance(A, nn.Linear)
        assert isinstance(B, nn.Linear)
        return A.weight, B.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ..., in] -> [batch, ..., out]."""
        paths = self._routing.paths
        experts = (
            [name for name in self.lora_A if any(name in path for path in paths)]
            if self.awake
            else []
        )
        if not experts:
            return self.base_layer(x)
        dropout_p = max(self.dropout[name] for name in experts) if self.training else 0.0
        return gated_lora_linear(
            x,
            self.base_layer.weight,
            [self.factors(name)[0] for name in experts],
            [self.factors(name)[1] for name in experts],
            bias=self.base_layer.bias,
            scaling=[self.scaling[name] for name in experts],
            gates=self._token_gates(x, experts),
            segments=self._segments(x, experts),
            dropout_p=dropout_p,
            seed=int(torch.randint(2**31, ())) if dropout_p else None,
        )

    def _token_gates(self, x: Tensor, experts: list[str]) -> Tensor | None:
        gates = self._routing.gates
        if gates is None:
            return None
        columns = [self._routing.paths[0].index(name) for name in experts]
        gates = gates[:, columns]
        return gates.view(len(gates), *[1] * (x.dim() - 2), len(experts)).expand(
            *x.shape[:-1], len(experts)
        )

    def _segments(self, x: Tensor, experts: list[str]) -> Segments | None:
        paths = self._routing.paths
        if len(paths) == 1:
            return None
        rows = x.numel() // x.shape[-1] // len(paths)
        chosen = [tuple(experts.index(name) for name in path if name in experts) for path in paths]
        return Segments([rows * i for i in range(len(paths) + 1)], chosen)


def add_experts(
    model: nn.Module,
    targets: Sequence[str],
    names: Sequence[str],
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
) -> dict[str, GatedLoraLinear]:
    """Put experts on the linears of ``model`` whose dotted name is, or ends in, one of ``targets``.

    Returns:
        the new layers by name. They share one :class:`Routing`, so :func:`routed` speaks to all of
        them.

    Raises:
        ValueError: a target that names no linear; the message lists the linears that there are.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    routing, layers = Routing(), {}
    for target in targets:
        found = [name for name in linears if name == target or name.endswith("." + target)]
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"no linear of the model is named {target!r}; "
                f"its linears end in {', '.join(endings)}"
            )
        for name in found:
            parent, _, child = name.rpartition(".")
            layer = GatedLoraLinear(linears[name], routing)
            for expert in names:
                layer.add_expert(expert, r, alpha, dropout)
            setattr(model.get_submodule(parent), child, layer)
            layers[name] = layer
    return layers


def gated_layers(model: nn.Module) -> dict[str, GatedLoraLinear]:
    """The layers that carry experts, by dotted name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GatedLoraLinear)
    }


@contextmanager
def routed(
    layers: dict[str, GatedLoraLinear], *paths: Sequence[str], gates: Tensor | None = None
) -> Iterator[None]:
    """Within the block, forwards use these experts: ``routed(layers, ["global"])`` on all rows,
    ``routed(layers, ["global", "local"], gates=g)`` gated per sample (g [batch, 2]),
    ``routed(layers, ["global"], ["local"])`` on the first and the second half of the batch.

    Raises:
        ValueError: gates together with several paths.
    """
    if gates is not None and len(paths) != 1:
        raise ValueError(f"gates go with one path of experts, got {len(paths)} paths")
    routings = {id(layer._routing): layer._routing for layer in layers.values()}.values()
    before = [(routing.paths, routing.gates) for routing in routings]
    for routing in routings:
        routing.paths, routing.gates = tuple(tuple(path) for path in paths), gates
    try:
        yield
    finally:
        for routing, (old_paths, old_gates) in zip(routings, before, strict=True):
            routing.paths, routing.gates = old_paths, old_gates


def save_adapter(
    layers: dict[str, GatedLoraLinear], expert: str, folder: Path, *, base_model: str = ""
) -> None:
    """Write the awake layers' ``expert`` in peft's format.

    The files are adapter_config.json and adapter_model.safetensors.
    """
    awake = {
        name: layer for name, layer in layers.items() if layer.awake and expert in layer.lora_A
    }
    if not awake:
        raise ValueError(f"no awake layer holds the expert {expert!r}; there is nothing to save")
    first = next(iter(awake.values()))
    r = len(first.factors(expert)[0])
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": first.scaling[expert] * r,
        "lora_dropout": first.dropout[expert],
        "target_modules": sorted(awake),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    tensors = {}
    for name, layer in awake.items():
        for part, weight in zip(("lora_A", "lora_B"), layer.factors(expert), strict=True):
            tensors[f"{PEFT_PREFIX}{name}.{part}.weight"] = weight.detach().contiguous().clone()
    # not save_file: what a full disk answers is to be an OSError
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def load_adapter(layers: dict[str, GatedLoraLinear], expert: str, folder: Path) -> None:
    """Read a LoRA adapter of peft or :func:`save_adapter` into ``expert``.

    The adapter's rank and scale replace the expert's. Layers of the model that the file does not
    name lose the expert.

    Raises:
        ValueError: the adapter is no plain LoRA, or names linears that carry no experts here.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    unusual = [
        key
        for key in ("use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern")
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or unusual:
        raise ValueError(
            f"{folder} must hold a plain LoRA adapter, "
            f"got peft_type={config.get('peft_type')} with {unusual}"
        )
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in tensors}
    missing = sorted(named - layers.keys())
    if missing:
        raise ValueError(
            f"{folder} has weights for {missing[:3]}, which carry no experts; "
            f"those that do: {sorted(layers)[:3]} ..."
        )
    r = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    for name, layer in layers.items():
        for part in (layer.lora_A, layer.lora_B):
            if expert in part:
                del part[expert]
        if name in named:
            layer.add_expert(expert, r, scale * r, config.get("lora_dropout", 0.0))
            with torch.no_grad():
                for part, weight in zip(("lora_A", "lora_B"), layer.factors(expert), strict=True):
                    weight.copy_(tensors[f"{PEFT_PREFIX}{name}.{part}.weight"])
