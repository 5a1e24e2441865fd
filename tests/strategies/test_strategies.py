"""One suite for every strategy, then what is particular to each."""

from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax.align.fitness import idle_rule, update_fitness
from fedmoe_jax.align.top_k import expected_load, to_mask
from fedmoe_jax.align.usage import load_cv
from fedmoe_jax.client import (
    ClientUpdate,
    mix_outputs,
    mix_probabilities,
    step_weights,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.strategies import (
    STRATEGIES,
    either,
    fedjets,
    fedmix,
    fedmoe,
    fedmoe_da,
    find_strategy,
    hfedmoe,
    traits,
)
from fedmoe_jax.strategies.fedavg import normalise_steps
from fedmoe_jax.types import Assignment, Evidence, Feedback, Hyper, Sizes

SIZES = Sizes(
    num_clients=10,
    cohort_size=6,
    num_experts=5,
    max_held=3,
    num_active=2,
    local_steps=2,
    batch_size=8,
    expert_width=16,
    num_classes=4,
    max_capacity=3,
)
DENSE = tuple(n for n, s in STRATEGIES.items() if s.resize(SIZES).num_experts == 1)
RESIZED = tuple(n for n, s in STRATEGIES.items() if s.resize(SIZES) != SIZES)
HOLD_ALL = ("hfedmoe", "fedmoe", "fedmoe_da", "pfedmoe", "fedmix_all")  # at first
SHARED = tuple(  # decide differently for the same training, so they share a program
    name for name, s in STRATEGIES.items() if traits(s) == traits(STRATEGIES["random"])
)
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def make_hyper(options="", **changes):
    fields = dict.fromkeys(Hyper.__dataclass_fields__, 0.5) | changes
    own = default.get_config()[options].to_dict() if options else {}
    hyper = jax.tree.map(jnp.float32, fields | {"own": own})
    return Hyper(**hyper | {"strategy": jnp.int32(changes.get("strategy", 0))})


def hyper_of(name, **changes):
    return make_hyper(find_strategy(name).options, **changes)


def make_evidence(sizes, fitness=None, usage=None, round=0, memory=None):
    rng = np.random.default_rng(0)
    count, experts = sizes.cohort_size, sizes.num_experts
    if fitness is None:
        fitness = rng.random((count, experts))
    if usage is None:
        usage = 100 * rng.random(experts)
    return Evidence(
        round=jnp.int32(round),
        client=jnp.arange(count, dtype=jnp.int32) + sizes.num_clients - count,
        fitness=jnp.asarray(fitness, jnp.float32),
        usage=jnp.asarray(usage, jnp.float32),
        capacity=jnp.arange(count, dtype=jnp.int32) % sizes.max_held + 1,
        load=jnp.full(count, 16.0),
        held=jnp.zeros((count, experts), bool),
        memory=memory or {},
    )


def assert_valid(assignment, capacity, sizes):
    """Ids in range, valid slots first, distinct experts, exactly k_c of them."""
    held, slot = np.asarray(assignment.held), np.asarray(assignment.slot)
    assert held.shape == slot.shape == (len(capacity), sizes.max_held)
    assert held.dtype == np.int32 and slot.dtype == bool
    assert np.all((held >= 0) & (held < sizes.num_experts))
    places = np.arange(sizes.max_held)[None]
    np.testing.assert_array_equal(slot, places < np.asarray(capacity)[:, None])
    for ids, valid in zip(held, slot, strict=True):
        assert len(set(ids[valid])) == valid.sum()


@lru_cache
def compiled(name):
    strategy = find_strategy(name)
    return jax.jit(partial(strategy.assign, sizes=strategy.resize(SIZES)))


def prepare(name, **evidence):
    strategy = find_strategy(name)
    sizes = strategy.resize(SIZES)
    memory = strategy.remember(sizes)
    return compiled(name), make_evidence(sizes, memory=memory, **evidence)


def slots_of(name, evidence):
    """How many experts every client is to hold in the first round."""
    sizes = find_strategy(name).resize(SIZES)
    if name in HOLD_ALL:
        return np.full(len(evidence.client), sizes.max_held)
    return np.minimum(evidence.capacity, sizes.max_held)


# --- all of them


@every_strategy
def test_valid_and_deterministic_under_jit(name):
    assign, evidence = prepare(name)
    key, hyper = jax.random.key(3), hyper_of(name)
    first = assign(evidence, hyper, key=key)
    slots, sizes = slots_of(name, evidence), find_strategy(name).resize(SIZES)
    assert_valid(first, slots, sizes)
    again = assign(evidence, hyper, key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@every_strategy
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_valid_whatever_the_evidence(name, bad):
    sizes = find_strategy(name).resize(SIZES)
    fitness = np.full((sizes.cohort_size, sizes.num_experts), bad)
    usage = np.full(sizes.num_experts, bad)
    assign, evidence = prepare(name, fitness=fitness, usage=usage)
    got = assign(evidence, hyper_of(name, exploration=0.0), key=jax.random.key(0))
    assert_valid(got, slots_of(name, evidence), sizes)


@every_strategy
def test_scan_over_rounds_of_vmap_over_keys_is_each_alone(name):
    assign, evidence = prepare(name)
    hyper, keys = hyper_of(name), jax.random.split(jax.random.key(5), 2)

    def one_round(carry, t):
        now = evidence.replace(round=t)
        return carry, jax.vmap(lambda key: assign(now, hyper, key=key))(keys)

    together = jax.jit(lambda: jax.lax.scan(one_round, None, jnp.arange(3))[1])()
    for t, i in np.ndindex(3, 2):
        row = jax.tree.map(lambda leaf, t=t, i=i: leaf[t, i], together)
        alone = assign(evidence.replace(round=jnp.int32(t)), hyper, key=keys[i])
        jax.tree.map(np.testing.assert_array_equal, row, alone)


@every_strategy
def test_note_is_one_sentence(name):
    note = find_strategy(name).note
    assert note.endswith(".") and note.count(". ") == 0 and len(note) > 20


def test_unknown_strategy_lists_the_names():
    with pytest.raises(
        UserError, match="strategy='best'.*random, fixed_random, round_robin"
    ):
        find_strategy("best")


# --- random and exploration


def test_random_holds_every_expert_equally_often():
    assign, evidence = prepare("random")
    keys = jax.random.split(jax.random.key(0), 400)
    hyper = make_hyper()
    hold = jax.vmap(lambda key: to_mask(assign(evidence, hyper, key=key), 5))
    share = jax.jit(hold)(keys).mean(axis=0)
    expected = np.broadcast_to(evidence.capacity[:, None] / 5, (6, 5))
    np.testing.assert_allclose(share, expected, atol=0.1)  # 4 standard errors


def test_a_random_draw_does_not_depend_on_the_cohort():
    assign, evidence = prepare("random")
    alone = jax.tree.map(lambda leaf: leaf[2:3], evidence.replace(round=None))
    whole = assign(evidence, make_hyper(), key=jax.random.key(0))
    single = assign(alone, make_hyper(), key=jax.random.key(0))
    np.testing.assert_array_equal(whole.held[2:3], single.held)


@pytest.mark.parametrize("name", ["greedy", "load_balanced", "load_balanced_running"])
def test_exploration_is_the_share_of_clients_that_ignore_the_scores(name):
    sizes = SIZES._replace(num_clients=900, cohort_size=900, num_experts=8)
    favourite = np.zeros((900, 8))
    favourite[:, 5] = 1.0
    evidence = make_evidence(sizes, fitness=favourite)
    evidence = evidence.replace(capacity=jnp.ones(900, jnp.int32))
    assign = jax.jit(partial(find_strategy(name).assign, sizes=sizes))
    for exploration in (0.0, 0.4, 1.0):
        hyper = make_hyper(exploration=exploration, usage_weight=0.0)
        got = assign(evidence, hyper, key=jax.random.key(2))
        share = np.bincount(got.held[:, 0], minlength=8) / 900
        expected = np.full(8, exploration / 8)  # explorers take each alike
        expected[5] += 1 - exploration
        np.testing.assert_allclose(share, expected, atol=0.04)


# --- round robin


def test_round_robin_loads_are_even_in_a_round_and_over_time():
    assign, evidence = prepare("round_robin")
    total = np.zeros((6, 5), int)
    for t in range(5):
        got = assign(evidence.replace(round=jnp.int32(t)), None, key=None)
        mask = np.asarray(to_mask(got, 5))
        holders = mask.sum(axis=0)
        assert holders.max() - holders.min() <= 1
        total += mask
    np.testing.assert_array_equal(
        total, np.broadcast_to(np.asarray(evidence.capacity)[:, None], (6, 5))
    )


def test_round_robin_by_hand():
    assign, evidence = prepare("round_robin", round=4)
    got = assign(evidence, None, key=None)  # capacities 1 2 3 1 2 3, five experts
    expected = [[4], [0, 1], [2, 3, 4], [0], [1, 2], [3, 4, 0]]
    held = [ids[valid].tolist() for ids, valid in zip(got.held, got.slot, strict=True)]
    assert held == expected


# --- greedy


@pytest.mark.parametrize(
    ("rule", "last"), [("decay", 0), ("keep", 2), ("prior", 2)], ids=str
)
def test_greedy_locks_in_its_first_pick_only_under_decay(rule, last):
    """Expert 0 starts a hair ahead and is mediocre; expert 2 is the good one."""
    quality = jnp.array([0.45, 0.40, 0.90, 0.42])
    sizes = SIZES._replace(num_clients=1, cohort_size=1, num_experts=4, max_held=1)
    keep, target = idle_rule(rule, decay=0.9, prior=0.5)
    hyper = make_hyper(
        exploration=0.0, fitness_rate=0.3, idle_decay=keep, idle_target=target
    )

    def one_round(fitness, _):
        evidence = make_evidence(sizes, fitness=fitness, usage=jnp.zeros(4))
        got = find_strategy("greedy").assign(evidence, hyper, sizes, jax.random.key(0))
        fitness = update_fitness(
            fitness, evidence.client, got, quality[got.held], got.slot, hyper
        )
        return fitness, got.held[0, 0]

    start = jnp.array([[0.501, 0.5, 0.5, 0.5]])
    held = np.asarray(jax.lax.scan(one_round, start, None, length=40)[1])
    assert held[0] == 0 and held[-1] == last
    if rule == "decay":
        assert set(held) == {0}


# --- load balanced


def load_cv_of(name, evidence, sizes, hyper):
    got = find_strategy(name).assign(evidence, hyper, sizes, jax.random.key(1))
    share = expected_load(evidence.load, got.slot.sum(axis=1), sizes.num_active)
    mask = to_mask(got, sizes.num_experts)
    return load_cv(jnp.sum(mask * share[:, None], axis=0))


def test_seeing_earlier_picks_ends_the_herd():
    sizes = SIZES._replace(num_clients=20, cohort_size=20, num_experts=8)
    flat = np.full((20, 8), 0.5)
    evidence = make_evidence(sizes, fitness=flat, usage=np.arange(8.0))
    hyper = make_hyper(exploration=0.0)
    measure = jax.jit(load_cv_of, static_argnums=(0, 2))
    literal = measure("load_balanced", evidence, sizes, hyper)
    running = measure("load_balanced_running", evidence, sizes, hyper)
    assert literal > 1.0  # everyone reads the same usage and moves to experts 0 to 2
    assert running < 0.2


def test_load_balanced_by_hand():
    sizes = SIZES._replace(num_clients=2, cohort_size=2, num_experts=3, max_held=2)
    evidence = make_evidence(
        sizes, fitness=[[0.1, 0.5, 0.9], [0.9, 0.1, 0.1]], usage=[0.0, 50.0, 100.0]
    )  # capacities 1 and 2
    hyper = make_hyper(exploration=0.0, fitness_weight=0.6, usage_weight=0.4)
    got = find_strategy("load_balanced").assign(
        evidence, hyper, sizes, jax.random.key(0)
    )
    assert got.held[0, 0] == 2  # 0.6 - 0.4 beats 0.3 - 0.2 and 0
    assert got.held[1].tolist() == [0, 1]  # 0.6, -0.2, -0.4


# --- dense controls


def test_dense_controls_match_the_mixture_in_size():
    total = find_strategy("fedavg").resize(SIZES)
    active = find_strategy("fedavg_active").resize(SIZES)
    for sizes, width in ((total, 5 * 16), (active, 2 * 16)):
        assert sizes == SIZES._replace(
            num_experts=1, max_held=1, num_active=1, expert_width=width
        )


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(RESIZED)))
def test_mixtures_train_the_configured_model(name):
    assert find_strategy(name).resize(SIZES) == SIZES


