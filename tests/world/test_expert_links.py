"""The links between gate and experts, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, choose, make_devices, make_federation, make_hyper

from fedmoe_jax.types import make_keys
from fedmoe_jax.world import expert_links
from fedmoe_jax.world.step import observe

MANY = SIZES._replace(num_experts=40_000)
KEY = jax.random.key(5)


def test_mean_snr_by_hand():
    hyper = make_hyper(expert_links={"snr": 10.0, "spread": 5.0})
    found = expert_links.mean_snr(jnp.array([0.0, 2.0, -2.0]), hyper)
    np.testing.assert_allclose(found, [10, 100, 1], rtol=1e-5)


@pytest.mark.parametrize("persistence", [0.0, 0.8, 1.0])
def test_step_links_keeps_the_law_and_forgets_as_it_should(persistence):
    hyper = make_hyper(expert_links={"persistence": persistence})
    before = expert_links.init_links(make_keys(KEY, 0), hyper, MANY)
    keys = make_keys(KEY, 1)
    after = expert_links.step_links(before, keys, jnp.int32(0), hyper)
    error = 4 * np.sqrt(2 / MANY.num_experts)
    assert abs(float(jnp.var(after.latent)) - 1) < error
    both = float((before.latent * after.latent).mean())
    assert abs(both - persistence) < error
    assert persistence < 1 or (after.latent == before.latent).all()


def test_step_links_begins_the_second_stage_when_it_is_due():
    hyper = make_hyper(expert_links={"start": 2})
    state = expert_links.init_links(make_keys(KEY, 0), hyper, SIZES)
    stages = [bool(state.simulated)]
    for round in range(4):
        keys = make_keys(KEY, round)
        state = expert_links.step_links(state, keys, jnp.int32(round), hyper)
        stages.append(bool(state.simulated))
    assert stages == [False, False, False, True, True]
    one_stage = expert_links.init_links(make_keys(KEY, 0), make_hyper(), SIZES)
    assert bool(one_stage.simulated)


def test_apply_links_changes_nothing_but_the_links():
    hyper = make_hyper(expert_links={"snr": 0.0, "spread": 10.0})
    state = expert_links.Shadows(jnp.array([1.0, 0.0]), jnp.array(True))
    federation = make_federation(devices=make_devices(3))
    view = observe({"expert_links": state}, federation, hyper, choose("expert_links"))
    np.testing.assert_allclose(view.links.snr, [10, 1], rtol=1e-6)
    plain = observe({}, federation, hyper, ())
    assert plain.links is None and plain.distortion is None
    jax.tree.map(np.testing.assert_array_equal, view.devices, plain.devices)
