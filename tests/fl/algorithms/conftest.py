"""An algorithm's stages on a tiny model in float64."""

from __future__ import annotations

import pytest

from fedms.fl.algorithms import stages_of


@pytest.fixture
def setting(config, world, in_float64):
    """``setting("method=ditto")``: the first stage, the model and the clients, two blocks awake."""
    from fedms.fl.engines.world import load_model

    model = load_model(config(in_float64), world.federation)
    model.slots.set_awake((2, 3))
    model.prefix.keep([2])

    def choose(*overrides: str, stage: int = 0):
        chosen = stages_of(config(in_float64, *overrides))[stage]
        model.build(dict(chosen.modules))
        return chosen, model, world.federation.clients

    return choose
