"""Prototype alignment: clients with like features hold the same experts.

After the dense warm-up (`upcycle.rounds`; 0: before the first round) every client sends
once what describes its data: the mean features of each label under the
server's model, and the labels' counts; for text one mean of hidden states in each MoE
layer. The server looks for groups of clients (see `align.prototypes`), and every group
has experts of its own: with k groups, expert e is of group e mod k. A client holds
those of its own group first, then those of groups that are near. Where there are no
groups all clients go on as in the warm-up: each holds expert 0 alone, a dense model,
as pooling is what wins there. `prototypes_bounded`, whose experts all stay in use,
draws at random each round instead.

Not a published system. Related are IFCA (arXiv 2006.04088), whose clients choose the
model of least loss and download all of them for it, and clustered FL by directions of
updates (Sattler et al., arXiv 1910.01991); here one small message decides.

A client that has never taken part sends the same message, and is served by the first
expert of the group whose means are nearest.

With `prototypes.period` clients are asked again, which new data and drifting labels
call for; images that rotate, blur or lose contrast are asked for as they were at first.
What the messages reveal is not protected: class means are what attacks on privacy use.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedmoe_jax.align.bounded import bounded_top_k
from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.align.prototypes import (
    Found,
    Means,
    average_groups,
    average_labels,
    center,
    count_search_bytes,
    find_groups,
    measure_distance,
)
from fedmoe_jax.align.ties import draw_lots
from fedmoe_jax.align.top_k import fill_slots, top_k
from fedmoe_jax.base import Model, Route, Routing, Scores, Strategy, Task
from fedmoe_jax.moe_layers import layer_keys, map_layers
from fedmoe_jax.options import NON_NEGATIVE, TRACED, Option
from fedmoe_jax.positions import weigh_routing
from fedmoe_jax.strategies.flex_moe import OPTIONS as BOUNDS
from fedmoe_jax.strategies.flex_moe import make_bounds, weigh_slots
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Federation,
    Hyper,
    PyTree,
    SimState,
    Sizes,
)

SECOND = 1e-3  # by which a group's next expert ranks below the one before
LOT = 1e-4  # by which lots decide between experts of equal scores


def shape_features(sizes: Sizes) -> tuple[int, int]:
    """L and D of `describe_features` in ONE layer."""
    return sizes.num_classes, sizes.gate_width


def init(
    sizes: Sizes, shape: Callable[[Sizes], tuple[int, int]] = shape_features
) -> dict[str, Array]:
    """`score` [N, E] at most 1, 0 before the first message, and what was found.

    That are the mean of all clients' messages, `center` [L, D], and the groups' means
    less it, `mu` [E, L, D], of which as many count as there are groups.
    """
    return {
        "score": jnp.zeros((sizes.num_clients, sizes.num_experts)),
        "center": jnp.zeros(shape(sizes)),
        "mu": jnp.zeros((sizes.num_experts, *shape(sizes))),
        "groups": jnp.zeros(()),
        "groups_gap": jnp.zeros(()),
        "groups_chance": jnp.ones(()),
    }


def read_features(gate: PyTree) -> PyTree:
    """Gates whose logits are the features themselves: identities, D experts wide."""
    if "kernel" not in gate:
        return {name: read_features(tree) for name, tree in gate.items()}
    width = gate["kernel"].shape[-1]
    return {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}


def take_dense(params: PyTree) -> PyTree:
    """The server's model with its first expert alone, leaves [1, ...]."""
    first = jax.tree.map(lambda leaf: leaf[:1], params["experts"])
    return params | {"experts": first}


def apply_dense(
    params: PyTree, frozen: PyTree, batch: PyTree, model: Model, sizes: Sizes
) -> tuple[PyTree, Routing]:
    """Outputs and routing of a model of `take_dense`, without dropout."""
    slots = sizes.num_layers, 1
    held, slot = jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool)
    return model.apply(params, frozen, batch, held, slot, Route(1), None)


def weigh_positions(scores: Scores, weight: Array) -> Array:
    """The weights of all positions of a batch, of examples with the weights [B]."""
    own = jnp.ones(scores.loss.shape) if scores.weight is None else scores.weight
    return own * weight.reshape((-1,) + (1,) * (own.ndim - 1))


