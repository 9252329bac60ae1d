"""FedDPA and FedALT: how two experts are mixed in every linear, and what is sent of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from visits import a_view, one_visit, together

from fedms.fl.algorithms import stages_of
from fedms.fl.client import Visit, class_counts, received, visit
from fedms.fl.config import load_config
from fedms.fl.engines.world import load_model
from fedms.fl.model.view import View
from fedms.fl.types import ConfigError, renamed, select

QUERY = "encoder.layer.3.attention.self.query"


def alike(one, other, atol=1e-12):
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=0, atol=atol)


def two_views(stage, model, clients, states, **more) -> View:
    """The first examples of two clients side by side."""
    model.slots.load(states, stage.trains)
    rows = [client.test[:n] for client, n in zip(clients, (3, 2), strict=False)]
    return View(model, rows, class_counts(model, clients[:2]), **more)


# FedDPA -------------------------------------------------------------------------------------------


def test_feddpa_weighs_by_the_mean_cosine_with_own_examples(setting):
    stage, model, clients = setting("method=feddpa_f", "feddpa_f.examples=3", stage=1)
    start = received(model, stage, {})
    draw = {n: torch.randn_like(t) for n, t in select(start, ("local.*", "global.*")).items()}
    states = [stage.start(start, draw), stage.start(start, {n: -t for n, t in draw.items()})]
    own = [client.own for client in clients[:2]]
    view = two_views(stage, model, clients, states, own=own)
    found = stage.predict.weights(view)
    for k, rows in ((0, slice(0, 3)), (1, slice(3, 5))):
        chosen = own[k][[0, (len(own[k]) - 1) // 2, len(own[k]) - 1]]
        model.slots.load([states[k]])
        known = View(model, [chosen], view.counts[k : k + 1]).features("local")
        asked = View(model, [view.indices[rows]], view.counts[k : k + 1]).features("local")
        cosine = F.cosine_similarity(asked[:, None], known[None], dim=-1).mean(-1)
        torch.testing.assert_close(found[rows, 1], 0.5 * cosine)
        torch.testing.assert_close(found[rows].sum(-1), torch.ones_like(cosine))
        mixed = View(model, [view.indices[rows]], view.counts[k : k + 1])
        model.slots.load(states, stage.trains)
        torch.testing.assert_close(
            stage.predict(view)[rows], _alone(model, states[k], mixed, found[rows])
        )


def _alone(model, state, view, gates):
    model.slots.load([state])
    again = View(model, [view.indices], view.counts)
    return again.log_p("global", "local", gates=gates)


def test_feddpa_f_trains_as_fine_tuning_does(setting):
    stage, model, clients = setting("method=feddpa_f", stage=1)
    plain = setting("method=fedavg_ft", stage=1)[0]
    alike(*(one_visit(s, model, clients[0]).kept for s in (stage, plain)))


def test_feddpa_t_sends_what_fedavg_sends(setting):
    """Exactly, without the local expert's phase; with it, by the same names."""
    plain, model, clients = setting("method=fedavg")
    both = setting("method=feddpa_t")[0]
    shared = replace(both, phases=both.phases[1:])
    fedavg, without, with_local = (one_visit(s, model, clients[0]) for s in (plain, shared, both))
    alike(without.shared, fedavg.shared)
    assert without.train_loss == pytest.approx(fedavg.train_loss, abs=1e-12)
    assert without.kept == {}
    fresh = received(model, both, {})
    assert with_local.shared.keys() == fedavg.shared.keys()
    moved = [(with_local.kept[n] - fresh[n]).abs().max() for n in with_local.kept]
    assert len(moved) == 2 * 2 * 3
    assert min(moved) > 0


def test_feddpa_ts_newcomer_answers_by_the_head_that_it_was_sent(config, world, in_float64):
    """log softmax(H z), z through the received expert under 1 - w cos: the local B is still 0."""
    settings = config(in_float64, "method=feddpa_t", "task.head=linear")
    model, (stage, _) = load_model(settings, world.federation), stages_of(settings)
    model.slots.set_awake((2, 3))
    model.prefix.keep([2])
    sent = {n: torch.randn_like(t) for n, t in received(model, stage, {}).items()}
    sent, newcomer = select(sent, ("global.*",)), world.federation.unseen[0]
    start = stage.start(received(model, stage, sent), {})
    model.slots.load([start])
    view = View(model, [newcomer.test], class_counts(model, [newcomer]), own=[newcomer.own])
    weights = stage.predict.weights(view)
    z = view.features("global", gates=weights[:, :1])
    wanted = (z @ sent["global.head.weight"].T).log_softmax(-1)
    assert wanted.exp().max() > 0.5  # no chance
    torch.testing.assert_close(stage.predict(view), wanted)
    own = {"local.head.weight": torch.ones_like(start["local.head.weight"])}
    alike(select(stage.start(received(model, stage, sent), own), ("local.head.*",)), own)


