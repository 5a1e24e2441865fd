"""Step 4 of a round: the cohort trains, spread over devices and streamed through each.

Every device walks its share of the clients in chunks, vmaps `client_update` over a
chunk and adds the results to running sums, so that memory does not grow with the
cohort. One psum at the end joins the devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmoe_jax.aggregate import Sums, accumulate, accumulate_chunk, zero_sums
from fedmoe_jax.program import Program
from fedmoe_jax.reply import JudgeFn, Reply, Weights, cast_reply, train_client
from fedmoe_jax.runtime.scheduling import chunk_size, schedule
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import (
    AlignState,
    Array,
    ClientInput,
    ClientUpdate,
    Evidence,
    Federation,
    Hyper,
    PyTree,
    SimState,
)
from fedmoe_jax.world.outcome import STALE, Conditions


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
    train = functools.partial(
        train_client, client_update=client_update, judge=judge, program=program
    )

    def one_client(
        inputs: ClientInput, conditions: Conditions
    ) -> tuple[ClientUpdate, Weights, Reply]:
        client_key = jax.random.fold_in(key, inputs.client)
        return train(params, inputs, conditions, federation, hyper, client_key)

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
