"""Client-expert fitness: how well each expert serves each client (paper III-B-1)."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, Assignment, Feedback, Hyper


def init_fitness(
    key: Array, num_clients: int, num_experts: int, prior: Array, noise: Array
) -> Array:
    """The scores before any round: the prior plus uniform noise that breaks ties.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      num_experts: E.
      prior: score that every pair starts from.
      noise: half the width of the noise, >= 0.

    Returns:
      [N, E] float32 in [prior - noise, prior + noise].
    """
    shape = (num_clients, num_experts)
    return prior + noise * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _accuracy(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    return feedback.accuracy


def _loss(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    return jnp.exp(-hyper.fitness.loss_scale * feedback.loss)


def _mixed(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    share = hyper.fitness.frequency_share
    return (1 - share) * feedback.accuracy + share * feedback.frequency


def _relate(values: Array, counted: Array) -> Array:
    """Values [C, K] less their mean over the slots of the client that count."""
    total = jnp.where(counted, values, 0.0).sum(axis=1, keepdims=True)
    return values - total / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)


def _relative(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    return (1 + _relate(feedback.accuracy, feedback.load > 0)) / 2


def _relative_loss(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    scale = -hyper.fitness.loss_scale  # less loss than the mean is more than a half
    return jax.nn.sigmoid(scale * _relate(feedback.loss, feedback.load > 0))


def _take_probe(feedback: Feedback) -> Array:
    assert feedback.probe is not None  # clients of a kind in PROBES send it
    return feedback.probe


def _probe(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    return jnp.exp(-hyper.fitness.loss_scale * _take_probe(feedback))


def _relative_probe(feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    scale = -hyper.fitness.loss_scale
    return jax.nn.sigmoid(scale * _relate(_take_probe(feedback), slot))


PROBES = ("probe", "relative_probe")  # kinds for which clients probe, see `probe`
SCORES: dict[str, Callable[[Feedback, Array, Hyper], Array]] = {
    "accuracy": _accuracy,
    "loss": _loss,
    "mixed": _mixed,
    "relative": _relative,
    "relative_loss": _relative_loss,
    "probe": _probe,
    "relative_probe": _relative_probe,
}


def score(kind: str, feedback: Feedback, slot: Array, hyper: Hyper) -> Array:
    """The score of each held pair by one round of feedback.

    `accuracy` and `loss` are the feedback of FLEX-MoE (arXiv 2512.23070); `mixed`
    adds the selection frequency that the paper names beside the error. A client's
    experts share most of these, as they share its examples: held pairs score high
    because they were trained. The relative kinds leave that share out. The probes
    judge each expert as it was received, before the client has trained it, on examples
    that it need not train on, as IFCA (arXiv 2006.04088) does with every model of the
    server.

    Args:
      kind: `accuracy`, `loss` (`exp(-loss_scale * loss)`), `mixed`
        (`(1 - frequency_share) * accuracy + frequency_share * frequency`), `relative`
        (`(1 + accuracy - mean accuracy) / 2`) or `relative_loss`
        (`sigmoid(loss_scale * (mean loss - loss))`), means over the experts that the
        client has trained in the round, so that 1/2 is as good as its others; `probe`
        (`exp(-loss_scale * probe)`) or `relative_probe`
        (`sigmoid(loss_scale * (mean probe - probe))`), the mean over the experts that
        the client has received, trained or not.
      feedback: with leaves of shape [C, K]; `probe` is there for kinds in `PROBES`.
      slot: [C, K] bool, which slots are valid; read by `relative_probe`.
      hyper: gives `fitness.loss_scale` and `fitness.frequency_share`.

    Returns:
      [C, K] float32 in [0, 1]; NaN where the feedback is NaN.

    Raises:
      UserError: if `kind` is unknown.
    """
    if kind not in SCORES:
        allowed = ", ".join(SCORES)
        raise UserError(f"fitness.feedback={kind!r} is unknown; allowed: {allowed}")
    return SCORES[kind](feedback, slot, hyper)


def idle_rule(kind: str, hyper: Hyper) -> tuple[Array | float, Array | float]:
    """The share of its distance to a target that an idle pair keeps, and the target.

    Args:
      kind: `keep` (FLEX-MoE: unheld pairs keep their score), `decay` (the paper's
        wording: unheld pairs only lose score, so greedy locks in its first picks)
        or `prior` (they forget towards the prior, so they are tried again).
      hyper: gives `fitness.idle_decay` and `fitness.prior`.

    Raises:
      UserError: if `kind` is unknown.
    """
    decay, prior = hyper.fitness.idle_decay, hyper.fitness.prior
    rules = {"keep": (1.0, prior), "decay": (decay, 0.0), "prior": (decay, prior)}
    if kind not in rules:
        raise UserError(
            f"fitness.idle={kind!r} is unknown; allowed: {', '.join(rules)}"
        )
    return rules[kind]


def update_fitness(
    fitness: Array,
    client: Array,
    assignment: Assignment,
    score: Array,
    counted: Array,
    *,
    rate: Array,
    idle_decay: Array | float,
    idle_target: Array | float,
) -> Array:
    """One round of learning for every client-expert pair.

    A pair held with evidence moves by the EMA `(1 - rate) Q + rate * score`. A pair
    held without evidence (`counted` false or a score that is not finite) keeps Q: it
    did interact, but nothing was seen. Every other pair, of clients outside the
    cohort too, did not interact and follows `idle_decay Q + (1 - idle_decay) target`.

    Args:
      fitness: [N, E] float32.
      client: [C] int32, distinct client ids.
      assignment: what the C clients held, [C, K].
      score: [C, K] float32, may hold NaN.
      counted: [C, K] bool, slots whose score is evidence, see `learn.find_counted`.
      rate: [] or [C, 1], weight in (0, 1] of the newest score.
      idle_decay: [] or [N, 1], see `idle_rule`.
      idle_target: [], see `idle_rule`.

    Returns:
      [N, E] float32, finite if `fitness` is.
    """
    chex.assert_rank(fitness, 2)
    chex.assert_shape(client, (score.shape[0],))
    chex.assert_equal_shape([assignment.held, assignment.slot, score, counted])
    idle = idle_decay * fitness + (1 - idle_decay) * idle_target
    old = fitness[client[:, None], assignment.held]
    new = (1 - rate) * old + rate * score
    value = jnp.where(counted & jnp.isfinite(score), new, old)
    # An id of E is out of bounds, so the writes of empty slots are dropped.
    expert = jnp.where(assignment.slot, assignment.held, fitness.shape[1])
    return idle.at[client[:, None], expert].set(value, mode="drop")
