"""From gate logits to gates: held-only top-A routing, and losses of the gate."""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links, Route
from fedmoe_jax.models.links import SNR, see_links
from fedmoe_jax.options import UserError
from fedmoe_jax.positions import average
from fedmoe_jax.types import Array, Hyper, PyTree


def pool(features: Array) -> Array:
    """The gate's view of features: [B, ..., D] averaged over positions -> [B, D]."""
    positions = tuple(range(1, features.ndim - 1))
    return features.mean(axis=positions, dtype=jnp.float32)


def gate_logits(gate: PyTree, features: Array, links: Links | None = None) -> Array:
    """Scores every expert from pooled features, and from its link where it has one.

    Args:
      gate: `kernel` [E, D], `bias` [E]; with links `snr` [E], see `see_links`.
      features: [B, ..., D] float.
      links: to the experts; None for perfect ones, which change nothing.

    Returns:
      [B, E] float32 logits.
    """
    pooled = pool(features)
    chex.assert_axis_dimension(gate["kernel"], 1, pooled.shape[-1])
    logits = jnp.einsum("bd,ed->be", pooled, gate["kernel"]) + gate["bias"][None]
    return logits if links is None else see_links(logits, gate[SNR], links)


def route(logits: Array, mask: Array, num_active: int) -> Array:
    """Top-A gates among the allowed experts, renormalised over the chosen ones.

    Args:
      logits: [B, E] float (E may be K slots).
      mask: [E] bool, experts that may be used; at least one must be.
      num_active: A; fewer are chosen where the mask allows fewer.

    Returns:
      [B, E] gates, rows sum to 1, exactly min(A, allowed) entries are positive; of
      equal logits the lower index is chosen.
    """
    chosen = choose(logits, mask, num_active)
    return jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-1)


def choose(logits: Array, mask: Array, num_active: int) -> Array:
    """[B, E] bool, the top-A of the allowed experts; arguments are those of `route`."""
    chex.assert_rank([logits, mask], [2, 1])
    masked = jnp.where(mask[None], logits, -jnp.inf)
    _, best = jax.lax.top_k(masked, min(num_active, logits.shape[-1]))  # [B, A]
    return jax.nn.one_hot(best, logits.shape[-1], dtype=bool).any(1) & mask[None]


def keep_largest(logits: Array, mask: Array, num_active: int) -> Array:
    """The top-A of a softmax over all allowed experts, not renormalised.

    Arguments are those of `route`; rows of the gates [B, E] sum to at most 1.
    """
    chosen = choose(logits, mask, num_active)
    gates = jax.nn.softmax(jnp.where(mask[None], logits, -jnp.inf), axis=-1)
    return jnp.where(chosen, gates, 0.0)


def add_up(logits: Array, mask: Array, num_active: int) -> Array:
    """The same gate for every allowed expert, whatever the logits; rows sum to E.

    So the sum of the experts' outputs, scaled up where only some are allowed.
    Arguments are those of `route`.
    """
    chex.assert_rank([logits, mask], [2, 1])
    each = mask.size / mask.sum()
    return jnp.broadcast_to(jnp.where(mask, each, 0.0)[None], logits.shape)


GATINGS = {"chosen": route, "all": keep_largest, "sum": add_up}


def make_gates(logits: Array, mask: Array, how: Route) -> Array:
    """The gates [B, E] of an example's experts, as the strategy has it.

    Args:
      logits: [B, E] float (E may be K slots).
      mask: [E] bool, experts that may be used; at least one must be.
      how: of ONE layer; gives A, the name in `GATINGS` and the `bias` [E], or None.

    Raises:
      UserError: the name is unknown, or the bias is not that of one layer.
    """
    if how.gating not in GATINGS:
        allowed = ", ".join(GATINGS)
        raise UserError(f"gating={how.gating!r} is unknown; allowed: {allowed}")
    if how.bias is not None:
        if how.bias.shape != logits.shape[1:]:
            raise UserError(
                f"the model makes {logits.shape[1]} gates with a bias of the shape "
                f"{list(how.bias.shape)}; allowed: that of one layer, as "
                "`route.of_layer(layer)` has it"
            )
        logits = logits + how.bias[None]
    return GATINGS[how.gating](logits, mask, how.num_active)


