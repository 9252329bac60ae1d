"""Texts as a task: rows and masks, pooling and heads worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from fedms.fl.data.federation import Dataset
from fedms.fl.tasks.text import TextTask

TEXTS = ("acute cough", "left knee fracture old", "rash", "acute " * 50, "")
CPU = torch.device("cpu")


@pytest.fixture
def task(tiny_bert):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    data = Dataset(TEXTS, np.array([0, 2, 3, 1, 0]), ("lung", "heart", "bone", "skin"))
    return lambda **settings: TextTask(data, tokenizer, **{"max_tokens": 12, **settings})


def test_texts_become_rows_cut_at_max_tokens(task):
    task = task()
    assert task.lengths.tolist() == [4, 6, 3, 12, 2]
    assert task.num_classes == 4
    batch = task.batch(np.array([1, 4, 0]), CPU)
    assert len(batch) == 3
    assert batch.inputs["input_ids"].shape == (3, 6)
    assert batch.inputs["attention_mask"].tolist() == [
        [1] * 6,
        [1, 1, 0, 0, 0, 0],
        [1] * 4 + [0] * 2,
    ]
    assert batch.targets.tolist() == [2, 0, 0]
    assert batch.example.tolist() == [0, 1, 2]


@pytest.mark.parametrize("head", ["names", "linear"])
def test_pooling_leaves_the_padding_out(task, head):
    hidden = torch.randn(2, 6, 5)
    for pooling in ("mean", "cls"):
        one = task(pooling=pooling, head=head)
        batch = one.batch(np.array([1, 4]), CPU)
        pooled = one.pool(hidden, batch)
        rows = [hidden[0].mean(0), hidden[1, :2].mean(0)] if pooling == "mean" else hidden[:, 0]
        wanted = torch.stack([*rows])
        torch.testing.assert_close(pooled, normalize(wanted, dim=-1) if head == "names" else wanted)


def test_class_names_are_encoded_in_the_prompt(task):
    """By a backbone whose state is the token's own number: the logits are scaled cosines."""
    task, asked = task(prompt="chronic {} old", logit_scale=3.0), []

    def hidden(batch):
        asked.append(batch)
        return torch.nn.functional.one_hot(batch.inputs["input_ids"], 50).double()

    task.prepare(hidden)
    (names,) = asked
    assert names.inputs["input_ids"].shape == (4, 5)
    z = task.pool(hidden(names), names)
    logits = task.logits(z, None)
    # two names share four of their five tokens: cosine 4 / 5
    torch.testing.assert_close(logits, 3 * (torch.full((4, 4), 0.8) + 0.2 * torch.eye(4)).double())
    assert task.fresh_head(50) is None
    assert task.score(logits, torch.tensor([0, 1, 3, 3])).tolist() == [1, 1, 0, 1]


def test_a_trained_head_starts_undecided(task):
    task = task(head="linear")
    head = task.fresh_head(7)
    assert head.shape == (4, 7)
    z = torch.randn(3, 7)
    assert (task.logits(z, head) == 0).all()
    head = torch.randn(4, 7)
    torch.testing.assert_close(task.logits(z, head), z @ head.T)
    assert task.logits(z, None).shape == (3, 4)