def test_a_prox_term_and_a_server_rate_come_from_their_options():
    for name, field, value in (
        ("fedprox", "prox", 0.1),
        ("fedadam_active", "server_learning_rate", 0.01),
    ):
        tuned = find_strategy(name).tune(hyper_of(name))
        np.testing.assert_allclose(getattr(tuned, field), value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_counts_how_often_a_gradient_is_used(momentum):
    """Against local SGD itself: constant gradients of 1 and a rate of 1."""

    def walk(steps):
        velocity = place = 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1.0
            place += velocity
        return place

    steps, size = np.array([1, 4, 7]), np.array([10.0, 10.0, 20.0])
    used = np.array([walk(count) for count in steps])
    np.testing.assert_allclose(
        step_weights(jnp.asarray(steps, jnp.float32), momentum), used, rtol=1e-5
    )
    mean = (used * size).sum() / size.sum()
    scale = normalise_steps(jnp.asarray(steps), jnp.asarray(size), momentum)
    np.testing.assert_allclose(scale, mean / used, rtol=1e-5)
    # With the same gradient everywhere nothing changes: every client goes as far.
    np.testing.assert_allclose(scale * used, mean, rtol=1e-5)


# --- fixed random


def test_fixed_random_keeps_what_it_drew():
    assign, evidence = prepare("fixed_random")
    first = assign(evidence, make_hyper(), key=jax.random.key(0))
    mask = to_mask(first, SIZES.num_experts)
    again = assign(evidence.replace(held=mask), make_hyper(), key=jax.random.key(1))
    np.testing.assert_array_equal(to_mask(again, SIZES.num_experts), mask)
    other = assign(evidence, make_hyper(), key=jax.random.key(1))
    assert np.any(to_mask(other, SIZES.num_experts) != mask)


# --- FLEX-MoE


def test_flex_moe_by_hand():
    """Four clients of one slot each want expert 0; bounds let two have it."""
    sizes = SIZES._replace(cohort_size=4, num_experts=2, max_held=1)
    fitness = [[0.9, 0.1], [0.9, 0.6], [0.9, 0.5], [0.9, 0.2]]
    memory = {"deficit": jnp.zeros(2), "bound_violation": jnp.zeros(())}
    evidence = make_evidence(sizes, fitness=fitness, memory=memory)
    evidence = evidence.replace(capacity=jnp.ones(4, jnp.int32))
    strategy, hyper = find_strategy("flex_moe"), hyper_of("flex_moe")
    hyper = hyper.replace(own=hyper.own | {"low": 0.9, "high": 1.0, "deficit": 0.5})
    got = strategy.assign(evidence, hyper, sizes, None)
    assert got.held[:, 0].tolist() == [0, 1, 1, 0]  # 1 and 2 lose least by it
    # An expert 1 that lacked 3 slots of 2 on average is worth 0.75 more to all.
    lacking = evidence.replace(memory=memory | {"deficit": jnp.array([0.0, 3.0])})
    free = hyper.replace(own=hyper.own | {"low": 0.0, "high": 2.0})
    wanted = strategy.assign(lacking, free, sizes, None)
    assert wanted.held[:, 0].tolist() == [0, 1, 1, 1]  # 0.9 against 0.85, 1.35, 1.25...


def test_flex_moe_remembers_what_experts_lacked():
    sizes = SIZES._replace(cohort_size=3, num_experts=3, max_held=2)
    strategy, hyper = find_strategy("flex_moe"), hyper_of("flex_moe")
    memory = {"deficit": jnp.array([0.0, 0.5, 1.0]), "bound_violation": jnp.zeros(())}
    evidence = make_evidence(sizes, memory=memory)
    held = jnp.array([[0, 1], [0, 1], [0, 2]], jnp.int32)
    slot = jnp.array([[True, True], [True, False], [True, True]])
    learnt = strategy.learn(evidence, Assignment(held, slot), None, hyper)
    # Loads 3, 1, 1, mean 5/3: bounds 0.8 and 1.2 of it are 1 and 2.
    np.testing.assert_allclose(learnt["deficit"], [0, 0.5 + 2 / 3, 1 + 2 / 3])
    assert learnt["bound_violation"] == 1
    weighted = find_strategy("flex_moe_examples")
    learnt = weighted.learn(evidence, Assignment(held, slot), None, hyper)
    mean = 16 * 5 / 3
    np.testing.assert_allclose(learnt["deficit"][2], 1 + mean - 16, rtol=1e-6)
    missed = 48 - 1.2 * mean + 2 * (0.8 * mean - 16)
    np.testing.assert_allclose(learnt["bound_violation"], missed, rtol=1e-5)


# --- HFedMoE


def test_hfedmoe_value_by_hand():
    gates = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    hyper = make_hyper().replace(own={"share": 0.25, "beta": 2.0, "threshold": 0.3})
    # means 3/4, 1/4, 0; largest 1, 1/2, 0
    told = [
        (0.5 * np.log(0.5 / 0.75) + np.log(1 / 0.75)) / 2,
        0.5 * np.log(0.5 / 0.25) / 2,
        0.0,
    ]
    weight = 0.25 * np.array([0.75, 0.25, 0.0]) + 0.75 * np.array([1.0, 0.5, 0.0])
    expected = weight - 2.0 * np.array(told)
    expected[2] = -np.inf  # no example is routed to it
    np.testing.assert_allclose(hfedmoe.focus(gates, hyper), expected, rtol=1e-5)


def test_hfedmoe_weights_by_hand():
    frequency, peak = jnp.array([0.6, 0.3, 0.1]), jnp.array([1.0, 0.5, 0.25])
    feedback = Feedback(peak, peak, frequency, peak, peak, None)
    gate = {"bias": jnp.zeros(3)}
    update = ClientUpdate({"gate": gate}, feedback, None, None, None)
    hyper = make_hyper().replace(own={"share": 0.5, "beta": 0.0, "threshold": 0.2})
    client = None, update, jnp.int32(40), hyper
    assert hfedmoe.weigh_experts(*client).tolist() == [40, 40, 0]
    alpha = 0.6 * (0.6 + 1.0) / 2 + 0.3 * (0.3 + 0.5) / 2
    np.testing.assert_allclose(hfedmoe.weigh_gate(*client), [alpha] * 3, rtol=1e-6)


# --- FedMoE


def test_fedmoe_sub_models_cover_the_routing():
    assign, evidence = prepare("fedmoe")
    shares = jnp.tile(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.05]]), (10, 1))
    capacity = jnp.array([1, 2, 3, 1, 2, 3])
    memory = {"frequency": shares, "rounds": jnp.full(10, 2)}  # a warm-up of 2
    evidence = evidence.replace(memory=memory, capacity=capacity)
    hyper = hyper_of("fedmoe")  # coverage 0.8: experts 1 and 3; capacities 1 2 3 1 2 3
    got = assign(evidence, hyper, key=None)
    held = [ids[valid].tolist() for ids, valid in zip(got.held, got.slot, strict=True)]
    assert held == [[1], [1, 3], [1, 3], [1], [1, 3], [1, 3]]
    greedy = hyper.replace(own=hyper.own | {"coverage": 0.85})
    got = assign(evidence, greedy, key=None)
    assert got.slot.sum(1).tolist() == [1, 2, 3, 1, 2, 3]
    assert sorted(got.held[2, :3].tolist()) == [1, 2, 3]
    roomy = evidence.replace(capacity=jnp.full(6, 5))  # for all experts
    assert assign(roomy, hyper, key=None).slot.sum(1).tolist() == [2] * 6


