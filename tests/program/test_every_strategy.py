"""One suite of whole rounds for every strategy: shapes, bytes, resume, one trace."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    NO_CLASS,
    B,
    N,
    R,
    Run,
    all_finite,
    assert_same,
    breakable,
    make_program,
    plan_run,
    send_inputs,
    start,
    start_run,
    stems,
    use_linear_model,
)

import fedmoe_jax.round as round_file
from fedmoe_jax.aggregate import by_examples, by_routed
from fedmoe_jax.evaluation.evaluate import build_evaluate
from fedmoe_jax.evaluation.scoring import evaluation_route, route_all
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.round import build_round
from fedmoe_jax.runtime.sharding import replicate, spread
from fedmoe_jax.state import init_state
from fedmoe_jax.strategies import STRATEGIES, fedjets
from fedmoe_jax.train import checkpoint
from fedmoe_jax.train.plan import make_wave, program_key
from fedmoe_jax.types import SimState
from fedmoe_jax.world.costs import count_bytes

pytestmark = pytest.mark.slow

# These controls differ from the one of the total size in their width only.
WIDTHS = ("_active", "_smallest", "_held")
CASES = [(n, "global") for n in STRATEGIES if not n.endswith(WIDTHS)]
CASES += [("greedy", "holder_rows"), ("greedy", "personal")]
CASES += [("ifca", "holder_rows"), ("ifca", "personal")]
CASES += [("greedy", "shared"), ("greedy", "probe"), ("greedy", "biased")]
# One of each kind of forward pass, of gate, and of what becomes of the stem.
WITH_ALL = ("ifca", "oracle", "prototypes", "flex_moe", "hfedmoe", "pfedmoe", "fedmix")
WITH_ALL += ("heterofl", "local", "scaffold", "fedjets", "fedjets_frozen_stem")
WITH_ALL += ("fedmoe_da", "centralised")
CASES += [(name, "all") for name in WITH_ALL]
VARIANTS = {mode: {"gate.mode": mode} for mode in ("global", "holder_rows", "personal")}
VARIANTS["shared"] = {"model.shared_width": 4}  # an expert that every client trains
# Clients probe what they have received, on a quarter of their examples.
VARIANTS["probe"] = {
    "fitness.feedback": "relative_probe",
    "fitness.probe_share": 0.25,
}
VARIANTS["biased"] = {"gate.bias": 2.0}
# Floors that four clients of ten can meet, and weights by losses.
VARIANTS["fair"] = {
    "fairness.floor": 0.3,
    "fairness.expert_floor": 0.75,
    "fairness.power": 1.0,
}
VARIANTS["linked"] = {
    "expert_links.kind": "wireless",
    "expert_links.csi": 0.9,
    "expert_links.price": 0.5,
    "loss.latency": 0.5,
}
VARIANTS["all"] = VARIANTS["shared"] | VARIANTS["probe"] | VARIANTS["biased"]
VARIANTS["all"] |= VARIANTS["fair"] | VARIANTS["linked"]
# All tests of a case follow each other, while its program is there.
each_case = pytest.mark.parametrize(("strategy", "variant"), CASES, scope="module")
BROKEN = 3  # a client
# These give clients more than they have room for; `needs` says so.
BEYOND_CAPACITY = {"hfedmoe", "fedmix_all", "fedmoe", "fedmoe_da", "pfedmoe"}
BEYOND_CAPACITY |= {f"{n}_shared_gate" for n in ("hfedmoe", "fedmix_all", "fedmoe")}


class Trial(NamedTuple):
    """A chunk of rounds of one strategy, and the program that ran it.

    Attributes:
      parts: before the first round.
      state: after the chunk.
      metrics: of its rounds.
      held: [R, N, E] int32, 1 where the client held the expert in the round.
      heads: [R, ...] the server's head after each round.
      chunk: (state, federation, hyper) -> states and, of each round, metrics,
        `times_held` and head, of two runs with other keys, of which the first is the
        one above.
    """

    parts: Run
    state: SimState
    metrics: dict
    held: np.ndarray
    heads: np.ndarray
    chunk: Callable

    def run(self, state, federation):
        """The first run from another state, or with other data."""
        both = self.chunk(state, federation, self.parts.hyper)
        return jax.tree.map(lambda leaf: leaf[0], both)


@functools.cache
def plan_cases():
    """The plan of every case, and the program that it shares as in a comparison."""
    groups, cases = {}, {}
    for case in CASES:
        strategy, variant = case
        plan = plan_run(strategy=strategy, **VARIANTS[variant])
        groups.setdefault(program_key(plan), []).append((case, plan))
    for wave in map(make_wave, groups.values()):
        program = use_linear_model(wave.program)
        cases |= {
            case: (plan, program)
            for case, plan in zip(wave.names, wave.plans, strict=True)
        }
    return cases


evaluate_once = functools.cache(build_evaluate)


@functools.cache
def compile_chunk(program):
    """R rounds of two runs, scanned and vmapped, as one program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_file, "build_client_update", breakable)
        round_step = build_round(program)

    def chunk(key, state, federation, hyper):
        def step(carry, _):
            carry, metrics = round_step(carry, federation, hyper)
            head = carry.params["head"]["kernel"]
            return carry, (metrics, carry.align.times_held[:, 0], head)

        return jax.lax.scan(step, state.replace(key=key), length=R)

    def two_runs(state, federation, hyper):
        keys = jnp.stack([state.key, jax.random.fold_in(state.key, 1)])
        vmapped = jax.vmap(chunk, in_axes=(0, None, None, None))
        return vmapped(keys, state, federation, hyper)

    return jax.jit(spread(two_runs, program.mesh))


