"""A round of federated averaging with S clients side by side, on whatever device there is.

    python bench/federated_speed.py [--cohorts 1 8 32] [--rounds 3] [key=value ...]
    python bench/federated_speed.py --random MiniLM      needs no package with weights or texts

32 clients, 2 local steps of 8 texts, the default model. Rounds of the settings are interleaved and
medians shown; each begins from the same state, and the losses must agree. Every round is a line of
JSON as well, printed when it ends: {"side_by_side": S, "seconds": s}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.client import Visit, visit
from fedms.fl.config import Config, load_config
from fedms.fl.data.federation import ClientData, Dataset, Federation
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress

SMALL = [
    "method=fedavg", "rivals=[]", "data.num_clients=32", "data.unseen_clients=0",
    "data.max_per_category=1", "data.min_partition_size=8", "stage1.local_steps=2",
    "stage1.batch_size=8",
]  # fmt: skip
SIZES = {"MiniLM": (384, 6, 12, 1536), "tiny": (32, 2, 2, 64)}
"""Width, blocks, heads and inner width of a BERT; the first are all-MiniLM-L6-v2's."""
WORDS = 1000


def save_random_bert(folder: Path, size: str) -> None:
    """A BERT of random weights, and a tokenizer for texts that are their token ids written out."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    width, blocks, heads, inner = SIZES[size]
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=inner,
        )
    ).save_pretrained(folder)
    vocabulary = {"[UNK]": 0} | {str(i): i for i in range(1, WORDS)}
    ids = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=ids, unk_token="[UNK]").save_pretrained(folder)


def random_federation(clients: int = 32, each: int = 16, classes: int = 20) -> Federation:
    """Texts of 6 to 15 ids, about as long as the default run's."""
    draw = np.random.default_rng(0)

    def text() -> str:
        return " ".join(map(str, draw.integers(1, WORDS, draw.integers(6, 16))))

    total, nothing = clients * each, np.zeros(0, dtype=np.int64)
    dataset = Dataset(
        [text() for _ in range(total)],
        draw.integers(classes, size=total),
        tuple(text() for _ in range(classes)),
    )
    shares = np.arange(total).reshape(clients, each)
    return Federation(
        dataset,
        tuple(ClientData(str(i), own, *[nothing] * 3) for i, own in enumerate(shares)),
    )


def make_world(random: str | None, settings: list[str]) -> tuple[Config, World]:
    with Progress(quiet=True) as progress, tempfile.TemporaryDirectory() as folder:
        if random is None:
            config = load_config(None, [*SMALL, *settings])
            return config, World(config, progress)
        save_random_bert(Path(folder), random)
        config = load_config(None, [*SMALL, f"model.path={folder}", *settings])
        return config, World(config, progress, random_federation())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 8, 32], metavar="S")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random", choices=SIZES, help="a BERT of random weights, random texts")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config, world = make_world(args.random, args.settings)
    model, (stage, *_) = world.model, stages_of(config)
    blocks = tuple(range(len(model.backbone.blocks)))[-config.sal.max_blocks :]
    model.slots.set_awake(blocks)
    model.prefix.keep([model.slots.depth])
    visits = [Visit(client, {}, blocks) for client in world.federation.clients]

    def one_round(cohort: int) -> tuple[float, float]:
        """Seconds, and the mean loss."""
        started, losses = time.perf_counter(), []
        for start in range(0, len(visits), cohort):
            for update in visit(model, stage, visits[start : start + cohort], {}, 1, config.seed):
                if isinstance(update, Exception):
                    raise update
                losses.append(update.train_loss)
        return time.perf_counter() - started, statistics.mean(losses)

    _, wanted = one_round(1)  # fills the prefix
    seconds: dict[int, list[float]] = {cohort: [] for cohort in args.cohorts}
    for number in range(1 + args.rounds):
        for cohort, times in seconds.items():
            took, loss = one_round(cohort)
            assert abs(loss - wanted) < 1e-2 * wanted, f"S = {cohort}: loss {loss}, not {wanted}"
            if number:  # the first warms up: on a GPU kernels are compiled in it
                times.append(took)
                print(json.dumps({"side_by_side": cohort, "seconds": took}), flush=True)
    tokens = float(np.mean(model.task.lengths)) * stage.settings.batch_size
    place = f"{model.backbone.device}, base in {str(model.backbone.dtype).removeprefix('torch.')}"
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {place}\n")
    print("| clients side by side | tokens a step | s a round | times as fast as one by one |")
    print("| --- | --- | --- | --- |")
    alone = statistics.median(seconds[args.cohorts[0]])
    best = min(args.cohorts, key=lambda cohort: statistics.median(seconds[cohort]))
    for cohort, times in seconds.items():
        median = statistics.median(times)
        print(f"| {cohort} | {tokens * cohort:.0f} | {median:.2f} | {alone / median:.2f} |")
    print(f"\nNo gain beyond S = {best}, {tokens * best:.0f} tokens a step, among those tried.")


if __name__ == "__main__":
    main()
