"""One suite for every strategy, then what is particular to each."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.align.fitness import idle_rule, update_fitness
from fedmoe_jax.align.solve import expected_load, to_mask
from fedmoe_jax.align.usage import load_cv
from fedmoe_jax.strategies import STRATEGIES, either, find_strategy
from fedmoe_jax.types import Evidence, Hyper, Sizes, UserError

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
)
DENSE = ("fedavg", "fedavg_active")
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def make_hyper(**changes):
    fields = dict.fromkeys(Hyper.__dataclass_fields__, 0.5) | changes
    hyper = {name: jnp.float32(value) for name, value in fields.items()}
    return Hyper(**hyper | {"strategy": jnp.int32(changes.get("strategy", 0))})


def make_evidence(sizes, fitness=None, usage=None, round=0):
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
    return compiled(name), make_evidence(find_strategy(name).resize(SIZES), **evidence)


# --- all of them


@every_strategy
def test_valid_and_deterministic_under_jit(name):
    assign, evidence = prepare(name)
    key, hyper = jax.random.key(3), make_hyper()
    first = assign(evidence, hyper, key=key)
    assert_valid(first, evidence.capacity, find_strategy(name).resize(SIZES))
    again = assign(evidence, hyper, key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@every_strategy
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_valid_whatever_the_evidence(name, bad):
    sizes = find_strategy(name).resize(SIZES)
    fitness = np.full((sizes.cohort_size, sizes.num_experts), bad)
    usage = np.full(sizes.num_experts, bad)
    assign, evidence = prepare(name, fitness=fitness, usage=usage)
    got = assign(evidence, make_hyper(exploration=0.0), key=jax.random.key(0))
    assert_valid(got, evidence.capacity, sizes)


@every_strategy
def test_scan_over_rounds_of_vmap_over_keys_is_each_alone(name):
    assign, evidence = prepare(name)
    hyper, keys = make_hyper(), jax.random.split(jax.random.key(5), 2)

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
    with pytest.raises(UserError, match="strategy='best'.*random, round_robin, greedy"):
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


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(DENSE)))
def test_mixtures_train_the_configured_model(name):
    assert find_strategy(name).resize(SIZES) == SIZES


# --- several strategies in one program


def test_either_decides_as_the_strategy_that_is_counted_to():
    names = tuple(name for name in STRATEGIES if name not in DENSE)
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
