"""Training runs: peft's loss curve, checkpointing, transformers' Trainer, DDP by accelerate."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft_models import fused_calls, small_llama, with_adapters
from ranks import run_ranks
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fedms

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small are faster on one, and much faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _model(**config):
    config = {"r": 8, "target_modules": TARGETS, "init_lora_weights": True, **config}
    return with_adapters(small_llama(), **config).train()


def _texts(count):
    """Sequences with something to learn: each token is the one before plus a step of the row."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(0, 40, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + step * torch.arange(12)) % 40


def _losses(model, steps):
    texts = _texts(64)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for i in range(steps):
        batch = texts[torch.arange(8 * i, 8 * i + 8) % 64]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_200_steps_have_pefts_loss_curve():
    stock = _model()
    fused = copy.deepcopy(stock)
    fedms.accelerate(fused)
    with fused_calls() as calls:
        ours = _losses(fused, 200)
    assert len(calls) == 200 * 14
    theirs = _losses(stock, 200)
    assert theirs[-8:].mean() < 0.9 * theirs[:8].mean()  # it learns, so the curve means something
    assert ((ours - theirs).abs() / theirs).max() < 1e-4


def test_dropout_trains_as_well_as_pefts():
    """Other masks, the same distribution: over seeds the mean loss agrees within its error."""
    ends = {True: [], False: []}
    for fused in ends:
        for seed in range(5):
            model = _model(lora_dropout=0.2)
            if fused:
                fedms.accelerate(model)
            torch.manual_seed(seed)
            ends[fused].append(_losses(model, 24)[-8:].mean())
    ours, theirs = torch.stack(ends[True]), torch.stack(ends[False])
    error = (ours.var() / 5 + theirs.var() / 5).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * error
    assert error < 0.05 * theirs.mean()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(use_reentrant):
    """The recomputation draws the forward's masks again."""
    model, batch = _model(lora_dropout=0.3, init_lora_weights=False), _texts(4)
    fedms.accelerate(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(4)
        with fused_calls() as calls:
            model(input_ids=batch, labels=batch).loss.backward()
        assert len(calls) == 14 * (1 + checkpointed)
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for ours, exact in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)
    torch.manual_seed(5)
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    other = next(p.grad for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(other, gradients[0][0], rtol=1e-2)


class Texts(Dataset):
    def __init__(self) -> None:
        self.rows = _texts(32)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def test_transformers_trainer(tmp_path):
    histories = []
    for fused in (False, True):
        model = _model()
        if fused:
            fedms.accelerate(model)
        arguments = TrainingArguments(
            str(tmp_path / str(fused)), max_steps=8, per_device_train_batch_size=8, seed=0,
            logging_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True,
            save_steps=8, gradient_checkpointing=True, dataloader_pin_memory=False,
        )  # fmt: skip
        with fused_calls() as calls:
            trainer = Trainer(model, arguments, train_dataset=Texts())
            trainer.train()
        assert len(calls) == (8 * 14 * 2 if fused else 0)
        histories.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert (tmp_path / str(fused) / "checkpoint-8" / "adapter_model.safetensors").exists()
    assert len(histories[0]) == 8
    torch.testing.assert_close(*map(torch.tensor, histories), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["plain", "gated", "mixed"])
def test_trainer_compiles_fused_dropout(tmp_path, routing):
    """`Trainer(torch_compile=True)`: one graph, in which every layer is the op."""
    model = _model(lora_dropout=0.05)
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.05))
    model.base_model.set_adapter(["default", "second"])
    fedms.accelerate(model)
    block = {
        "plain": nullcontext(),
        "gated": fedms.gated(model, torch.tensor([0.3, 0.7]), adapters=["default", "second"]),
        "mixed": fedms.mixed_adapters(model, ["default", "second"] * 4),
    }[routing]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", torch_compile=True, dataloader_pin_memory=False,
        torch_compile_backend="aot_eager",
    )  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    profile = torch.profiler.profile(acc_events=True)

    class AfterCompiling(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                profile.start()

    with block:
        Trainer(model, arguments, train_dataset=Texts(), callbacks=[AfterCompiling()]).train()
    profile.stop()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    ran = {event.key: event.count for event in profile.key_averages()}
    assert ran.get("fedms::native_forward", 0) + ran.get("fedms::stacked_forward", 0) == 2 * 14


def _gradients_by_accelerate() -> list[torch.Tensor]:
    """The averaged gradients, after this rank's half of the batch."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = _model(init_lora_weights=False)
    fedms.accelerate(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    assert type(wrapped).__name__ == "DistributedDataParallel"
    rows = _texts(8).chunk(2)[accelerator.process_index]
    with fused_calls() as calls:
        accelerator.backward(wrapped(input_ids=rows, labels=rows).loss)
    assert len(calls) == 14
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_accelerate_and_ddp_on_gloo():
    found = run_ranks(_gradients_by_accelerate)
    model, rows = _model(init_lora_weights=False), _texts(8)
    model(input_ids=rows, labels=rows).loss.backward()
    wanted = [p.grad for p in model.parameters() if p.requires_grad]
    for gradients in found:
        for ours, exact in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-6)
