"""The largest feasible floor: by hand, and refused beyond it with its name."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from factories import COSTS, make_config, make_devices, tiny_config

from fedmoe_jax.feasible import (
    check_floor,
    count_reach,
    find_largest,
    hold_one,
    round_down,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train.plan import plan_run
from fedmoe_jax.world.costs import client_flops

DEVICES = make_devices(4, memory=1e6 * jnp.array([1.0, 2.0, 3.0, 4.0]))
WORK = np.full(4, 40)  # examples
FOUR = {"num_clients": 4, "cohort_size": 2}


def test_count_reach_by_hand():
    reach = lambda **fields: count_reach(
        make_config(**{f"availability.{k}": v for k, v in fields.items()}), DEVICES
    )
    np.testing.assert_allclose(reach(), np.ones(4))
    np.testing.assert_allclose(reach(share=0.7, swing=0.3), np.full(4, 0.7), rtol=1e-5)
    # Cut off at 1: a quarter of the day below, min(1, 1 + sin) has the mean 1 - 1 / pi.
    np.testing.assert_allclose(
        reach(share=1.0, swing=1.0), np.full(4, 1 - 1 / np.pi), rtol=1e-4
    )
    weak = 1 - 0.8 * np.array([0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(reach(capacity_bias=0.8), weak)
    np.testing.assert_allclose(reach(capacity_bias=0.8, share=0.5), weak / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("reach", "cohort", "dropout", "informed", "most"),
    [
        ([1.0] * 4, 2, 0.0, True, 0.5),  # the places
        ([1.0] * 4, 2, 0.2, False, 0.4),
        ([0.3, 1.0, 1.0, 1.0], 2, 0.0, True, 0.3),  # the rarest client
        ([0.5] * 4, 2, 0.0, True, 0.5),
        ([0.5] * 4, 2, 0.0, False, 0.25),  # a client takes two places each time
        ([0.25, 1.0, 1.0, 1.0], 2, 0.0, False, 0.25),
        ([0.25, 0.5, 1.0, 1.0], 2, 0.0, False, 0.25),
        ([0.25, 0.25, 1.0, 1.0], 2, 0.5, False, 0.1),  # 2 / (4 + 4 + 1 + 1) / 2
        ([0.0, 1.0], 1, 0.0, True, 0.0),
    ],
)
def test_find_largest_by_hand(reach, cohort, dropout, informed, most):
    found = find_largest(np.array(reach), cohort, dropout, informed)
    np.testing.assert_allclose(found, most)


@pytest.mark.parametrize(
    ("value", "cut"),
    [(0.29346, 0.293), (0.2, 0.2), (1.0, 1.0), (1 / 3, 0.333), (2e-5 / 3, 6.66e-6)],
)
def test_round_down_names_no_larger_number(value, cut):
    assert round_down(value) == pytest.approx(cut, rel=1e-9)
    assert round_down(value) <= value * (1 + 1e-6)
    assert round_down(0.0) == 0.0


def name_largest(**fields):
    """The floor that the refusal of one that is too high names."""
    config = make_config(**FOUR, **{"fairness.floor": 0.9}, **fields)
    with pytest.raises(UserError, match="^fairness.floor=0.9 is not allowed") as caught:
        check_floor(config, DEVICES, COSTS, WORK)
    text = str(caught.value)
    assert "\n" not in text
    most = float(re.search(r"; allowed: 0 to (\S+)$", text)[1])
    config.fairness.floor = most
    check_floor(config, DEVICES, COSTS, WORK)
    return most


def test_check_floor_names_the_largest_one_and_allows_it():
    assert name_largest() == 0.5
    assert name_largest(**{"availability.dropout": 0.1}) == 0.45
    share = {"availability.share": 0.4}
    # Blind draws take 2.5 places for each time that a client is met.
    assert name_largest(**share) == 0.2
    reachable = {"availability.sampling": "reachable"}
    assert name_largest(**share, **reachable) == 0.4
    bias = {"availability.capacity_bias": 0.8}
    assert name_largest(**bias, **reachable) == 0.4  # the weakest, 1 - 0.8 x 3/4
    assert name_largest(**bias) == 0.311  # 2 / (1 / 0.4 + 1 / 0.6 + 1 / 0.8 + 1)


def test_check_floor_without_a_choice_or_a_link():
    everyone = FOUR | {"cohort_size": 4, "fairness.floor": 0.1}
    with pytest.raises(UserError, match="cohort_size=num_clients=4.*allowed: 0, or a"):
        check_floor(make_config(**everyone), DEVICES, COSTS, WORK)
    check_floor(make_config(**everyone | {"fairness.floor": 0.0}), DEVICES, COSTS, WORK)
    # Clients that train for themselves need no link.
    alone = {"strategy": "local", "availability.share": 0.4, "fairness.floor": 0.5}
    check_floor(make_config(**FOUR, **alone), DEVICES, COSTS, WORK)
    with pytest.raises(UserError, match="allowed: 0 to 0.4"):
        check_floor(
            make_config(**FOUR, **alone, **{"availability.sampling": "reachable"}),
            DEVICES,
            COSTS,
            WORK,
        )


def test_check_floor_refuses_clients_that_are_lost_in_every_round():
    """Four copies of 500 bytes that all share and 1,000 of an expert: 6,000 bytes."""
    memory = jnp.array([5990.0, 6010.0, 5990.0, 9000.0])
    devices = make_devices(4, memory=memory)
    floor = FOUR | {"fairness.floor": 0.1, "devices.overload": "lose"}
    told = "2 of 4 clients have no memory for .* lost in every round; allowed: 0$"
    with pytest.raises(UserError, match=told):
        check_floor(make_config(**floor), devices, COSTS, WORK)
    check_floor(
        make_config(**floor | {"devices.overload": "ignore"}), devices, COSTS, WORK
    )
    check_floor(make_config(**floor | {"pruning.kind": "lamp"}), devices, COSTS, WORK)
    check_floor(make_config(**floor), devices.replace(memory=memory + 20), COSTS, WORK)


def test_check_floor_refuses_clients_that_are_late_in_every_round():
    """Five seconds each way, and 30 FLOPs for each of 40 examples."""
    flops = client_flops(COSTS, hold_one(DEVICES), 40.0)
    np.testing.assert_allclose(flops, 40 * (10 + 20))
    devices = make_devices(4, rate=100.0, flops=jnp.array([1e3, 121.0, 119.0, 100.0]))
    floor = FOUR | {
        "fairness.floor": 0.1,
        "late.kind": "drop",
        "devices.deadline": 20.0,
    }
    told = "2 of 4 clients cannot train .* devices.deadline=20 .* allowed: 0$"
    with pytest.raises(UserError, match=told):
        check_floor(make_config(**floor), devices, COSTS, WORK)
    for other in (
        {"late.kind": "stale"},
        {"channel.kind": "wireless"},
        {"bandwidth.spread": 1.0},
        {"pruning.kind": "lamp"},
        {"devices.deadline": 22.1},
    ):
        check_floor(make_config(**floor | other), devices, COSTS, WORK)
    # Twelve seconds of training are too many over any link.
    for other in ({"channel.kind": "wireless"}, {"bandwidth.spread": 1.0}):
        short = make_config(**floor | other | {"devices.deadline": 11.9})
        with pytest.raises(UserError, match="1 of 4 clients cannot train"):
            check_floor(short, devices, COSTS, WORK)


def test_a_run_with_an_infeasible_floor_is_refused_when_it_is_planned():
    with pytest.raises(UserError, match="fairness.floor=0.41 .* allowed: 0 to 0.4$"):
        plan_run(tiny_config(**{"fairness.floor": 0.41}), build_mesh(1))
