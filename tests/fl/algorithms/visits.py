"""A client's visit and a view of its examples, for tests of what an algorithm makes of them."""

from __future__ import annotations

from fedms.fl.client import Visit, class_counts, received, visit
from fedms.fl.model.view import View
from fedms.fl.server import Totals
from fedms.fl.types import State, Update, select


def one_visit(stage, model, client, server=None, kept=None, round=1) -> Update:
    (update,) = visit(model, stage, [Visit(client, kept or {}, (2, 3))], server or {}, round, 0)
    assert isinstance(update, Update), update
    return update


def a_view(stage, model, client, server, kept=None, moved=0.0, counts=None) -> View:
    """The client's examples, its leaves ``moved`` from where the visit began."""
    model.slots.load([stage.start(received(model, stage, server), kept or {})], stage.trains)
    began = {name: leaf.clone() for name, leaf in model.slots.live.items()}
    for leaf in select(model.slots.live, stage.trains).values():
        leaf += moved
    counts = class_counts(model, [client]) if counts is None else counts
    return View(model, [client.train[:5]], counts, began)


def together(stage, updates, server: State | None = None) -> State:
    """The server's state after these updates."""
    totals = Totals(stage.aggregate)
    for update in updates:
        totals.add(update)
    return totals.finish(server or {})
