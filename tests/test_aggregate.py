"""Masked aggregation against a plain loop over clients, and the server step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax import program
from fedmoe_jax.aggregate import (
    Sums,
    accumulate,
    add_stale,
    mean_delta,
    merge,
    server_optimizer,
    weigh,
    zero_sums,
)
from fedmoe_jax.client import ClientInput, ClientUpdate
from fedmoe_jax.cohort import (
    Report,
    build_train_cohort,
    keep_if,
    place_reports,
    take_inputs,
)
from fedmoe_jax.rules import CALM
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.types import Federation, Feedback
from fedmoe_jax.world.outcome import BROKEN, MERGED, STALE, Outcome

EXPERTS, SLOTS = 4, 2
GATE_MODES = ("global", "holder_rows", "personal")
WEIGHTS = ("examples", "routed")
PARTS = ("stem", "gate", "experts", "head")

# Expert 3 is held only by the padding client 3 and in an invalid slot of client 1.
HELD = np.array([[0, 1], [2, 3], [1, 0], [3, 0], [0, 2], [2, 0]], np.int32)
SLOT = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]], bool)
STEPS = np.array([2, 1, 7, 0, 3, 1], np.int32)  # client 3 only pads
FINITE = np.array([1, 1, 1, 1, 0, 1], bool)  # client 4 diverged
SIZE = np.array([10, 20, 30, 40, 50, 60], np.int32)
LOAD = np.array([[3, 5], [7, 9], [0, 2], [4, 4], [6, 6], [8, 1]], np.float32)
CLIENTS = len(HELD)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(experts=EXPERTS, seed=0):
    return {
        "stem": {"kernel": draw(3, seed=seed)},
        "gate": {
            "kernel": draw(experts, 2, seed=seed + 1),
            "bias": draw(experts, seed=seed + 2),
        },
        "experts": {"kernel": draw(experts, 2, 3, seed=seed + 3)},
        "head": {"bias": draw(2, seed=seed + 4)},
    }


PARAMS = make_params()


def make_deltas(seed=10):
    """What each client returns; nothing but NaN from the one that diverged."""
    gate = PARAMS["gate"]
    deltas = {
        "stem": {"kernel": draw(CLIENTS, 3, seed=seed)},
        "gate": {
            name: draw(CLIENTS, *leaf.shape, seed=seed + 1 + leaf.ndim)
            for name, leaf in gate.items()
        },
        "experts": {"kernel": draw(CLIENTS, SLOTS, 2, 3, seed=seed + 4)},
        "head": {"bias": draw(CLIENTS, 2, seed=seed + 5)},
    }
    for leaf in jax.tree.leaves(deltas):
        leaf[4] = np.nan
    return deltas


DELTAS = make_deltas()


EVERYONE = np.ones(CLIENTS, np.int32)


def broadcast(held=HELD, slot=SLOT, steps=STEPS):
    count = len(held)
    gate = jax.tree.map(lambda leaf: np.stack([leaf] * count), PARAMS["gate"])
    inputs = ClientInput(
        client=np.arange(count, dtype=np.int32),
        steps=steps,
        budget=slot.sum(1, dtype=np.int32),
        scale=np.ones(count, np.float32),
        held=held,
        slot=slot,
        calibration=np.ones(count, np.float32),
        correction={},
        own={"gate": gate},
    )
    return jax.tree.map(jnp.asarray, inputs)


def make_updates(deltas=DELTAS, finite=FINITE, load=LOAD):
    count = len(finite)
    update = ClientUpdate(
        delta=deltas,
        feedback=Feedback(load, load, load, load, load, load[:, :0]),
        loss=np.zeros(count, np.float32),
        accuracy=np.zeros(count, np.float32),
        finite=finite,
    )
    return jax.tree.map(jnp.asarray, update)


def make_rules(gate_mode, weight):
    fields = {"gate.mode": gate_mode, "merge.weight": weight}
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    return program.make_rules(config, EXPERTS)


@functools.partial(jax.jit, static_argnames=("gate_mode", "weight"))
def sum_up(params, inputs, updates, size, *, gate_mode, weight):
    """Streams all clients into the sums."""

    def add(sums, client):
        weights = weigh(*client, None, make_rules(gate_mode, weight))
        weights = keep_if(client[1].finite, weights)
        return accumulate(sums, 0, *client[:2], weights), None

    start = jax.tree.map(lambda leaf: leaf[None], zero_sums(params))
    sums, _ = jax.lax.scan(add, start, (inputs, updates, size))
    return jax.tree.map(lambda leaf: leaf[0], sums)


@functools.partial(jax.jit, static_argnums=0)
def server_step(name, params, opt_state, sums, learning_rate):
    return merge(params, opt_state, sums, server_optimizer(name, learning_rate))


def init_server(name, params):
    tree = jax.tree.map(jnp.asarray, params)
    return tree, server_optimizer(name, jnp.float32(1.0)).init(tree)


# ---- the slow twin


def slow_mean(gate_mode, weight):
    """Mean deltas and summed weights [E], one client, one slot, one row at a time."""
    sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape), PARAMS)
    shared, rows, experts = 0.0, np.zeros(EXPERTS), np.zeros(EXPERTS)
    for c in range(CLIENTS):
        if not STEPS[c] or not FINITE[c]:
            continue
        delta = jax.tree.map(lambda leaf, c=c: leaf[c].astype(np.float64), DELTAS)
        held = {HELD[c, k] for k in range(SLOTS) if SLOT[c, k]}
        shared += SIZE[c]
        sums["stem"]["kernel"] += SIZE[c] * delta["stem"]["kernel"]
        sums["head"]["bias"] += SIZE[c] * delta["head"]["bias"]
        for e in range(EXPERTS):
            sent = {"global": True, "holder_rows": e in held, "personal": False}
            if sent[gate_mode]:
                rows[e] += SIZE[c]
                for name in ("kernel", "bias"):
                    sums["gate"][name][e] += SIZE[c] * delta["gate"][name][e]
        for k in range(SLOTS):
            if SLOT[c, k]:
                w = {"examples": SIZE[c], "routed": LOAD[c, k]}[weight]
                experts[HELD[c, k]] += w
                row = delta["experts"]["kernel"][k]
                sums["experts"]["kernel"][HELD[c, k]] += w * row
    for part, weights in (("gate", rows), ("experts", experts)):
        for leaf in sums[part].values():
            for e in range(EXPERTS):
                leaf[e] /= weights[e] if weights[e] else 1.0
    sums["stem"]["kernel"] /= shared
    sums["head"]["bias"] /= shared
    return sums, shared, rows, experts


def assert_close(tree, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    for leaf, other in pairs:
        assert leaf.shape == other.shape
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("gate_mode", GATE_MODES)
def test_mean_equals_the_loop_over_clients(gate_mode, weight):
    rules = {"gate_mode": gate_mode, "weight": weight}
    sums = sum_up(PARAMS, broadcast(), make_updates(), SIZE, **rules)
    expected, shared, rows, experts = slow_mean(gate_mode, weight)
    np.testing.assert_allclose(sums.weight["stem"], shared)
    np.testing.assert_allclose(sums.weight["gate"], rows)
    np.testing.assert_allclose(sums.weight["experts"], experts)
    assert_close(jax.jit(mean_delta)(sums), expected)
    params, opt_state = init_server("sgd", PARAMS)
    new, _ = server_step("sgd", params, opt_state, sums, 1.0)
    assert_close(new, jax.tree.map(np.add, PARAMS, expected))
    # Nobody held expert 3, and nobody holding it means no 0/0 and no decay.
    old = PARAMS["experts"]["kernel"]
    np.testing.assert_array_equal(new["experts"]["kernel"][3], old[3])
    assert np.all(np.abs(new["experts"]["kernel"][:3] - old[:3]).max((1, 2)) > 0)


def test_order_of_clients_does_not_matter():
    rules = {"gate_mode": "holder_rows", "weight": "routed"}
    inputs, updates = broadcast(), make_updates()
    sums = sum_up(PARAMS, inputs, updates, SIZE, **rules)
    order = np.array([5, 2, 0, 4, 1, 3])
    shuffled = jax.tree.map(lambda leaf: leaf[order], (inputs, updates, SIZE))
    assert_close(sum_up(PARAMS, *shuffled, **rules), sums, atol=1e-4)


def test_nobody_counts_nothing_changes():
    rules = {"gate_mode": "global", "weight": "examples"}
    inputs = broadcast(steps=np.zeros(CLIENTS, np.int32))
    sums = sum_up(PARAMS, inputs, make_updates(), SIZE, **rules)
    params, opt_state = init_server("adam", PARAMS)
    new, new_opt = server_step("adam", params, opt_state, sums, 1.0)
    for leaf, old in zip(
        jax.tree.leaves((new, new_opt[0].mu)),
        jax.tree.leaves((params, opt_state[0].mu)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, old)


def test_equal_clients_give_that_clients_params():
    client = make_params(seed=50)
    step = jax.tree.map(np.subtract, client, PARAMS)
    held = np.array([[0, 1], [2, 3], [3, 1], [2, 0], [0, 3], [1, 2]], np.int32)
    deltas = jax.tree.map(lambda leaf: np.stack([leaf] * CLIENTS), step)
    deltas["experts"] = {"kernel": step["experts"]["kernel"][held]}
    inputs = broadcast(held, np.ones((CLIENTS, SLOTS), bool), EVERYONE)
    rules = {"gate_mode": "holder_rows", "weight": "examples"}
    sums = sum_up(PARAMS, inputs, make_updates(deltas, EVERYONE > 0), SIZE, **rules)
    new, _ = server_step("sgd", *init_server("sgd", PARAMS), sums, 1.0)
    assert_close(new, client)


def test_a_gate_row_of_one_holder_moves_by_its_full_delta():
    rules = {"gate_mode": "holder_rows", "weight": "examples"}
    slot = SLOT & ((HELD != 2) | (np.arange(CLIENTS) == 1)[:, None])
    sums = sum_up(PARAMS, broadcast(slot=slot), make_updates(), SIZE, **rules)
    mean = jax.jit(mean_delta)(sums)
    for name, leaf in mean["gate"].items():  # client 1 alone holds expert 2
        np.testing.assert_allclose(leaf[2], DELTAS["gate"][name][1, 2], rtol=1e-6)
        assert np.all(np.asarray(leaf[3]) == 0)
    kernel = mean["experts"]["kernel"][2]
    np.testing.assert_allclose(kernel, DELTAS["experts"]["kernel"][1, 0], rtol=1e-6)


@pytest.mark.parametrize("gate_mode", ["global", "holder_rows"])
def test_dense_fedavg_is_the_weighted_mean_of_the_clients(gate_mode):
    params = make_params(experts=1)
    clients = [make_params(experts=1, seed=seed) for seed in (100, 200, 300)]
    deltas = [jax.tree.map(np.subtract, client, params) for client in clients]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *deltas)
    everyone, size = np.ones(3, bool), np.array([1, 2, 5], np.int32)
    inputs = broadcast(
        np.zeros((3, 1), np.int32), np.ones((3, 1), bool), np.ones(3, np.int32)
    )
    updates = make_updates(stacked, everyone, np.ones((3, 1), np.float32))
    rules = {"gate_mode": gate_mode, "weight": "examples"}
    sums = sum_up(params, inputs, updates, size, **rules)
    new, _ = server_step("sgd", *init_server("sgd", params), sums, 1.0)
    expected = jax.tree.map(lambda a, b, c: (a + 2 * b + 5 * c) / 8, *clients)
    assert_close(new, expected)


# ---- the server's optimiser


def make_sums(seed, trained):
    """Sums whose means are random, with the experts and rows `trained` [E]."""
    trained = np.asarray(trained, np.float32)
    delta = make_params(seed=seed)
    delta["gate"]["kernel"] *= trained[:, None]
    delta["gate"]["bias"] *= trained
    delta["experts"]["kernel"] *= trained[:, None, None]
    one = np.float32(1)
    weight = {"stem": one, "gate": trained, "experts": trained, "head": one}
    sums = Sums(delta=delta, weight=weight)
    return jax.tree.map(jnp.asarray, sums)


def moments(opt_state):
    """The parts of an optimiser state that mirror the params."""
    is_mirror = lambda node: isinstance(node, dict) and set(node) == set(PARTS)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_mirror)
    return [node for node in nodes if is_mirror(node)]


@pytest.mark.parametrize(
    ("name", "mirrors"), [("momentum", 1), ("adam", 2), ("yogi", 2), ("adagrad", 1)]
)
def test_an_expert_nobody_holds_keeps_value_and_moments(name, mirrors):
    params, opt_state = init_server(name, PARAMS)
    params, opt_state = server_step(
        name, params, opt_state, make_sums(60, [1] * 4), 0.1
    )
    for round in range(3):  # expert 1 has moments by now, and is not held any more
        sums = make_sums(70 + round, [1, 0, 1, 1])
        new, new_opt = server_step(name, params, opt_state, sums, 0.1)
        assert len(moments(new_opt)) == mirrors
        trees = zip(
            [new, *moments(new_opt)], [params, *moments(opt_state)], strict=True
        )
        for tree, old in trees:
            for part in PARTS:
                for leaf, before in zip(
                    tree[part].values(), old[part].values(), strict=True
                ):
                    moved = np.asarray(leaf) != np.asarray(before)
                    if part in ("gate", "experts"):
                        assert not moved[1].any()
                        moved = np.delete(moved, 1, axis=0)
                    assert moved.all()
        params, opt_state = new, new_opt


def test_server_steps_by_hand():
    first, second = make_sums(60, [1] * 4), make_sums(70, [1] * 4)
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


def test_streamed_sums_equal_stacked_sums():
    """np.average over all deltas at once, with the weights of every part."""
    finite = np.ones(CLIENTS, bool)
    deltas = jax.tree.map(np.copy, DELTAS)
    for leaf in jax.tree.leaves(deltas):
        leaf[4] = 1.5
    inputs, updates = broadcast(), make_updates(deltas, finite)
    rules = {"gate_mode": "holder_rows", "weight": "routed"}
    mean = jax.jit(mean_delta)(sum_up(PARAMS, inputs, updates, SIZE, **rules))
    weight = SIZE * (STEPS > 0)
    average = functools.partial(np.average, axis=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for part, name in (("stem", "kernel"), ("head", "bias")):
        close(mean[part][name], average(deltas[part][name], weights=weight))
    for expert in range(3):  # nobody holds expert 3
        holds = (expert == HELD) & SLOT & (STEPS > 0)[:, None]
        rows = weight * holds.any(1)
        for name, delta in deltas["gate"].items():
            close(mean["gate"][name][expert], average(delta[:, expert], weights=rows))
        slots = deltas["experts"]["kernel"][holds]
        found = mean["experts"]["kernel"][expert]
        close(found, average(slots, weights=LOAD[holds]))


# ---- the cohort


def test_positions_beyond_the_cohort_get_no_steps():
    inputs = broadcast(steps=EVERYONE)
    taken = take_inputs(inputs, jnp.array([[5, 0], [6, 2], [7, 9]]))
    assert taken.steps.tolist() == [[1, 1], [0, 1], [0, 0]]
    np.testing.assert_array_equal(taken.held[0], HELD[[5, 0]])
    np.testing.assert_array_equal(taken.client[1, 1], 2)
    for leaf in jax.tree.leaves(taken.own):
        assert leaf.shape[:2] == (3, 2)


def test_reports_return_to_their_places():
    loss = jnp.array([10.0, 20.0, 30.0])
    outcome = Outcome(loss.astype(int), loss, loss)
    report = Report(
        {}, loss, accuracy=loss, outcome=outcome, sent=loss, own={}, variate={}
    )
    placed = place_reports(report, jnp.array([3, 5, 1]), 4)  # position 5 pads
    assert placed.loss.tolist() == [0, 30, 0, 10]
    assert placed.outcome.code.tolist() == [0, 30, 0, 10]


def make_federation():
    fields = dict.fromkeys(Federation.__dataclass_fields__)
    return Federation(**fields | {"size": jnp.asarray(SIZE)})


def fake_update(params, inputs, federation, hyper, key):
    """What the client of this id returns according to the tables above."""
    tables = make_updates()
    return jax.tree.map(lambda leaf: leaf[inputs.client], tables)


def judge_by_numbers(inputs, sent, finite):
    """Nobody is late or lost; whose numbers are broken does not count."""
    code = jnp.where(finite, MERGED, BROKEN).astype(jnp.int32)
    return Outcome(code, jnp.ones(3), jnp.ones(3))


def test_late_updates_are_summed_apart():
    def judge(inputs, sent, finite):
        outcome = judge_by_numbers(inputs, sent, finite)
        late = finite & (inputs.client % 2 == 1)
        return outcome.replace(code=jnp.where(late, STALE, outcome.code))

    rules = make_rules("personal", "examples")
    rules = rules._replace(world=CALM._replace(late="stale"))
    train = build_train_cohort(fake_update, judge, rules)
    params = jax.tree.map(jnp.asarray, PARAMS)
    run = jax.jit(spread(train, build_mesh(1)))
    inputs = broadcast(steps=EVERYONE)
    (now, late), _ = run(params, inputs, make_federation(), {}, jax.random.key(0))
    odd = np.arange(len(SIZE)) % 2 == 1
    for sums, part in ((now, ~odd), (late, odd)):
        steps = np.where(part, EVERYONE, 0)  # without steps nobody counts
        expected = sum_up(
            PARAMS,
            broadcast(steps=steps),
            make_updates(),
            SIZE,
            gate_mode="personal",
            weight="examples",
        )
        assert_close(sums, expected, atol=1e-4)
    half = add_stale(now, late, jnp.float32(0.5))
    both = jax.tree.map(jnp.add, now.weight, late.weight)
    jax.tree.map(np.testing.assert_allclose, half.weight, both)
    expected = jax.tree.map(lambda a, b: a + 0.5 * b, now.delta, late.delta)
    jax.tree.map(np.testing.assert_allclose, half.delta, expected)


@pytest.mark.parametrize(("devices", "chunk"), [(1, 1), (1, 4), (8, 1), (2, 2)])
def test_devices_and_chunks_do_not_change_the_sums(devices, chunk):
    train = build_train_cohort(
        fake_update,
        judge_by_numbers,
        make_rules("personal", "examples")._replace(client_chunk=chunk),
    )
    steps = np.array([3, 1, 4, 1, 5, 9], np.int32)  # dealt in another order
    inputs = broadcast(steps=steps)
    params = jax.tree.map(jnp.asarray, PARAMS)
    run = jax.jit(spread(train, build_mesh(devices)))
    (sums,), report = run(params, inputs, make_federation(), {}, jax.random.key(0))
    rules = {"gate_mode": "personal", "weight": "examples"}
    expected = sum_up(PARAMS, inputs, make_updates(), SIZE, **rules)
    assert_close(sums, expected, atol=1e-4)
    np.testing.assert_array_equal(report.feedback.load, LOAD)
    np.testing.assert_array_equal(report.arrived, FINITE)
    assert report.outcome.code.dtype == jnp.int32
    for name, leaf in report.own["gate"].items():
        trained = inputs.own["gate"][name] + DELTAS["gate"][name]
        np.testing.assert_allclose(leaf, trained, rtol=1e-6)