@functools.cache
def try_strategy(strategy, variant):
    """The first chunk of rounds of a strategy, as its config makes it."""
    plan, program = plan_cases()[strategy, variant]
    sizes, mesh = program.sizes, program.mesh
    _, state, federation, hyper = start_run(plan, program, seed=0)
    # Expert 0 is the first choice of all clients under greedy, expert 3 of none.
    preference = jnp.array([0.04, 0.02, 0.0, -0.04])[None, None]
    preference = preference[..., : sizes.num_experts]
    fitness = state.align.fitness + preference
    state = state.replace(align=state.align.replace(fitness=fitness))
    parts = Run(program, *replicate((state, federation, hyper), mesh))
    chunk = compile_chunk(program)
    trial = Trial(parts, state, {}, np.zeros(0), np.zeros(0), chunk)
    state, rounds = trial.run(parts.state, parts.federation)
    metrics, times_held, heads = jax.device_get(rounds)
    before = np.zeros_like(times_held[:1])
    held = np.diff(np.concatenate([before, times_held]), axis=0)
    return trial._replace(state=state, metrics=metrics, held=held, heads=heads)


@each_case
def test_chunk_keeps_shapes_and_stays_finite(strategy, variant):
    parts, state, metrics, *_ = try_strategy(strategy, variant)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(parts.state)
    assert all_finite(state) and all_finite(metrics)
    assert all(len(values) == R for values in metrics.values())
    assert int(state.round) == R and metrics["nonfinite_clients"].sum() == 0
    record = parts.program.strategy
    assert set(record.frozen).isdisjoint(state.params)
    if "stem" in record.frozen:
        return
    moved = [float(jnp.abs(a - b).max()) for a, b in stems(state, parts.state)]
    if "stem" in record.personal:
        assert max(moved) == 0
    else:
        assert min(moved) > 1e-5


@each_case
def test_held_experts_fit_the_clients(strategy, variant):
    parts, state, _, held, *_ = try_strategy(strategy, variant)
    capacity = np.array(state.belief.capacity)
    sizes = parts.program.sizes
    assert set(capacity) == {1, 2} or sizes.num_experts == 1
    assert set(np.unique(held)) <= {0, 1}
    assert ((held.sum(2) > 0).sum(1) == sizes.cohort_size).all()
    if strategy not in BEYOND_CAPACITY and sizes.num_experts > 1:
        assert (held.sum(2) <= capacity[None, : sizes.num_clients]).all()
    last = np.array(state.align.held)[:, 0]
    assert (last[held[-1].any(1)] == held[-1][held[-1].any(1)]).all()


@functools.cache
def plan_fair():
    """The programs of all strategies with every mechanism of fairness, by strategy."""
    groups = {}
    for name in STRATEGIES:
        plan = plan_run(strategy=name, **VARIANTS["fair"])
        groups.setdefault(program_key(plan), []).append((name, plan))
    waves = list(map(make_wave, groups.values()))
    return {
        name: (plan, use_linear_model(wave.program))
        for wave in waves
        for name, plan in zip(wave.names, wave.plans, strict=True)
    }


