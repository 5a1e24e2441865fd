"""Functions of ONE MoE layer over the axis G, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, assert_same, make_align, make_evidence

from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.align_layers import ALIGN, EVIDENCE
from fedmoe_jax.moe_layers import layer_keys, layer_names, map_layers, map_rows

N, E, K = SIZES.num_clients, SIZES.num_experts, SIZES.max_held
layers = pytest.mark.parametrize("num_layers", [1, 3])


def stack(trees, axes):
    """Trees of one layer each, joined at the place of G in `axes`."""
    no_axis = lambda axis: axis is None
    join = lambda axis, *parts: (
        parts[0]
        if axis is None
        else jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *parts)
    )
    return jax.tree.map(join, axes, *trees, is_leaf=no_axis)


def draw_evidence(layer):
    rng = np.random.default_rng(layer)
    shape = SIZES.cohort_size, E
    return make_evidence(
        fitness=rng.random(shape),
        usage=rng.random(E),
        held=jnp.asarray(rng.random(shape) < 0.5),
        state={"mass": jnp.asarray(rng.random((N, E)), jnp.float32)},
    )


def decide(evidence, key):
    """A decision from all that differs between layers."""
    scores = evidence.fitness - evidence.usage[None] + evidence.held
    scores += evidence.state["mass"][evidence.client]
    scores += jax.random.uniform(key, scores.shape)
    return top_k(scores, evidence.capacity, K)


@pytest.mark.slow
@layers
def test_map_layers_of_evidence_is_a_loop(num_layers):
    rows = [draw_evidence(layer) for layer in range(num_layers)]
    keys = layer_keys(jax.random.key(5), num_layers)
    over_layers = map_layers(decide, num_layers, (EVIDENCE, 0), 1)
    found = jax.jit(over_layers)(stack(rows, EVIDENCE), keys)
    loop = [decide(row, key) for row, key in zip(rows, keys, strict=True)]
    assert found.held.shape == (SIZES.cohort_size, num_layers, K)
    assert_same(found, stack(loop, 1))
    assert len({layer.held.tobytes() for layer in map(jax.device_get, loop)}) == (
        num_layers
    )


def draw_align(layer):
    rng = np.random.default_rng(10 + layer)
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)
    return make_align(
        *(N, E),
        fitness=draw(N, E),
        usage=draw(E),
        held=draw(N, E) < 0.5,
        times_held=jnp.asarray(rng.integers(0, 9, (N, E)), jnp.int32),
        strategy={"total": draw()},
        detector={"suspicion": draw(N)},
    )


def learn(align, score, rate):
    """A step that changes every leaf, and a result of its own."""
    held = align.held ^ (score > 0.5)
    after = align.replace(
        fitness=(1 - rate) * align.fitness + rate * score,
        usage=align.usage + score.sum(0),
        held=held,
        times_held=align.times_held + held,
        strategy={"total": align.strategy["total"] + score.sum()},
        detector={"suspicion": align.detector["suspicion"] + score.mean(1)},
    )
    return after, score.sum(0)


@pytest.mark.slow
@layers
def test_map_layers_of_the_alignment_state_is_a_loop(num_layers):
    rows = [draw_align(layer) for layer in range(num_layers)]
    score = jax.random.uniform(jax.random.key(1), (N, num_layers, E))
    rate = jnp.float32(0.25)  # of all layers
    over_layers = map_layers(learn, num_layers, (ALIGN, 1, None), (ALIGN, 0))
    found, load = over_layers(stack(rows, ALIGN), score, rate)
    loop = [learn(row, score[:, layer], rate) for layer, row in enumerate(rows)]
    states, loads = zip(*loop, strict=True)
    assert found.fitness.shape == (N, num_layers, E)
    assert load.shape == (num_layers, E)
    assert_same((found, load), (stack(states, ALIGN), jnp.stack(loads)), atol=1e-5)


def test_map_layers_of_one_layer_calls_the_function_as_it_is():
    """One layer costs nothing: the same program but for adding the axis."""
    seen = []

    def note(leaf):
        seen.append(leaf)
        return leaf

    leaf = jnp.arange(6.0).reshape(2, 1, 3)
    found = map_layers(note, 1, in_axes=1, out_axes=1)(leaf)
    assert not isinstance(seen[0], jax.core.Tracer) and seen[0].shape == (2, 3)
    np.testing.assert_array_equal(found, leaf)


def test_layer_keys_begin_with_the_key_itself():
    key = jax.random.key(3)
    assert_same(layer_keys(key, 1), key[None])
    keys = jax.random.key_data(layer_keys(key, 4))
    assert_same(layer_keys(key, 4)[0], key)
    assert len({tuple(row) for row in keys.tolist()}) == 4
    # More layers change nothing for those that were there.
    assert_same(layer_keys(key, 2), layer_keys(key, 4)[:2])


def test_map_rows_gives_every_leaf_the_weights_of_its_rows():
    """Of two layers: stem and head have one weight, gates and experts one a row."""
    layers = {"b": jnp.ones((3, 2)), "a": jnp.ones((3, 1, 2))}
    tree = {"stem": {"x": jnp.ones(4)}, "gate": layers, "experts": layers}
    rows = jnp.arange(6.0).reshape(2, 3)
    weight = {"stem": jnp.float32(9.0), "gate": rows, "experts": 10 * rows}
    scale = lambda w, leaf, more: (
        more + w.reshape(w.shape + (1,) * (leaf.ndim - w.ndim))
    )
    found = map_rows(scale, weight, tree, tree)
    assert found["stem"]["x"].tolist() == [10] * 4 and set(found) == set(tree)
    # Layers are in the order of their names.
    assert found["gate"]["a"].tolist() == [[[1, 1]], [[2, 2]], [[3, 3]]]
    assert found["experts"]["b"].tolist() == [[31, 31], [41, 41], [51, 51]]


def test_layer_names_are_in_the_order_of_g():
    assert layer_names({"moe_1": {}, "moe_0": {}}) == ["moe_0", "moe_1"]
