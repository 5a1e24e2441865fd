"""HeteroFL: slices by hand, and the sum of slices as one wide hidden layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    draw,
    draw_params,
    list_held,
    make_config,
    make_hyper,
    make_image_model,
    prepare_strategy,
    sizes_of,
)

from fedmoe_jax.base import Route
from fedmoe_jax.strategies.heterofl import HETEROFL, no_loss

SLICES, WIDTH = 3, 8


def test_assign_nests_the_slices():
    assign, evidence = prepare_strategy("heterofl")
    got = assign(evidence, make_hyper(), key=jax.random.key(0))
    nested = [[0], [0, 1], [0, 1, 2]]
    assert list_held(got) == nested + nested  # capacities 1 2 3 1 2 3


def test_configure_makes_a_slice_of_every_slot_of_the_largest_client():
    sizes = sizes_of("heterofl")
    assert (sizes.num_experts, sizes.max_held, sizes.num_active) == (3, 3, 3)
    config = HETEROFL.configure(make_config())
    assert config.model.expert_width == make_config().model.expert_width


def test_no_loss_trains_no_gate():
    logits = draw(4, SLICES)
    held = jnp.array([True, False, False])
    grads = jax.grad(lambda logits: no_loss(logits, None, held, 1.0, make_hyper()))(
        logits
    )
    np.testing.assert_array_equal(grads, np.zeros((4, SLICES)))


def widen(experts, held):
    """The hidden layer of the held slices in one, from its params [E, ...]."""
    join = lambda leaves, axis: np.concatenate([leaves[e] for e in held], axis)
    second, first = experts["Dense_0"], experts["Dense_1"]
    hidden = join(first["kernel"], 1), join(first["bias"], 0)
    output = join(second["kernel"], 0), second["bias"][list(held)].sum(axis=0)
    return *hidden, *output


@pytest.mark.slow
@pytest.mark.parametrize("shared_width", [0, 5])
def test_the_sum_of_held_slices_is_a_dense_network_of_their_width(shared_width):
    """A shared expert is whole on every client, and outside the scaler."""
    model = make_image_model(num_experts=SLICES, shared_width=shared_width)
    params = jax.tree.map(np.asarray, draw_params(model))
    batch = {"x": draw(4, 8, 8, 1)}
    features = np.asarray(model.parts.stem(params["stem"], batch, None))
    for count in (1, 2, 3):
        slots = jnp.arange(SLICES)[None], (jnp.arange(SLICES) < count)[None]
        route = Route(SLICES, gating=HETEROFL.gating)
        found, routing = model.apply(params, {}, batch, *slots, route, None)
        kernel, bias, out, shift = widen(params["experts"]["moe"], range(count))
        assert kernel.shape[1] == count * WIDTH
        hidden = np.maximum(features @ kernel + bias, 0)
        wide = (hidden @ out + shift) * SLICES / count  # the scaler
        head = params["head"]
        if shared_width:
            own = jax.tree.map(lambda leaf: leaf[None], params["stem"]["shared"])
            kernel, bias, out, shift = widen(own, (0,))
            wide = wide + np.maximum(features @ kernel + bias, 0) @ out + shift
        expected = wide @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert (np.asarray(routing.gates[0]) > 0).sum(1).tolist() == [count] * 4
