"""One round and a chunk of rounds: closed forms, invariants, slow twin against scan."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    NO_CLASS,
    B,
    C,
    E,
    K,
    R,
    Run,
    T,
    all_finite,
    assert_same,
    breakable,
    make_data,
    make_devices,
    make_federation,
    make_logit_model,
    make_program,
    plan_run,
    see_calm,
    send_inputs,
    start,
    stems,
    tiny_config,
    use_linear_model,
    use_model,
)
from jax.extend.core import jaxprs_in_params

from fedmoe_jax import round as round_file
from fedmoe_jax import state as state_file
from fedmoe_jax.aggregate import no_rows, zero_sums
from fedmoe_jax.broadcast import build_judge
from fedmoe_jax.client import build_client_update
from fedmoe_jax.cohort import build_train_cohort
from fedmoe_jax.options import replace
from fedmoe_jax.program import make_hyper
from fedmoe_jax.round import build_round, build_run_rounds, scan_rounds
from fedmoe_jax.runtime.sharding import replicate, spread
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies import STRATEGIES
from fedmoe_jax.train.plan import Member, plan_waves
from fedmoe_jax.train.run import build_job
from fedmoe_jax.types import Assignment
from fedmoe_jax.world.costs import Traffic, count_bytes
from fedmoe_jax.world.outcome import Conditions

pytestmark = pytest.mark.slow


def compile_round(program):
    return jax.jit(spread(build_round(program), program.mesh))


class Base(NamedTuple):
    """A load-balanced run: its round and a chunk as compiled programs."""

    run: Run
    round_step: Callable
    run_rounds: Callable
    traces: list


@functools.cache
def base():
    traces = []

    def counting(*args):
        traces.append(1)
        return STRATEGIES["load_balanced"].assign(*args)

    plan = plan_run()
    strategy = plan.program.strategy._replace(assign=counting)
    program = use_linear_model(plan.program._replace(strategy=strategy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_file, "build_client_update", breakable)
        round_step, run_rounds = compile_round(program), build_run_rounds(program)
    return Base(start(plan, program), round_step, run_rounds, traces)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def make_label_federation(counts):
    """Clients of blank images whose labels have the histograms `counts` [N, L]."""
    counts = np.array(counts)
    size, total = counts.sum(1), counts.sum()
    y = np.concatenate([np.repeat(np.arange(counts.shape[1]), row) for row in counts])
    index = np.zeros((len(counts), size.max()), np.int32)
    for client, first in enumerate(np.cumsum(size) - size):
        index[client, : size[client]] = np.arange(first, first + size[client])
    return make_federation(
        train={
            "x": jnp.zeros((total, 2, 2, 1), jnp.uint8),
            "y": jnp.asarray(y, jnp.int32),
        },
        index=jnp.asarray(index),
        size=jnp.asarray(size, jnp.int32),
        steps=jnp.ones(len(counts), jnp.int32),
        label_mix=jnp.asarray(counts / size[:, None], jnp.float32),
        public=jnp.zeros(0, jnp.int32),
        statistics={"mean": jnp.zeros((2, 2, 1)), "std": jnp.ones((2, 2, 1))},
        frozen={},
        devices=make_devices(len(counts), memory=1e12, flops=1e12, rate=1e12),
        drift_source=jnp.arange(len(counts)),
    )


def fixed_assignment(evidence, hyper, sizes, key):
    """Clients 0 and 1 hold expert 0, client 2 expert 2; expert 1 has no holder."""
    expert = jnp.array([0, 0, 2], jnp.int32)[evidence.client]
    return Assignment(expert[:, None], jnp.ones((evidence.client.shape[0], 1), bool))


def test_run_rounds_converges_to_the_label_frequencies_of_the_holders():
    counts = np.array([[4, 1, 1], [0, 1, 1], [1, 2, 0]])  # sizes 6, 2 and 3
    # One step on 6 examples sees every example of every client equally often, so that a
    # round is exactly one step of gradient descent.
    sizes = {"num_clients": 3, "cohort_size": 3, "num_experts": 3, "max_held": 1}
    sizes |= {"num_active": 1, "local_steps": 1, "batch_size": 6, "chunk_rounds": 400}
    changes = sizes | {"client.momentum": 0.0, "client.learning_rate": 1.0}
    program = use_model(
        make_program(make_data(3, (2, 2, 1)), **changes), make_logit_model(3, 3)
    )
    strategy = program.strategy._replace(assign=fixed_assignment)
    program = program._replace(strategy=strategy)
    hyper = make_hyper(tiny_config(**changes))
    state, _ = init_state(jax.random.key(0), hyper, program)
    first = np.array(state.params["experts"]["moe"]["logits"])
    federation = make_label_federation(counts)
    state, metrics = build_run_rounds(program)(state, federation, hyper)
    found = jax.nn.softmax(state.params["experts"]["moe"]["logits"], axis=-1)
    np.testing.assert_allclose(found[0], np.array([4, 2, 2]) / 8, atol=1e-4)
    np.testing.assert_array_equal(state.params["experts"]["moe"]["logits"][1], first[1])
    # A class that no holder owns has no finite minimum; its frequency only nears 0.
    np.testing.assert_allclose(found[2], np.array([1, 2, 0]) / 3, atol=5e-3)
    mean_loss = -sum(
        (row / row.sum() * np.log(np.maximum(found[expert], 1e-9))).sum()
        for row, expert in zip(counts, [0, 0, 2], strict=True)
    )
    np.testing.assert_allclose(metrics["train_loss"][-1], mean_loss / 3, atol=1e-3)


def test_run_rounds_is_a_loop_over_rounds():
    run, round_step, run_rounds, _ = base()
    state, rows = run.state, []
    for _ in range(R):
        state, metrics = round_step(state, run.federation, run.hyper)
        rows.append(metrics)
    scanned, stacked = run_rounds(copy(run.state), run.federation, run.hyper)
    # XLA may fuse a loop body in another way than the same program alone.
    assert_same(scanned, state, atol=1e-6)
    assert int(scanned.round) == R
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    assert rows.keys() == stacked.keys()
    for name, values in rows.items():
        np.testing.assert_allclose(stacked[name], values, rtol=1e-5, atol=1e-6)


def test_round_step_draws_a_cohort_of_its_own():
    run, round_step, *_ = base()
    state, cohorts = run.state, []
    for _ in range(4):
        before = np.array(state.align.times_held)
        state, _ = round_step(state, run.federation, run.hyper)
        took_part = np.array(state.align.times_held != before).any((1, 2))
        cohorts.append(tuple(np.flatnonzero(took_part)))
    assert all(len(cohort) == C for cohort in cohorts)
    assert len(set(cohorts)) > 1


def test_run_rounds_is_traced_once_for_rounds_seeds_and_hyperparameters():
    run, _, run_rounds, traces = base()
    other = start(plan_run(seed=1), run.program, seed=1)
    before, kernels = len(traces), []
    for state, federation in (
        (copy(run.state), run.federation),
        (other.state, other.federation),
    ):
        state, _ = run_rounds(state, federation, run.hyper)
        rate = 2 * run.hyper.client.learning_rate
        faster = replace(run.hyper, client={"learning_rate": rate})
        state, _ = run_rounds(state, federation, faster)
        kernels.append(state.params["head"]["kernel"])
    assert len(traces) - before <= 1  # none if another test ran it before
    assert run_rounds._cache_size() == 1
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01


def test_build_run_rounds_of_equal_programs_is_one():
    programs = [plan_run(seed=seed).program for seed in (0, 1)]
    assert build_run_rounds(programs[0]) is build_run_rounds(programs[1])


def test_build_round_vmaps_over_seeds():
    run, round_step, _, _ = base()
    keys = jax.random.split(jax.random.key(7), 2)
    states = [init_state(key, run.hyper, run.program)[0] for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    round_of_all = jax.vmap(build_round(run.program), in_axes=(0, None, None))
    together = jax.jit(spread(round_of_all, run.program.mesh))
    together = together(stacked, run.federation, run.hyper)
    for seed, state in enumerate(states):
        found = jax.tree.map(lambda leaf, s=seed: leaf[s], together)
        state = replicate(state, run.program.mesh)
        expected = round_step(state, run.federation, run.hyper)
        assert_same(found[0].params, expected[0].params, atol=1e-5)
        assert_same(found[0].align, expected[0].align, atol=1e-5)
        np.testing.assert_array_equal(
            found[1]["expert_load"], expected[1]["expert_load"]
        )


# Who else is in the cohort must not matter.


@functools.cache
def cohort_function():
    run, *_ = base()
    strategy = run.program.strategy._replace(personal=("gate",), gate_weight=no_rows)
    program = run.program._replace(strategy=strategy)
    train_cohort = build_train_cohort(breakable(program), build_judge(program), program)
    return jax.jit(spread(train_cohort, program.mesh))


def train_clients(clients, federation=None):
    """Sums and replies of a cohort; client c holds experts c and c + 1 (mod E)."""
    run, *_ = base()
    cohort = jnp.array(clients, jnp.int32)
    held = (cohort[:, None] + jnp.arange(K)[None]) % E
    state, data = run.state, federation or run.federation
    run = run._replace(federation=data)
    gates = jax.tree.map(
        lambda leaf: jnp.stack([leaf] * len(clients)), {"gate": state.params["gate"]}
    )
    inputs = send_inputs(run, state, cohort, held, held >= 0)
    conditions = Conditions(
        client=cohort,
        device=make_devices(len(clients)),
        events=jax.tree.map(lambda leaf: leaf[cohort], see_calm(run).events),
        traffic=Traffic(*[jnp.ones(len(clients))] * 7),
        examples=jnp.ones(len(clients)),
    )
    (sums,), replies = cohort_function()(
        state.params,
        inputs.replace(personal=gates),
        conditions,
        data,
        run.hyper,
        jax.random.key(3),
    )
    return sums, replies


def test_train_cohort_in_any_order():
    sums, replies = train_clients([1, 4, 5, 8])
    order = np.array([2, 0, 3, 1])
    other_sums, other = train_clients([5, 1, 8, 4])
    # The sums add the same numbers in another order.
    total = float(sums.weight["stem"])
    assert_same(other_sums.delta, sums.delta, atol=1e-6 * total)
    assert_same(other, jax.tree.map(lambda leaf: leaf[order], replies))


def test_train_cohort_gives_updates_that_do_not_depend_on_the_others():
    _, replies = train_clients([1, 4, 5, 8])
    _, other = train_clients([0, 5, 6, 9])
    row = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    assert_same(row(other, 1), row(replies, 2))
    assert float(jnp.abs(replies.loss[0] - replies.loss[2])) > 0


# Broken clients.


def poison(federation, client):
    """Gives one client labels that are no classes."""
    own = federation.index[client][: int(federation.size[client])]
    y = federation.train["y"].at[own].set(NO_CLASS)
    return federation.replace(train=federation.train | {"y": y})


def test_train_cohort_sums_nothing_of_a_broken_client():
    run, *_ = base()
    with_it, replies = train_clients([1, 4, 5, 8], poison(run.federation, 5))
    np.testing.assert_array_equal(replies.arrived, [True, True, False, True])
    assert math.isnan(replies.loss[2])
    without, _ = train_clients([1, 4, 8, 8])
    once, _ = train_clients([8, 8, 8, 8])
    # 1 + 4 + 8 = (1 + 4 + 8 + 8) - (8 + 8 + 8 + 8) / 4
    expected = jax.tree.map(lambda a, b: a - b / 4, without, once)
    assert_same(with_it, expected, atol=1e-5 * float(expected.weight["stem"]))


def test_round_step_goes_on_without_a_broken_client():
    run, round_step, *_ = base()
    state, sound = round_step(run.state, run.federation, run.hyper)
    cohort = np.flatnonzero(np.array(state.align.times_held).any((1, 2)))
    broken = cohort[1]
    federation = replicate(poison(run.federation, broken), run.program.mesh)
    state, metrics = round_step(run.state, federation, run.hyper)
    assert int(metrics["nonfinite_clients"]) == 1
    assert all_finite(state) and all_finite(metrics)
    held = np.array(state.align.times_held)[:, 0]
    old, new = (np.array(s.align.fitness)[:, 0] for s in (run.state, state))
    np.testing.assert_array_equal(
        new[broken][held[broken] > 0], old[broken][held[broken] > 0]
    )
    trained = np.delete(held, broken, axis=0).sum(0)
    np.testing.assert_array_equal(metrics["expert_load"], T * B * trained)
    assert min(float(jnp.abs(a - b).max()) for a, b in stems(state, run.state)) > 0
    # It sends all before the server finds it broken.
    assert metrics["bytes_up"] == sound["bytes_up"]
    assert metrics["wasted_bytes"] > 0


def test_round_step_keeps_params_where_every_client_is_broken():
    run, round_step, *_ = base()
    rate = jnp.inf * run.hyper.client.learning_rate
    hyper = replace(run.hyper, client={"learning_rate": rate})
    state, metrics = round_step(run.state, run.federation, hyper)
    assert int(metrics["nonfinite_clients"]) == C
    assert_same(state.params, run.state.params)
    assert all_finite(state) and int(state.round) == 1
    assert metrics["expert_load"].sum() == 0
    assert math.isnan(metrics["train_loss"]) and math.isnan(metrics["train_accuracy"])
    # The run goes on: the next round, with a sane rate, trains.
    state, metrics = round_step(state, run.federation, run.hyper)
    assert int(metrics["nonfinite_clients"]) == 0
    assert min(float(jnp.abs(a - b).max()) for a, b in stems(state, run.state)) > 0


def test_round_step_learns_nothing_from_updates_that_come_too_late():
    run, *_ = base()
    lost = {"devices": {"deadline": 1e-9}, "late": {"kind": "drop"}}
    static = replace(run.program.static, **lost)
    round_step = compile_round(run.program._replace(static=static))
    state, metrics = round_step(run.state, run.federation, run.hyper)
    assert metrics["dropped_clients"] == C and metrics["expert_load"].sum() == 0
    held = np.array(state.align.times_held) > 0
    old, new = (np.array(s.align.fitness) for s in (run.state, state))
    assert held.any()
    np.testing.assert_array_equal(new[held], old[held])
    assert np.all(new[~held] != old[~held])  # the others were idle
    assert not np.any(state.align.usage)
    assert_same(state.params, run.state.params)


@pytest.mark.parametrize(
    ("idle", "slope", "offset"),
    [("keep", 1.0, 0.0), ("decay", 0.8, 0.0), ("prior", 0.8, 0.2 * 0.4)],
)
def test_round_step_moves_the_fitness_of_unheld_pairs_by_the_idle_rule(
    idle, slope, offset
):
    config = tiny_config(
        **{"fitness.idle": idle, "fitness.idle_decay": 0.8, "fitness.prior": 0.4},
        **{"client.learning_rate": 0.3},
    )
    run, *_ = base()
    static = replace(run.program.static, fitness={"idle": idle})
    round_step = compile_round(run.program._replace(static=static))
    hyper = replicate(make_hyper(config), run.program.mesh)
    before, state = None, run.state
    for _ in range(4):  # so long that some experts are right now and then
        before = state
        state, _ = round_step(state, run.federation, hyper)
    old, new = (np.array(s.align.fitness) for s in (before, state))
    held = np.array(state.align.times_held != before.align.times_held)
    np.testing.assert_allclose(new[~held], slope * old[~held] + offset, atol=1e-6)
    moved = new[held] - (1 - config.fitness.rate) * old[held]
    accuracy = moved / config.fitness.rate
    assert ((accuracy > -1e-5) & (accuracy < 1 + 1e-5)).all()
    assert len(np.unique(accuracy.round(4))) > 1


# ---- ragged rounds


@functools.cache
def ragged_round():
    """One round in which clients pass once over their own data, and its run."""
    plan = plan_run(
        **{"local_epochs": 1.0, "partition.kind": "dirichlet", "partition.alpha": 0.3}
    )
    program = use_linear_model(plan.program)
    run = start(plan, program)
    state, metrics = compile_round(program)(run.state, run.federation, run.hyper)
    cohort = np.flatnonzero(np.array(state.align.times_held).any((1, 2)))
    return plan, run, cohort, state, jax.device_get(metrics)


def test_make_federation_gives_every_client_its_own_steps():
    plan, run, *_ = ragged_round()
    size, steps = np.asarray(plan.partition.size), np.asarray(plan.federation.steps)
    np.testing.assert_array_equal(steps, -(-size // B))
    assert len(set(steps.tolist())) > 2
    most = run.program.sizes.local_steps
    assert most == 2 ** math.ceil(math.log2(steps.max())) and run.program.static.ragged


def test_round_step_counts_ragged_load_and_examples():
    _, run, cohort, state, metrics = ragged_round()
    steps = np.asarray(run.federation.steps)[cohort]
    held = np.array(state.align.times_held)[cohort, 0]
    assert metrics["examples"] == B * steps.sum()
    # Clients hold at most A experts, so each sees all examples of its holders.
    np.testing.assert_array_equal(metrics["expert_load"], B * steps @ held)
    assert metrics["wasted_share"] == 0  # one device, one client at a time
    seconds = metrics["simulated_seconds"] / metrics["simulated_median_seconds"]
    assert seconds > 1
    assert metrics["nonfinite_clients"] == 0 and all_finite(state)


# ---- frozen parts

STEM = (64, 37)  # its kernel; no other array ends with these axes


def list_equations(jaxpr):
    """All equations of a program, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from list_equations(inner)