def sum_examples(
    sum_batch: Callable[[PyTree, Array], PyTree],
    federation: Federation,
    index: Array,
    size: Array,
    task: Task,
    sizes: Sizes,
) -> PyTree:
    """Sums of ONE client over all of its examples.

    Args:
      sum_batch: (batch, weight [B], 0 for padding) -> sums of any form.
      federation: the data.
      index: [M] int32, the client's examples, padded.
      size: [] int32, how many of them count.
      task: of the program.
      sizes: static sizes.
    """
    block = sizes.batch_size
    index = jnp.pad(index, (0, -len(index) % block))

    def sum_block(number: Array) -> PyTree:
        place = number * block + jnp.arange(block)
        batch = take_batch(federation.train, index[place], federation.statistics, task)
        return sum_batch(batch, (place < size).astype(jnp.float32))

    def add(number: Array, sums: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, sums, sum_block(number))

    shapes = jax.eval_shape(sum_block, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, -(-size // block), add, zeros)


def describe_features(
    params: PyTree,
    federation: Federation,
    index: Array,
    size: Array,
    model: Model,
    task: Task,
    sizes: Sizes,
) -> Means:
    """ONE client's mean features of each label, leaves [G, L, D] and [G, L].

    Args:
      params: of the server.
      federation: the data.
      index: [M] int32, the client's examples, padded.
      size: [] int32, how many of them count.
      model: of the program.
      task: says what the labels are.
      sizes: static sizes.
    """
    dense = take_dense(params) | {"gate": read_features(params["gate"])}

    def sum_batch(batch: PyTree, weight: Array) -> tuple[Array, Array]:
        outputs, routing = apply_dense(dense, federation.fixed, batch, model, sizes)
        own = weigh_positions(task.loss(outputs, batch), weight)
        routing = weigh_routing(routing, own)
        assert routing.logits is not None and routing.weight is not None
        count = routing.weight[:, :, None]
        if task.labels is not None:
            label = jax.nn.one_hot(task.labels(batch), sizes.num_classes)
            count = count * label[None]
        return jnp.einsum("gpl,gpd->gld", count, routing.logits), count.sum(axis=1)

    total, count = sum_examples(sum_batch, federation, index, size, task, sizes)
    return Means(total / jnp.maximum(count, 1e-6)[:, :, None], count)


def keep_numbers(found: Found, before: Array) -> Found:
    """Groups under the numbers that most of their clients' groups had before.

    Else the experts of two groups that are the same as before would change places. One
    number after the other goes to the group whose clients score it highest together.

    Args:
      found: now.
      before: [N, E] float32, scores of experts before; all 0 where there were none.
    """
    most = found.distance.shape[1]
    own = jax.nn.one_hot(found.distance.argmin(axis=1), most)
    gain = own.T @ before[:, :most]  # [group, number]
    there = jnp.arange(most) < found.count
    gain = jnp.where(there[:, None] & there[None], gain, -jnp.inf)

    def settle(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        gain, group = carry
        row, number = jnp.unravel_index(gain.argmax(), gain.shape)
        free = jnp.isfinite(gain[row, number])
        group = group.at[number].set(jnp.where(free, row, group[number]))
        return gain.at[row].set(-jnp.inf).at[:, number].set(-jnp.inf), group

    start = gain, jnp.arange(most)
    group = jax.lax.fori_loop(0, found.count, settle, start)[1]
    return found._replace(distance=found.distance[:, group])


def score_experts(found: Found, num_experts: int) -> Array:
    """Scores [N, E] of experts by the distance of their groups from each client.

    `1 - (d - min d) / (max d - min d)`, less `SECOND` for every expert that the group
    has before it. All 0 where there are no groups.
    """
    count, distance = found.count, found.distance
    expert = jnp.arange(num_experts)
    distance = distance[:, expert % count]
    low, high = (f(axis=1, keepdims=True) for f in (distance.min, distance.max))
    near = 1 - (distance - low) / jnp.maximum(high - low, 1e-9)
    behind = SECOND * (expert // count)
    return jnp.where(count > 1, near - behind[None], 0.0)


def survey(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    model: Model,
    task: Task,
    sizes: Sizes,
    describe: Callable[..., Means],
) -> tuple[SimState, PyTree]:
    """A stage: every client's message, made by `describe`, and the groups they form."""
    if sizes.num_experts == 1:  # nothing to choose, and no gate that reads features
        return state, federation.frozen

    def ask(own: tuple[Array, Array]) -> Means:
        return describe(state.params, federation, *own, model, task, sizes)

    # One client after the other: they differ in size, and padding would cost as much.
    means = jax.lax.map(ask, (federation.index, federation.size))

    def look(means: Means, before: Array, key: Array) -> dict[str, Array]:
        most = min(sizes.num_experts, sizes.num_clients)
        shrink = hyper.prototypes.shrink
        found = find_groups(key, means, shrink, most=most)
        found = keep_numbers(found, before)
        member = jax.nn.one_hot(found.distance.argmin(axis=1), sizes.num_experts)
        mean = average_labels(means)
        return {
            "score": score_experts(found, sizes.num_experts),
            "center": mean,
            "mu": average_groups(center(means, mean), member, shrink),
            "groups": found.count.astype(jnp.float32),
            "groups_gap": found.gap,
            "groups_chance": found.chance,
        }

    keys = layer_keys(jax.random.fold_in(key, state.round), sizes.num_layers)
    before = state.align.strategy["score"]
    found = map_layers(look, sizes.num_layers, (1, 0, 0))(means, before, keys)
    align = state.align.replace(strategy=found)
    return state.replace(align=align), federation.frozen


def welcome(
    state: SimState,
    federation: Federation,
    index: Array,
    size: Array,
    hyper: Hyper,
    *,
    model: Model,
    task: Task,
    sizes: Sizes,
    describe: Callable[..., Means],
    alone: bool = True,
) -> Array:
    """The first expert of the nearest group. `Strategy.welcome`.

    Before clients have been asked all experts; where they form no groups the first one,
    which all train, if it is trained `alone`, else all.
    """
    if sizes.num_experts == 1:
        return jnp.ones((sizes.num_layers, 1), bool)
    means = describe(state.params, federation, index, size, model, task, sizes)

    def choose(own: Means, known: dict[str, Array]) -> Array:
        one = jax.tree.map(lambda leaf: leaf[None], own)
        distance = measure_distance(center(one, known["center"]), known["mu"])[0]
        there = jnp.arange(sizes.num_experts) < known["groups"]
        nearest = jnp.where(there, distance, jnp.inf).argmin()
        first = jnp.arange(sizes.num_experts) == nearest  # 0 of one group
        return jnp.where(known["groups"] > (0 if alone else 1), first, True)

    over_layers = map_layers(choose, sizes.num_layers, (0, 0))
    return over_layers(means, state.align.strategy)


def prefer_near(evidence: Evidence, hyper: Hyper) -> Array:
    """The affinity [C, E] in [0, 1]: of the score; 0 where no groups are known."""
    return jnp.maximum(evidence.state["score"][evidence.client], 0.0)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """The k_c experts of highest score; expert 0 alone where no groups are known."""
    known = evidence.state["groups"] > 1
    score = evidence.state["score"][evidence.client]
    # All are 0 where no groups are known, and the first of equals is expert 0.
    capacity = jnp.where(known, evidence.capacity, 1)
    return top_k(score, capacity, sizes.max_held)


def assign_bounded(
    evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array
) -> Assignment:
    """Most score in total, with every expert's holders within FLEX-MoE's bounds.

    Where no groups are known scores are drawn afresh.
    """
    known = evidence.state["groups"] > 1
    score = evidence.state["score"][evidence.client]
    drawn = uniform_scores(key, evidence.client, sizes.num_experts)
    weight = weigh_slots(evidence)
    slots = fill_slots(evidence.capacity, sizes.max_held).sum()
    lots = draw_lots(key, evidence.client, sizes.num_experts)
    bounds = make_bounds(
        weight, slots / sizes.num_experts, sizes.num_experts, hyper, True
    )
    scores = jnp.where(known, score, drawn) + LOT * lots
    return bounded_top_k(
        scores, evidence.capacity, bounds, max_held=sizes.max_held, whole=True
    )


def is_asked(round: Array, hyper: Hyper) -> Array:
    """[] bool, whether clients send their messages just before a round, [] int32."""
    numbers = hyper.prototypes
    since = round - hyper.upcycle.rounds
    again = (numbers.period > 0) & (since % jnp.maximum(numbers.period, 1) == 0)
    return (since == 0) | ((since > 0) & again)


def count_features(round: Array, hyper: Hyper, sizes: Sizes) -> tuple[Array, int]:
    """Means and counts of all labels; one pass over examples. `Strategy.message`."""
    each = sizes.num_layers * sizes.num_classes * (sizes.gate_width + 1)
    return jnp.where(is_asked(round, hyper), each, 0.0), 1


def count_stage_bytes(
    sizes: Sizes, shape: Callable[[Sizes], tuple[int, int]] = shape_features
) -> float:
    """Bytes of the search for groups in all MoE layers. `Strategy.stage_bytes`."""
    most = min(sizes.num_experts, sizes.num_clients)
    search = count_search_bytes(sizes.num_clients, shape(sizes), most)
    return sizes.num_layers * search


def make_stages(describe: Callable[..., Means]) -> tuple:
    """`Strategy.stages` of a strategy whose clients send what `describe` makes."""
    when = "upcycle.rounds", "prototypes.period"
    return ((when, functools.partial(survey, describe=describe)),)


OPTIONS = (
    Option(
        "prototypes.period",
        NON_NEGATIVE,
        "rounds after which clients send again what they send after the dense warm-up; "
        "a multiple of chunk_rounds; 0: never",
        TRACED,
    ),
    Option(
        "prototypes.shrink",
        NON_NEGATIVE,
        "examples by which a group's mean features shrink towards those of all",
        TRACED,
    ),
)

PROTOTYPES = Strategy(
    assign=assign,
    affinity=prefer_near,
    about=(
        "Finds groups of clients from the mean features of their labels, and gives "
        "each group experts of its own; without groups all train one expert."
    ),
    needs="clients' class means and label counts",
    options=OPTIONS,
    init=init,
    stages=make_stages(describe_features),
    welcome=functools.partial(welcome, describe=describe_features),
    message=count_features,
    stage_bytes=count_stage_bytes,
)

PROTOTYPES_BOUNDED = PROTOTYPES._replace(
    assign=assign_bounded,
    welcome=functools.partial(welcome, describe=describe_features, alone=False),
    about=(
        "As prototypes, but bounds the number of every expert's holders; without "
        "groups draws at random."
    ),
    options=(*OPTIONS, *BOUNDS),
)
