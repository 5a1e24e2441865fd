"""Every client's model on the client's own test set.

Where the server has a whole model, the test examples of all clients are scored side by
side, each with the experts that its own client holds; else client by client.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.evaluation.held_sets import run_model
from fedmoe_jax.evaluation.panel import Panel
from fedmoe_jax.evaluation.scoring import (
    Answers,
    ClientView,
    Examples,
    answer_experts,
    answer_none,
    count_values,
    encode,
    evaluation_route,
    join_frozen,
    list_values,
    mix_answers,
    take_model,
    take_parts,
    view_clients,
)
from fedmoe_jax.evaluation.sources import choose_batch
from fedmoe_jax.models.dispatch import dispatch
from fedmoe_jax.models.one_layer import apply_experts
from fedmoe_jax.models.routing import make_gates
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import Array, Federation, Lists, PyTree, SimState
from fedmoe_jax.world.step import View


def score_own_tests(
    state: SimState,
    view: View,
    bias: Array | None,
    lists: Lists,
    panel: Panel,
    program: Program,
) -> tuple[dict[str, Array], Array]:
    """Scores of clients on their own test sets, written for one device of the mesh.

    Args:
      state: the simulation.
      view: of the world as it is now.
      bias: [N, G, E] float32, see `gate_bias`; None without one.
      lists: the own test sets.
      panel: the clients that are scored where parts are personal.
      program: the static parts.

    Returns:
      `right` [V, n], the sums of values, and `total` [n], that of their weights; and
      [n] bool, the clients that count. All clients, those of the panel where parts are
      personal.
    """
    if program.strategy.personal:
        counts = score_personal(state, view, lists, panel, program)
        counted = panel.counted
    else:
        clients = view_clients(state, view.federation, bias)
        counts = score_shared(state, view, clients, lists, program)
        counted = jnp.ones_like(counts["total"], bool)
    return jax.lax.psum(counts, CLIENTS), counted


def sum_examples(
    outputs: PyTree, batch: PyTree, program: Program
) -> tuple[Array, Array]:
    """Values [V, B] and weight [B] of each example, summed over its positions."""
    scores = program.task.loss(outputs, batch)
    weight = jnp.ones_like(scores.score) if scores.weight is None else scores.weight
    per_example = lambda leaf: leaf.reshape(len(leaf), -1).sum(axis=1)
    values = [per_example(each * weight) for each in list_values(scores, program)]
    return jnp.stack(values), per_example(weight)


def read_batch(
    federation: Federation, example: Array, amount: Array | None, program: Program
) -> PyTree:
    """The examples `example` [B], drifted by `amount` [] where it is given.

    Those numbered after the training examples are test examples.
    """
    taken = take_rows(federation, example), jnp.arange(len(example))
    drift = program.static.drift.images, amount
    return take_batch(*taken, federation.statistics, program.task, *drift)


def take_rows(federation: Federation, example: Array) -> PyTree:
    """Rows [B, ...] of training examples, and of test examples numbered after them."""

    def take(train: Array, test: Array) -> Array:
        place = example - len(train)
        own = place.reshape(-1, *[1] * (train.ndim - 1)) >= 0
        return jnp.where(own, test[jnp.maximum(place, 0)], train[example])

    return jax.tree.map(take, federation.train, federation.test)


# ---- the server's model


def list_places(lists: Lists) -> Array:
    """Places in the flat lists that hold an example, before all others: [n * M]."""
    count, width = lists.index.shape
    owned = jnp.arange(width)[None] < lists.size[:, None]
    return jnp.nonzero(owned.ravel(), size=count * width, fill_value=0)[0]


def read_mixed(view: View, example: Array, client: Array, program: Program) -> PyTree:
    """The examples [B], drifted where their clients [B] have drifted."""
    batch = read_batch(view.federation, example, None, program)
    if view.distortion is None:
        return batch
    drifted = read_batch(view.federation, example, view.distortion.max(), program)
    moved = view.distortion[client] > 0
    choose = lambda new, old: jnp.where(
        moved.reshape(-1, *[1] * (new.ndim - 1)), new, old
    )
    return jax.tree.map(choose, drifted, batch)


def answer_held(
    params: PyTree,
    frozen: PyTree,
    held: Array,
    bias: Array | None,
    examples: Examples,
    program: Program,
) -> PyTree:
    """Outputs [B, ...] of each example with experts of its own, `held` [B, G, E].

    `bias` [B, G, E] is of its gate logits, None for none.
    """
    if program.model.parts is not None:
        held, bias = jax.tree.map(lambda leaf: leaf[:, 0], (held, bias))
        return answer_parts(params, held, bias, examples, program)
    everything = jnp.broadcast_to(jnp.arange(held.shape[2]), held.shape[1:])

    def answer(batch: PyTree, slot: Array, bias: Array | None) -> PyTree:
        one = examples._replace(batch=jax.tree.map(lambda leaf: leaf[None], batch))
        outputs, _ = run_model(params, frozen, everything, slot, bias, one, program)
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return jax.vmap(answer)(examples.batch, held, bias)


def answer_parts(
    params: PyTree,
    held: Array,
    bias: Array | None,
    examples: Examples,
    program: Program,
) -> Array:
    """As `answer_held`, of a model with parts; `held` and `bias` [B, E]."""
    encoded = encode(params, examples, program)
    assert encoded.logits is not None
    how = evaluation_route(program)

    def choose(row: Array, mask: Array, bias: Array | None) -> Array:
        return make_gates(row[None], mask, how._replace(bias=bias))[0]

    gates = jax.vmap(choose)(encoded.logits, held, bias)
    (experts,), parts = params["experts"].values(), take_parts(program)
    features, shared = encoded.features, encoded.shared
    if program.strategy.every_expert:
        outputs = apply_experts(parts, experts, features, None)
        answers = answer_experts(params["head"], outputs, shared, program)
    else:
        need = examples.real[:, None] & (gates > 0)
        answers = dispatch(parts, experts, params["head"], features, need, shared)
        if program.strategy.mix == "probabilities":
            answers = jax.nn.softmax(answers)
    none = answer_none(params["head"], experts, features, shared, program)
    return mix_answers(gates, Answers(answers, none), program)


def score_shared(
    state: SimState, view: View, clients: ClientView, lists: Lists, program: Program
) -> dict[str, Array]:
    """The share of one device; the examples of all clients [N] in batches."""
    federation = view.federation
    params = join_frozen(state, federation, program)
    slots = clients.held, clients.bias
    device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
    place, total = list_places(lists), lists.size.sum()
    width, size = lists.index.shape[1], min(choose_batch(program), len(place))

    def add(number: Array, counts: dict[str, Array]) -> dict[str, Array]:
        position = (number * num_devices + device) * size + jnp.arange(size)
        real = position < total
        chosen = place[jnp.minimum(position, len(place) - 1)]
        client, example = chosen // width, lists.index.ravel()[chosen]
        batch = read_mixed(view, example, client, program)
        examples = Examples(batch, jnp.zeros((size, 0)), real)
        # Of pooled data there is one.
        row = jnp.minimum(client, len(clients.held) - 1)
        own, bias = jax.tree.map(lambda leaf: leaf[row], slots)
        model = params, federation.fixed
        outputs = answer_held(*model, own, bias, examples, program)
        right, weight = sum_examples(outputs, batch, program)
        return {
            "right": counts["right"]
            .at[:, client]
            .add(jnp.where(real[None], right, 0.0)),
            "total": counts["total"].at[client].add(jnp.where(real, weight, 0.0)),
        }

    batches = -(-total // (num_devices * size))
    return jax.lax.fori_loop(0, batches, add, no_counts(len(lists.size), program))


def no_counts(num_clients: int, program: Program) -> dict[str, Array]:
    """`right` [V, n] and `total` [n] of no example."""
    return {
        "right": jnp.zeros((count_values(program), num_clients)),
        "total": jnp.zeros(num_clients),
    }


# ---- personal parts


def score_personal(
    state: SimState, view: View, lists: Lists, panel: Panel, program: Program
) -> dict[str, Array]:
    """The share of one device; the panel's clients one after the other."""
    count = len(panel.counted)
    client = jnp.arange(count) if panel.client is None else panel.client
    device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
    most = -(-count // num_devices)
    place = device * most + jnp.arange(most)
    row = jnp.minimum(place, count - 1)
    score = lambda row: score_client(
        state, view, lists, panel, client[row], row, program
    )
    counts, empty = jax.lax.map(score, row), no_counts(count, program)
    return {
        "right": empty["right"].at[:, place].set(counts["right"].T, mode="drop"),
        "total": empty["total"].at[place].set(counts["total"], mode="drop"),
    }


def score_client(
    state: SimState,
    view: View,
    lists: Lists,
    panel: Panel,
    client: Array,
    row: Array,
    program: Program,
) -> dict[str, Array]:
    """`right` [V] and `total` [] of ONE client, which has its own row of the panel."""
    federation = view.federation
    own = take_model(panel.models, row)
    held = jnp.broadcast_to(jnp.arange(own.held.shape[1]), own.held.shape)
    params = join_frozen(state, federation, program)
    model = take_submodel(params, own.personal, held, program.strategy.local_experts)
    amount = None if view.distortion is None else view.distortion[client]
    index, length = lists.index[client], lists.size[client]
    size = min(choose_batch(program), len(index))

    def add(number: Array, counts: dict[str, Array]) -> dict[str, Array]:
        position = number * size + jnp.arange(size)
        real = position < length
        example = index[jnp.minimum(position, len(index) - 1)]
        batch = read_batch(federation, example, amount, program)
        examples = Examples(batch, jnp.zeros((size, 0)), real)
        slots = held, own.held, own.bias
        outputs, _ = run_model(model, federation.fixed, *slots, examples, program)
        right, weight = sum_examples(outputs, batch, program)
        return {
            "right": counts["right"] + jnp.where(real[None], right, 0.0).sum(axis=1),
            "total": counts["total"] + jnp.where(real, weight, 0.0).sum(),
        }

    batches = -(-length // size)
    one = jax.tree.map(lambda leaf: leaf[..., 0], no_counts(1, program))
    return jax.lax.fori_loop(0, batches, add, one)
