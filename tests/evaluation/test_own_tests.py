"""Own test sets, and what else clients set aside, against loops over examples."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SMALL,
    make_align,
    make_config,
    make_data,
    make_devices,
    make_federation,
    make_program,
    run_alone,
)

from fedmoe_jax.base import Route
from fedmoe_jax.data.partition import load_partition
from fedmoe_jax.evaluation import sources
from fedmoe_jax.evaluation.evaluate import build_evaluate, summarise_validation
from fedmoe_jax.evaluation.panel import Panel
from fedmoe_jax.evaluation.priors import gather_priors
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import replace
from fedmoe_jax.report.rows import read_metrics
from fedmoe_jax.runtime.sharding import build_mesh
from fedmoe_jax.train.plan import plan_run
from fedmoe_jax.train.run import stack_federations
from fedmoe_jax.types import Lists, Pool, SimState
from fedmoe_jax.world.participation import init_participation

pytestmark = pytest.mark.slow

N, E, COUNT, IMAGE, CLASSES, UNSEEN = 6, 4, 23, (4, 4, 1), 3, 3
IDLE, LOST = 4, 2  # one has held nothing, no update of the other has counted
SIZES = np.array([3, 0, 4, 1, 2, 4], np.int32)  # of the clients' own tests
CHANGES = {
    "num_clients": N,
    "num_experts": E,
    "max_held": 3,
    "num_active": 2,
    "batch_size": 1,
    "model.stem_width": 6,
    "model.expert_width": 5,
    "model.feature_width": 5,
    "partition.unseen": UNSEEN,
}
# The personal parts of a strategy, whether every expert is computed, parts, devices.
FORMS = [
    ((), True, True, 1),
    ((), False, True, 2),
    ((), True, False, 1),
    (("gate",), True, True, 2),
    (("stem", "gate", "experts", "head"), True, True, 1),
    (("gate", "head"), True, False, 2),
]


def build(personal, every_expert, parts, devices, mix="outputs", **changes):
    program = make_program(make_data(CLASSES, IMAGE), **CHANGES, **changes)
    strategy = program.strategy._replace(
        personal=personal, every_expert=every_expert, mix=mix
    )
    if "experts" in personal:
        strategy = strategy._replace(local_experts=E)
    program = program._replace(strategy=strategy, mesh=build_mesh(devices))
    if not parts:
        program = program._replace(model=program.model._replace(parts=None))
    return program


def draw_state(program, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = jax.tree.map(
        lambda leaf: draw(*leaf.shape), shape_params(program.model)[0]
    )
    rows = lambda leaf: draw(N, *leaf.shape)
    held = rng.random((N, 1, E)).argsort(axis=2) < np.arange(N)[:, None, None] % 3 + 1
    held[IDLE] = False
    participation = init_participation(program.sizes)
    counted = jnp.ones(N, jnp.int32).at[jnp.array([IDLE, LOST])].set(0)
    return SimState(
        round=jnp.int32(0),
        key=jax.random.key(0),
        params=params,
        server_opt={},
        align=make_align(
            N, E, held=jnp.asarray(held), fitness=jnp.full(held.shape, 0.5)
        ),
        personal={p: jax.tree.map(rows, params[p]) for p in program.strategy.personal},
        variate={},
        participation=participation.replace(rounds=counted),
    )


def draw_federation():
    """The training examples are the test examples, too; 21 of them are set aside."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (COUNT, *IMAGE), np.uint8)
    y = rng.integers(0, CLASSES, COUNT, np.int32)
    mix = rng.dirichlet(np.ones(CLASSES), N)
    ids = rng.permutation(COUNT).astype(np.int32)
    own = np.zeros((N, 4), np.int32)
    own[np.arange(4)[None] < SIZES[:, None]] = ids[: SIZES.sum()]
    unseen = np.sort(rng.integers(0, UNSEEN - 1, 9))  # the last one has no example
    fields = make_federation(
        label_mix=mix.astype(np.float32),
        train={"x": x, "y": y},
        test={"x": x, "y": y},
        test_stratum=y,
        statistics={k: np.full(IMAGE, v, np.float32) for k, v in STATISTICS.items()},
        devices=make_devices(N),
        sample_order=np.arange(N, dtype=np.int32),
        frozen={},
        own_test=Lists(own, SIZES),
        validation=Pool(
            np.append(ids, [0, 0]).astype(np.int32),
            np.append(y[ids] + 1, [0, 0]).astype(np.int32),
        ),
        unseen=Pool(
            np.append(ids[:9], 0).astype(np.int32),
            np.append(unseen + 1, 0).astype(np.int32),
        ),
    )
    return jax.tree.map(jnp.asarray, fields)