@functools.cache
def trace_round(program):
    """A jitted round of a program, so that those who share it trace it once."""
    return jax.jit(spread(build_round(program), program.mesh))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_goes_with_every_mechanism_of_fairness(strategy):
    """By shapes; those of the variant `all` are run."""
    plan, program = plan_fair()[strategy]
    run = start(plan, program)
    state, metrics = jax.eval_shape(trace_round(program), *run[1:])
    few = program.sizes.num_experts - program.strategy.local_experts < 2
    expected = set() if program.strategy.pooled else {"clients"}
    if not few and program.strategy.gating != "sum":
        expected.add("tiers")
    assert set(state.queues) == expected
    assert ("longest_tier_queue" in metrics) == ("tiers" in expected)
    assert program.static.fairness.power != program.strategy.pooled


def list_messages(parts):
    """Numbers that each client sends to the stages before every round, [R]."""
    message = parts.program.strategy.message or (lambda *_: (0.0, 0))
    sizes = parts.program.sizes
    return [float(message(jnp.int32(r), parts.hyper, sizes)[0]) for r in range(R)]


@each_case
def test_bytes_and_loads_are_counted_from_the_held_mask(strategy, variant):
    parts, state, metrics, held, *_ = try_strategy(strategy, variant)
    params = state.params | parts.federation.frozen
    count = lambda part: count_bytes(params[part])
    sizes, record = parts.program.sizes, parts.program.strategy
    slots = held.sum(2)  # [R, N]
    # Clients that choose have received all, and send the probes of all.
    received = slots if record.choose is None else sizes.num_experts * (slots > 0)
    probed = received.sum(1) if parts.program.static.probes else 0
    unchosen = (received - slots).sum(1) * count("experts") / sizes.num_experts
    parts_sent = {"stem", "gate", "head"} - set(record.personal + record.frozen)
    per_client = sum(count(part) for part in parts_sent)
    local = held[:, :, sizes.num_experts - record.local_experts :].sum((1, 2))
    travelling = slots.sum(1) - local
    expert, copies = count("experts") / sizes.num_experts, 2 if record.variates else 1
    both = copies * (sizes.cohort_size * per_client + travelling * expert)
    both *= not record.silent
    known = np.cumsum(slots > 0, axis=0) > 1
    new = ((slots > 0) & ~known).sum(1) * sum(count(part) for part in record.frozen)
    biased = "gate.bias" in VARIANTS[variant] and record.affinity is not None
    biases = 4 * received.sum(1) * biased
    # What clients send to each other is counted by hand in test_fedmoe_da.py.
    asked = np.array(list_messages(parts)) * sizes.num_clients
    model = sum(count(part) for part in ("stem", "head", *record.frozen)) + expert
    exchanged = metrics["bytes_down"] - both - new - biases - unchosen
    exchanged -= sizes.num_clients * model * np.sign(asked)
    if record.exchange is None:
        np.testing.assert_allclose(exchanged, 0, atol=1e-6 * both.max())
    else:
        most = sizes.cohort_size * (sizes.cohort_size - 1) * sizes.num_experts
        assert 0 < exchanged[0] <= most * expert  # none where no two have met
        both = both + exchanged
    shared = sum(count(part) for part in {"stem", "gate", "head", *record.frozen})
    most = (3 if record.variates else 1) * (shared + received.max(1) * expert) / 4
    np.testing.assert_allclose(metrics["peak_client_parameters"], most, rtol=1e-6)
    reported = parts.program.report_numbers * sizes.cohort_size
    numbers = 5 * slots.sum(1) + probed + reported
    up = both + 4 * numbers * (not record.silent) + 4 * asked
    if record.gate_period:
        up[0] += sizes.cohort_size * count("gate")  # shown in the first of two rounds
    all_active = slots.max() <= sizes.num_active
    by_use = record.expert_weight not in (by_examples, by_routed, fedjets.slots_alike)
    if all_active and not by_use:
        np.testing.assert_allclose(metrics["bytes_up"], up, rtol=1e-6)
    else:  # experts of little use, or of none, are not sent
        assert (metrics["bytes_up"] <= up * (1 + 1e-6)).all()
    active = np.minimum(sizes.num_active, slots)
    load = metrics["expert_load"]
    examples = sizes.local_steps * B
    if (
        record.expert_priority
    ):  # the load of experts that are not trained is not counted
        assert (load.sum(1) < examples * active.sum(1)).all()
    else:
        np.testing.assert_array_equal(load.sum(1), examples * active.sum(1))
    assert (load[~held.any(1)] == 0).all()
    if all_active:  # then each of them sees all examples
        np.testing.assert_array_equal(load, examples * held.sum(1))


