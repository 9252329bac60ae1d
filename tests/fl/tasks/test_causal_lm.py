"""Language modelling: the right tokens are judged, and the loss is transformers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as t
from torch.nn.functional import log_softmax

from fedms.fl.data.corpus import Windows
from fedms.fl.model.bodies import Vocabulary, decoder
from fedms.fl.tasks.causal_lm import CausalLMTask

CPU = torch.device("cpu")
WINDOWS = Windows(
    np.array([5, 6, 7, 8, 9, 3, 4, 5, 6, 7, 8, 9, 2], dtype=np.int32),
    np.array([[0, 5], [5, 7], [6, 13]]),
)


def task(output=lambda z: z, vocabulary: int = 11) -> CausalLMTask:
    return CausalLMTask(WINDOWS, output, vocabulary)


def test_a_batch_by_hand():
    batch = task().batch(np.array([1, 0]), CPU)
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert batch.targets.tolist() == [4, 6, 7, 8, 9]
    assert batch.example.tolist() == [0, 1, 1, 1, 1]
    assert batch.position.tolist() == [0, 0, 1, 2, 3]
    assert batch.answers == (1, 4)
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    assert task().pool(hidden, batch).flatten().tolist() == [0, 5, 6, 7, 8]
    assert task().lengths.tolist() == [5, 2, 7]


def test_the_score_is_bits():
    log_p = torch.tensor([[0.25, 0.5, 0.25], [1 / 8, 1 / 8, 0.75]]).log()
    scores = task().score(log_p, torch.tensor([1, 0]))
    torch.testing.assert_close(scores, torch.tensor([-1.0, -3.0]))
    metric = CausalLMTask.metric
    assert float(scores.mean()) * metric.factor == pytest.approx(2.0)
    assert metric.name == "bits per token"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(kind):
    """Over windows of different lengths, so with padding."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = t.LlamaConfig(vocab_size=11, num_attention_heads=2, **sizes)
        model = t.LlamaForCausalLM(config).eval()
    else:
        model = t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=11, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
            )
        ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        labelled = task().batch(np.arange(3), CPU).inputs
        labels = labelled["input_ids"].masked_fill(labelled["attention_mask"] == 0, -100)
        wanted = model(**labelled, labels=labels, use_cache=False).loss

        body = decoder(model)
        one = task(Vocabulary(model))
        batch = one.batch(np.arange(3), CPU)
        logits = one.logits(one.pool(body.run(**batch.inputs), batch), None)
        scores = one.score(log_softmax(logits, dim=-1), batch.targets)
    assert len(scores) == 4 + 1 + 6
    assert float(-scores.mean()) * math.log(2) == pytest.approx(float(wanted), rel=1e-5)
    assert one.fresh_head(16) is None