STATISTICS = {"mean": 0.5, "std": 0.3}
FEDERATION = draw_federation()


@functools.partial(jax.jit, static_argnums=0)
def answer(program, state, client, example, held):
    """The class of ONE example by ONE client's model with these experts."""
    own = jax.tree.map(lambda leaf: leaf[client], state.personal)
    everything = jnp.arange(E)[None]
    local = program.strategy.local_experts
    submodel = take_submodel(state.params, own, everything, local)
    image = FEDERATION.train["x"][example].astype(jnp.float32)[None]
    batch = {"x": (image / 255 - 0.5) / 0.3, "y": jnp.zeros(1, jnp.int32)}
    route = Route(program.sizes.num_active, program.strategy.mix)
    slots = everything, held[None]
    outputs, _ = program.model.apply(submodel, {}, batch, *slots, route, None)
    return outputs[0].argmax()


def slow_asides(program, state):
    """The accuracies one example at a time."""
    y, everyone = np.asarray(FEDERATION.train["y"]), np.ones(E, bool)
    right = lambda *which: int(answer(program, state, *which))
    counted = [
        c for c in range(N) if not program.strategy.personal or c not in (IDLE, LOST)
    ]
    own = {}
    for client in counted:
        held = np.asarray(state.align.held[client, 0])
        held = everyone if client in (IDLE, LOST) else held
        ids = np.asarray(FEDERATION.own_test.index[client])[: SIZES[client]]
        if len(ids):
            own[client] = np.mean([right(client, i, held) == y[i] for i in ids])
    models = counted if program.strategy.personal else [0]
    unseen = []
    for number in range(UNSEEN - 1):
        ids = np.asarray(FEDERATION.unseen.example)
        ids = ids[np.asarray(FEDERATION.unseen.group) == number + 1]
        each = [[right(m, i, everyone) == y[i] for i in ids] for m in models]
        unseen.append(np.mean(each))
    own = list(own.values())
    worst = lambda x: np.sort(x)[: math.ceil(len(x) / 10)].mean()
    return {
        "own_test_accuracy": np.mean(own),
        "worst_decile_own_test_accuracy": worst(own),
        "own_test_clients": len(own),
        "unseen_accuracy": np.mean(unseen),
        "worst_decile_unseen_accuracy": worst(unseen),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [500, 4])
def test_asides_equal_the_slow_loop(form, batch, monkeypatch):
    monkeypatch.setattr(sources, "TEST_BATCH", batch)
    build_evaluate.cache_clear()
    program = build(*form)
    state = draw_state(program)
    found = jax.device_get(build_evaluate(program)(state, FEDERATION, {}))
    expected = slow_asides(program, state)
    assert expected["own_test_clients"] == (3 if form[0] else 5)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    # The validation examples are the test examples in another order.
    for name in ("global", "personal", "personal_prior"):
        value = found[f"validation_{name}_accuracy"]
        test = found[f"{name}_accuracy"]
        np.testing.assert_allclose(value, test, atol=1e-6, err_msg=name)


def test_probabilities_are_mixed_in_own_tests_too():
    program = build((), True, True, 1, "probabilities")
    state = draw_state(program)
    found = build_evaluate(program)(state, FEDERATION, {})
    expected = slow_asides(program, state)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("personal", "every_expert"),
    [((), True), ((), False), (("stem", "gate", "experts", "head"), True)],
)
def test_a_shared_expert_answers_in_own_tests_too(personal, every_expert):
    program = build(personal, every_expert, True, 1, **{"model.shared_width": 3})
    state = draw_state(program)
    found = build_evaluate(program)(state, FEDERATION, {})
    for name, value in slow_asides(program, state).items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("personal", [(), ("gate",)])
def test_images_of_own_tests_drift_with_their_clients(personal):
    """At full loss of contrast the images of the two that drift are their means."""
    drift = {"drift.images": "contrast"}
    program = build(personal, True, True, 1, **drift)
    ((name, _),) = program.processes
    state = draw_state(program, 3)
    drifted, calm = (state.replace(world={name: jnp.float32(x)}) for x in (1, 0))
    source = jnp.array([5, 1, 2, 3, 4, 0])
    federation = FEDERATION.replace(drift_source=source)
    evaluate = build_evaluate(program)
    found, before = (evaluate(s, federation, {}) for s in (drifted, calm))
    own = FEDERATION.own_test
    ids = jnp.concatenate([own.index[c, : SIZES[c]] for c in (0, 5)])
    x = jnp.asarray(FEDERATION.train["x"], jnp.float32)
    x = x.at[ids].set(x[ids].mean((1, 2), keepdims=True))
    moved = FEDERATION.replace(train=FEDERATION.train | {"x": x})
    plain = program._replace(processes=())
    expected = build_evaluate(plain)(state.replace(world={}), moved, {})
    for key in ("own_test_accuracy", "worst_decile_own_test_accuracy"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-6)
    assert found["own_test_accuracy"] != before["own_test_accuracy"]
    assert found["unseen_accuracy"] == before["unseen_accuracy"]