def test_fedmoe_clients_warm_up_keep_and_swap_by_their_own_rounds():
    assign, evidence = prepare("fedmoe")
    shares = jnp.tile(jnp.array([[0.05, 0.5, 0.1, 0.3, 0.05]]), (10, 1))
    rounds = jnp.zeros(10, jnp.int32).at[4:].set(jnp.array([0, 1, 2, 3, 6, 7]))
    held = jnp.zeros((6, 5), bool).at[:, jnp.array([0, 4])].set(True).at[0, 1].set(True)
    evidence = evidence.replace(
        memory={"frequency": shares, "rounds": rounds},
        capacity=jnp.full(6, 3),
        held=held,
    )
    got = assign(evidence, hyper_of("fedmoe"), key=None)  # warm-up 2, period 5
    mask = to_mask(got, 5)
    assert mask[:2].all()  # two still warm up
    assert np.flatnonzero(mask[2]).tolist() == [1, 3]  # searched
    np.testing.assert_array_equal(mask[3:5], held[3:5])  # kept
    assert np.flatnonzero(mask[5]).tolist() == [1, 4]  # 0 swapped for the first's 1


def test_fedmoe_similar_clients_recommend():
    frequency = jnp.array([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4], [0.0, 0.1, 0.9]])
    held = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 1]], bool)
    cos = 0.36 / (0.36 + 0.16)
    votes = fedmoe.vote(frequency, held)
    unit = frequency / np.linalg.norm(frequency, axis=1, keepdims=True)
    np.testing.assert_allclose(votes[0, 0], cos, rtol=1e-5)
    np.testing.assert_allclose(votes[0, 2], cos + unit[0] @ unit[2], rtol=1e-5)
    swapped = fedmoe.recommend(frequency, held)
    # 0 swaps expert 1 for 2, 1 swaps 2 for 1, 2 keeps its only one
    assert swapped.astype(int).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    alone = fedmoe.recommend(frequency[:1], held[:1])
    assert alone.tolist() == held[:1].tolist()


