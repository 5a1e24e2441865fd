"""What the server gets of one client's round: its update, its weights and a reply."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from fedmoe_jax.aggregate import emphasise, weigh
from fedmoe_jax.models.submodel import is_local
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.optimizers import step_weights
from fedmoe_jax.privacy.feedback import hide_feedback
from fedmoe_jax.privacy.updates import clip_update, weigh_alike
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.units import multiply_parts, share_experts
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Federation,
    Feedback,
    Hyper,
    PyTree,
)
from fedmoe_jax.world.costs import train_chosen
from fedmoe_jax.world.outcome import Conditions, Outcome

Weights = dict[str, Array]  # of a client's parts by name, see `aggregate.weigh`
# (conditions, experts that it sends [], whether its update is finite []) -> outcome, of
# ONE client.
JudgeFn = Callable[[Conditions, Array, Array], Outcome]


class Reply(struct.PyTreeNode):
    """The part of each client's update that the server keeps (leading C axis).

    Attributes:
      feedback: per-slot feedback [C, G, K].
      report: the strategy's, leaves [C, G, ...]; None without one.
      loss: [C] float32 nats.
      accuracy: [C] float32.
      outcome: what became of the client's round.
      sent: [C] float32, experts whose update it sends, a layer.
      personal: trained personal parts, by name like params; {} where there are none.
      variate: new control variates, like params; {} where there are none.
      chosen: [C, G, K] bool, the slots that the client has trained; None for all.
      importance: of the units, see `ClientUpdate`.
      load: [C, G, K] float32, the load that clients do not report, as their feedback is
        noisy, for measures alone; None where it is the feedback's.
    """

    feedback: Feedback
    report: PyTree
    loss: Array
    accuracy: Array
    outcome: Outcome
    sent: Array
    personal: PyTree
    variate: PyTree
    chosen: Array | None = None
    importance: PyTree = struct.field(default_factory=dict)
    load: Array | None = None

    @property
    def arrived(self) -> Array:
        """[C] bool, whether the client's update counts."""
        return self.outcome.arrived


def train_personal(
    inputs: ClientInput, update: ClientUpdate, local_experts: int
) -> PyTree:
    """ONE client's personal parts after training, by name like params.

    Args:
      inputs: what the client was sent, with its parts before training.
      update: its result.
      local_experts: how many of the E experts, the last ones, stay with the client.
    """

    def add_rows(layer: int, old: Array, delta: Array) -> Array:
        held, slot = inputs.held[layer], inputs.slot[layer]
        local = is_local(held, old.shape[0], local_experts)
        kept = (slot & local).reshape((-1,) + (1,) * (delta.ndim - 1))
        return old.at[held].add(jnp.where(kept, delta, 0.0))

    def add_part(part: str) -> PyTree:
        old, delta = inputs.personal[part], update.delta[part]
        if part != "experts":
            return jax.tree.map(jnp.add, old, delta)
        return {
            name: jax.tree.map(
                functools.partial(add_rows, layer), old[name], delta[name]
            )
            for layer, name in enumerate(layer_names(old))
        }

    return {part: add_part(part) for part in inputs.personal}


def renew_variate(
    inputs: ClientInput, update: ClientUpdate, hyper: Hyper, momentum: float
) -> PyTree:
    """ONE client's new control variate: its mean gradient (SCAFFOLD, option II).

    `c_i <- c_i - c - delta / (a lr)` with `c - c_i` the input's correction and `a` how
    often a gradient ends up in the delta, which is the number of steps in the paper,
    where there is no momentum. What is pruned has no gradient: its variate is 0, so
    that those of the clients that keep it sum to 0 at their optimum.
    """
    if not inputs.correction:
        return {}
    rate = 1.0 / (step_weights(inputs.steps, momentum) * hyper.client.learning_rate)
    renew = lambda correction, delta: -correction - rate * delta
    variate = jax.tree.map(renew, inputs.correction, update.delta)
    return multiply_parts(variate, update.keep)


def make_reply(
    update: ClientUpdate,
    inputs: ClientInput,
    sent: Array,
    outcome: Outcome,
    load: Array | None,
    hyper: Hyper,
    program: Program,
) -> Reply:
    """The reply of ONE client.

    Args:
      update: the client's result.
      inputs: of the client.
      sent: [] float32, experts that it sends.
      outcome: what became of its round.
      load: see `Reply.load`.
      hyper: hyperparameters.
      program: the parts that stay with the client, and its momentum.
    """
    return Reply(
        feedback=update.feedback,
        report=update.report,
        loss=update.loss,
        accuracy=update.accuracy,
        outcome=outcome,
        sent=sent,
        personal=train_personal(inputs, update, program.strategy.local_experts),
        variate=renew_variate(inputs, update, hyper, program.static.client.momentum),
        chosen=update.chosen,
        importance=update.importance,
        load=load,
    )


