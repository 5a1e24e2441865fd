"""Noise on sums: its size, of rare experts, on several devices, with late updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import (
    assert_same,
    make_hyper,
    plan_run,
    start_run,
    use_linear_model,
)

from fedmoe_jax.aggregate import Sums, aggregate, mean_delta
from fedmoe_jax.options import replace
from fedmoe_jax.privacy.sums import hide_sums
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.types import make_keys

KEYS = make_keys(jax.random.key(0), 5)
HYPER = make_hyper(privacy={"clip": 2.0, "noise": 1.5})


def test_hide_sums_gives_every_leaf_noise_of_its_own():
    total = {"stem": jnp.ones((100, 100)), "head": jnp.ones((100, 100))}
    noise = optax.tree.sub(hide_sums(total, HYPER, KEYS), total)
    for leaf in noise.values():
        np.testing.assert_allclose(leaf.std(), 3.0, rtol=0.03)
        np.testing.assert_allclose(leaf.mean(), 0.0, atol=0.12)
    assert abs(np.corrcoef(noise["stem"].ravel(), noise["head"].ravel())[0, 1]) < 0.05
    again = hide_sums(total, HYPER, make_keys(KEYS.run, 6))
    assert (np.array(again["stem"] - total["stem"] != noise["stem"])).all()


def test_hide_sums_gives_the_mean_of_a_rare_expert_the_most_noise():
    """z C / m_e, of experts with 1, 2, 10 and no holders."""
    total = {
        "stem": jnp.zeros(1),
        "gate": {"moe": {"kernel": jnp.zeros((4, 1))}},
        "experts": {"moe": {"kernel": jnp.zeros((4, 5000))}},
        "head": jnp.zeros(1),
    }
    holders = jnp.array([[1.0, 2.0, 10.0, 0.0]])
    whole = jnp.float32(10.0)
    weight = {"stem": whole, "gate": holders, "experts": holders, "head": whole}
    mean = mean_delta(Sums(hide_sums(total, HYPER, KEYS), weight))
    found = np.array(mean["experts"]["moe"]["kernel"]).std(axis=1)
    np.testing.assert_allclose(found, [3.0, 1.5, 0.3, 0.0], rtol=0.05)


PRIVATE = {"privacy.clip": 0.5, "privacy.noise": 0.3}


def play(devices=1, **changes):
    plan = plan_run(**{"privacy.clip": 0.5} | changes)
    program = use_linear_model(plan.program)._replace(mesh=build_mesh(devices))
    run = start_run(plan, program)
    return run, *build_run_rounds(program)(run.state, run.federation, run.hyper)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_rounds_on_several_devices_have_the_same_noise_once(optimizer):
    changes = PRIVATE | {"server.optimizer": optimizer}
    (_, state, _), (_, spread, _) = play(**changes), play(devices=4, **changes)
    assert_same(state.params, spread.params, atol=1e-5)
    for shard in jax.tree.leaves(spread.params):
        copies = [np.array(part.data) for part in shard.addressable_shards]
        assert all((copy == copies[0]).all() for copy in copies)


@pytest.mark.slow
def test_rounds_of_clipped_updates_move_the_server_no_further_than_the_bound():
    run, state, _ = play(**{"privacy.clip": 1e-3, "chunk_rounds": 1})
    before = start_run(plan_run(**{"privacy.clip": 1e-3}), run.program).state.params
    part = optax.tree.norm(optax.tree.sub(state.params["stem"], before["stem"]))
    assert 0 < part <= 1e-3 * (1 + 1e-3)


@pytest.mark.slow
def test_aggregate_adds_noise_to_late_updates_once():
    plan = plan_run(**PRIVATE, **{"late.kind": "stale", "late.discount": 0.0})
    run = start_run(plan, use_linear_model(plan.program))
    state, static = run.state, run.program.static
    one = {k: jnp.ones_like(v) for k, v in state.stale.weight.items()}
    sums = state.stale.replace(weight=one)
    late = state.replace(stale=sums)
    step = lambda state: aggregate(state, sums, run.hyper, static)[0]
    noise = optax.tree.sub(step(late), state.params)["stem"]["kernel"]
    # The weights of late updates count: two clients, one noise.
    expected = 0.5 * 0.3 * 0.5
    np.testing.assert_allclose(np.array(noise).std(), expected, rtol=0.15)
    quiet = replace(run.hyper, privacy={"noise": jnp.float32(0.0)})
    assert_same(aggregate(late, sums, quiet, static)[0], state.params, atol=1e-7)
