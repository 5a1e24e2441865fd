"""Clipping of whole updates, and equal weights, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import make_feedback, make_hyper, make_inputs, make_update

from fedmoe_jax.aggregate import held_rows
from fedmoe_jax.base import Strategy
from fedmoe_jax.privacy.updates import clip_update, leave_out, weigh_alike
from fedmoe_jax.strategies.hfedmoe import weigh_gate

# Norms: stem 3, gate rows 4 and 1, experts 12 and 100, head 0.
DELTA = {
    "stem": {"kernel": jnp.array([3.0, 0.0])},
    "gate": {"moe": {"kernel": jnp.array([[4.0], [1.0]])}},
    "experts": {"moe": {"kernel": jnp.array([[12.0, 0.0], [0.0, 100.0]])}},
    "head": {"bias": jnp.zeros(1)},
}
WEIGHTS = {
    "stem": jnp.float32(7.0),
    "gate": jnp.array([[7.0, 0.0]]),
    "experts": jnp.array([[0.3, 0.0]]),
    "head": jnp.float32(7.0),
}
NORM = 13.0  # of 3, 4 and 12: what has a weight


def make_strategy(**changes):
    fields = dict(gate_weight=held_rows, personal=()) | changes
    return Strategy(about="", assign=None, **fields)


def send(held=(0, 1), slot=(True, False), **changes):
    inputs = make_inputs(np.array([[held]], np.int32), np.array([[slot]]))
    return jax.tree.map(lambda leaf: leaf[0], inputs).replace(**changes)


def clip(most, scale=1.0, delta=DELTA):
    inputs = send(scale=scale)
    update = make_update(delta, make_feedback(jnp.zeros((1, 2))), finite=True)
    hyper = make_hyper(privacy={"clip": most})
    weights = weigh_alike(WEIGHTS, inputs, hyper, make_strategy())
    return clip_update(update, inputs, weights, hyper).delta


def test_weigh_alike_by_hand():
    found = weigh_alike(WEIGHTS, send(), make_hyper(), make_strategy())
    assert found["stem"] == found["head"] == 1
    assert found["gate"].tolist() == found["experts"].tolist() == [[1, 0]]


def test_weigh_alike_counts_what_is_held_and_not_what_is_used():
    unused = WEIGHTS | {"experts": jnp.zeros((1, 2))}
    rest = make_hyper(), make_strategy(local_experts=1)
    weigh = lambda **changes: weigh_alike(unused, send(**changes), *rest)["experts"]
    assert weigh(slot=(True, True)).tolist() == [[1, 0]]  # expert 1 stays
    assert weigh(held=(1, 0), slot=(True, True)).tolist() == [[0, 1]]
    assert weigh(steps=jnp.int32(0)).tolist() == [[0, 0]]


def test_weigh_alike_counts_rows_of_the_gate_whatever_their_use():
    unused, hyper = WEIGHTS | {"gate": jnp.zeros((1, 2))}, make_hyper()
    rows = lambda **changes: weigh_alike(
        unused, send(), hyper, make_strategy(**changes)
    )["gate"].tolist()
    assert rows(gate_weight=weigh_gate) == [[1, 1]]  # all of them, of any usage
    assert rows(personal=("gate",)) == [[0, 0]]


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("most", [1.0, 6.5, 13.0, 40.0])
def test_clip_update_bounds_what_reaches_the_sums(most, scale):
    found = optax.tree.scale(scale, clip(most, scale))
    counted = leave_out(found, WEIGHTS)
    np.testing.assert_allclose(
        optax.tree.norm(counted), min(most, scale * NORM), rtol=1e-6
    )
    factor = min(1.0, most / (scale * NORM))
    np.testing.assert_allclose(
        found["stem"]["kernel"][0], scale * factor * 3, rtol=1e-6
    )


def test_clip_update_leaves_what_is_within_the_bound_to_the_last_bit():
    found, kept = clip(13.5), leave_out(DELTA, WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, found, kept)


def test_clip_update_is_no_use_to_what_does_not_count():
    """Whatever an uncounted part holds changes nothing, not even NaN."""
    broken = jnp.array([[12.0, 0.0], [jnp.nan, 100.0]])
    odd = DELTA | {"experts": {"moe": {"kernel": broken}}}
    jax.tree.map(np.testing.assert_array_equal, clip(6.5), clip(6.5, delta=odd))


def test_clip_update_of_an_update_of_zeros():
    zeros = jax.tree.map(jnp.zeros_like, DELTA)
    jax.tree.map(np.testing.assert_array_equal, clip(1.0, delta=zeros), zeros)
