"""Masked aggregation against a plain loop over clients, and the server step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_config, make_feedback, make_inputs, make_update

from fedmoe_jax.aggregate import (
    EXPERT_WEIGHTS,
    Sums,
    accumulate,
    accumulate_chunk,
    add_stale,
    emphasise,
    keep_untrained,
    mean_delta,
    merge,
    weigh,
    zero_sums,
)
from fedmoe_jax.moe_layers import LAYERED, layer_names
from fedmoe_jax.optimizers import server_optimizer
from fedmoe_jax.program import make_static, resolve
from fedmoe_jax.reply import keep_if
from fedmoe_jax.strategies import find_strategy

pytestmark = pytest.mark.slow

EXPERTS, SLOTS = 4, 2
GATE_MODES = ("global", "holder_rows", "personal")
WEIGHTS = ("examples", "routed")
PARTS = ("stem", "gate", "experts", "head")

# [C, G, K]. In the first layer expert 3 is held only by the padding client 3 and in an
# invalid slot of client 1, in the second expert 0 likewise.
HELD = np.array(
    [
        [[0, 1], [1, 3]],
        [[2, 3], [2, 0]],
        [[1, 0], [3, 2]],
        [[3, 0], [0, 1]],
        [[0, 2], [3, 2]],
        [[2, 0], [2, 1]],
    ],
    np.int32,
)
SLOT = np.array(
    [
        [[1, 1], [1, 1]],
        [[1, 0], [1, 0]],
        [[1, 1], [1, 1]],
        [[1, 1], [1, 1]],
        [[1, 1], [1, 1]],
        [[1, 0], [1, 1]],
    ],
    bool,
)
STEPS = np.array([2, 1, 7, 0, 3, 1], np.int32)  # client 3 only pads
FINITE = np.array([1, 1, 1, 1, 0, 1], bool)  # client 4 diverged
SIZE = np.array([10, 20, 30, 40, 50, 60], np.int32)
LOAD = np.array([[3, 5], [7, 9], [0, 2], [4, 4], [6, 6], [8, 1]], np.float32)
LOAD = np.stack([LOAD, LOAD[::-1]], axis=1)  # [C, G, K]
POSITIONS = 10  # of each client
CLIENTS = len(HELD)
EVERY_CLIENT = np.ones(CLIENTS, np.int32)
UNHELD = (3, 0)  # in each layer
layers = pytest.mark.parametrize("num_layers", [1, 2])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(num_layers=1, experts=EXPERTS, seed=0):
    names = [f"moe_{layer}" for layer in range(num_layers)]
    gate = lambda s: {
        "kernel": draw(experts, 2, seed=s + 1),
        "bias": draw(experts, seed=s + 2),
    }
    expert = lambda s: {"kernel": draw(experts, 2, 3, seed=s + 3)}
    seeds = [seed + 1000 * layer for layer in range(num_layers)]
    return {
        "stem": {"kernel": draw(3, seed=seed)},
        "gate": dict(zip(names, map(gate, seeds), strict=True)),
        "experts": dict(zip(names, map(expert, seeds), strict=True)),
        "head": {"bias": draw(2, seed=seed + 4)},
    }


def make_deltas(num_layers=1, seed=10):
    """The deltas of all clients; nothing but NaN from the one that diverged."""
    rows = lambda leaf, s: draw(CLIENTS, *leaf.shape, seed=seed + s)
    deltas, params = {}, make_params(num_layers)
    for number, (part, tree) in enumerate(sorted(params.items())):
        leaves, shape = jax.tree.flatten(tree)
        if part == "experts":
            leaves = [leaf[:SLOTS] for leaf in leaves]
        drawn = [rows(leaf, 10 * number + i) for i, leaf in enumerate(leaves)]
        deltas[part] = jax.tree.unflatten(shape, drawn)
    for leaf in jax.tree.leaves(deltas):
        leaf[4] = np.nan
    return deltas


PARAMS, DELTAS = make_params(), make_deltas()


def send(num_layers=1, held=HELD, slot=SLOT, steps=STEPS):
    return make_inputs(held[:, :num_layers], slot[:, :num_layers], steps=steps)


def reply(deltas, finite=FINITE, load=LOAD):
    load = load[:, : len(deltas["gate"])]
    feedback = make_feedback(load, routed=load / POSITIONS)
    return make_update(deltas, feedback, finite=finite)


def make_strategy(gate_mode, weight):
    fields = {"gate.mode": gate_mode, "merge.weight": weight}
    return resolve(find_strategy("load_balanced"), make_config(**fields))


@functools.partial(jax.jit, static_argnames=("gate_mode", "weight"))
def sum_up(params, inputs, updates, size, *, gate_mode, weight):
    """Streams all clients into the sums."""
    strategy = make_strategy(gate_mode, weight)

    def add(sums, client):
        weights = weigh(*client, None, strategy)
        weights = keep_if(client[1].finite, weights)
        return accumulate(sums, 0, *client[:2], weights), None

    start = jax.tree.map(lambda leaf: leaf[None], zero_sums(params, ()))
    sums, _ = jax.lax.scan(add, start, (inputs, updates, size))
    return jax.tree.map(lambda leaf: leaf[0], sums)


def build_server(name, learning_rate):
    static = make_static(make_config(**{"server.optimizer": name}))
    return server_optimizer(static.server, learning_rate)


@functools.partial(jax.jit, static_argnums=0)
def server_step(name, params, opt_state, sums, learning_rate):
    return merge(params, opt_state, sums, build_server(name, learning_rate))


def init_server(name, params):
    tree = jax.tree.map(jnp.asarray, params)
    return tree, build_server(name, jnp.float32(1.0)).init(tree)


# ---- the slow twin


def slow_mean(gate_mode, weight, num_layers):
    """Mean deltas and summed weights [G, E]: one client, layer, slot, row at a time."""
    params, deltas = make_params(num_layers), make_deltas(num_layers)
    sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    names = layer_names(params["gate"])
    rows, experts = np.zeros((2, num_layers, EXPERTS))
    shared = 0.0
    for c in range(CLIENTS):
        if not STEPS[c] or not FINITE[c]:
            continue
        delta = jax.tree.map(lambda leaf, c=c: leaf[c].astype(np.float64), deltas)
        shared += SIZE[c]
        sums["stem"]["kernel"] += SIZE[c] * delta["stem"]["kernel"]
        sums["head"]["bias"] += SIZE[c] * delta["head"]["bias"]
        for g, layer in enumerate(names):
            held = {HELD[c, g, k] for k in range(SLOTS) if SLOT[c, g, k]}
            for e in range(EXPERTS):
                sent = {"global": True, "holder_rows": e in held, "personal": False}
                if sent[gate_mode]:
                    rows[g, e] += SIZE[c]
                    for name in ("kernel", "bias"):
                        row = delta["gate"][layer][name][e]
                        sums["gate"][layer][name][e] += SIZE[c] * row
            for k in range(SLOTS):
                if SLOT[c, g, k]:
                    share = LOAD[c, g, k] / POSITIONS
                    w = SIZE[c] * {"examples": share > 0, "routed": share}[weight]
                    experts[g, HELD[c, g, k]] += w
                    row = delta["experts"][layer]["kernel"][k]
                    sums["experts"][layer]["kernel"][HELD[c, g, k]] += w * row
    for part, weights in (("gate", rows), ("experts", experts)):
        for g, layer in enumerate(names):
            for leaf in sums[part][layer].values():
                for e in range(EXPERTS):
                    leaf[e] /= weights[g, e] if weights[g, e] else 1.0
    sums["stem"]["kernel"] /= shared
    sums["head"]["bias"] /= shared
    return sums, shared, rows, experts


def assert_close(tree, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    for leaf, other in pairs:
        assert leaf.shape == other.shape
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=atol)


@layers
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("gate_mode", GATE_MODES)
def test_mean_delta_equals_the_loop_over_clients(gate_mode, weight, num_layers):
    start, updates = make_params(num_layers), reply(make_deltas(num_layers))
    choice = {"gate_mode": gate_mode, "weight": weight}
    sums = sum_up(start, send(num_layers), updates, SIZE, **choice)
    expected, shared, rows, experts = slow_mean(gate_mode, weight, num_layers)
    np.testing.assert_allclose(sums.weight["stem"], shared)
    np.testing.assert_allclose(sums.weight["gate"], rows)
    np.testing.assert_allclose(sums.weight["experts"], experts)
    assert_close(jax.jit(mean_delta)(sums), expected)
    params, opt_state = init_server("sgd", start)
    new, _ = server_step("sgd", params, opt_state, sums, 1.0)
    assert_close(new, jax.tree.map(np.add, start, expected))
    # Without a holder there is no 0/0 and no decay.
    for unheld, layer in zip(UNHELD, layer_names(start["experts"]), strict=False):
        old, found = (tree["experts"][layer]["kernel"] for tree in (start, new))
        np.testing.assert_array_equal(found[unheld], old[unheld])
        moved = np.delete(np.abs(found - old).max((1, 2)), unheld)
        assert np.all(moved > 0)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weigh_by_hand_leaves_out_experts_without_a_position(weight):
    """A client with 40 examples, of whose 10 positions expert 2 saw none."""
    inputs = make_inputs(np.array([[[0, 2]]]), np.ones((1, 1, 2), bool))
    load = np.array([[5.0, 0.0]], np.float32)
    feedback = make_feedback(load, routed=load / 10)
    update = make_update({"gate": make_params()["gate"]}, feedback)
    client = jax.tree.map(lambda leaf: leaf[0], inputs), update, jnp.int32(40)
    weights = weigh(*client, None, make_strategy("holder_rows", weight))
    assert weights["experts"].tolist() == [[{"examples": 40, "routed": 20}[weight], 0]]
    assert weights["gate"].tolist() == [[40, 0, 40, 0]]  # the row has learnt


def test_weigh_by_routed_follows_examples_and_not_steps():
    """Two clients that train as many positions weigh as the examples they own."""
    load = np.full((1, 2), 96.0, np.float32)
    feedback = make_feedback(load[0], routed=jnp.array([0.75, 0.25]))
    few, many = (
        EXPERT_WEIGHTS["routed"](jnp.ones(2, bool), feedback, jnp.int32(size), None)
        for size in (10, 192)
    )
    assert few.tolist() == [7.5, 2.5] and many.tolist() == [144, 48]


def test_accumulate_in_any_order_gives_the_same_sums():
    choice = {"gate_mode": "holder_rows", "weight": "routed"}
    inputs, updates = send(), reply(DELTAS)
    sums = sum_up(PARAMS, inputs, updates, SIZE, **choice)
    order = np.array([5, 2, 0, 4, 1, 3])
    shuffled = jax.tree.map(lambda leaf: leaf[order], (inputs, updates, SIZE))
    assert_close(sum_up(PARAMS, *shuffled, **choice), sums, atol=1e-4)


@layers
@pytest.mark.parametrize("gate_mode", GATE_MODES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_accumulate_chunk_is_accumulate_of_its_clients(num_layers, gate_mode, weight):
    """Into two sums, with deltas scaled by client."""
    which = np.array([0, 1, 1, 0, 1, 0], np.int32)
    scale = np.linspace(0.5, 2.0, CLIENTS, dtype=np.float32)
    inputs = send(num_layers).replace(scale=scale)
    updates, strategy = reply(make_deltas(num_layers)), make_strategy(gate_mode, weight)
    weights = jax.vmap(lambda *client: weigh(*client, None, strategy))(
        inputs, updates, SIZE
    )
    weights = jax.vmap(keep_if)(FINITE, weights)
    zero = zero_sums(make_params(num_layers), ())
    start = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape)), zero)
    clients = which, inputs, updates, weights
    add = lambda sums, client: (accumulate(sums, *client), None)
    streamed, _ = jax.lax.scan(add, start, clients)
    assert_close(accumulate_chunk(start, *clients), streamed, atol=1e-4)
    assert np.ptp(np.asarray(streamed.delta["stem"]["kernel"]), axis=0).all()


def test_merge_changes_nothing_where_no_client_counts():
    choice = {"gate_mode": "global", "weight": "examples"}
    inputs = send(steps=np.zeros(CLIENTS, np.int32))
    sums = sum_up(PARAMS, inputs, reply(DELTAS), SIZE, **choice)
    params, opt_state = init_server("adam", PARAMS)
    new, new_opt = server_step("adam", params, opt_state, sums, 1.0)
    for leaf, old in zip(
        jax.tree.leaves((new, new_opt)),
        jax.tree.leaves((params, opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, old)


def test_merge_of_equal_clients_gives_that_clients_params():
    client = make_params(seed=50)
    step = jax.tree.map(np.subtract, client, PARAMS)
    held = np.array([[0, 1], [2, 3], [3, 1], [2, 0], [0, 3], [1, 2]], np.int32)
    deltas = jax.tree.map(lambda leaf: np.stack([leaf] * CLIENTS), step)
    deltas["experts"] = jax.tree.map(lambda leaf: leaf[held], step["experts"])
    inputs = send(1, held[:, None], np.ones_like(SLOT), EVERY_CLIENT)
    choice = {"gate_mode": "holder_rows", "weight": "examples"}
    sums = sum_up(PARAMS, inputs, reply(deltas, EVERY_CLIENT > 0), SIZE, **choice)
    new, _ = server_step("sgd", *init_server("sgd", PARAMS), sums, 1.0)
    assert_close(new, client)


def test_mean_delta_of_one_holder_is_its_full_delta():
    choice = {"gate_mode": "holder_rows", "weight": "examples"}
    others = np.arange(CLIENTS)[:, None, None] != 1
    sums = sum_up(
        *(PARAMS, send(slot=SLOT & ~((HELD == 2) & others)), reply(DELTAS), SIZE),
        **choice,
    )
    mean = jax.jit(mean_delta)(sums)
    for name, leaf in mean["gate"]["moe_0"].items():  # client 1 alone holds expert 2
        delta = DELTAS["gate"]["moe_0"][name]
        np.testing.assert_allclose(leaf[2], delta[1, 2], rtol=1e-6)
        assert np.all(np.asarray(leaf[3]) == 0)
    kernel = mean["experts"]["moe_0"]["kernel"][2]
    delta = DELTAS["experts"]["moe_0"]["kernel"]
    np.testing.assert_allclose(kernel, delta[1, 0], rtol=1e-6)


@pytest.mark.parametrize("gate_mode", ["global", "holder_rows"])
def test_merge_of_dense_models_is_the_weighted_mean_of_the_clients(gate_mode):
    params = make_params(experts=1)
    clients = [make_params(experts=1, seed=seed) for seed in (100, 200, 300)]
    deltas = [jax.tree.map(np.subtract, client, params) for client in clients]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *deltas)
    size, one = np.array([1, 2, 5], np.int32), (3, 1, 1)
    inputs = make_inputs(np.zeros(one, np.int32), np.ones(one, bool))
    updates = reply(stacked, np.ones(3, bool), np.ones(one, np.float32))
    choice = {"gate_mode": gate_mode, "weight": "examples"}
    sums = sum_up(params, inputs, updates, size, **choice)
    new, _ = server_step("sgd", *init_server("sgd", params), sums, 1.0)
    expected = jax.tree.map(lambda a, b, c: (a + 2 * b + 5 * c) / 8, *clients)
    assert_close(new, expected)


def test_add_stale_discounts_deltas_and_not_weights():
    choice = {"gate_mode": "global", "weight": "examples"}
    now = sum_up(PARAMS, send(), reply(DELTAS), SIZE, **choice)
    late = jax.tree.map(lambda leaf: 3 * leaf + 1, now)
    half = add_stale(now, late, jnp.float32(0.5))
    both = jax.tree.map(jnp.add, now.weight, late.weight)
    jax.tree.map(np.testing.assert_allclose, half.weight, both)
    expected = jax.tree.map(lambda a, b: a + 0.5 * b, now.delta, late.delta)
    jax.tree.map(np.testing.assert_allclose, half.delta, expected)


# ---- the server's optimiser


def make_sums(seed, experts, rows=None):
    """Sums whose means are random where `experts` and gate `rows` [G, E] are trained.

    Rows are those of the experts unless given.
    """
    experts = np.asarray(experts, np.float32)
    rows = experts if rows is None else np.asarray(rows, np.float32)
    delta = make_params(len(experts), seed=seed)
    for part, trained in (("gate", rows), ("experts", experts)):
        for row, layer in zip(trained, layer_names(delta[part]), strict=True):
            for leaf in delta[part][layer].values():
                leaf *= row.reshape((-1,) + (1,) * (leaf.ndim - 1))
    one = np.float32(1)
    weight = {"stem": one, "gate": rows, "experts": experts, "head": one}
    return jax.tree.map(jnp.asarray, Sums(delta=delta, weight=weight))


def moments(opt_state):
    """The moments of the server's optimiser, trees like the params."""
    is_moment = lambda node: isinstance(node, dict)

    def take(state):
        nodes = jax.tree.leaves(state, is_leaf=is_moment)
        return [node for node in nodes if is_moment(node)]

    layers = lambda part: {
        name: take(opt_state[part][name]) for name in opt_state[part]
    }
    found = {p: layers(p) if p in LAYERED else take(opt_state[p]) for p in opt_state}
    count = len(found["stem"])
    pick = lambda part, i: {name: nodes[i] for name, nodes in found[part].items()}
    return [
        {p: pick(p, i) if p in LAYERED else found[p][i] for p in found}
        for i in range(count)
    ]