def test_feddpa_t_trains_the_local_expert_in_the_mixture(setting):
    stage, model, clients = setting("method=feddpa_t", "feddpa_t.weight=0.3")
    view = a_view(stage, model, clients[0], {}, moved=0.1)
    gates = torch.tensor([[0.7, 0.3]]).double().expand(5, 2)
    wanted = F.nll_loss(view.log_p("global", "local", gates=gates), view.targets)
    torch.testing.assert_close(stage.phases[0].loss(view), wanted[None])
    assert stage.phases[0].trains == ("local.*",)


def test_own_examples_must_be_at_hand(setting):
    stage, model, clients = setting("method=feddpa_f", stage=1)
    with pytest.raises(ConfigError, match="own examples"):
        stage.predict(a_view(stage, model, clients[0], {}))


# FedALT -------------------------------------------------------------------------------------------


def test_fedalts_layer_is_the_papers(setting):
    """y = W x + b + s sum_i softmax(R x)_i B_i A_i x for every token, two clients side by side."""
    stage, model, _ = setting("method=fedalt")
    start = received(model, stage, {})
    states = []
    for _ in range(2):
        state = stage.start(start, {})
        states.append({n: torch.randn(t.shape, dtype=torch.double) for n, t in state.items()})
    layer, x = model.slots.layers[QUERY], torch.randn(5, 7, 32, dtype=torch.double)
    for some, rows in ((states, (3, 2)), (states[:1], (5,))):
        model.slots.load(some, stage.trains)
        with model.slots.routed(("rest", "own"), rows, router="mixer"):
            found = layer(x)
        for b in range(5):
            state = some[0] if b < rows[0] else some[1]
            for t in range(7):
                token = x[b, t]
                g = (state[f"mixer.{QUERY}.weight"] @ token).softmax(-1)
                parts = [
                    state[f"{e}.{QUERY}.lora_B"] @ state[f"{e}.{QUERY}.lora_A"] @ token
                    for e in ("rest", "own")
                ]
                wanted = layer.base_layer(token) + 2.0 * (g[0] * parts[0] + g[1] * parts[1])
                torch.testing.assert_close(found[b, t], wanted)


def rounds_of_fedalt(stage, model, cohorts):
    """Each client's own expert, and the server, after these cohorts' rounds."""
    server, kept = {}, {}
    for round, cohort in enumerate(cohorts, start=1):
        visits = [Visit(c, kept.get(c.client_id, {}), (2, 3)) for c in cohort]
        updates = visit(model, stage, visits, server, round, 0)
        server = together(stage, updates, server)
        kept.update({update.client_id: update.kept for update in updates})
    return server, kept


def test_with_two_clients_the_rest_is_the_other_one(setting):
    stage, model, (one, other, *_) = setting("method=fedalt")
    server, kept = rounds_of_fedalt(stage, model, [(one, other)] * 3)
    for client, rest in ((one, other), (other, one)):
        start = stage.start(received(model, stage, server), kept[client.client_id])
        theirs = select(kept[rest.client_id], ("own.*",))
        alike(select(start, ("rest.*.layer.[23].*",)), renamed(theirs, "own.", "rest."))
        alike(select(start, ("own.*.layer.[23].*",)), select(kept[client.client_id], ("own.*",)))


def test_the_rest_is_the_mean_of_the_others_whoever_came_when(setting):
    stage, model, clients = setting("method=fedalt")
    a, b, c, _ = clients
    server, kept = rounds_of_fedalt(stage, model, [(a, b), (b, c), (a,)])
    own = {who: select(state, ("own.*",)) for who, state in kept.items()}

    def mean(*some):
        return {n: sum(own[x.client_id][n] for x in some) / len(some) for n in own[a.client_id]}

    for client, others in ((a, (b, c)), (b, (a, c)), (clients[3], (a, b, c))):
        mine = kept.get(client.client_id, {})
        rest = select(stage.start(received(model, stage, server), mine), ("rest.*.layer.[23].*",))
        alike(rest, renamed(mean(*others), "own.", "rest."))


def test_fedalt_sends_neither_the_mixer_nor_its_expert(setting):
    stage, model, clients = setting("method=fedalt")
    first = one_visit(stage, model, clients[0])
    assert {name.partition(".")[0] for name in first.shared} == {"sum", "members"}
    assert {name.partition(".")[0] for name in first.kept} == {"own", "mixer", "last", "members"}
    server = together(stage, [first])
    again = one_visit(stage, model, clients[0], server, first.kept, round=2)
    change = again.kept[f"own.{QUERY}.lora_A"] - first.kept[f"own.{QUERY}.lora_A"]
    torch.testing.assert_close(again.shared[f"sum.{QUERY}.lora_A"], change)
    assert again.shared["members.sum"].item() == 0.0
    mixer = f"mixer.{QUERY}.weight"
    assert (again.kept[mixer] - received(model, stage, {})[mixer]).abs().max() > 0
    assert np.isfinite(again.train_loss)


def test_fedalt_refuses_clients_with_fewer_blocks():
    with pytest.raises(ConfigError, match="fedalt needs every block of every client"):
        load_config(None, ["rivals=['fedalt']", "sal.scope=client"])
    load_config(None, ["method=fedalt", "rivals=[]", "sal.scope=global"])