def keep_if(condition: Array, weights: Weights) -> Weights:
    """The weights of ONE client, or zeros."""
    return jax.tree.map(lambda weight: jnp.where(condition, weight, 0.0), weights)


def cast_reply(reply: Reply, code: DTypeLike, mask: DTypeLike) -> Reply:
    """The reply with outcomes' codes and chosen slots in other dtypes."""
    outcome = reply.outcome.replace(code=reply.outcome.code.astype(code))
    chosen = jax.tree.map(lambda leaf: leaf.astype(mask), reply.chosen)
    return reply.replace(outcome=outcome, chosen=chosen)


def follow_choice(
    inputs: ClientInput,
    conditions: Conditions,
    chosen: Array | None,
    kept: Array | None,
) -> tuple[ClientInput, Conditions]:
    """ONE client's inputs and conditions with the slots that it trains, [G, K] bool.

    `chosen` is None where it trains all that it has received, `kept` [G, K] the share
    of each expert that is not pruned, None for whole ones.
    """
    if chosen is None:
        return inputs, conditions
    traffic = train_chosen(conditions.traffic, chosen, kept)
    return inputs.replace(slot=chosen), conditions.replace(traffic=traffic)


def count_positions(steps: Array, program: Program) -> Array:
    """[] float32, positions that ONE client trains on, padding included."""
    taken = steps if program.static.ragged else program.sizes.local_steps
    return jnp.asarray(taken * program.scores.loss.size, jnp.float32)


def count_sent(
    weights: Weights, kept: Array | None, conditions: Conditions, program: Program
) -> Array:
    """[] float32, experts whose update ONE client sends, a layer.

    Args:
      weights: of the client; of no weight, no expert.
      kept: see `follow_choice`.
      conditions: of its round.
      program: whether the client asks for more than it trains.
    """
    sending = weights["experts"] > 0
    sending = sending if kept is None else sending * kept
    sent = sending.sum() / program.sizes.num_layers
    if program.static.privacy.flip:  # or the link would show what it trains
        sent = conditions.traffic.received
    return sent


def train_client(
    params: PyTree,
    inputs: ClientInput,
    conditions: Conditions,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    judge: JudgeFn,
    program: Program,
) -> tuple[ClientUpdate, Weights, Reply]:
    """What the server gets of ONE client's round: its update, weights and reply.

    Args:
      params: the server's params.
      inputs: what the client was sent.
      conditions: of its round, which it does not know.
      federation: data and sizes.
      hyper: hyperparameters.
      key: the client's of the round, consumed.
      client_update: its local steps.
      judge: the outcome of its round.
      program: the strategy's weights, the defences, the parts that stay with clients.

    Returns:
      The update as it may be merged, its weights, 0 where it does not count, and the
      reply.
    """
    private = program.static.privacy
    update = client_update(params, inputs, federation, hyper, key)
    kept = None
    if inputs.masks is not None:
        kept = share_experts(inputs.masks, program.units, program.rest_entries)
        kept = jnp.where(inputs.slot, kept, 0.0)
    inputs, conditions = follow_choice(inputs, conditions, update.chosen, kept)
    load = update.feedback.load if private.feedback_noise else None
    if private.feedback_noise:
        positions = count_positions(inputs.steps, program)
        update = hide_feedback(update, inputs, positions, hyper, key)
    size = federation.size[inputs.client]
    weights = weigh(inputs, update, size, hyper, program.strategy)
    if private.clip:
        weights = weigh_alike(weights, inputs, hyper, program.strategy)
    sent = count_sent(weights, kept, conditions, program)
    if program.static.fairness.power:
        assert update.first_loss is not None  # `static.fairness.power` is on
        weights = emphasise(weights, update.first_loss, hyper.fairness.power)
    outcome = judge(conditions, sent, update.finite)
    reply = make_reply(update, inputs, sent, outcome, load, hyper, program)
    if private.clip:
        update = clip_update(update, inputs, weights, hyper)
    return update, keep_if(outcome.arrived, weights), reply