def test_fedmoe_learns_the_routing_of_held_experts():
    sizes = SIZES._replace(num_clients=3, cohort_size=2, num_experts=3, max_held=3)
    known = {
        "frequency": jnp.array([[9.0] * 3, [0.0] * 3, [0.2, 0.3, 0.5]]),
        "rounds": jnp.array([4, 0, 2]),
    }
    evidence = make_evidence(sizes, memory=known)  # clients 1 and 2
    held = jnp.array([[0, 1, 2], [2, 0, 1]], jnp.int32)
    slot = jnp.array([[True, True, True], [True, True, False]])
    shares = jnp.array([[0.7, 0.2, 0.1], [0.9, 0.1, 0.0]])
    feedback = Feedback(shares, shares, shares, shares, shares, None)
    hyper = hyper_of("fedmoe", fitness_rate=0.25)
    learnt = fedmoe.learn(evidence, Assignment(held, slot), feedback, hyper)
    # Client 2 holds experts that had 0.7 of its routing: they share that out.
    moved = [0.2 + 0.25 * (0.7 * 0.1 - 0.2), 0.3, 0.5 + 0.25 * (0.7 * 0.9 - 0.5)]
    expected = [[9, 9, 9], [0.7, 0.2, 0.1], moved]
    np.testing.assert_allclose(learnt["frequency"], expected, rtol=1e-6)
    assert learnt["rounds"].tolist() == [4, 1, 3]
    lost = feedback.replace(load=jnp.zeros((2, 3)))  # both were not finite
    learnt = fedmoe.learn(evidence, Assignment(held, slot), lost, hyper)
    jax.tree.map(np.testing.assert_array_equal, learnt, known)


