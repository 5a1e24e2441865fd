"""Bytes, FLOPs and seconds by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import COSTS, make_devices

from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.world.costs import (
    Costs,
    Traffic,
    add_cover,
    answer_flops,
    client_bytes,
    client_flops,
    client_memory,
    client_parameters,
    client_seconds,
    count_costs,
    expert_seconds,
    fits_memory,
    probe_flops,
    scale_costs,
    train_chosen,
)

SLOTS = jnp.array([1.0, 3.0])
# The second client trains one of its three experts, sends two and gets all.
REPORTED = 5 * SLOTS  # numbers of feedback
TRAFFIC = Traffic(
    held=SLOTS,
    trained=jnp.ones(2),
    sent=jnp.array([1.0, 2.0]),
    received=SLOTS,
    reported=REPORTED,
    shown=jnp.zeros(2),
    new=jnp.array([0.0, 1.0]),
)
ALL = TRAFFIC.replace(trained=SLOTS, sent=SLOTS)
VARIATES = COSTS._replace(copies=2)
# With a stem that is not trained, of 300 bytes and 4 of the 10 FLOPs.
FROZEN = COSTS._replace(
    stem_bytes=0.0, frozen_bytes=300.0, frozen_flops=4.0, travel_bytes=200.0
)
PLAIN = STRATEGIES["random"]._replace(personal=())


PARAMS = {
    "stem": {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)},  # 20 floats
    "gate": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(4)},  # 24 floats
    "experts": {
        "moe": {"a": jnp.zeros((4, 5, 7)), "b": jnp.zeros((4, 7), jnp.bfloat16)}
    },
    "head": {"kernel": jnp.zeros((7, 2))},  # 14 floats
}
FORWARD = {"stem": 7, "gate": 3, "head": 1, "experts": 13}


def test_count_costs_from_the_params():
    expected = Costs(
        stem_bytes=4 * 20,
        head_bytes=4 * 14,
        gate_bytes=4 * 24,
        expert_bytes=4 * 35 + 2 * 7,
        frozen_bytes=0,
        shared_flops=3 * (7 + 3 + 1),  # backward is twice forward
        expert_flops=3 * 13,
        frozen_flops=0,
        fixed_flops=0,
        fixed_expert_flops=0,
        dense_flops=3 * (7 + 1 + 13),  # all but the gate
        travel_bytes=4 * (20 + 14 + 24),
        copies=1,
        num_layers=1,
    )
    assert count_costs(PARAMS, {}, FORWARD, PLAIN) == expected
    shapes = jax.eval_shape(lambda: PARAMS)
    assert count_costs(shapes, {}, FORWARD, PLAIN) == expected
    (experts,) = PARAMS["experts"].values()
    two = PARAMS | {"experts": {"block_0": experts, "block_1": experts}}
    found = count_costs(two, {}, FORWARD, PLAIN)
    assert (found.num_layers, found.expert_bytes) == (2, 2 * expected.expert_bytes)


@pytest.mark.parametrize(
    ("changes", "travel", "copies"),
    [
        ({"personal": ("gate", "head")}, 4 * 20, 1),
        ({"personal": ("experts",)}, 4 * (20 + 14 + 24), 1),
        ({"silent": True}, 0, 1),
        ({"variates": True}, 4 * (20 + 14 + 24), 2),
    ],
)
def test_count_costs_of_what_the_strategy_lets_travel(changes, travel, copies):
    costs = count_costs(PARAMS, {}, FORWARD, PLAIN._replace(**changes))
    assert (costs.travel_bytes, costs.copies) == (travel, copies)
    assert costs.gate_bytes == 4 * 24


def test_count_costs_of_frozen_parts_apart():
    trained = {part: tree for part, tree in PARAMS.items() if part != "stem"}
    frozen = {"stem": PARAMS["stem"], "table": jnp.zeros(9)}  # the model's own
    whole, found = (
        count_costs(*trees, FORWARD, PLAIN)
        for trees in ((PARAMS, {}), (trained, frozen))
    )
    expected = whole._replace(
        stem_bytes=0, frozen_bytes=4 * 29, frozen_flops=3 * 7, travel_bytes=4 * 38
    )
    assert found == expected
    assert found.shared_bytes == whole.shared_bytes + 4 * 9


def test_count_costs_of_a_shared_expert_with_its_stem():
    stem = PARAMS["stem"] | {"shared": {"kernel": jnp.zeros((5, 7))}}  # 35 floats more
    params, forward = PARAMS | {"stem": stem}, FORWARD | {"shared_expert": 11}
    plain = count_costs(PARAMS, {}, FORWARD, PLAIN)
    found = count_costs(params, {}, forward, PLAIN)
    assert found == plain._replace(
        stem_bytes=4 * 55,
        travel_bytes=4 * (55 + 14 + 24),
        shared_flops=3 * (7 + 11 + 3 + 1),
        dense_flops=3 * (7 + 11 + 1 + 13),
    )
    rest = {part: tree for part, tree in params.items() if part != "stem"}
    frozen = count_costs(rest, {"stem": stem}, forward, PLAIN)
    assert frozen.frozen_flops == 3 * (7 + 11) and frozen.frozen_bytes == 4 * 55
    # The gate's own stem has none: it costs what it costs without a shared expert.
    gate_stem = {"gate_stem": PARAMS["stem"]}
    beside = count_costs(params, gate_stem, forward, PLAIN)
    assert beside.frozen_flops == 3 * 7 and beside.frozen_bytes == 4 * 20
    assert beside.shared_flops == 3 * (7 + 11 + 3 + 1 + 7)


def test_count_costs_of_a_frozen_stem_that_the_gate_alone_reads():
    """The second stem is held and run forward; the first is trained and travels."""
    whole = count_costs(PARAMS, {}, FORWARD, PLAIN)
    found = count_costs(PARAMS, {"gate_stem": PARAMS["stem"]}, FORWARD, PLAIN)
    assert found == whole._replace(
        frozen_bytes=4 * 20, shared_flops=3 * (7 + 3 + 1 + 7), frozen_flops=3 * 7
    )
    # one expert of 154 bytes, in the client's first round
    first = Traffic(*jnp.ones((4, 1)), *jnp.zeros((2, 1)), jnp.ones(1))
    up, down = client_bytes(found, first)
    assert (up.tolist(), down.tolist()) == ([232 + 154], [232 + 154 + 80])
    later = first.replace(new=jnp.zeros(1))
    assert client_bytes(found, later)[1].tolist() == [232 + 154]
    assert client_memory(found, first).tolist() == [4 * (232 + 154) + 80]
    assert client_parameters(found, first).tolist() == [(232 + 154 + 80) / 4]
    # three times 11 of stem, gate and head and 13 of the expert, once 7
    np.testing.assert_allclose(client_flops(found, first, 2.0), [2 * (3 * 24 + 7)])


def test_client_flops_of_probes_by_hand():
    """Forward alone, a third of training: 10 FLOPs shared, 20 of the probed expert."""
    # Of 8 examples each of the experts, of one MoE layer, is probed.
    probes = TRAFFIC.replace(probed=8 * SLOTS)
    plain = client_flops(COSTS, TRAFFIC, 5.0)
    more = client_flops(COSTS, probes, 5.0) - plain
    np.testing.assert_allclose(more, [8 * 1 * (10 + 20) / 3, 8 * 3 * (10 + 20) / 3])
    # What is frozen is run forward as anything else.
    plain, found = (client_flops(FROZEN, each, 5.0) for each in (TRAFFIC, probes))
    np.testing.assert_allclose(found - plain, more, rtol=1e-6)
    devices = make_devices(2, flops=10.0)
    seconds = client_seconds(devices, COSTS, probes, 5.0)[:, 1]
    before = client_seconds(devices, COSTS, TRAFFIC, 5.0)[:, 1]
    np.testing.assert_allclose(seconds - before, [8, 24], rtol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "held", "expected"),
    [(1, 4, 10 + 20), (2, 1, 10 + 20), (2, 4, 10 + 10 * 5), (4, 3, 10 + 5 * 10)],
)
def test_probe_flops_by_hand(num_layers, held, expected):
    """All that are held in the other layers, and one alone: 20 / G FLOPs for each."""
    costs = COSTS._replace(num_layers=num_layers)
    np.testing.assert_allclose(probe_flops(costs, held), expected / 3)


def test_train_chosen_by_hand():
    """The clients hold 1 and 3 experts in each of two layers, and train one of them."""
    chosen = jnp.array([[[1, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]], bool)
    sent = TRAFFIC.replace(trained=SLOTS, reported=2 * (5 + 1) * SLOTS)
    found = train_chosen(sent, chosen)
    assert found.held.tolist() == [1, 3] and found.received.tolist() == [1, 3]
    assert found.forward.tolist() == found.trained.tolist() == [1, 1]
    # Five numbers of each layer's expert, and the probe of every one.
    assert found.reported.tolist() == [2 * 5 + 2, 2 * 5 + 2 * 3]
    each = [
        train_chosen(jax.tree.map(lambda leaf, c=c: leaf[c], sent), chosen[c])
        for c in range(2)
    ]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    jax.tree.map(np.testing.assert_array_equal, together, found)
    silent = train_chosen(sent.replace(reported=jnp.zeros(2)), chosen)
    assert silent.reported.tolist() == [0, 0]
    assert train_chosen(sent, None) is sent
    # 5 examples through one expert; before it every one is probed with 8.
    probed = found.replace(probed=8 * 2 * SLOTS)
    costs = COSTS._replace(num_layers=2)
    expected = [
        5 * 30 + 8 * 2 * 1 * (10 + 10 * 2) / 3,
        5 * 30 + 8 * 2 * 3 * (10 + 10 * 4) / 3,
    ]
    np.testing.assert_allclose(client_flops(costs, probed, 5.0), expected, rtol=1e-6)
    # All parameters once, and the copies of training for one expert.
    memory = [4 * (500 + 1000), 4 * (500 + 1000) + 2 * 1000]
    assert client_memory(costs, probed).tolist() == memory
    assert client_parameters(costs, probed).tolist() == [1500 / 4, 3500 / 4]
    up, down = client_bytes(costs, probed.replace(sent=jnp.ones(2)))
    assert down.tolist() == [1500, 3500]
    assert up.tolist() == [1500 + 4 * 12, 1500 + 4 * 16]


def test_add_cover_by_hand():
    """Two experts a layer of two layers more travel, with 5 or 6 numbers each."""
    cover = jnp.array([2.0, 0.0])
    plain = TRAFFIC.replace(biases=2 * SLOTS)
    for probes, numbers in ((False, 5), (True, 6)):
        found = add_cover(plain, cover, 2 * cover, probes)
        assert found.received.tolist() == (TRAFFIC.received + cover).tolist()
        extra = found.reported - TRAFFIC.reported
        assert extra.tolist() == [numbers * 4, 0]
        assert found.biases.tolist() == (2 * SLOTS + 2 * cover).tolist()
    assert add_cover(TRAFFIC, cover, 2 * cover, False).biases is None
    # What is not kept takes no memory, and nothing runs it.
    for count in (client_memory, client_parameters):
        np.testing.assert_array_equal(count(COSTS, found), count(COSTS, plain))
    flops = client_flops(COSTS, found, 5.0), client_flops(COSTS, plain, 5.0)
    np.testing.assert_array_equal(*flops)
    down = client_bytes(COSTS, found)[1] - client_bytes(COSTS, plain)[1]
    assert down.tolist() == [2 * 1000 + 4 * 4, 0]


def test_train_chosen_trains_no_more_than_there_is_room_for():
    chosen = jnp.ones((2, 1, 3), bool)
    found = train_chosen(TRAFFIC.replace(held=jnp.full(2, 3.0)), chosen)
    assert found.forward.tolist() == [3, 3] and found.trained.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("frozen", "experts", "expected"),
    [
        ({}, 1, 11 + 13),  # dense
        ({}, 2, 11 + 2 * 13),
        ({}, 4, 11 + 4 * 13),  # soft
        ({"gate_stem": PARAMS["stem"]}, 1, 11 + 7 + 13),
    ],
)
def test_answer_flops_by_hand(frozen, experts, expected):
    costs = count_costs(PARAMS, frozen, FORWARD, PLAIN)
    assert answer_flops(costs, experts) == expected


def test_scale_costs_multiplies_every_cost():
    sizes, flops = (900.0, 300.0, 300.0, 3000.0, 0.0), (30.0, 60.0, 0.0, 0.0, 0.0, 81.0)
    scaled = Costs(*sizes, *flops, 1500.0, copies=2, num_layers=1)
    assert scale_costs(VARIATES, 3) == scaled
    assert scale_costs(FROZEN, 3).frozen_bytes == 900


@pytest.mark.parametrize("always", [0, 300, 500])
def test_client_bytes_by_hand(always):
    costs = COSTS._replace(travel_bytes=always)
    up, down = client_bytes(costs, TRAFFIC)
    assert down.tolist() == [always + 1000, always + 3000]
    assert up.tolist() == [always + 1020, always + 2060]
    up, down = client_bytes(costs._replace(copies=2), TRAFFIC)
    assert down.tolist() == [2 * always + 2000, 2 * always + 6000]
    assert up.tolist() == [2 * always + 2020, 2 * always + 4060]


def test_client_bytes_of_frozen_parts_go_down_once_and_shown_gates_up():
    shown = TRAFFIC.replace(shown=jnp.ones(2))
    up, down = client_bytes(FROZEN._replace(travel_bytes=100.0), shown)
    # The head's 100 bytes always travel.
    assert down.tolist() == [100 + 1000, 100 + 3000 + 300]
    assert up.tolist() == [100 + 1000 + 20 + 100, 100 + 2000 + 60 + 100]


def test_client_bytes_of_a_bias_go_down():
    biased = TRAFFIC.replace(biases=SLOTS)
    up, down = client_bytes(COSTS, biased)
    assert down.tolist() == [500 + 1000 + 4, 500 + 3000 + 12]
    assert up.tolist() == client_bytes(COSTS, TRAFFIC)[0].tolist()


def test_client_parameters_by_hand():
    # 500 bytes of stem, gate and head, 1,000 of an expert, 4 of a parameter
    assert client_parameters(COSTS, TRAFFIC).tolist() == [375, 875]
    assert client_parameters(FROZEN, TRAFFIC).tolist() == [375, 875]
    assert client_parameters(VARIATES, TRAFFIC).tolist() == [1125, 2625]


def test_client_bytes_beyond_int32():
    up, down = client_bytes(scale_costs(COSTS, 10**7), ALL)
    np.testing.assert_allclose(down, [1.5e10, 3.5e10], rtol=1e-6)
    assert np.all(up > 2.0**31)


def test_client_flops_of_whole_numbers_beyond_int32_can_be_traced():
    params = dict.fromkeys(("stem", "gate", "experts", "head"), jnp.zeros((2, 2)))
    forward = {"stem": 10**12, "experts": 10**12}
    costs = scale_costs(count_costs(params, {}, forward, PLAIN), 10**4)
    flops = jax.jit(lambda traffic: client_flops(costs, traffic, 2.0))(ALL)
    np.testing.assert_allclose(flops, [12e16, 24e16], rtol=1e-6)


def test_client_flops_by_hand():
    one_size = client_flops(COSTS, ALL, jnp.float32(5))
    assert one_size.tolist() == [5 * (10 + 20), 5 * (10 + 60)]
    each_its_own = client_flops(COSTS, ALL, jnp.array([5.0, 1.0]))
    assert each_its_own.tolist() == [150, 70]
    # three forward, one of them backward: a third of 3, and two thirds of 1
    one_trained = client_flops(COSTS, TRAFFIC, jnp.float32(3))
    np.testing.assert_allclose(one_trained, [3 * (10 + 20), 3 * (10 + 20 * 5 / 3)])
    # of 6 FLOPs for gradients, 2 shared and 4 of an expert, none where it is untrained
    base = COSTS._replace(fixed_flops=2.0, fixed_expert_flops=4.0)
    without = client_flops(base, TRAFFIC, jnp.float32(3))
    np.testing.assert_allclose(without, one_trained - 3 * (2 + 4), rtol=1e-6)
    # a frozen stem has a third of its 4
    frozen = client_flops(FROZEN, ALL, jnp.float32(3))
    np.testing.assert_allclose(frozen, [3 * (30 - 8 / 3), 3 * (70 - 8 / 3)])


def test_client_flops_of_pruned_clients_by_hand():
    """Half of two experts is left, with 24 FLOPs, and nine tenths of what is shared.

    Each of the two has what it keeps fixed; the second client has whole experts.
    """
    costs = COSTS._replace(fixed_expert_flops=4.0)
    pruned = TRAFFIC.replace(
        saved=jnp.array([0.1, 0.0]),
        slots=jnp.array([2.0, 3.0]),
        density=jnp.array([1.2, 1.0]),
    )
    flops = client_flops(costs, pruned, jnp.float32(3))
    expected = [3 * (9 + 24 - 2 * 4), 3 * (10 + 20 * 5 / 3 - 4)]
    np.testing.assert_allclose(flops, expected, rtol=1e-6)
    probes = pruned.replace(probed=8 * pruned.slots)
    more = client_flops(costs, probes, jnp.float32(3)) - flops
    expected = [8 * 2 * (9 + 24 / 2) / 3, 8 * 3 * (10 + 20) / 3]
    np.testing.assert_allclose(more, expected, rtol=1e-5)


def test_expert_seconds_by_hand():
    devices = make_devices(2, upload=[2.0, 4.0], download=[10.0, 5.0], flops=[1.0, 3.0])
    up, down = jnp.array([[4.0, 8.0, 0.0]] * 2), jnp.array([[10.0, 20.0, 0.0]] * 2)
    flops = jnp.array([[1.0, 2.0, 0.0], [3.0, 6.0, 9.0]])
    expected = [[2 + 1 + 1, 4 + 2 + 2, 0], [1 + 2 + 1, 2 + 4 + 2, 3]]
    np.testing.assert_allclose(expert_seconds(devices, up, down, flops), expected)


def test_client_seconds_by_hand():
    devices = make_devices(
        2,
        flops=[15.0, 70.0],
        upload=[1520.0, 2560.0],
        download=[1500.0, 7000.0],
        latency=[0.0, 0.25],
    )
    traffic = TRAFFIC.replace(trained=SLOTS)
    seconds = jax.jit(client_seconds)(devices, COSTS, traffic, examples=jnp.float32(5))
    # download 1500 and 3500 bytes, train 150 and 350 FLOPs, upload 1520 and 2560 bytes
    np.testing.assert_allclose(seconds, [[1, 10, 1], [0.75, 5, 1.25]], rtol=1e-6)


def test_client_seconds_without_travel_have_no_latency():
    devices = make_devices(2, latency=1.0)
    silent, still = COSTS._replace(travel_bytes=0.0), jnp.zeros(2)
    traffic = TRAFFIC.replace(sent=still, received=still, reported=still)
    seconds = client_seconds(devices, silent, traffic, jnp.ones(2))
    assert np.all(seconds[:, [0, 2]] == 0) and np.all(seconds[:, 1] > 0)


def test_fits_memory_of_what_just_suffices():
    held = jnp.arange(1.0, 41.0)
    costs = COSTS._replace(expert_bytes=16_640.0)
    traffic = Traffic(held, held, *[held] * 5)
    exact = np.float32(4 * (500 + 16_640.0 * np.arange(1, 41)))
    assert fits_memory(costs, traffic, exact).all()
    assert not fits_memory(costs, traffic, 0.99999 * exact).any()


def test_client_memory_by_hand():
    # 4 copies of 500 + 1,000 an expert held, but 1 copy of what only runs forward
    traffic = ALL.replace(held=jnp.array([1.0, 3.0]), trained=jnp.array([1.0, 1.0]))
    bytes_needed = client_memory(COSTS, traffic)
    assert bytes_needed.tolist() == [4 * 1500, 4 * 1500 + 2000]
    frozen = client_memory(FROZEN, traffic)
    assert frozen.tolist() == [4 * 1200 + 300, 4 * 1200 + 2000 + 300]
    variates = client_memory(VARIATES, traffic)  # its own and their mean
    assert variates.tolist() == [6 * 1500, 4 * 1500 + 2000 + 2 * 3500]