def list_carried(equation):
    """The carry of a loop; nothing of any other equation."""
    inputs, params = equation.invars, equation.params
    if equation.primitive.name == "scan":
        first = params["num_consts"]
        return inputs[first : first + params["num_carry"]]
    if equation.primitive.name == "while":
        return inputs[params["cond_nconsts"] + params["body_nconsts"] :]
    return []


def find_stems(values):
    """The values, or arrays, that end with the axes of the stem's kernel."""
    shape = lambda value: getattr(value, "aval", value).shape
    return [value for value in values if shape(value)[-2:] == STEM]


def trace_fedjets(frozen):
    """A run of fedjets and its traced chunk; steps of all clients are not alike."""
    changes = {"strategy": "fedjets", "model.stem_width": STEM[1], "local_epochs": 1.0}
    plan = plan_run(**changes, **{"server.optimizer": "adam"})
    strategy = plan.program.strategy._replace(frozen=frozen, stages=())
    run = start(plan, plan.program._replace(strategy=strategy))
    rounds = spread(scan_rounds(run.program), run.program.mesh)
    return run, jax.make_jaxpr(rounds)(*run[1:]).jaxpr


def test_scan_rounds_carries_nothing_frozen():
    """Neither over rounds, over clients, nor over local steps, nor in the sums."""
    run, jaxpr = trace_fedjets(("stem",))
    assert set(run.federation.frozen) == {"stem"}
    assert len(find_stems(jax.tree.leaves(run.federation))) == 1
    equations = list(list_equations(jaxpr))
    assert any(find_stems(equation.invars) for equation in equations)  # it is read
    assert not any(find_stems(list_carried(equation)) for equation in equations)
    sent = [e for e in equations if e.primitive.name.startswith("psum")]
    assert sent and not any(find_stems(equation.invars) for equation in sent)
    for tree in (run.state, run.state.server_opt, zero_sums(run.state.params, ())):
        assert not find_stems(jax.tree.leaves(tree))
    assert not find_stems(jaxpr.outvars)