def assert_moved(tree, old, weight):
    """Every number has moved, but for the rows without weight."""
    for part in ("stem", "head"):
        for leaf, before in zip(tree[part].values(), old[part].values(), strict=True):
            assert np.all(np.asarray(leaf) != np.asarray(before))
    for part in ("gate", "experts"):
        names = layer_names(tree[part])
        for layer, trained in zip(names, np.asarray(weight[part]) > 0, strict=True):
            for leaf, before in zip(
                tree[part][layer].values(), old[part][layer].values(), strict=True
            ):
                moved = np.asarray(leaf) != np.asarray(before)
                assert moved[trained].all() and not moved[~trained].any()


OPTIMIZERS = [("momentum", 1), ("adam", 2), ("fedadam", 2), ("yogi", 2), ("adagrad", 1)]
TRAINED = ([1, 0, 1, 1], [1, 1, 1, 0])  # experts of each layer
GATE_ROWS = ([0, 1, 1, 1], [1, 0, 0, 1])


@layers
@pytest.mark.parametrize(("name", "mirrors"), OPTIMIZERS)
def test_merge_keeps_value_and_moments_of_untrained_experts(name, mirrors, num_layers):
    params, opt_state = init_server(name, make_params(num_layers))
    every = make_sums(60, np.ones((num_layers, EXPERTS)))
    params, opt_state = server_step(name, params, opt_state, every, 0.1)
    for round in range(3):  # untrained experts have moments by now
        sums = make_sums(70 + round, TRAINED[:num_layers], GATE_ROWS[:num_layers])
        new, new_opt = server_step(name, params, opt_state, sums, 0.1)
        assert len(moments(new_opt)) == mirrors
        trees = [new, *moments(new_opt)], [params, *moments(opt_state)]
        for tree, old in zip(*trees, strict=True):
            assert_moved(tree, old, sums.weight)
        params, opt_state = new, new_opt