# --- several strategies in one program


def test_either_decides_as_the_strategy_that_is_counted_to():
    names = SHARED
    evidence, key = make_evidence(SIZES), jax.random.key(3)
    assign = jax.jit(partial(either(names).assign, sizes=SIZES))
    found = []
    for number, name in enumerate(names):
        both = make_hyper(strategy=number, exploration=0.0)
        got = assign(evidence, both, key=key)
        expected = compiled(name)(evidence, both, key=key)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        found.append(np.asarray(to_mask(got, SIZES.num_experts)).tobytes())
    assert len(set(found)) >= 4  # they do not all decide the same
    assert assign._cache_size() == 1


def test_either_of_one_strategy_is_that_strategy():
    assert either(("greedy",)) is STRATEGIES["greedy"]
    assert either(("greedy", "random")) is either(("greedy", "random"))


# --- FedMix


def test_fedmix_takes_what_the_gate_asks_for():
    assign, evidence = prepare("fedmix")
    mass = jnp.tile(jnp.array([[0.5, 0.02, 0.3, 0.08, 0.1]]), (10, 1)).at[4].set(0.0)
    evidence = evidence.replace(memory={"mass": mass})  # clients 4 to 9
    got = assign(evidence, hyper_of("fedmix"), key=jax.random.key(0))
    held = [ids[valid].tolist() for ids, valid in zip(got.held, got.slot, strict=True)]
    assert held[1:] == [[0, 2], [0, 2, 4], [0], [0, 2], [0, 2, 4]]
    assert len(held[0]) == 1  # client 4 has not taken part and draws
    few = evidence.replace(memory={"mass": jnp.where(mass < 0.4, 0.01, mass)})
    got = assign(few, hyper_of("fedmix"), key=jax.random.key(0))
    assert got.slot.sum(1)[1:].tolist() == [1, 1, 1, 1, 1]


