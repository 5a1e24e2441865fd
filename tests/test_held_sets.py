"""A model without parts is scored as the same model with parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import prepare_state

from configs import default
from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.held_sets import find_sets
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state
from fedmoe_jax.train import run

SMALL = {
    "num_clients": 6,
    "cohort_size": 3,
    "num_experts": 5,
    "max_held": 3,
    "model.expert_width": 4,
    "model.stem_width": 8,
    "run.num_devices": 1,
    "data.public": 8,
    "fedjets.steps": 1,
}


def test_clients_with_equal_sets_share_one():
    held = np.zeros((5, 2, 40), bool)
    held[0, 0, [3, 39]] = held[0, 1, 7] = True
    held[1] = True  # all experts
    held[2, 0, [3, 39]] = held[2, 1, 8] = True
    held[3] = held[0]
    held[4, 0, 3] = held[4, 1, 7] = True
    sets = jax.jit(find_sets, static_argnums=1)(jnp.array(held), 2)
    np.testing.assert_array_equal(sets.whole, [False, True, False, False, False])
    assert sets.count == 4
    of = sets.of_client
    assert of[0] == of[3] and len({int(s) for s in of}) == 4
    for client in (0, 2, 3, 4):
        for layer in range(2):
            slots = sets.held[of[client], layer], sets.slot[of[client], layer]
            found = np.asarray(slots[0])[np.asarray(slots[1])]
            expected = np.flatnonzero(held[client, layer])
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "strategy", ["greedy", "flex_moe", "fedmix", "pfedmoe", "fedjets", "local"]
)
def test_scores_are_those_of_the_model_with_parts(strategy):
    config = default.get_config("smoke")
    config.update_from_flattened_dict(SMALL | {"strategy": strategy})
    config.drift.images, config.num_rounds = "contrast", 4
    config.drift.strength = 0.8
    plan = run.plan_run(config, build_mesh(1))
    program, hyper = plan.program, plan.hyper
    init = jax.jit(init_state, static_argnums=2)
    state, frozen = init(jax.random.key(0), hyper, program)
    federation = plan.federation.replace(frozen=frozen)
    state, frozen = jax.jit(prepare_state, static_argnums=3)(
        state, federation, hyper, program
    )
    federation = federation.replace(frozen=frozen)
    noise = lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape)
    params, personal = jax.tree.map(noise, (state.params, state.personal))
    sizes = program.sizes
    drawn = jax.random.uniform(jax.random.key(2), (6, 1, sizes.num_experts))
    held = drawn.argsort(axis=2) < sizes.max_held
    state = state.replace(
        params=params,
        personal=personal,
        align=state.align.replace(held=held.at[0].set(False)),
        participation=state.participation.replace(
            rounds=state.participation.rounds + 1
        ),
    )
    whole = program._replace(model=program.model._replace(parts=None))
    arguments = [replicate(x, program.mesh) for x in (state, federation, hyper)]
    expected = build_evaluate(program)(*arguments)
    found = build_evaluate(whole)(*arguments)
    assert found["specialisation"].shape == (1, sizes.num_experts, 10)
    for name, value in found.items():
        # One image of 360 whose best classes are equal to rounding may differ.
        np.testing.assert_allclose(value, expected[name], atol=4e-3)
    assert set(expected) - set(found) <= {"global_soft_accuracy", "expert_accuracy"}
