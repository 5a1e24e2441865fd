"""Noisy features and a gate that sees its links, by hand and by their variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import draw, draw_params, make_image_model

from fedmoe_jax.base import Links, Route
from fedmoe_jax.models.dispatch import dispatch
from fedmoe_jax.models.links import receive, receive_rows, see_links
from fedmoe_jax.models.one_layer import apply_experts, apply_linked
from fedmoe_jax.models.routing import gate_logits

BATCH, EXPERTS, WIDTH = 6, 5, 8
PERFECT = jnp.full((BATCH, EXPERTS), jnp.inf)


def make_links(snr, seed=0, **changes):
    """Links of an SNR [B, E] that the gate does not see and that take no time."""
    nothing = jnp.zeros(snr.shape)
    key = jax.random.split(jax.random.key(seed), len(snr))
    links = Links(snr=snr, seen=nothing, charge=nothing, time=nothing, key=key)
    return links._replace(**changes)


def test_see_links_by_hand():
    logits, snr = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0.5, -2.0])
    links = make_links(
        jnp.ones((2, 2)),
        seen=jnp.array([[-1.0, -3.0], [0.0, -0.5]]),
        charge=jnp.array([[0.0, 0.25], [0.5, 0.0]]),
    )
    expected = [[1 - 0.5, 2 + 6 - 0.25], [3 - 0.5, 4 + 1]]
    np.testing.assert_allclose(see_links(logits, snr, links), expected)
    gate = {"kernel": jnp.eye(2), "bias": jnp.zeros(2), "snr": snr}
    np.testing.assert_allclose(gate_logits(gate, logits, links), expected)
    np.testing.assert_array_equal(gate_logits(gate, logits), logits)


@pytest.mark.parametrize(("snr", "scale"), [(4.0, 1.0), (0.25, 3.0)])
def test_receive_adds_noise_of_the_stated_variance(snr, scale):
    """The power of the features over the SNR, whatever their scale."""
    features = scale * draw(400, 30)
    power = np.square(features).mean(axis=1, keepdims=True)
    links = make_links(jnp.full((400, 2), snr))
    noise = [np.asarray(receive(features, links, e)) - features for e in (0, 1)]
    for each in noise:
        ratio = each**2 / (power / snr)  # of mean 1 and variance 2
        assert abs(ratio.mean() - 1) < 4 * np.sqrt(2 / ratio.size)
        assert abs(each.mean()) < 4 * scale / np.sqrt(snr * each.size)
    together = np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]
    assert abs(together) < 4 / np.sqrt(noise[0].size)


def test_receive_over_a_perfect_link_is_what_was_sent_bit_by_bit():
    features = draw(BATCH, 3, WIDTH)
    np.testing.assert_array_equal(
        receive(features, make_links(PERFECT), jnp.int32(2)), features
    )


def test_receive_has_a_gradient_where_all_features_are_zero():
    links = make_links(PERFECT.at[1].set(0.5))
    total = lambda x: receive(x, links, jnp.int32(0)).sum()
    grads = jax.grad(total)(jnp.zeros((BATCH, WIDTH)))
    np.testing.assert_allclose(grads, np.ones((BATCH, WIDTH)), atol=1e-4)


@pytest.mark.slow
def test_receive_rows_are_those_of_the_batch():
    features, row = draw(BATCH, 2, WIDTH), jnp.array([4, 0, 4])
    links = make_links(jnp.abs(draw(BATCH, EXPERTS)) + 0.1)
    whole = receive(features, links, jnp.int32(3))
    found = receive_rows(features, links, jnp.int32(3), row)
    np.testing.assert_array_equal(found, whole[row])
    low = receive(features.astype(jnp.bfloat16), links, jnp.int32(3))
    assert low.dtype == jnp.bfloat16


# ---- in a model


@pytest.fixture(scope="module")
def model():
    return make_image_model(linked=True)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_apply_linked_gives_each_expert_its_own_features(model, platform):
    parts = model.parts._replace(platform=platform)
    experts, features = draw_params(model)["experts"]["moe"], draw(BATCH, WIDTH)
    links = make_links(jnp.abs(draw(BATCH, EXPERTS, seed=1)) + 0.1)
    held = jnp.array([3, 1])
    rows = jax.tree.map(lambda leaf: leaf[held], experts)
    found = jax.jit(lambda *x: apply_linked(parts, *x, None, held, links))(
        rows, features
    )
    for place, expert in enumerate(held):
        one = jax.tree.map(lambda leaf, e=expert: leaf[e], experts)
        alone = parts.expert(one, receive(features, links, expert), None)
        np.testing.assert_allclose(found[:, place], alone, rtol=1e-4, atol=1e-5)
    clean = apply_experts(parts, rows, features, None)
    assert np.abs(np.asarray(found - clean)).max() > 0.1
    perfect = make_links(PERFECT)
    same = apply_linked(parts, rows, features, None, held, perfect)
    np.testing.assert_allclose(same, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dispatch_sends_what_the_experts_receive(model):
    params, features = draw_params(model), draw(BATCH, WIDTH)
    experts, links = params["experts"]["moe"], make_links(jnp.ones((BATCH, EXPERTS)))
    need = jnp.asarray(np.random.default_rng(0).random((BATCH, EXPERTS)) < 0.5)
    run = jax.jit(lambda: dispatch(*inputs, need, None, links))
    inputs = model.parts, experts, params["head"], features
    everything = jnp.arange(EXPERTS)
    outputs = apply_linked(model.parts, experts, features, None, everything, links)
    expected = model.parts.head(params["head"], outputs)
    expected = jnp.where(need[..., None], expected, 0.0)
    np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_apply_over_perfect_links_is_apply_without(model):
    params, batch = draw_params(model), {"x": draw(BATCH, 8, 8, 1)}
    held, slot = jnp.array([[4, 0, 2]]), jnp.array([[True, True, False]])
    sub = params | {"experts": jax.tree.map(lambda x: x[held[0]], params["experts"])}
    inputs = sub, {}, batch, held, slot
    plain, routed = model.apply(*inputs, Route(2), None)
    over = Route(2, links=make_links(PERFECT))
    found, decided = model.apply(*inputs, over, None)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(decided.logits, routed.logits)
    noisy = Route(2, links=make_links(jnp.ones((BATCH, EXPERTS))))
    other, decided = model.apply(*inputs, noisy, None)
    np.testing.assert_array_equal(decided.logits, routed.logits)  # it does not see them
    assert np.abs(np.asarray(other - plain)).max() > 0.05


@pytest.mark.slow
def test_init_of_a_linked_gate_is_as_without_but_for_what_it_sees():
    plain, linked = (make_image_model(linked=each) for each in (False, True))
    one, other = (jax.jit(m.init)(jax.random.key(1))[0] for m in (plain, linked))
    gate = other["gate"]["moe"]
    assert gate.pop("snr").tolist() == [0.0] * EXPERTS
    jax.tree.map(np.testing.assert_array_equal, one, other)
