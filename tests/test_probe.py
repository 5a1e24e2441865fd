"""The probe of received experts, beside sub-models that hold one expert a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    draw_params,
    make_data,
    make_federation,
    make_inputs,
    make_program,
    make_windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.base import Route
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.probe import (
    count_held_out,
    find_hold_key,
    hold_out,
    leave_alone,
    probe_experts,
)
from fedmoe_jax.tasks.batches import take_batch

PLACES = 12
SHARES = st.floats(0, 0.5, width=32, allow_subnormal=False)  # XLA reads these as 0


def make_text_data(rng):
    """Windows of tokens, of which some only pad."""
    data = make_windows(rng.integers(0, 11, (20, 9)).astype(np.int32), 11)
    return data._replace(train=data.train | {"length": rng.integers(4, 10, 20)})


TRANSFORMER = {
    "model.kind": "transformer",
    "model.heads": 2,
    "model.kv_heads": 1,
    "max_held": 3,
}
CASES = {
    "image": {"max_held": 3},
    "shared expert": {"max_held": 3, "model.shared_width": 4},
    "probabilities": {"max_held": 3, "strategy": "fedmix_all"},
    "dense": {"strategy": "fedavg"},
    "two layers": TRANSFORMER,
    "routed": TRANSFORMER | {"num_active": 1},
    "tied": TRANSFORMER | {"model.tied": True},
}


def start(case):
    """A program, random params, data on the device, and inputs of one client."""
    rng, changes = np.random.default_rng(3), CASES[case]
    text = "model.kind" in changes
    data = make_text_data(rng) if text else make_data(10)
    if not text:
        x = rng.integers(0, 256, data.train["x"].shape, np.uint8)
        data = data._replace(train=data.train | {"x": x})
    program = make_program(data, **changes)
    federation = make_federation(
        train=jax.tree.map(jnp.asarray, data.train),
        statistics=program.task.statistics(data),
        frozen={},
    )
    sizes = program.sizes
    rows = [rng.permutation(sizes.num_experts)[: sizes.max_held] for _ in range(9)]
    held = np.stack(rows[: sizes.num_layers]).astype(np.int32)[None]
    slot = np.ones(held.shape, bool)
    slot[0, -1, 2:] = False
    inputs = make_inputs(held, slot)
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    return program, draw_params(program.model), federation, inputs


def probe_slowly(program, params, federation, inputs, ids):
    """Each loss by a sub-model that has room for what it holds and no more."""
    batch = take_batch(federation.train, ids, federation.statistics, program.task)
    strategy, (layers, slots) = program.strategy, inputs.slot.shape
    route = Route(program.sizes.num_active, mix=strategy.mix, gating=strategy.gating)
    losses = np.full((layers, slots), np.nan)

    @jax.jit
    def lose(held, slot):
        submodel = take_submodel(params, {}, held, 0)
        outputs, _ = program.model.apply(submodel, {}, batch, held, slot, route, None)
        return mean_loss(program.task.loss(outputs, batch))

    for g in range(layers):
        for k in range(slots):
            if not inputs.slot[g, k]:
                continue
            kept = [
                [k] if layer == g else np.flatnonzero(inputs.slot[layer]).tolist()
                for layer in range(layers)
            ]
            width = max(map(len, kept))  # the narrower layer repeats its first expert
            rows = [row + row[:1] * (width - len(row)) for row in kept]
            held = np.stack([inputs.held[n][np.array(r)] for n, r in enumerate(rows)])
            slot = np.array([[i < len(row) for i in range(width)] for row in kept])
            losses[g, k] = lose(held, slot)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_probe_experts_equals_sub_models_with_one_expert(case):
    program, params, federation, inputs = start(case)
    ids = jnp.array([4, 0, 7, 4])
    received = take_submodel(params, {}, inputs.held, 0)
    probe = jax.jit(lambda *own: probe_experts(*own, ids, program))
    found = np.asarray(probe(received, inputs, federation))
    expected = probe_slowly(program, params, federation, inputs, ids)
    assert found.shape == inputs.slot.shape and found.dtype == np.float32
    valid = np.asarray(inputs.slot)
    np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-4)
    if valid.sum() > 1:  # the experts differ, so that equal losses say something
        assert np.ptp(found[valid]) > 1e-3


def test_leave_alone_by_hand():
    slot = jnp.array([[True, True, False], [True, False, False]])
    found = leave_alone(slot)
    assert found.shape == (2, 3, 2, 3)
    assert found[0, 1].tolist() == [[False, True, False], [True, False, False]]
    assert found[1, 0].tolist() == [[True, True, False], [True, False, False]]
    assert found[1, 2].tolist() == [[True, True, False], [False, False, True]]


@given(st.integers(1, 3000), SHARES)
def test_count_held_out_leaves_some_on_both_sides(size, share):
    held_out = int(count_held_out(np.int32(size), np.float32(share)))
    if share == 0 or size == 1:
        assert held_out == 0
    else:
        assert 1 <= held_out < size and abs(held_out - share * size) <= 1
    on_device = count_held_out(jnp.int32(size), jnp.float32(share))
    assert on_device == held_out and on_device.dtype == jnp.int32


hold = jax.jit(hold_out)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(1, PLACES), SHARES, st.integers(0, 99))
def test_hold_out_takes_so_many_of_the_clients_own_and_the_same_again(size, share, c):
    key = find_hold_key(jax.random.key(0), jnp.int32(c))
    index = jnp.where(jnp.arange(PLACES) < size, 100 + jnp.arange(PLACES), 0)
    found = np.asarray(hold(key, index, size, share))
    assert found.sum() == count_held_out(np.int32(size), np.float32(share))
    assert not found[size:].any()
    # The examples are the same ones wherever they stand in the client's row.
    moved = jnp.concatenate([index[:size][::-1], index[size:]])
    other = np.asarray(hold(key, moved, size, share))
    assert set(np.asarray(moved)[other]) == set(np.asarray(index)[found])


def test_hold_out_is_a_choice_of_each_client_and_each_run():
    index = jnp.arange(PLACES)
    runs = jax.random.key(0), jax.random.key(1)
    find_all = jax.vmap(find_hold_key, (None, 0))
    choices = [
        tuple(np.asarray(hold(key, index, PLACES, 0.5)).tolist())
        for run in runs
        for key in find_all(run, jnp.arange(4))
    ]
    assert len(set(choices)) > 5
    # A client's key does not depend on the cohort.
    assert find_all(runs[0], jnp.arange(4))[3] == find_hold_key(runs[0], jnp.int32(3))