def test_scan_rounds_carries_what_is_trained():
    """The same search finds a stem that is not frozen in every loop."""
    run, jaxpr = trace_fedjets(())
    assert run.federation.frozen == {}
    equations = list(list_equations(jaxpr))
    loops = [e for e in equations if find_stems(list_carried(e))]
    names = [loop.primitive.name for loop in loops]
    # Over rounds, over chunks of clients and over the clients of one; local steps.
    assert names == ["scan", "scan", "while", "scan"]
    sent = [e for e in equations if e.primitive.name.startswith("psum")]
    assert any(find_stems(equation.invars) for equation in sent)
    assert len(find_stems(jax.tree.leaves(run.state.server_opt))) == 2
    assert find_stems(jax.tree.leaves(zero_sums(run.state.params, ())))
    assert len(find_stems(jaxpr.outvars)) == 3  # params and two moments


# ---- keys


def key_data(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def with_children(keys, count=8):
    """The keys and what splits of them and numbers folded into them give."""
    data = jnp.array(sorted(keys), jnp.uint32)
    children = jax.vmap(lambda key: jax.random.split(key, count))(
        jax.random.wrap_key_data(data)
    )
    folded = jax.vmap(
        lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    )(jax.random.wrap_key_data(data))
    return set(keys) | {
        tuple(row)
        for part in (children, folded)
        for row in np.asarray(jax.random.key_data(part)).reshape(-1, 2).tolist()
    }


def test_round_step_uses_no_key_of_the_start(monkeypatch):
    run, *_ = base()
    start, rounds = [], []

    def spy(function, place):
        def spied(*args, **kwargs):
            keys = [a for a in args if getattr(a, "dtype", None) == run.state.key.dtype]
            (key,) = keys
            data = jax.random.key_data(key)
            jax.debug.callback(lambda d: start_or_round(d, place), data)
            return function(*args, **kwargs)

        return spied

    start_or_round = lambda data, place: place.append(tuple(data.tolist()))
    assign = spy(STRATEGIES["random"].assign, rounds)
    program = run.program._replace(
        model=run.program.model._replace(init=spy(run.program.model.init, start)),
        strategy=run.program.strategy._replace(assign=assign),
    )
    update = lambda *args: spy(build_client_update(*args), rounds)
    monkeypatch.setattr(state_file, "init_fitness", spy(state_file.init_fitness, start))
    world = spy(round_file.choose_cohort, rounds)
    monkeypatch.setattr(round_file, "choose_cohort", world)
    monkeypatch.setattr(round_file, "build_client_update", update)
    state, _ = init_state(jax.random.key(0), run.hyper, program)
    round_step = compile_round(program)
    state = replicate(state, program.mesh)
    for _ in range(4):
        state, _ = round_step(state, run.federation, run.hyper)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(start) == 2 and len(rounds) == 4 * (2 + C)
    assert len(set(start + rounds)) == len(start + rounds)
    assert not with_children(start) & with_children(rounds)
    assert key_data(state.key) not in with_children(start)


# ---- collectives

COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1, "f64": 8}