# One client's bytes down in a first round with all there is, by hand: the linear stem
# has 256 numbers, the head 64, an expert 16, a gate row 5.
BYTES_DOWN = {
    "hfedmoe": 4 * (256 + 64 + 4 * 5 + 4 * 16),
    "fedmix_all": 4 * (256 + 64 + 4 * 16),  # the gate stays
    "fedmoe": 4 * (256 + 64 + 4 * 5 + 4 * 16),
    "ifca": 4 * (256 + 64 + 4 * 5 + 4 * 16),
    "pfedmoe": 4 * (256 + 16),  # gate, head and one expert stay
    "fedavg": 4 * (256 + 64 + 5 + 16),
    "scaffold": 2 * 4 * (256 + 64 + 5 + 16),
    "local": 0,
    "centralised": 0,
}


# What a shared expert of 16 numbers adds to it, which travels with the stem, and a bias
# of each of two experts.
BYTES_OF_ALL = {"pfedmoe": 4 * (16 + 2), "scaffold": 2 * 4 * 16, "local": 0}


@pytest.mark.parametrize("strategy", BYTES_DOWN)
def test_bytes_of_a_first_round_by_hand(strategy):
    trial = try_strategy(strategy, "global")
    clients = trial.parts.program.sizes.cohort_size
    assert trial.metrics["bytes_down"][0] == clients * BYTES_DOWN[strategy]


@pytest.mark.parametrize("strategy", BYTES_OF_ALL)
def test_bytes_of_a_first_round_with_all_by_hand(strategy):
    trial = try_strategy(strategy, "all")
    clients = trial.parts.program.sizes.cohort_size
    expected = BYTES_DOWN[strategy] + BYTES_OF_ALL[strategy]
    assert trial.metrics["bytes_down"][0] == clients * expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_pays_for_a_shared_expert_once(strategy):
    """Of 4 hidden units between features of 8 and outputs of 4, as TINY has them."""
    record, numbers = STRATEGIES[strategy], 8 * 4 + 4 + 4 * 4 + 4
    plain, found = (
        make_program(strategy=strategy, **{"model.shared_width": n}).costs
        for n in (0, 4)
    )
    more = lambda name: getattr(found, name) - getattr(plain, name)
    assert more("shared_bytes") == 4 * numbers and more("expert_bytes") == 0
    stays = record.silent or "stem" in record.frozen
    assert more("travel_bytes") == 4 * numbers * (not stays)
    passes = 3 * 2 * (8 * 4 + 4 * 4)  # two products, forward and backward
    assert passes <= more("shared_flops") < 1.2 * passes and more("expert_flops") == 0
    frozen = more("shared_flops") if "stem" in record.frozen else 0
    assert more("frozen_flops") == frozen


def test_fedjets_trains_a_shared_expert_or_freezes_it_with_the_stem():
    trained = try_strategy("fedjets", "all")
    assert set(trained.parts.federation.frozen["gate_stem"]) == {"kernel"}
    kernel = lambda stem: np.array(stem["shared"]["kernel"])
    before, after = trained.parts.state.params["stem"], trained.state.params["stem"]
    assert np.abs(kernel(after) - kernel(before)).max() > 1e-5
    frozen = try_strategy("fedjets_frozen_stem", "all")
    assert "stem" not in frozen.state.params
    made = frozen.parts.federation.frozen["stem"]
    assert np.abs(kernel(made) - kernel(before)).max() > 1e-6  # on the public slice
    # The server trains the same network for both.
    kept = trained.parts.federation.frozen["gate_stem"]["kernel"]
    np.testing.assert_array_equal(made["kernel"], kept)