def test_fedmix_gate_loss_by_hand():
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))
    hyper = make_hyper().replace(own={"sparsity": 2.0, "variety": 3.0})
    one = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    loss = fedmix.gate_loss(logits, None, hyper)
    np.testing.assert_allclose(loss, 2 * one - 3 * np.log(2), rtol=1e-5)


def test_fedmix_weighs_by_responsibility_and_remembers_the_gate():
    share, mass = jnp.array([0.75, 0.25]), jnp.array([0.5, 0.2, 0.3])
    update = ClientUpdate(
        {}, Feedback(share, share, share, share, share, mass), *[0] * 3
    )
    weight = fedmix.by_responsibility(None, update, jnp.int32(40), None)
    assert weight.tolist() == [30, 10]
    old = jnp.arange(6.0).reshape(2, 3)
    evidence = make_evidence(
        SIZES._replace(num_clients=2, cohort_size=2, num_experts=3, max_held=3),
        memory={"mass": old},
    )
    told = Feedback(*[None] * 5, jnp.stack([mass, jnp.zeros(3)]))  # 1 was not finite
    learnt = fedmix.learn(evidence, None, told, None)["mass"]
    np.testing.assert_allclose(learnt, jnp.stack([mass, old[1]]))


def test_probabilities_are_mixed_not_logits():
    model = SimpleNamespace(head=lambda params, outputs: params * outputs)
    outputs = jnp.log(jnp.array([[[0.99, 0.01], [0.2, 0.8]]]))
    gates = jnp.array([[0.25, 0.75]])
    mixed = jax.nn.softmax(mix_probabilities(model, 1.0, outputs, gates))
    np.testing.assert_allclose(mixed, [[0.3975, 0.6025]], rtol=1e-5)
    other = jax.nn.softmax(mix_outputs(model, 1.0, outputs, gates))
    assert other[0, 0] > 0.5


