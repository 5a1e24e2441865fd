"""FedJETs: anchors and weights by hand."""

import jax
import jax.numpy as jnp
import pytest
from factories import (
    SIZES,
    list_held,
    make_align,
    make_config,
    make_federation,
    make_hyper,
    prepare_strategy,
)

from fedmoe_jax.program import configure
from fedmoe_jax.strategies import fedjets
from fedmoe_jax.types import SimState


@pytest.mark.slow
def test_choose_anchors_covers_the_labels():
    mix = jnp.array(
        [[0.6, 0.4, 0, 0], [0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.2, 0, 0, 0.8]]
    )
    size = jnp.full(4, 30)
    found = {
        tuple(fedjets.choose_anchors(mix, size, 3, jax.random.key(seed)).tolist())
        for seed in range(20)
    }
    # All tie at 1 at first. After 0 or 1, 2 has 1 that is new and 3 has 0.8 and more;
    # after 2 the others tie at 1 again.
    assert all(anchor[2] in (0, 1) for anchor in found) and len(found) > 2
    every = fedjets.choose_anchors(mix, size, 4, jax.random.key(0))
    assert sorted(every.tolist()) == [0, 1, 2, 3]


def test_choose_anchors_follows_the_labels_where_nothing_ties():
    mix = jnp.array([[0.5, 0.25, 0.125, 0.125], [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]])
    size = jnp.array([80, 60, 40])
    for seed in range(5):  # 0 has 80; then of 1 30 x 0.5 + 30 x 0.75 are new, of 2 35
        found = fedjets.choose_anchors(mix, size, 2, jax.random.key(seed))
        assert found.tolist() == [0, 1, -1]


def test_choose_anchors_prefers_many_examples_to_pure_ones():
    """Of 10 examples of one label, 200 of two, 90 of one; by share all have 1."""
    mix = jnp.array([[1.0, 0, 0], [0, 0.5, 0.5], [0, 1.0, 0]])
    for seed in range(5):
        found = fedjets.choose_anchors(
            mix, jnp.array([10, 200, 90]), 2, jax.random.key(seed)
        )
        assert found.tolist() == [-1, 0, 1]  # of 90 half are new, of 10 all


def test_assign_lets_anchors_hold_their_expert_and_teach_the_gate():
    assign, evidence = prepare_strategy("fedjets")
    mass = jnp.tile(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]), (10, 1))
    anchor = jnp.full(10, -1).at[jnp.array([5, 8])].set(jnp.array([2, 0]))
    evidence = evidence.replace(state={"mass": mass, "anchor": anchor})
    got = assign(evidence, make_hyper(), key=jax.random.key(0))
    assert list_held(got) == [
        [1],
        [2],
        [1],
        [1, 3],
        [0],
        [1, 3],
    ]  # capacities 1 2 1 2 1 2
    assert got.calibration.tolist() == [0, 1, 0, 0, 1, 0]
    assert configure(make_config(strategy="fedjets")).loss.calibration == 1


def test_slots_alike_and_rows_alike_average_plainly():
    one = fedjets.slots_alike(jnp.array([True, False]), None, jnp.int32(40), None)
    assert one.tolist() == [1, 1]
    rows = fedjets.rows_alike(jnp.zeros(3, bool), None, jnp.int32(40), None)
    assert rows.tolist() == [1, 1, 1]


def test_appoint_anchors_reads_labels_and_no_groups():
    """Two groups of two classes each, whose strata are apart."""
    label_mix = jnp.array([[0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.25, 0.75]])
    size, key = jnp.array([80, 60, 40]), jax.random.key(0)
    classes = jnp.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    found = {}
    for groups, mix in ((1, classes), (2, label_mix)):
        sizes = SIZES._replace(num_clients=3, num_experts=2, num_groups=groups)
        federation = make_federation(label_mix=mix, size=size, frozen={})
        nothing = dict.fromkeys(SimState.__dataclass_fields__)
        state = SimState(**nothing | {"align": make_align(3, 2)})
        state, _ = fedjets.appoint_anchors(
            *(state, federation, None, key), model=None, task=None, sizes=sizes
        )
        found[groups] = state.align.strategy["anchor"].tolist()
    # 0 has 80; then of 1 30 x 0.25 + 30 x 0.75 are new, of 2 10 x 0.25 + 30 x 0.75.
    assert found[1] == found[2] == [[0, 1, -1]]