@pytest.mark.parametrize(("name", "mirrors"), [("momentum", 1), ("adam", 2)])
def test_keep_untrained_of_an_optimiser_state_of_two_layers(name, mirrors):
    _, old = init_server(name, make_params(2))
    old = jax.tree.map(lambda leaf: leaf + 5, old)
    new = jax.tree.map(lambda leaf: leaf + 1, old)
    weight = make_sums(0, TRAINED, GATE_ROWS).weight
    weight["stem"] = jnp.zeros(())  # no client has trained the stem
    kept = keep_untrained(new, old, weight)
    assert jax.tree.structure(kept) == jax.tree.structure(old)
    found = moments(kept)
    assert len(found) == mirrors
    for tree in found:
        assert np.all(np.asarray(tree["stem"]["kernel"]) == 5)
        assert np.all(np.asarray(tree["head"]["bias"]) == 6)
        for layer, (experts, rows) in enumerate(zip(TRAINED, GATE_ROWS, strict=True)):
            name_of = f"moe_{layer}"
            kernel = tree["experts"][name_of]["kernel"][:, 0, 0]
            assert kernel.tolist() == [5 + count for count in experts]
            for leaf in tree["gate"][name_of].values():
                first = np.asarray(leaf).reshape(EXPERTS, -1)[:, 0]
                assert first.tolist() == [5 + count for count in rows]
    if name == "adam":
        assert kept["stem"][0].count == 5 and kept["head"][0].count == 6
        for layer, experts in enumerate(TRAINED):
            steps = kept["experts"][f"moe_{layer}"][0].count
            assert steps.tolist() == [5 + count for count in experts]


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_merge_takes_the_first_step_of_an_expert_whenever_it_comes(name):
    """As if the rounds before, in which nothing trained it, had not been."""
    params, opt_state = start = init_server(name, PARAMS)
    for round in range(9):
        others = make_sums(80 + round, [[0, 1, 1, 1]], [[0, 1, 1, 1]])
        params, opt_state = server_step(name, params, opt_state, others, 0.1)
    every = make_sums(99, np.ones((1, EXPERTS)))
    late, _ = server_step(name, params, opt_state, every, 0.1)
    first, _ = server_step(name, *start, every, 0.1)
    for part in ("gate", "experts"):
        (names,) = layer_names(PARAMS[part])
        for leaf, other in zip(
            jax.tree.leaves(late[part][names]),
            jax.tree.leaves(first[part][names]),
            strict=True,
        ):
            np.testing.assert_array_equal(leaf[0], other[0])
            assert np.all(np.asarray(leaf[1]) != np.asarray(other[1]))