# --- FedJETs


def test_fedjets_anchors_cover_the_labels():
    mix = jnp.array(
        [[0.6, 0.4, 0, 0], [0.7, 0.3, 0, 0], [0, 0, 1, 0], [0.2, 0, 0, 0.8]]
    )
    # 0 ties with all at 1; then 2 has most that is new, then 3, then what is left.
    assert fedjets.choose_anchors(mix, 3).tolist() == [0, -1, 1, 2]
    assert sorted(fedjets.choose_anchors(mix, 4).tolist()) == [0, 1, 2, 3]


def test_fedjets_anchors_hold_their_expert_and_teach_the_gate():
    assign, evidence = prepare("fedjets")
    mass = jnp.tile(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]), (10, 1))
    anchor = jnp.full(10, -1).at[jnp.array([5, 8])].set(jnp.array([2, 0]))
    evidence = evidence.replace(memory={"mass": mass, "anchor": anchor})
    got = assign(evidence, hyper_of("fedjets"), key=jax.random.key(0))
    held = [ids[valid].tolist() for ids, valid in zip(got.held, got.slot, strict=True)]
    assert held == [[1], [2], [1], [1, 3], [0], [1, 3]]  # capacities 1 2 1 2 1 2
    assert got.calibration.tolist() == [0, 1, 0, 0, 1, 0]
    assert find_strategy("fedjets").tune(hyper_of("fedjets")).calibration == 1