def test_asides_without_any_are_not_measured():
    program = build((), True, True, 1)
    program = program._replace(static=replace(program.static, partition={"unseen": 0}))
    bare = FEDERATION.replace(own_test=None, validation=None, unseen=None)
    state = draw_state(program)
    found = build_evaluate(program)(state, bare, {})
    whole = build_evaluate(build((), True, True, 1))(state, FEDERATION, {})
    assert not any(n.startswith(("own", "valid", "unseen")) for n in found)
    for name, value in found.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_strata_without_validation_do_not_count():
    """Client 0 has half of its labels in a stratum without a validation example."""
    mix = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    panel = Panel(
        client=None,
        counted=jnp.ones(2, bool),
        label_mix=mix,
        drifts=None,
        models=None,
        model=jnp.arange(2),
        sets=None,
        priors=gather_priors(mix, jnp.arange(2), jnp.arange(2), 2),
    )
    rows = jnp.array([[[3.0, 0.0]], [[1.0, 0.0]]])
    counts = {"total": jnp.array([4.0, 0.0]), "global": jnp.array([[2.0, 0.0]])}
    found = summarise_validation(counts | {"personal": rows, "prior": rows}, panel)
    assert found["validation_global_accuracy"] == 0.5
    assert found["validation_personal_accuracy"] == (0.75 + 0.25) / 2
    assert found["validation_personal_prior_accuracy"] == (0.75 + 0.25) / 2


# ---- whole runs

ASIDES = {
    "partition.test_share": 0.2,
    "partition.validation_share": 0.1,
    "partition.unseen": 2,
}


def test_a_run_has_them_in_its_rows_and_its_summary(tmp_path):
    config = make_config(**SMALL | ASIDES | {"num_rounds": 2})
    assert run_alone(config, tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    made = json.loads((tmp_path / "summary.json").read_text())
    names = ("own_test", "worst_decile_own_test", "unseen", "worst_decile_unseen")
    names += ("validation_global", "validation_personal", "validation_personal_prior")
    for name in names:
        assert 0 <= last[f"{name}_accuracy"] <= 1
        assert made[f"final_{name}_accuracy"] == last[f"{name}_accuracy"]
    assert last["own_test_clients"] == made["own_test_clients"] == 4
    partition = load_partition(tmp_path / "partition.npz")
    assert len(partition.size) == 4 and len(np.unique(partition.unseen_client)) == 2


def test_runs_with_longer_lists_share_a_wave():
    """Seeds have lists of different lengths; padding belongs to nobody."""
    fields = SMALL | ASIDES | {"partition.alpha": 0.1}
    plans = [plan_run(make_config(seed=s, **fields), build_mesh(1)) for s in (2, 3)]
    stacked = stack_federations([p.federation for p in plans], build_mesh(1))
    shapes = [p.federation.unseen.example.shape for p in plans]
    assert shapes[0] != shapes[1]
    for number, plan in enumerate(plans):
        own = plan.federation
        for name in ("validation", "unseen"):
            pool, found = getattr(own, name), getattr(stacked, name)
            length = len(pool.group)
            np.testing.assert_array_equal(found.group[number, :length], pool.group)
            assert not found.group[number, length:].any()
        width = own.own_test.index.shape[1]
        index = stacked.own_test.index[number]
        np.testing.assert_array_equal(index[:, :width], own.own_test.index)
        np.testing.assert_array_equal(stacked.own_test.size[number], own.own_test.size)


def test_pooled_data_are_judged_by_the_clients_own_tests():
    config = make_config(strategy="centralised", **SMALL | ASIDES)
    federation = plan_run(config, build_mesh(1)).federation
    assert federation.own_test.index.shape[0] == 4 and len(federation.size) == 1
    trained = federation.index[0, : federation.size[0]]
    tested = federation.own_test.index[federation.own_test.index > 0]
    assert not set(trained.tolist()) & set(tested.tolist())
