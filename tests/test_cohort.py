"""The training of a cohort: its places and its sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    assert_same,
    make_federation,
    make_feedback,
    make_hyper,
    make_inputs,
    make_program,
    make_replies,
    make_update,
)

from fedmoe_jax.aggregate import accumulate, weigh, zero_sums
from fedmoe_jax.cohort import build_train_cohort, place_replies, take_clients
from fedmoe_jax.reply import keep_if
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.world.outcome import BROKEN, MERGED, STALE, Outcome

pytestmark = pytest.mark.slow

HYPER = make_hyper()
C, E, K = 6, 4, 2
HELD = np.array([[0, 1], [2, 3], [1, 0], [3, 0], [0, 2], [2, 0]], np.int32)[:, None]
SLOT = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]], bool)[:, None]
FINITE = np.array([1, 1, 1, 1, 0, 1], bool)  # client 4 diverged
SIZE = np.array([10, 20, 30, 40, 50, 60], np.int32)
LOAD = np.arange(2.0 * C, dtype=np.float32).reshape(C, 1, K)
STEPS = np.array([3, 1, 4, 1, 5, 9], np.int32)  # scheduled in another order


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_tree(lead=(), experts=E, seed=0):
    """A tree like params with leading axes, of one layer."""
    return {
        "stem": {"kernel": draw(*lead, 3, seed=seed)},
        "gate": {"moe": {"bias": draw(*lead, E, seed=seed + 1)}},
        "experts": {"moe": {"kernel": draw(*lead, experts, 2, seed=seed + 2)}},
        "head": {"bias": draw(*lead, 2, seed=seed + 3)},
    }


PARAMS, DELTAS = jax.tree.map(jnp.asarray, make_tree()), make_tree((C,), K, seed=10)
for rows in jax.tree.leaves(DELTAS):
    rows[4] = np.nan


def send(steps=STEPS):
    gates = jax.tree.map(lambda leaf: np.stack([leaf] * C), PARAMS["gate"])
    return make_inputs(HELD, SLOT, steps=steps, personal={"gate": gates})


def reply():
    return make_update(DELTAS, make_feedback(LOAD), finite=FINITE)


def test_take_clients_gives_positions_beyond_the_cohort_no_steps():
    inputs, position = send(np.ones(C, np.int32)), jnp.array([[5, 0], [6, 2], [7, 9]])
    conditions = {"client": 10 * jnp.arange(C)}
    taken, there = take_clients(inputs, conditions, position)
    assert taken.steps.tolist() == [[1, 1], [0, 1], [0, 0]]
    np.testing.assert_array_equal(taken.held[0], HELD[[5, 0]])
    np.testing.assert_array_equal(taken.client[1, 1], 2)
    assert there["client"][:2].tolist() == [[50, 0], [50, 20]]
    for leaf in jax.tree.leaves(taken.personal):
        assert leaf.shape[:2] == (3, 2)


def test_place_replies_returns_them_to_their_places():
    loss = jnp.array([10.0, 20.0, 30.0])
    outcome = Outcome(loss.astype(int), loss, loss)
    replies = make_replies({}, np.ones(3, bool), loss=loss, outcome=outcome)
    placed = place_replies(replies, jnp.array([3, 5, 1]), 4)  # position 5 pads
    assert placed.loss.tolist() == [0, 30, 0, 10]
    assert placed.outcome.code.tolist() == [0, 30, 0, 10]


# ---- sums


def fake_update(params, inputs, federation, hyper, key):
    """The result of the client of this id according to the tables above."""
    return jax.tree.map(lambda leaf: leaf[inputs.client], reply())


def judge_by_numbers(conditions, sent, finite):
    """No client is late or lost, but broken numbers do not count."""
    code = jnp.where(finite, MERGED, BROKEN).astype(jnp.int32)
    return Outcome(code, jnp.ones(3), jnp.ones(3))


def train(
    inputs,
    judge=judge_by_numbers,
    devices=1,
    platform="cpu",
    hyper=HYPER,
    **changes,
):
    """Sums and replies of the cohort."""
    fields = {"gate.mode": "personal", "merge.weight": "examples"}
    program = make_program(**fields | changes)._replace(platform=platform)
    run = spread(build_train_cohort(fake_update, judge, program), build_mesh(devices))
    conditions = {"client": jnp.arange(C)}
    federation = make_federation(size=jnp.asarray(SIZE))
    return jax.jit(run)(
        PARAMS, inputs, conditions, federation, hyper, jax.random.key(0)
    )


def sum_loop(inputs):
    """Sums by a loop over clients, gates personal."""
    strategy = make_program(**{"gate.mode": "personal"}).strategy
    sums = jax.tree.map(lambda leaf: leaf[None], zero_sums(PARAMS, ()))
    for c in range(C):
        client = jax.tree.map(lambda leaf, c=c: leaf[c], (inputs, reply()))
        weights = keep_if(FINITE[c], weigh(*client, SIZE[c], None, strategy))
        sums = accumulate(sums, 0, *client, weights)
    return jax.tree.map(lambda leaf: leaf[0], sums)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_train_cohort_sums_late_updates_apart(platform):
    def judge(conditions, sent, finite):
        outcome = judge_by_numbers(conditions, sent, finite)
        late = finite & (conditions["client"] % 2 == 1)
        return outcome.replace(code=jnp.where(late, STALE, outcome.code))

    one_step = np.ones(C, np.int32)
    changes = {"late.kind": "stale", "run.client_chunk": 1 if platform == "cpu" else 3}
    (now, late), _ = train(send(one_step), judge, platform=platform, **changes)
    odd = np.arange(C) % 2 == 1
    for sums, part in ((now, ~odd), (late, odd)):
        expected = sum_loop(send(np.where(part, one_step, 0)))  # no steps, no weight
        assert_same(sums, expected, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("devices", "chunk"), [(1, 1), (1, 4), (8, 1), (2, 2)])
def test_train_cohort_gives_the_same_sums_on_any_devices_and_chunks(
    devices, chunk, platform
):
    """On an accelerator those of a chunk are products, with NaNs left out as well."""
    inputs, changes = send(), {"run.client_chunk": chunk}
    (sums,), replies = train(inputs, devices=devices, platform=platform, **changes)
    assert_same(sums, sum_loop(inputs), atol=1e-4)
    np.testing.assert_array_equal(replies.feedback.load, LOAD)
    np.testing.assert_array_equal(replies.arrived, FINITE)
    assert replies.outcome.code.dtype == jnp.int32
    old, delta = inputs.personal["gate"]["moe"], DELTAS["gate"]["moe"]
    for name, leaf in replies.personal["gate"]["moe"].items():
        np.testing.assert_allclose(leaf, old[name] + delta[name], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_train_cohort_weighs_every_part_by_the_loss(platform, monkeypatch):
    """Weights by examples, which the first loss to the power of 2 multiplies."""
    loss = np.linspace(0.5, 2.0, C).astype(np.float32)
    answer = reply().replace(first_loss=jnp.asarray(loss))
    monkeypatch.setitem(globals(), "reply", lambda: answer)
    hyper = make_hyper(fairness={"power": 2.0})
    changes = {"fairness.power": 1.0, "run.client_chunk": 3}
    inputs = send()
    (sums,), replies = train(inputs, platform=platform, hyper=hyper, **changes)
    (plain,), unweighed = train(inputs, platform=platform)
    np.testing.assert_array_equal(replies.sent, unweighed.sent)
    monkeypatch.setitem(globals(), "SIZE", SIZE * loss**2)
    expected = sum_loop(inputs)
    assert_same(sums, expected, rtol=1e-4, atol=1e-4)
    assert abs(float(plain.weight["stem"] - sums.weight["stem"])) > 1
