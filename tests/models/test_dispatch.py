"""Sorted dispatch: the plan by hand, outputs against every expert on every image."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, fill, make_image_model

from fedmoe_jax.models import dispatch
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.one_layer import apply_experts

pytestmark = pytest.mark.slow

EXPERTS = 5
plan_blocks = jax.jit(dispatch.plan_blocks, static_argnums=(1, 2))
STEM_OF = {"mlp": "mlp", "conv": "cnn"}
FEATURES = {"mlp": (8,), "conv": (2, 2, 16)}  # of one 16x16 image


@functools.cache
def make_case(expert):
    """Parts of a model, experts, head and the features of 9 images, drawn at random."""
    model = make_image_model(
        stem=STEM_OF[expert], expert=expert, image_shape=(16, 16, 1)
    )
    rng = np.random.default_rng(0)
    params = fill(shape_params(model)[0])
    features = jnp.asarray(rng.normal(size=(9, *FEATURES[expert])), jnp.float32)
    return model.parts, params["experts"]["moe"], params["head"], features


def draw_need(seed, share):
    need = np.random.default_rng(seed).random((9, EXPERTS)) < share
    need[:, 3] = False  # no example needs this expert
    return jnp.asarray(need)


@functools.partial(jax.jit, static_argnums=0)
def dense(parts, experts, head, features, shared=None):
    """[B, E, L] logits of every expert on every image."""
    outputs = apply_experts(parts, experts, features, None)
    beside = 0.0 if shared is None else jnp.tile(shared[:, None], (1, EXPERTS, 1))
    return parts.head(head, outputs + beside)


def test_plan_blocks_by_hand():
    need = np.zeros((5, 3), bool)
    need[[0, 2, 4], 0] = True
    need[[1, 3], 2] = True
    blocks = plan_blocks(jnp.asarray(need), 2, 3)
    assert blocks.count == 3
    assert blocks.expert.shape == (9,) and blocks.expert[:3].tolist() == [0, 0, 2]
    assert blocks.image[:3].tolist() == [[0, 2], [4, 5], [1, 3]]  # 5 is padding
    assert np.all(blocks.image[3:] == 5)
    no = 18  # rows of all blocks
    assert blocks.place[:, 0].tolist() == [0, no, 1, no, 2]
    assert blocks.place[:, 2].tolist() == [no, 4, no, 5, no]
    assert np.all(blocks.place[:, 1] == no)


def test_plan_blocks_of_at_most_one_expert_an_image():
    need = np.ones((5, 3), bool)
    need[3:, 0] = False
    blocks = plan_blocks(jnp.asarray(need), 2, 1)
    assert blocks.count == 3 and blocks.expert.shape == (5,)  # floor(5 / 2) + 3
    assert blocks.expert[:3].tolist() == [0, 0, 1]
    assert blocks.image[:3].tolist() == [[0, 1], [2, 5], [3, 4]]


def test_plan_blocks_of_everything_and_of_nothing():
    everything = plan_blocks(jnp.ones((4, 3), bool), 4, 3)
    assert everything.count == 3 and everything.expert.tolist() == [0, 1, 2]
    assert everything.image.tolist() == [[0, 1, 2, 3]] * 3
    nothing = plan_blocks(jnp.zeros((4, 3), bool), 4, 3)
    assert nothing.count == 0 and np.all(nothing.image == 4)


@hypothesis.given(
    need=arrays.arrays(bool, (7, 4)),
    rows=st.sampled_from([1, 3, 9]),
    most=st.sampled_from([1, 2, 4]),
)
@hypothesis.settings(max_examples=25)
def test_plan_blocks_has_every_needed_pair_once(need, rows, most):
    blocks = jax.device_get(plan_blocks(jnp.asarray(need), rows, most))
    need = need & (need.cumsum(1) <= most)  # the first ones of an image
    sizes = need.sum(0)
    assert blocks.count == sum(-(-size // rows) for size in sizes)
    pairs = [
        (image, expert)
        for expert, images in zip(blocks.expert, blocks.image, strict=True)
        for image in images[images < len(need)]
    ]
    assert sorted(pairs) == [tuple(pair) for pair in np.argwhere(need)]
    used = (blocks.image < len(need)).any(1)
    assert used[: blocks.count].all() and not used[blocks.count :].any()
    found = np.append(blocks.image.ravel(), -1)[blocks.place]
    np.testing.assert_array_equal(found, np.where(need, np.arange(7)[:, None], -1))


@pytest.mark.parametrize(
    ("expert", "rows", "shared"),
    [("mlp", 2, False), ("mlp", 64, False), ("conv", 2, False), ("mlp", 2, True)],
)
def test_dispatch_gives_needed_pairs_their_dense_logits(
    monkeypatch, expert, rows, shared
):
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", rows)
    parts, *case = make_case(expert)
    beside = draw(9, 6, seed=1) if shared else None
    run = jax.jit(lambda *args: dispatch.dispatch(parts, *args))
    everything = dense(parts, *case, beside)
    for share in (0.0, 0.4, 1.1):
        need = draw_need(0, share)
        wanted = jnp.where(need[..., None], everything, 0.0)
        np.testing.assert_allclose(run(*case, need, beside), wanted, atol=1e-5)


def test_dispatch_works_as_much_as_is_needed(monkeypatch):
    """The loop runs once per block, and an expert that is not needed is never read."""
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", 2)
    parts, experts, head, features = make_case("mlp")
    poisoned = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[3].set(jnp.nan), experts)
    rows = []

    def expert(one, x, key):
        jax.debug.callback(lambda: rows.append(len(x)))
        return parts.expert(one, x, key)

    need, spied = draw_need(0, 0.4), parts._replace(expert=expert)
    result = dispatch.dispatch(spied, poisoned, head, features, need, None)
    jax.effects_barrier()
    assert np.isfinite(result).all()
    assert sum(rows) == sum(2 * -(-size // 2) for size in np.asarray(need).sum(0))


@pytest.mark.parametrize("walk", ["map", "vmap"])
def test_dispatch_over_runs(monkeypatch, walk):
    """Runs need different numbers of blocks and have experts of their own."""
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", 2)
    parts, *trained, features = make_case("mlp")
    runs = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), trained)
    need = jnp.stack([draw_need(0, 0.3), draw_need(1, 0.8), draw_need(2, 0.0)])
    one = lambda run: dispatch.dispatch(parts, *run[0], features, run[1], None)
    over = {"map": lambda x: jax.lax.map(one, x), "vmap": jax.vmap(one)}[walk]
    result = jax.jit(over)((runs, need))
    for i in range(3):
        run = jax.tree.map(lambda leaf, i=i: leaf[i], runs)
        wanted = jnp.where(need[i, ..., None], dense(parts, *run, features), 0.0)
        np.testing.assert_allclose(result[i], wanted, atol=1e-5)
