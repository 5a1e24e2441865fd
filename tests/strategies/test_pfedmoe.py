"""pFedMoE: two experts on every client, of which the second stays there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import list_held, make_config, make_hyper, prepare_strategy

from fedmoe_jax.models.submodel import is_local
from fedmoe_jax.strategies.pfedmoe import PFEDMOE, configure
from fedmoe_jax.world.costs import count_costs


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_experts": 64, "max_held": 8, "num_active": 1}, {"num_experts": 2}],
)
def test_configure_makes_two_experts_that_see_every_example(fields):
    config = configure(make_config(**fields))
    assert (config.num_experts, config.max_held, config.num_active) == (2, 2, 2)
    rest = {"num_experts": 2, "max_held": 2, "num_active": 2}
    assert config.to_dict() == make_config(**fields).to_dict() | rest


@pytest.mark.slow
def test_assign_gives_both_experts_to_clients_of_any_capacity():
    assign, evidence = prepare_strategy("pfedmoe")
    evidence = evidence.replace(capacity=jnp.ones_like(evidence.capacity))
    found = assign(evidence, make_hyper(), key=jax.random.key(0))
    assert list_held(found) == [[0, 1]] * len(evidence.client)


def test_local_experts_are_the_second_alone():
    local = is_local(jnp.array([0, 1]), 2, PFEDMOE.local_experts)
    assert local.tolist() == [False, True]


def test_personal_parts_leave_only_the_stem_and_the_shared_expert_to_travel():
    sizes = {"stem": (7,), "gate": (2, 3), "experts": (2, 5), "head": (11,)}
    params = {part: np.zeros(shape, np.float32) for part, shape in sizes.items()}
    costs = count_costs(params, {}, dict.fromkeys(sizes, 1.0), PFEDMOE)
    assert costs.travel_bytes == 4 * 7 and costs.expert_bytes == 4 * 5
    assert set(PFEDMOE.personal) == {"gate", "experts", "head"}