def test_merge_by_hand():
    first, second = make_sums(60, np.ones((1, 4))), make_sums(70, np.ones((1, 4)))
    step = lambda name, params, opt, sums: server_step(name, params, opt, sums, 0.5)
    new, _ = step("sgd", *init_server("sgd", PARAMS), first)
    assert_close(new, jax.tree.map(lambda w, d: w + 0.5 * d, PARAMS, first.delta))
    new, opt = step("momentum", *init_server("momentum", PARAMS), first)
    new, _ = step("momentum", new, opt, second)
    expected = jax.tree.map(
        lambda w, a, b: w + 0.5 * a + 0.5 * (0.9 * a + b),
        PARAMS,
        first.delta,
        second.delta,
    )
    assert_close(new, expected)
    new, _ = step("adam", *init_server("adam", PARAMS), first)
    expected = jax.tree.map(
        lambda w, d: w + 0.5 * d / (np.abs(d) + 1e-3), PARAMS, first.delta
    )
    assert_close(new, expected)


def test_mean_delta_of_streamed_sums_equals_the_stacked_average():
    """np.average over all deltas at once, with the weights of every part."""
    finite = np.ones(CLIENTS, bool)
    deltas = jax.tree.map(np.copy, DELTAS)
    for leaf in jax.tree.leaves(deltas):
        leaf[4] = 1.5
    choice = {"gate_mode": "holder_rows", "weight": "routed"}
    sums = sum_up(PARAMS, send(), reply(deltas, finite), SIZE, **choice)
    mean = jax.jit(mean_delta)(sums)
    weight = SIZE * (STEPS > 0)
    average = functools.partial(np.average, axis=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for part, name in (("stem", "kernel"), ("head", "bias")):
        close(mean[part][name], average(deltas[part][name], weights=weight))
    for expert in range(3):  # expert 3 has no holder
        holds = (expert == HELD[:, 0]) & SLOT[:, 0] & (STEPS > 0)[:, None]
        rows = weight * holds.any(1)
        for name, delta in deltas["gate"]["moe_0"].items():
            found = mean["gate"]["moe_0"][name][expert]
            close(found, average(delta[:, expert], weights=rows))
        slots = deltas["experts"]["moe_0"]["kernel"][holds]
        found = mean["experts"]["moe_0"]["kernel"][expert]
        routed = SIZE[:, None] * LOAD[:, 0]
        close(found, average(slots, weights=routed[holds]))


def test_weigh_leaves_out_what_stays_with_the_client():
    """Personal parts, the last experts where they are local, and whole idle clients."""
    strategy = make_strategy("global", "examples")._replace(
        personal=("gate", "experts", "head"), local_experts=2
    )
    one = lambda tree, c: jax.tree.map(lambda leaf: leaf[c], tree)
    inputs, updates = send(2), reply(make_deltas(2))
    found = weigh(one(inputs, 0), one(updates, 0), SIZE[0], None, strategy)
    assert found["stem"] == 10 and found["head"] == 0
    assert found["gate"].tolist() == np.zeros((2, EXPERTS)).tolist()
    # It holds 0 and 1, in the second layer 1 and 3; 2 and 3 are local.
    assert found["experts"].tolist() == [[10, 10], [10, 0]]
    padding = weigh(one(inputs, 3), one(updates, 3), SIZE[3], None, strategy)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(padding))


# ---- losses


def test_emphasise_by_hand():
    weights = {"stem": jnp.float32(3), "gate": jnp.array([[1.0, 0.0]])}
    found = emphasise(weights, jnp.float32(0.5), jnp.float32(2))
    np.testing.assert_allclose(found["stem"], 0.75, rtol=1e-5)
    np.testing.assert_allclose(found["gate"], [[0.25, 0.0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "power", "factor"),
    [(0.0, 1.0, 1e-15), (-1.0, 1.0, 1e-15), (1e6, 50.0, 1e15), (7.0, 0.0, 1.0)],
)
def test_emphasise_loses_no_client_and_no_sum(loss, power, factor):
    found = emphasise({"stem": jnp.ones(())}, jnp.float32(loss), jnp.float32(power))
    np.testing.assert_allclose(found["stem"], factor, rtol=1e-4)