# --- FedMoE-DA


def test_fedmoe_da_mixes_with_the_most_similar():
    rows = jnp.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [-1.0, 0.1]])
    similar = fedmoe_da.find_similar(rows)
    weights = fedmoe_da.mixing_weights(similar, jnp.float32(1), jnp.float32(0.5))
    unit = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    scaled = np.exp(unit @ unit.T / 0.5)
    for i, j in ((0, 1), (1, 0), (2, 0), (3, 2)):  # the nearest other of each
        total = scaled[i, i] + scaled[i, j]
        np.testing.assert_allclose(weights[i, j], scaled[i, j] / total, rtol=1e-5)
        np.testing.assert_allclose(weights[i, i], scaled[i, i] / total, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.asarray(weights) > 0).sum() == 8


def test_fedmoe_da_mixes_the_cohort_and_renews_its_weights_every_period():
    rng = np.random.default_rng(0)
    personal = {
        "gate": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32)},
        "experts": {"w": jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32)},
    }
    hyper = hyper_of("fedmoe_da")  # five neighbours, a period of 5
    memory = fedmoe_da.remember(SIZES._replace(num_clients=3, num_experts=2))
    mine = np.array([4, 5, 0, 1])  # the experts of clients 2 and 0
    everyone = jnp.ones(2, bool)
    for number, fresh in ((3, False), (5, True), (6, True)):
        evidence = SimpleNamespace(
            round=jnp.int32(number), client=jnp.array([2, 0], jnp.int32)
        )
        mixed, memory, *moved = fedmoe_da.exchange(
            personal, memory, evidence, everyone, hyper
        )
        rows = personal["gate"]["kernel"].reshape(6, 3)[mine]
        similar = fedmoe_da.find_similar(rows)
        weights = fedmoe_da.mixing_weights(similar, jnp.float32(5), jnp.float32(1))
        weights = weights if fresh else np.eye(4)  # nobody has shown its rows yet
        expected = np.array(personal["experts"]["w"]).reshape(6, 5)
        expected[mine] = weights @ expected[mine]
        np.testing.assert_allclose(
            mixed["experts"]["w"].reshape(6, 5), expected, rtol=1e-5, atol=1e-6
        )
        assert mixed["gate"] is personal["gate"]
        both = [2.0, 2.0] if fresh else [0.0, 0.0]  # each gets the other's two experts
        assert [count.tolist() for count in moved] == [both, both]
        if number == 5:  # from then on other rows change nothing until the next renewal
            old = personal["gate"]["kernel"]
            frozen = {"gate": {"kernel": -old[::-1]}, "experts": personal["experts"]}
            later = SimpleNamespace(round=jnp.int32(6), client=evidence.client)
            again, *_ = fedmoe_da.exchange(frozen, memory, later, everyone, hyper)
            assert_trees_close(again["experts"], mixed["experts"])
            alone = jnp.array([True, False])  # the other's round did not count
            still, _, *moved = fedmoe_da.exchange(
                personal, memory, evidence, alone, hyper
            )
            rest = lambda tree: jax.tree.map(
                lambda leaf: leaf[:2], tree
            )  # not client 2
            assert_trees_close(rest(still["experts"]), rest(personal["experts"]))
            assert [count.tolist() for count in moved] == [[0, 0], [0, 0]]


def test_fedmoe_da_counts_what_travels_once():
    mixing = np.eye(6)  # three clients of two experts
    mixing[0, [1, 2, 5]] = mixing[1, 2] = 0.1
    sent, received = fedmoe_da.count_sent(jnp.asarray(mixing), 2)
    assert received.tolist() == [2, 0, 0]  # its own second expert travels nowhere
    assert sent.tolist() == [0, 1, 1]


def assert_trees_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left, right)