@each_case
def test_a_saved_state_goes_on_alike_in_the_same_program(strategy, variant, tmp_path):
    trial = try_strategy(strategy, variant)
    with checkpoint.open_checkpoints(tmp_path, 1) as store:
        checkpoint.save(store, R, trial.state)
    with checkpoint.open_checkpoints(tmp_path, 1) as store:
        restored, _ = checkpoint.restore_latest(store, trial.parts.state)[:2]
    federation, mesh = trial.parts.federation, trial.parts.program.mesh
    found = trial.run(replicate(restored, mesh), federation)
    assert_same(found, trial.run(replicate(trial.state, mesh), federation))
    assert trial.chunk._cache_size() == 1


@each_case
def test_a_broken_client_spoils_nothing(strategy, variant):
    trial = try_strategy(strategy, variant)
    parts, sizes = trial.parts, trial.parts.program.sizes
    broken = BROKEN % sizes.num_clients
    train = parts.federation.train
    y = train["y"].at[parts.federation.index[broken, 0]].set(NO_CLASS)
    data = parts.federation.replace(train=train | {"y": y})
    data = replicate(data, parts.program.mesh)
    state, (metrics, times_held, _) = trial.run(parts.state, data)
    took_part = np.diff(times_held.sum(2)[:, broken], prepend=0) > 0
    assert took_part.any()
    np.testing.assert_array_equal(metrics["nonfinite_clients"], took_part)
    if sizes.cohort_size > 1:
        assert all_finite(state)
    own = lambda state: (state.variate.get("own", {}), state.personal)
    kept, before = jax.tree.map(lambda leaf: leaf[broken], own(state)), own(parts.state)
    if strategy != "fedmoe_da":  # where others mix with what it has
        assert_same(kept, jax.tree.map(lambda leaf: leaf[broken], before))


def test_personal_gates_change_for_the_cohort_only():
    parts, state, _, held, *_ = try_strategy("greedy", "personal")
    assert_same(state.params["gate"], parts.state.params["gate"])
    took_part = held.any((0, 2))
    assert 0 < took_part.sum() < N
    old, new = (
        np.array(s.personal["gate"]["moe"]["kernel"]) for s in (parts.state, state)
    )
    changed = np.abs(new - old).max((1, 2)) > 1e-6
    np.testing.assert_array_equal(changed, took_part)


@pytest.mark.parametrize("variant", ["holder_rows", "global"])
def test_gate_rows_of_unheld_experts(variant):
    parts, state, _, held, *_ = try_strategy("greedy", variant)
    rows_held = held.any((0, 1))
    assert rows_held[0] and not rows_held[3]
    old, new = (s.params["gate"]["moe"]["kernel"] for s in (parts.state, state))
    changed = np.abs(new - old).max(1) > 0
    # Globally every row learns from the calibration loss of every client.
    np.testing.assert_array_equal(changed, rows_held | (variant == "global"))


def test_experts_nobody_held_keep_their_values():
    parts, state, _, held, *_ = try_strategy("greedy", "global")
    old, new = (s.params["experts"]["moe"]["kernel"] for s in (parts.state, state))
    np.testing.assert_array_equal(np.abs(new - old).max((1, 2)) > 0, held.any((0, 1)))


def answer_slowly(trial, client):
    """Class predictions for the test images by the model that one client has."""
    program, state, data = trial.parts.program, trial.state, trial.parts.federation
    mine = jax.tree.map(lambda leaf: leaf[client], state.personal)
    params = state.params | data.frozen | mine
    local = program.strategy.local_experts
    if "experts" in mine:
        first = program.sizes.num_experts - local
        params["experts"] = jax.tree.map(
            lambda server, own: jnp.concatenate([server[:first], own[first:]]),
            state.params["experts"],
            mine["experts"],
        )
    batch = program.task.prepare(data.test, data.statistics)
    model = program.model.parts
    features = model.stem(params["stem"], batch, None)
    seen = model.stem(params.get("gate_stem", params["stem"]), batch, None)
    logits = gate_logits(params["gate"]["moe"], seen)
    gates = route_all(logits, evaluation_route(program))
    shared = params["stem"].get("shared", {"kernel": jnp.zeros((4, 4))})
    beside = model.head(params["head"], features @ shared["kernel"])
    total, mixes = 0.0, program.strategy.mix == "probabilities"
    for expert in range(program.sizes.num_experts):
        one = jax.tree.map(lambda leaf, e=expert: leaf[e], params["experts"]["moe"])
        logits = model.head(params["head"], model.expert(one, features, None))
        each = jax.nn.softmax(logits + beside) if mixes else logits
        total = total + gates[:, expert, None] * each  # the head is linear
    return np.array((total if mixes else total + beside).argmax(1))


