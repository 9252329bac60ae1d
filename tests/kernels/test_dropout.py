"""One mask for every backend, forward and backward: a function of (seed, expert, row, column)."""

from __future__ import annotations

import pytest
import torch
from lora_problem import BACKENDS, make_problem

from fedms.kernels import gated_lora_linear
from fedms.kernels.dropout import expert_key, keep_mask

CPU = torch.device("cpu")


def _hash_by_hand(seed: int, expert: int, row: int, column: int) -> int:
    """The docstring's definition in Python's own integers."""
    m32, m64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    z = (expert_key(seed, expert) + (row + 1) * 0xD1B54A32D192ED03) & m64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & m64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & m64
    z ^= z >> 31
    v = (column * 0x9E3779B1 + (z & m32)) & m32
    v = ((v ^ v >> 16) * 0x7FEB352D) & m32
    v = ((v ^ v >> 15 ^ z >> 32) * 0x846CA68B) & m32
    return v ^ v >> 16


def test_torch_mask_is_the_definition():
    for seed in (0, 1, 2**62 + 12345):
        mask = keep_mask(seed, 3, 5, 9, 11, 0.37, CPU)
        for i in range(4):
            for c in range(11):
                assert mask[i, c].item() == (_hash_by_hand(seed, 3, 5 + i, c) >= int(0.37 * 2**32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_mask_is_the_same_forward_and_backward(backend, k, dtype):
    """With A = I and B = I or 0, y and dx are the mask of one expert, scaled."""
    m, p, seed = 20, 0.4, 99
    x = torch.ones(m, k, dtype=dtype, requires_grad=True)
    weight = torch.zeros(k, k, dtype=dtype)
    eye = [torch.eye(k), torch.eye(k)]
    off = [torch.eye(k), torch.zeros(k, k)]
    for expert in (0, 1):
        B = off if expert == 0 else off[::-1]
        y = gated_lora_linear(x, weight, eye, B, dropout_p=p, seed=seed, backend=backend)
        dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        mask = keep_mask(seed, expert, 0, m, k, p, CPU)
        assert torch.equal(y != 0, mask)
        assert torch.equal(dx != 0, mask)
        assert torch.allclose(y.float()[mask], torch.tensor(1 / (1 - p)), rtol=4e-3)


def test_masks_are_independent_and_have_the_right_mean():
    p = 0.1
    masks = torch.stack([keep_mask(7, e, 0, 400, 500, p, CPU).double() for e in range(3)])
    count = masks[0].numel()
    sigma = (p * (1 - p) / count) ** 0.5
    assert (masks.mean((1, 2)) - (1 - p)).abs().max() < 4 * sigma
    centred = masks - masks.mean((1, 2), keepdim=True)
    pairs = {
        "experts": (centred[0], centred[1]),
        "rows": (centred[0, :-1], centred[0, 1:]),
        "columns": (centred[0, :, :-1], centred[0, :, 1:]),
        "seeds": (centred[0], keep_mask(8, 0, 0, 400, 500, p, CPU).double() - (1 - p)),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (p * (1 - p))
        assert abs(correlation) < 4 / count**0.5, name
    row_means = masks[0].mean(1)
    assert (row_means - (1 - p)).abs().max() < 5 * (p * (1 - p) / 500) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_none_follows_torchs_generator(backend):
    problem = make_problem(ranks=(8,), gates=None).to(torch.float32)

    def call() -> torch.Tensor:
        return gated_lora_linear(
            problem.x, problem.weight, problem.A, problem.B, dropout_p=0.5, backend=backend
        )

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_with_the_same_mask(backend):
    problem = make_problem(ranks=(8,), gates=None).to(torch.float32)

    def block(x: torch.Tensor) -> torch.Tensor:
        return gated_lora_linear(
            x, problem.weight, problem.A, problem.B, dropout_p=0.5, backend=backend
        ).relu()

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = (
            torch.utils.checkpoint.checkpoint(block, problem.x, use_reentrant=False)
            if checkpointed
            else block(problem.x)
        )
        grads.append(torch.autograd.grad(y.sum(), [problem.x, *problem.A, *problem.B]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