def calibration_loss(logits: Array, weight: Array | None, held: Array) -> Array:
    """`-log` of the gate mass that falls on held experts, mean over positions, nats.

    A client's gate is otherwise only trained to choose among the experts it holds, so
    experts never held together would never be compared. Zero when all are held.

    Args:
      logits: [P, E] float over all experts.
      weight: [P] float32 of the positions, None where all count alike.
      held: [E] bool, at least one held.
    """
    chex.assert_rank([logits, held], [2, 1])
    held_mass = jax.nn.logsumexp(jnp.where(held[None], logits, -jnp.inf), axis=-1)
    return average(jax.nn.logsumexp(logits, axis=-1) - held_mass, weight)


def load_loss(logits: Array, weight: Array | None, mask: Array) -> Array:
    """Load-balancing loss of the Switch Transformer (arXiv 2101.03961, eq. 4), >= 0.

    `n * sum_e f_e P_e` over the n allowed experts, f_e the share of positions whose
    first choice is e and P_e the mean gate probability; 1 under a uniform routing.

    Args:
      logits: [P, E] float.
      weight: [P] float32 of the positions, None where all count alike.
      mask: [E] bool, allowed experts.
    """
    probabilities = jax.nn.softmax(jnp.where(mask[None], logits, -jnp.inf), axis=-1)
    first = jax.nn.one_hot(probabilities.argmax(-1), logits.shape[-1])
    mean = lambda values: average(values, weight)
    return mask.sum() * (mean(first) * mean(probabilities)).sum()


def z_loss(logits: Array, weight: Array | None, mask: Array) -> Array:
    """Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): mean squared log-sum-exp.

    Args:
      logits: [P, E] float.
      weight: [P] float32 of the positions, None where all count alike.
      mask: [E] bool, allowed experts.
    """
    masked = jnp.where(mask[None], logits, -jnp.inf)
    return average(jnp.square(jax.nn.logsumexp(masked, axis=-1)), weight)


def latency_loss(
    logits: Array, weight: Array | None, mask: Array, time: Array
) -> Array:
    """`E[sum_e p_e(x) T_e / T_dl]`: the time of the links that the gate expects.

    The penalty for the latency of the channel in the loss of the gate that the paper
    suggests (arXiv 2507.05685, section IV.C); its form is this project's choice. p is
    the softmax over the allowed experts, so that it has a gradient in each of them.

    Args:
      logits: [P, E] float32.
      weight: [P] float32 of the positions, None where all count alike.
      mask: [E] bool, allowed experts, at least one.
      time: [P, E] float32, T_e / T_dl.

    Returns:
      [] float32, deadlines.
    """
    chex.assert_equal_shape([logits, time])
    probabilities = jax.nn.softmax(jnp.where(mask[None], logits, -jnp.inf), axis=-1)
    return average((probabilities * time).sum(axis=-1), weight)


def calibrate_gate(
    logits: Array, weight: Array | None, held: Array, factor: Array, hyper: Hyper
) -> Array:
    """Calibration, load and z losses of gate logits, each with its weight.

    Args:
      logits: [P, E] float32.
      weight: [P] float32 of the positions, None where all count alike.
      held: [E] bool.
      factor: [] of the calibration loss.
      hyper: gives the weights, `loss.calibration`, `loss.load` and `loss.z`.

    Returns:
      [] float32, nats.
    """
    weights = hyper.loss
    return (
        weights.calibration * factor * calibration_loss(logits, weight, held)
        + weights.load * load_loss(logits, weight, held)
        + weights.z * z_loss(logits, weight, held)
    )
