"""Load beside training, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import choose, make_devices, make_federation, make_hyper

from fedmoe_jax.world.step import observe

AWAY = 20.0  # a latent so far out that its share is 0 or 1


@pytest.mark.parametrize(
    ("process", "latent", "numbers", "factors"),
    [
        ("pressure", [True, False, True], {"left": 0.25}, {"memory": [0.25, 1, 0.25]}),
        # at its median other work takes half of the most
        ("background", [-AWAY, 0.0, AWAY], {"most": 0.8}, {"flops": [1, 0.6, 0.2]}),
        # exp(2 z - 2), of the links both ways
        (
            "bandwidth",
            [1.0, 0.0, 1.5],
            {"spread": 2.0},
            dict.fromkeys(("upload", "download"), np.exp([0, -2, 1])),
        ),
    ],
)
def test_apply_changes_one_resource_by_hand(process, latent, numbers, factors):
    before = dict(memory=8.0, flops=4.0, upload=2.0, download=16.0)
    after = observe(
        {process: jnp.array(latent)},
        make_federation(devices=make_devices(3, **before)),
        make_hyper(**{process: numbers}),
        choose(process),
    ).devices
    for name, value in before.items():
        expected = value * np.array(factors.get(name, [1.0, 1.0, 1.0]))
        np.testing.assert_allclose(getattr(after, name), expected, rtol=1e-6)