@each_case
def test_evaluation_asks_every_clients_own_model(strategy, variant):
    trial = try_strategy(strategy, variant)
    program, data = trial.parts.program, trial.parts.federation
    found = evaluate_once(program)(trial.state, data, trial.parts.hyper)
    y = np.array(data.test["y"])
    took_part = np.flatnonzero(np.array(trial.state.participation.rounds))
    clients = took_part if program.strategy.personal else took_part[:1]
    right = [(answer_slowly(trial, client) == y).mean() for client in clients]
    # A tie between two classes may fall either way.
    near = {"rtol": 0, "atol": 1.5 / len(y)}
    np.testing.assert_allclose(found["global_accuracy"], np.mean(right), **near)
    assert found["client_accuracy"].shape == (N,)
    assert all_finite(found)
    if (
        program.sizes.num_experts == 1 and not program.strategy.personal
    ):  # one model for all
        hit = answer_slowly(trial, 0) == y
        labels = np.arange(data.label_mix.shape[1])
        of_class = [hit[y == k].mean() if (y == k).any() else 0.0 for k in labels]
        expected = np.array(data.label_mix) @ np.array(of_class)
        mean = found["personal_accuracy"]
        np.testing.assert_allclose(mean, expected.mean(), atol=0.02)
        assert found["clients_counted"] == N
        np.testing.assert_allclose(found["client_accuracy"], expected, atol=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_experts_behind_links_or_has_none(strategy):
    """Nothing is compiled; those of every kind that are run are among `WITH_ALL`."""
    plan = plan_run(strategy=strategy, **VARIANTS["linked"])
    program = use_linear_model(plan.program)
    start = lambda: init_state(jax.random.key(0), plan.hyper, program)
    state, frozen = jax.eval_shape(start)
    inputs = state, plan.federation.replace(frozen=frozen), plan.hyper
    after, _ = jax.eval_shape(spread(build_round(program), program.mesh), *inputs)
    found = jax.eval_shape(build_evaluate(program), *inputs)
    linked = program.sizes.num_experts > 1 and program.strategy.gating != "sum"
    whole = after.params | after.personal
    assert ("snr" in whole["gate"]["moe"]) == linked
    assert ("linked_personal_prior_accuracy" in found) == linked
    assert ("linked_delay" in found) == linked


def moved(trial, part, leaf="kernel"):
    """The largest change of the server's values of a part, and of each client's."""
    start, end = trial.parts.state, trial.state
    take = lambda tree: tree.get("moe", tree)[leaf]
    far = lambda get: np.abs(np.array(get(end)) - np.array(get(start)))
    server = far(lambda state: take(state.params[part]))
    own = (
        far(lambda state: take(state.personal[part])) if part in end.personal else None
    )
    return server, own


def test_pfedmoe_shares_one_expert_and_keeps_the_other():
    trial = try_strategy("pfedmoe", "global")
    server, own = moved(trial, "experts")  # [2, ...], [N, 2, ...]
    took_part = trial.held.any((0, 2))
    assert server[0].max() > 1e-6 and server[1].max() == 0
    assert own[:, 0].max() == 0 and own[~took_part].max() == 0
    assert (own[took_part, 1].max((1, 2)) > 1e-6).all()
    for part in ("gate", "head"):
        server, own = moved(trial, part)
        assert server.max() == 0 and (own[took_part].max((1, 2)) > 1e-6).all()


def test_local_clients_train_alone():
    trial = try_strategy("local", "global")
    took_part = trial.held.any((0, 2))
    for part in ("stem", "experts", "head"):
        server, own = moved(trial, part)
        far = own.reshape(N, -1).max(1)
        assert server.max() == 0
        np.testing.assert_array_equal(far > 0, took_part)


def first_round(strategy):
    """The server's move of the head in the first round, which dense controls share."""
    trial = try_strategy(strategy, "global")
    return trial.heads[0] - np.array(trial.parts.state.params["head"]["kernel"])


def test_fedadam_steps_on_what_fedavg_adds():
    mean = first_round("fedavg")
    found = first_round("fedadam")
    square = 0.99 * 1e-6 + 0.01 * mean**2  # starts at tau^2
    expected = 0.01 * 0.1 * mean / (np.sqrt(square) + 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_fedprox_and_fednova_are_fedavg_where_theory_says_so():
    mean = first_round("fedavg")
    near = first_round("fedprox")
    assert 0 < np.abs(near - mean).max() < 0.1 * np.abs(mean).max()
    normalised = first_round("fednova")  # all take equally many steps
    np.testing.assert_allclose(normalised, mean, rtol=1e-5, atol=1e-7)


def test_scaffold_corrects_towards_the_mean_of_the_variates():
    parts, state, *_ = try_strategy("scaffold", "global")
    kernel = np.array(state.variate["own"]["head"]["kernel"])
    mean = np.array(state.variate["mean"]["head"]["kernel"])
    cohort = jnp.array([2, 7, 1, 0])
    one = jnp.zeros((4, 1))
    inputs = send_inputs(parts, state, cohort, one, one == 0)
    found = inputs.correction["head"]["kernel"]
    np.testing.assert_allclose(found, mean[None] - kernel[cohort], atol=1e-6)
    assert np.abs(found).max() > 1e-4


@pytest.mark.parametrize("fields", [{}, {"drift.labels": 0.8, "drift.rounds": 1}])
def test_scaffolds_running_mean_is_the_sum_over_all_variates(fields):
    """After many rounds of uneven clients, one of which breaks; labels may drift."""
    plan = plan_run(
        strategy="scaffold", **{"drift.start": 1, "chunk_rounds": 1}, **fields
    )
    program = use_linear_model(plan.program)
    run = start_run(plan, program)
    uneven = run.federation.size.at[0].set(9)  # so that weights can be told apart
    train = run.federation.train
    y = train["y"].at[run.federation.index[BROKEN, 0]].set(NO_CLASS)
    federation = run.federation.replace(size=uneven, train=train | {"y": y})
    federation = replicate(federation, program.mesh)
    chunk = compile_chunk(program)
    trial = Trial(run, run.state, {}, np.zeros(0), np.zeros(0), chunk)
    state = run.state
    for _ in range(20):
        state, _ = trial.run(state, federation)
    share = np.array(uneven) / np.sum(uneven)
    slow = jax.tree.map(
        lambda rows: np.tensordot(share, np.array(rows), 1), state.variate["own"]
    )
    assert_same(state.variate["mean"], slow, atol=1e-5)
    assert np.abs(slow["head"]["kernel"]).max() > 1e-2


@pytest.mark.parametrize(
    ("strategy", "part"), [("fedjets", "gate_stem"), ("fedjets_frozen_stem", "stem")]
)
def test_fedjets_keeps_the_stem_that_it_trains_on_the_public_slice(strategy, part):
    trial, other = (try_strategy(name, "global") for name in (strategy, "fedjets"))
    plain = start(plan_run(strategy=strategy), trial.parts.program)
    trained = trial.parts.federation.frozen[part]["kernel"]
    assert np.abs(trained - plain.federation.frozen[part]["kernel"]).max() > 1e-6
    # Both freeze the same one, and clients train from the common initial weights.
    assert_same(trained, other.parts.federation.frozen["gate_stem"]["kernel"])
    whole = plain.state.params | plain.federation.frozen
    assert_same(whole["stem"], other.parts.state.params["stem"])
    flops = trial.metrics["server_flops"]
    examples = int(trial.parts.hyper.fedjets.steps) * B
    assert flops[0] == trial.parts.program.costs.dense_flops * examples > 0
    assert not flops[1:].any()


def test_fedjets_has_one_anchor_per_expert():
    trial = try_strategy("fedjets", "global")
    anchor = np.array(trial.state.align.strategy["anchor"])[0]
    experts = np.arange(trial.parts.program.sizes.num_experts)
    assert sorted(anchor[anchor >= 0]) == experts.tolist()
    for held in trial.held:
        active = (anchor >= 0) & held.any(1)
        np.testing.assert_array_equal(
            held[active], anchor[active][:, None] == experts[None]
        )


def test_the_centralised_control_takes_the_steps_of_a_cohort_on_all_data():
    parts = try_strategy("centralised", "global").parts
    federation, other = parts.federation, try_strategy("fedavg", "global").parts
    assert federation.size.tolist() == [other.federation.size.sum()]
    cohort = other.program.sizes.cohort_size
    assert federation.steps.tolist() == [cohort * other.federation.steps[0]]
    assert federation.label_mix.shape[0] == N  # judged by the same clients
