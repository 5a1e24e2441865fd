"""The importance of units: of a batch, of a round, over rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import fill, make_image_model

from fedmoe_jax.base import Units
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.pruning.importance import (
    UNKNOWN,
    init_importance,
    learn_importance,
    measure_magnitude,
    measure_taylor,
)

UNITS = (
    Units("s", "stem", 2, ((("w",), 0),)),
    Units("e", "experts", 2, ((("a",), 1), (("b",), 0))),
)


def params(a, b, w=(1.0, 1.0)):
    return {
        "stem": {"w": jnp.asarray(w)},
        "experts": {"moe": {"a": jnp.asarray(a), "b": jnp.asarray(b)}},
    }


def test_measure_taylor_by_hand():
    own = params([[[1.0, 2.0], [3.0, 4.0]]], [[5.0, 6.0]], (2.0, -1.0))
    grads = params([[[1.0, -1.0], [1.0, 1.0]]], [[-1.0, 2.0]], (3.0, 0.5))
    found = measure_taylor(own, grads, UNITS)
    np.testing.assert_array_equal(found["s"], [6.0, 0.5])
    # Unit 0: 1 + 3 - 5, unit 1: -2 + 4 + 12.
    np.testing.assert_array_equal(found["e"], [[[1.0, 14.0]]])


def test_measure_magnitude_is_the_norm_of_all_leaves():
    own = params([[[3.0, 0.0], [0.0, 2.0]]], [[4.0, 0.0]])
    np.testing.assert_allclose(measure_magnitude(own, UNITS)["e"], [[[5.0, 2.0]]])


def test_init_importance_is_unknown():
    model = make_image_model()
    found = init_importance(fill(shape_params(model)[0]), model.units)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        "stem0": (8,),
        "expert": (1, 5, 8),
    }
    assert all((leaf == UNKNOWN).all() for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_learn_importance_averages_over_those_that_kept_the_unit():
    old = {"s": jnp.array([4.0, -1.0]), "e": jnp.array([[[1.0, -1.0], [2.0, 2.0]]])}
    held = jnp.array([[[0]], [[0]], [[1]]])  # three clients, one slot
    masks = {
        "s": jnp.array([[1, 1], [1, 0], [1, 1]], bool),
        "e": jnp.array([[[[1, 1]]], [[[1, 0]]], [[[1, 1]]]], bool),
    }
    reported = {
        "s": jnp.array([[2.0, 3.0], [4.0, 9.0], [jnp.nan, 7.0]]),
        "e": jnp.array([[[[3.0, 5.0]]], [[[5.0, 9.0]]], [[[7.0, 7.0]]]]),
    }
    arrived = jnp.array([True, True, False])
    routed = jnp.array([[[1.0]], [[0.25]], [[1.0]]])
    learn = lambda old, routed: learn_importance(
        old, reported, masks, held, routed, arrived, jnp.float32(0.5), UNITS
    )
    found = learn(old, routed)
    # Known 4 moves half way to the mean 3; the first report of the other counts whole.
    np.testing.assert_array_equal(found["s"], [3.5, 3.0])
    # (3 + 5) / 1.25 of the positions that are routed to the first expert; 1 before.
    np.testing.assert_allclose(found["e"], [[[3.7, 5.0], [2.0, 2.0]]], rtol=1e-6)
    # A client that does not use the expert says nothing, whatever it reports.
    alone = learn(old, routed.at[1].set(0.0))
    np.testing.assert_array_equal(alone["e"], [[[2.0, 5.0], [2.0, 2.0]]])
    # A measured 0 is known.
    known = learn(found | {"s": jnp.zeros(2)}, routed)
    np.testing.assert_array_equal(known["s"], [1.5, 1.5])


@pytest.mark.slow
def test_learn_importance_ranks_units_that_idle_clients_keep_with_the_others():
    """One client keeps all and uses the expert, three keep the top half and do not."""
    true = jnp.arange(8.0, 0.0, -1.0)
    few = jnp.arange(8) < 4
    masks = {"s": jnp.ones((4, 2), bool), "e": jnp.stack([few | True, few, few, few])}
    reported = {"s": jnp.ones((4, 2)), "e": jnp.stack([true, *[jnp.zeros(8)] * 3])}
    place = lambda leaf: leaf[:, None, None]
    masks["e"], reported["e"] = place(masks["e"]), place(reported["e"])
    old = {"s": -jnp.ones(2), "e": -jnp.ones((1, 1, 8))}
    routed = jnp.array([1.0, 0.0, 0.0, 0.0])[:, None, None]
    held, arrived = jnp.zeros((4, 1, 1), jnp.int32), jnp.ones(4, bool)
    rest = held, routed, arrived, jnp.float32(0.1), UNITS
    found = learn_importance(old, reported, masks, *rest)
    np.testing.assert_array_equal(found["e"][0, 0], true)