def count_text_bytes(shapes):
    """Bytes of the arrays in `(f32[3,4]{1,0}, s32[])`."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in found
    )


def split_computations(text):
    """The lines of every computation of a compiled program, by name."""
    computations, name = {}, ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = head[1] if head else name
        computations.setdefault(name, []).append(line)
    return computations


def find_called(computations, names):
    """The computations `names` and all that they call."""
    seen, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            for line in computations[name]:
                left += [
                    n for n in re.findall(r"%([\w.\-]+)", line) if n in computations
                ]
    return seen


def list_collectives(program):
    """Bytes that each collective of a compiled program sends, and its computation."""
    return [
        (count_text_bytes(match[1]), name)
        for name, lines in split_computations(program.as_text()).items()
        for match in filter(None, map(COLLECTIVE.search, lines))
    ]


@pytest.mark.parametrize(("num_devices", "gate_mode"), [(2, "global"), (8, "personal")])
def test_round_step_has_one_collective_that_joins_the_devices(num_devices, gate_mode):
    """Devices exchange one copy of the params and the reports, once a round."""
    changes = {"run.num_devices": num_devices, "gate.mode": gate_mode}
    plan = plan_run(**changes, local_epochs=1.0)
    run = start(plan, plan.program)
    program = compile_round(run.program).lower(*run[1:]).compile()
    computations = split_computations(program.as_text())
    bodies = [
        body
        for lines in computations.values()
        for line in lines
        for body in re.findall(r"body=%([\w.\-]+)", line)
    ]
    assert len(bodies) >= 2  # over the chunks and over the local steps
    ((sent, place),) = list_collectives(program)
    assert place not in find_called(computations, bodies), "a collective in a loop"
    params = count_bytes(run.state.params)
    report = C * (4 * K + 9) * 4  # feedback; loss, accuracy; code, phases, spent
    if gate_mode == "personal":
        report += C * count_bytes(run.state.params["gate"])
    weights = (2 * E + 1) * 4
    assert params <= sent <= params + report + weights


def test_runs_of_a_sweep_do_not_talk_to_each_other(tmp_path):
    """One collective a round, over the devices of one run, of one run's size."""
    changes = {"run.num_devices": 8, "chunk_rounds": 1}
    members = [Member(f"seed{s}", tiny_config(seed=s, **changes)) for s in (0, 1)]
    (wave,) = plan_waves(members)
    assert dict(wave.program.mesh.shape) == {"runs": 2, "clients": 4}
    job = build_job(wave, [tmp_path / name for name in wave.names])
    program = job.programs.run_rounds.lower(job.state, *job.inputs).compile()
    ((sent, _),) = list_collectives(program)
    one_run = count_bytes(job.state.params) / 2
    assert one_run <= sent < 1.5 * one_run
    (groups,) = re.findall(r"all-reduce\(.*replica_groups=(\S+),", program.as_text())
    assert groups in ("[2,4]<=[8]", "{{0,1,2,3},{4,5,6,7}}")
