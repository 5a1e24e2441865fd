"""Step 4 of a round: the cohort trains, spread over devices and streamed through each.

Every device walks its share of the clients in chunks, vmaps `client_update` over a
chunk and adds the results to running sums, so that memory does not grow with the
cohort. One psum at the end joins the devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from fedmoe_jax.aggregate import (
    Sums,
    accumulate,
    accumulate_chunk,
    emphasise,
    weigh,
    zero_sums,
)
from fedmoe_jax.models.submodel import is_local
from fedmoe_jax.moe_layers import layer_names
from fedmoe_jax.optimizers import step_weights
from fedmoe_jax.privacy.feedback import hide_feedback
from fedmoe_jax.privacy.updates import clip_update, weigh_alike
from fedmoe_jax.program import Program
from fedmoe_jax.pruning.units import multiply_parts, share_experts
from fedmoe_jax.runtime.scheduling import chunk_size, schedule
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import (
    AlignState,
    Array,
    ClientInput,
    ClientUpdate,
    Evidence,
    Federation,
    Feedback,
    Hyper,
    PyTree,
    SimState,
)
from fedmoe_jax.world.costs import train_chosen
from fedmoe_jax.world.outcome import STALE, Conditions, Outcome

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
    """ONE client's personal parts after training."""

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
    hyper: Hyper,
    program: Program,
) -> Reply:
    """The reply of ONE client.

    Args:
      update: the client's result.
      inputs: of the client.
      sent: [] float32, experts that it sends.
      outcome: what became of its round.
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
    )


def keep_if(condition: Array, weights: dict[str, Array]) -> dict[str, Array]:
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


def take_clients(
    inputs: ClientInput, conditions: Conditions, position: Array
) -> tuple[ClientInput, Conditions]:
    """Clients at positions of any shape; positions beyond the cohort get zero steps."""
    count = inputs.client.shape[0]
    take = lambda leaf: leaf[jnp.minimum(position, count - 1)]
    inputs, conditions = jax.tree.map(take, (inputs, conditions))
    steps = jnp.where(position < count, inputs.steps, 0)
    return inputs.replace(steps=steps), conditions


def place_replies(replies: Reply, position: Array, count: int) -> Reply:
    """This device's replies at their places in the cohort [C], zeros elsewhere."""

    def place(leaf: Array) -> Array:
        empty = jnp.zeros((count, *leaf.shape[1:]), leaf.dtype)
        return empty.at[position].set(leaf, mode="drop")

    return jax.tree.map(place, replies)


def train_share(
    params: PyTree,
    chunks: tuple[ClientInput, Conditions],
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    judge: JudgeFn,
    program: Program,
) -> tuple[tuple[Sums, ...], Reply]:
    """The share of ONE device: streams its chunks of inputs through `client_update`.

    Args:
      params: the server's params.
      chunks: inputs and conditions with leading axes [chunks, clients of a chunk].
      federation: data and sizes.
      hyper: hyperparameters.
      key: the round's training key; each client folds its id into it.
      client_update: for ONE client.
      judge: the outcome of ONE client's round.
      program: the strategy's weights, and the parts that stay with clients.

    Returns:
      Sums over this device's clients, see `build_train_cohort`, and their replies with
      one leading axis.
    """
    stale = program.static.late.kind == "stale"  # then sums have a second row for them
    private = program.static.privacy

    def one_client(
        inputs: ClientInput, conditions: Conditions
    ) -> tuple[ClientUpdate, dict, Reply]:
        client_key = jax.random.fold_in(key, inputs.client)
        update = client_update(params, inputs, federation, hyper, client_key)
        kept = None
        if inputs.masks is not None:
            kept = share_experts(inputs.masks, program.units, program.rest_entries)
            kept = jnp.where(inputs.slot, kept, 0.0)
        inputs, conditions = follow_choice(inputs, conditions, update.chosen, kept)
        load = update.feedback.load if private.feedback_noise else None
        if private.feedback_noise:
            positions = count_positions(inputs.steps, program)
            update = hide_feedback(update, inputs, positions, hyper, client_key)
        size = federation.size[inputs.client]
        weights = weigh(inputs, update, size, hyper, program.strategy)
        if private.clip:
            weights = weigh_alike(weights, inputs, hyper, program.strategy)
        sending = weights["experts"] > 0
        sending = sending if kept is None else sending * kept
        sent = sending.sum() / program.sizes.num_layers
        if private.flip:  # all that it asks for, or the link would show what it trains
            sent = conditions.traffic.received
        if program.static.fairness.power:
            weights = emphasise(weights, update.loss, hyper.fairness.power)
        outcome = judge(conditions, sent, update.finite)
        reply = make_reply(update, inputs, sent, outcome, hyper, program)
        if private.clip:
            update = clip_update(update, inputs, weights, hyper)
        reply = reply.replace(load=load)
        return update, keep_if(outcome.arrived, weights), reply

    def choose_sums(code: Array) -> Array:
        return (code == STALE).astype(jnp.int32) if stale else jnp.zeros_like(code)

    def add_client(totals: Sums, client: tuple) -> tuple[Sums, None]:
        code, *sent = client
        return accumulate(totals, choose_sums(code) if stale else 0, *sent), None

    def one_chunk(totals: Sums, chunk: tuple) -> tuple[Sums, Reply]:
        inputs, _ = chunk
        if inputs.client.shape[0] == 1:  # vmapping one client would group convolutions
            returned = one_client(*jax.tree.map(lambda leaf: leaf[0], chunk))
            returned = jax.tree.map(lambda leaf: leaf[None], returned)
        else:
            returned = jax.vmap(one_client)(*chunk)
        updates, weights, replies = returned
        code = replies.outcome.code
        if program.platform == "cpu":
            clients = code, inputs, updates, weights
            return jax.lax.scan(add_client, totals, clients)[0], replies
        which = choose_sums(code)
        return accumulate_chunk(totals, which, inputs, updates, weights), replies

    rows = lambda leaf: jnp.zeros((1 + stale, *leaf.shape))
    start = jax.tree.map(rows, zero_sums(params, program.units))
    totals, replies = jax.lax.scan(one_chunk, start, chunks)
    take = lambda row: jax.tree.map(lambda leaf: leaf[row], totals)
    sums = tuple(take(row) for row in range(1 + stale))
    clients = chunks[0].client.size  # not -1: replies may have leaves without numbers
    join = lambda leaf: leaf.reshape(clients, *leaf.shape[2:])
    return sums, jax.tree.map(join, replies)


