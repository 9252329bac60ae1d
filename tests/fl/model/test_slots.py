"""Experts side by side: each row through its own client's, by hand and against one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedms.fl.model.backbone import Backbone
from fedms.fl.model.bodies import Body
from fedms.fl.model.slots import ExpertLinear, Slots
from fedms.fl.types import ConfigError


class Two(nn.Module):
    """Two blocks, linears of 6 -> 8 and of 8 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Settings", (), {"num_hidden_layers": 2})()
        self.layer = nn.ModuleList([nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Linear(8, 4))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer[1](torch.tanh(self.layer[0](x)))


@pytest.fixture
def two():
    def make(**settings) -> Slots:
        model = Two().double()
        backbone = Backbone(Body(model, model, model.forward, 4))
        slots = Slots(backbone, **{"r": 2, "alpha": 3.0, "targets": ["0"], **settings})
        slots.set_awake((0, 1))
        return slots

    return make


def trained(slots: Slots, *experts: str) -> dict[str, torch.Tensor]:
    fresh = {name: t for expert in experts for name, t in slots.fresh(expert).items()}
    return {name: torch.randn_like(tensor) for name, tensor in fresh.items()}


def by_hand(slots: Slots, x: torch.Tensor, state: dict, path: tuple[str, ...], gates=None):
    for i in range(2):
        base = slots.layers[f"layer.{i}.0"].base_layer
        y = base(x)
        for e, expert in enumerate(path):
            name = f"{expert}.layer.{i}.0.lora_"
            if f"{name}A" in state:
                term = slots.alpha / slots.r * (x @ state[name + "A"].T @ state[name + "B"].T)
                y = y + (term if gates is None else gates[:, e].view(-1, 1, 1) * term)
        x = y if i else torch.tanh(y)
    return x


PATHS = [(), ("a",), ("b",), ("a", "b"), ("b", "a")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [False, True])
def test_each_row_goes_through_its_own_clients_experts(two, path, gated):
    """Expert a is everybody's, b each client's own; the second of three clients has no rows."""
    slots = two()
    shared = trained(slots, "a")
    states = [{**shared, **trained(slots, "b")} for _ in range(3)]
    slots.load(states, ("b.*",))
    assert {len(t) for n, t in slots.live.items() if n.startswith("a.")} == {1}
    assert {len(t) for n, t in slots.live.items() if n.startswith("b.")} == {3}
    rows, x = (2, 0, 3), torch.randn(5, 7, 6, dtype=torch.double)
    gates = torch.rand(5, len(path), dtype=torch.double) if gated else None
    with slots.routed(path, rows, gates):
        found = slots.backbone.model(x)
    for mine, state in ((slice(0, 2), states[0]), (slice(2, 5), states[2])):
        wanted = by_hand(slots, x[mine], state, path, None if gates is None else gates[mine])
        torch.testing.assert_close(found[mine], wanted, rtol=0, atol=1e-12)


def test_one_optimiser_over_the_slots_is_one_a_slot(two):
    """Three steps of AdamW on four clients at once, and on each alone."""
    slots = two()
    states = [trained(slots, "b") for _ in range(4)]
    x = torch.randn(4, 3, 7, 6, dtype=torch.double)

    def train(chosen: list[int]) -> list[dict]:
        slots.load([states[i] for i in chosen], ("b.*",))
        leaves = [leaf.requires_grad_() for leaf in slots.live.values()]
        optimizer = torch.optim.AdamW(leaves, lr=0.1, weight_decay=0.1, foreach=True)
        for _ in range(3):
            with slots.routed(("b",), [3] * len(chosen)):
                out = slots.backbone.model(x[chosen].flatten(0, 1))
            optimizer.zero_grad()
            out.square().mean((1, 2)).sum().backward()
            optimizer.step()
        return [slots.of(s) for s in range(len(chosen))]

    together = train([0, 1, 2, 3])
    for i in range(4):
        (alone,) = train([i])
        for name, tensor in alone.items():
            torch.testing.assert_close(together[i][name], tensor, rtol=0, atol=1e-12)
            assert (tensor - states[i][name]).abs().max() > 0.1


def test_gates_have_gradients_at_zero_too(two):
    slots = two()
    slots.load([trained(slots, "a", "b"), trained(slots, "a", "b")], ("*",))
    x = torch.randn(2, 5, 6, dtype=torch.double)

    def output(gates: torch.Tensor) -> torch.Tensor:
        with slots.routed(("a", "b"), (1, 1), gates):
            return slots.backbone.model(x).square().sum()

    gates = torch.tensor([[0.0, 0.7], [0.3, 0.0]], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(output, (gates,))


def test_an_expert_that_is_not_asked_for_costs_nothing(two):
    slots = two()
    x = torch.randn(3, 5, 6, dtype=torch.double)
    base = by_hand(slots, x, {}, ())
    slots.load([trained(slots, "a")], ("a.*",))
    for leaf in slots.live.values():
        leaf.requires_grad_()
    for path in ((), ("unknown",)):
        with slots.routed(path, (3,)):
            out = slots.backbone.model(x)
        assert torch.equal(out, base)
        assert not out.requires_grad
    slots.set_awake((1,))
    state = trained(slots, "a")
    slots.load([state])
    assert {slots.block_of(name) for name in slots.live} == {1}
    with slots.routed(("a",), (3,)):
        out = slots.backbone.model(x)
    awake = {name: t for name, t in state.items() if "layer.1" in name}
    torch.testing.assert_close(out, by_hand(slots, x, awake, ("a",)))


def test_a_mask_depends_on_the_client_and_the_example_alone(two):
    """Not on the neighbours, and not on how far the batch is padded."""
    slots = two(dropout=0.5)
    states = [trained(slots, "a") for _ in range(3)]
    x = torch.randn(6, 9, 6, dtype=torch.double)

    def run(clients: list[int], length: int) -> torch.Tensor:
        slots.load([states[i] for i in clients], ("a.*",))
        seeds = [torch.Generator().manual_seed(10 + i) for i in clients]
        own = torch.cat([x[2 * i : 2 * i + 2, :length] for i in clients])
        with slots.routed(("a",), [2] * len(clients), seeds=seeds):
            return slots.backbone.model(own)

    together = run([0, 1, 2], 9)
    for i in range(3):
        alone = run([i], 5)
        torch.testing.assert_close(together[2 * i : 2 * i + 2, :5], alone, rtol=0, atol=1e-12)
    slots.load(states, ("a.*",))
    with slots.routed(("a",), [2, 2, 2]):
        assert (slots.backbone.model(x) - together).abs().max() > 0.1


def test_a_correction_of_the_base_is_added_to_it(two):
    """alpha / r is 1.5."""
    slots = two()
    state = {**trained(slots, "a"), "base.layer.0.0": torch.randn(8, 6, dtype=torch.double)}
    x = torch.randn(3, 5, 6, dtype=torch.double)
    slots.load([state])
    for path in ((), ("a",)):
        with slots.routed(path, (3,)):
            found = slots.backbone.model(x)
        first = slots.layers["layer.0.0"].base_layer
        before = first.weight.clone()
        first.weight.data += 1.5 * state["base.layer.0.0"]
        torch.testing.assert_close(found, by_hand(slots, x, state, path), rtol=0, atol=1e-12)
        first.weight.data = before


def test_a_new_expert_starts_as_in_peft_and_alike_everywhere(two):
    torch.manual_seed(1)
    one = two(r=6).fresh("a")
    state = torch.get_rng_state()
    other = two(r=6)
    assert other.alpha / other.r == 3 / 6
    for name, tensor in one.items():
        assert torch.equal(tensor, other.fresh("a")[name])
        assert (tensor == 0).all() == name.endswith("B")
    A = one["a.layer.0.0.lora_A"]
    bound = 1 / math.sqrt(6)  # Kaiming-uniform with a = sqrt(5)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert state.shape == torch.get_rng_state().shape


def test_a_trained_head_is_a_part_of_every_expert(two):
    slots = two(head=torch.zeros(3, 4))
    assert slots.fresh("local")["local.head.weight"].shape == (3, 4)
    assert slots.block_of("local.head.weight") is None
    assert slots.is_awake("local.head.weight")
    slots.load([slots.fresh("local"), slots.fresh("local")], ("local.*",))
    assert slots.live["local.head.weight"].shape == (2, 3, 4)


def test_the_route_before_is_back_afterwards_even_after_an_error(two):
    slots = two()
    slots.load([trained(slots, "a")])
    x = torch.randn(3, 5, 6, dtype=torch.double)

    def fail() -> None:
        with slots.routed((), (3,)):
            raise RuntimeError("inside")

    with slots.routed(("a",), (3,)):
        before = slots.backbone.model(x)
        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert torch.equal(slots.backbone.model(x), before)


def test_targets_are_ends_of_dotted_names(two):
    slots = two(targets=["1.0"])
    assert set(slots.layers) == {"layer.1.0"}
    assert isinstance(slots.backbone.model.layer[1][0], ExpertLinear)
    assert isinstance(slots.backbone.model.layer[0][0], nn.Linear)
    with pytest.raises(ConfigError, match=r"lora.targets: no linear .* 'irst'; its .* end in 0"):
        two(targets=["irst"])
