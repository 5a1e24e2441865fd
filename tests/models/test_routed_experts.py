"""Experts on routed tokens: outputs and gradients of every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.base import Route
from fedmoe_jax.models import routed_experts
from fedmoe_jax.models.routed_experts import mix_routed
from fedmoe_jax.models.routing import make_gates
from fedmoe_jax.models.transformer_parts import feed_forward, init_feed_forward

TOKENS, EXPERTS, WIDTH, UNITS, ACTIVE = 9, 4, 6, 5, 2


def mix_chosen(experts, tokens, gates):
    return mix_routed(experts, tokens, gates, ACTIVE)


def mix_all(experts, tokens, gates):
    """The twin: all experts on all tokens."""
    outputs = jax.vmap(feed_forward, in_axes=(0, None), out_axes=1)(experts, tokens)
    return jnp.einsum("tk,tkd->td", gates, outputs)


def make_case(chosen):
    """Experts, tokens and gates, which are not 0 where `chosen` [T, K]."""
    keys = jax.random.split(jax.random.key(0), 3)
    make = functools.partial(init_feed_forward, width=WIDTH, hidden=UNITS)
    experts = jax.vmap(make)(jax.random.split(keys[0], EXPERTS))
    tokens = jax.random.normal(keys[1], (TOKENS, WIDTH))
    gates = jax.random.uniform(keys[2], (TOKENS, EXPERTS), minval=0.1)
    return experts, tokens, jnp.where(chosen, gates, 0.0)


def choose_two():
    """Two of the first three experts for each token; the last one sees none."""
    left_out = np.random.default_rng(0).integers(0, 3, TOKENS)
    place = np.arange(EXPERTS)
    return (place != left_out[:, None]) & (place < 3)


def weigh(mix, case):
    """A number whose gradient differs from token to token."""
    return (mix(*case) * jnp.sin(jnp.arange(TOKENS * WIDTH)).reshape(TOKENS, -1)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 4, 128])
def test_outputs_and_gradients_are_those_of_all_pairs(monkeypatch, rows):
    monkeypatch.setattr(routed_experts, "BLOCK_ROWS", rows)
    chosen = choose_two()
    case = make_case(chosen)
    np.testing.assert_allclose(mix_chosen(*case), mix_all(*case), rtol=1e-5, atol=1e-6)
    found, expected = (
        jax.grad(lambda case, mix=mix: weigh(mix, case))(case)
        for mix in (mix_chosen, mix_all)
    )
    masked = (*expected[:2], jnp.where(chosen, expected[2], 0.0))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, masked)


def test_what_nobody_is_routed_to_is_not_read():
    """Rows of NaN would spread through any product with them."""
    experts, tokens, gates = make_case(choose_two())
    broken = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), experts)
    np.testing.assert_array_equal(
        mix_chosen(broken, tokens, gates), mix_chosen(experts, tokens, gates)
    )


@pytest.mark.parametrize("gating", ["chosen", "all"])
def test_a_broken_logit_breaks_its_token_alone(gating):
    """Routing makes NaN of more than A gates of that token."""
    experts, tokens, gates = make_case(choose_two())
    logits = jnp.log(gates).at[4, 3].set(jnp.nan)
    route = Route(ACTIVE, gating=gating)
    gates = make_gates(logits, jnp.ones(EXPERTS, bool), route)
    outputs = mix_chosen(experts, tokens, gates)
    broken = np.arange(TOKENS) == 4
    np.testing.assert_array_equal(np.isnan(outputs).any(axis=1), broken)
    expected = mix_all(experts, tokens, gates)[~broken]
    np.testing.assert_allclose(outputs[~broken], expected, rtol=1e-5, atol=1e-6)


def test_tokens_with_fewer_experts_than_active_ones():
    """As where a client holds one, and as of one token alone."""
    chosen = choose_two() & (np.arange(TOKENS) > 3)[:, None]
    case = make_case(chosen)
    np.testing.assert_allclose(mix_chosen(*case), mix_all(*case), rtol=1e-5, atol=1e-6)
    assert not mix_chosen(*case)[:4].any()


@pytest.mark.slow
def test_several_clients_at_once_are_each_by_itself():
    """Clients of a chunk are vmapped, and their blocks are of different numbers."""
    experts, tokens, gates = make_case(choose_two())
    several = jnp.stack([gates, jnp.where(jnp.arange(EXPERTS) == 1, gates, 0.0)])
    gradient = jax.grad(lambda gates: weigh(mix_chosen, (experts, tokens, gates)))
    together = jax.vmap(gradient)(several)
    for one, gates in zip(together, several, strict=True):
        np.testing.assert_allclose(one, gradient(gates), rtol=1e-5, atol=1e-6)