def build_train_cohort(
    client_update: Callable[..., ClientUpdate], judge: JudgeFn, program: Program
) -> Callable[..., tuple[tuple[Sums, ...], Reply]]:
    """Builds `train_cohort(params, inputs, conditions, federation, hyper, key)`.

    It is written for one device and joins the devices of the mesh axis `clients`.

    Args:
      client_update: for ONE client, see `client.build_client_update`.
      judge: the outcome of ONE client's round.
      program: clients vmapped at once, see `chunk_size`; weights; personal parts.

    Returns:
      A function of params, inputs [C], conditions [C], the federation, hyperparameters
      and the round's training key. It returns the sums of the updates that are merged
      now and, with `late="stale"`, of those that are merged in the next round; and the
      replies [C]. Both are the same on all devices.
    """

    def train_cohort(
        params: PyTree,
        inputs: ClientInput,
        conditions: Conditions,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> tuple[tuple[Sums, ...], Reply]:
        count, num_devices = inputs.client.shape[0], jax.lax.axis_size(CLIENTS)
        chunk = chunk_size(count, num_devices, program.static.run.client_chunk)
        position = schedule(inputs.steps, num_devices, chunk)
        position = position[jax.lax.axis_index(CLIENTS)]  # [chunks, clients of a chunk]
        sums, replies = train_share(
            params,
            take_clients(inputs, conditions, position),
            federation,
            hyper,
            key,
            client_update=client_update,
            judge=judge,
            program=program,
        )
        placed = place_replies(replies, position.reshape(-1), count)
        # With a single dtype the devices are joined by a single collective.
        numbers = cast_reply(placed, jnp.float32, jnp.float32)
        sums, reply = jax.lax.psum((sums, numbers), CLIENTS)
        return sums, cast_reply(reply, jnp.int32, bool)

    return train_cohort


def move_mean(variate: PyTree, new: PyTree, cohort: Array, share: Array) -> PyTree:
    """The mean of the variates, moved by the change of the cohort's alone.

    SCAFFOLD (arXiv 1910.06378), algorithm 1, line 17, with weights: the cost follows
    C, not N.

    Args:
      variate: `own` and `mean` before the round, see `SimState`.
      new: the cohort's new variates, like params with a leading C axis.
      cohort: [C] int32, client ids.
      share: [C] float32, each one's weight in the mean; 0 for those that keep theirs.
    """

    def move(mean: Array, rows: Array, fresh: Array) -> Array:
        kept = (share == 0).reshape((-1,) + (1,) * mean.ndim)
        change = jnp.where(kept, 0.0, fresh - rows[cohort])  # NaN of the broken too
        return mean + jnp.tensordot(share, change, axes=1)

    return jax.tree.map(move, variate["mean"], variate["own"], new)


def renew_clients(
    state: SimState, size: Array, cohort: Array, replies: Reply
) -> tuple[PyTree, PyTree]:
    """Personal parts and variates after a round in which some arrived.

    Args:
      state: before the round.
      size: [N] int32, examples of each client before anything drifts; a weight that
        changed would leave the mean of the variates behind.
      cohort: [C] int32, client ids.
      replies: of the cohort.
    """
    num_clients = state.participation.rounds.shape[0]
    arrived = jnp.where(replies.arrived, cohort, num_clients)  # others keep theirs
    renew = lambda rows, new: rows.at[arrived].set(new, mode="drop")
    personal = jax.tree.map(renew, state.personal, replies.personal)
    if not state.variate:
        return personal, {}
    share = jnp.where(replies.arrived, size[cohort] / size.sum(), 0.0)
    return personal, {
        "own": jax.tree.map(renew, state.variate["own"], replies.variate),
        "mean": move_mean(state.variate, replies.variate, cohort, share),
    }


def exchange(
    personal: PyTree,
    align: AlignState,
    evidence: Evidence,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> tuple[PyTree, AlignState, tuple[Array, Array]]:
    """Lets clients exchange personal parts, see `Strategy.exchange`.

    Returns:
      Personal parts, the alignment state, and the experts that each client of the
      cohort has sent to and received from others, [C] each.
    """
    act = program.strategy.exchange
    if act is None:
        nothing = jnp.zeros(evidence.client.shape)
        return personal, align, (nothing, nothing)
    personal, state, sent, received = act(
        personal, align.strategy, evidence, replies.arrived, hyper
    )
    return personal, align.replace(strategy=state), (sent, received)
