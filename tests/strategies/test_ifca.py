"""IFCA: the choice by hand, a round against a loop, and groups that it finds."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import assert_same, plan_run, start_run, use_linear_model
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.client import draw_local
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.optimizers import client_optimizer
from fedmoe_jax.probe import find_hold_key
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.strategies.ifca import choose_best
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import make_keys

choose = jax.jit(choose_best, static_argnums=2)


def choose_by(seed, probe, slot=(True,) * 4):
    """The place that is chosen, the only one."""
    key = jax.random.key(seed)
    chosen = choose(jnp.float32(probe), jnp.array(slot), None, key)
    assert chosen.dtype == bool and int(chosen.sum()) == 1
    return int(chosen.argmax())


@pytest.mark.parametrize(
    ("probe", "slot", "expected"),
    [
        ([2.0, 1.0, 3.0, 1.5], [1, 1, 1, 1], 1),
        ([2.0, 1.0, 3.0, 1.5], [1, 0, 1, 1], 3),  # the best was not received
        ([2.0, np.nan, np.inf, 3.0], [1, 1, 1, 1], 0),
        ([np.nan, 1.0, 9.0, 0.0], [1, 0, 0, 0], 0),  # a dense warm-up, diverged
        ([2.0, 1.0, 1.001, 3.0], [1, 1, 1, 1], 1),  # no tie
    ],
)
def test_choose_best_by_hand(probe, slot, expected):
    for seed in range(5):
        assert choose_by(seed, probe, np.array(slot, bool)) == expected


@pytest.mark.parametrize(
    ("probe", "tied"),
    [
        ([1.0, 1.0, 1.0, 1.0], {0, 1, 2, 3}),  # copies, after a dense warm-up
        ([2.0, 1.0, 1.0 + 2e-7, 3.0], {1, 2}),  # but for rounding
        ([np.nan, np.inf, np.nan, 0.0], {0, 1, 2}),  # the last was not received
    ],
)
def test_choose_best_draws_among_equals(probe, tied):
    slot = [True, True, True, probe[3] > 0]
    places = [choose_by(seed, probe, slot) for seed in range(60)]
    assert set(places) == tied
    assert max(map(places.count, tied)) < 1.6 * 60 / len(tied)


LOSSES = st.floats(0, 100, width=32, allow_subnormal=False)  # XLA reads these as 0


@given(st.lists(LOSSES, min_size=4, max_size=4), st.data())
def test_choose_best_has_no_more_loss_than_any(probe, data):
    slot = data.draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    place = choose_by(data.draw(st.integers(0, 9)), probe, slot)
    assert slot[place]
    least = np.float32(probe)[slot].min()
    assert np.float32(probe)[place] <= least * (1 + 2e-6)


# ---- a round against a loop over clients and experts

FIELDS = {
    "strategy": "ifca",
    "num_clients": 6,
    "cohort_size": 6,
    "partition.kind": "dirichlet",
    "partition.alpha": 0.1,
    "partition.min_size": 2,
    "fitness.probe_share": 0.3,
    "client.learning_rate": 0.1,
    "chunk_rounds": 1,
}
MOE = "moe"  # the one layer's name


def start_round(**changes):
    """A run before its first round, of linear experts whose parts cost one FLOP."""
    plan = plan_run(**FIELDS | changes)
    return start_run(plan, use_linear_model(plan.program))


def play(run):
    """The state after one chunk of rounds, and its metrics."""
    return build_run_rounds(run.program)(
        jax.tree.map(jnp.copy, run.state), run.federation, run.hyper
    )


def lose(params, expert, ids, run, calibration):
    """The loss of the model that has ONE expert, on some examples."""
    program, federation = run.program, run.federation
    rows = federation.train, ids, federation.statistics
    batch, parts = take_batch(*rows, program.task), program.model.parts
    features = parts.stem(params["stem"], batch, None)
    one = jax.tree.map(lambda leaf: leaf[expert], params["experts"][MOE])
    outputs = parts.head(params["head"], parts.expert(one, features, None))
    own = -jax.nn.log_softmax(gate_logits(params["gate"][MOE], features))[:, expert]
    return program.task.loss(outputs, batch).loss.mean() + calibration * own.mean()


def compile_twin(run):
    """The loss of `lose` without calibration, and one step of training with it."""
    hyper, client = run.hyper, run.program.static.client
    tx = client_optimizer(client, hyper.client.learning_rate)

    @jax.jit
    def step(params, opt_state, expert, ids):
        grads = jax.grad(lose)(params, expert, ids, run, hyper.loss.calibration)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    return jax.jit(lambda *given: lose(*given, run, 0.0)), tx.init, step


def train_slowly(run, client, twin):
    """The expert that ONE client chooses, and its delta like all params."""
    loss, init, step = twin
    program, hyper, state = run.program, run.hyper, run.state
    key = jax.random.fold_in(make_keys(state.key, 0).train, client)
    who = SimpleNamespace(client=client, hold_key=find_hold_key(state.key, client))
    draws = who, run.federation, hyper, jax.random.split(key)[0], program.sizes
    batches, probe = draw_local(*draws)
    assert not set(np.asarray(batches).flat) & set(np.asarray(probe).tolist())
    every = range(program.sizes.num_experts)
    losses = [float(loss(state.params, e, probe)) for e in every]
    expert = int(np.argmin(losses))
    params, opt_state = state.params, init(state.params)
    for ids in batches:
        params, opt_state = step(params, opt_state, expert, ids)
    return expert, jax.tree.map(jnp.subtract, params, state.params)


def merge_slowly(run, chosen, deltas, holders_alone):
    """The params after the round, each part's mean over the clients that trained it."""
    size = np.asarray(run.federation.size, np.float64)
    mean = lambda leaf, w: np.tensordot(w, leaf, 1) / max(w.sum(), 1)  # of none: 0
    all_clients = lambda *leaves: mean(np.stack(leaves), size)
    by_holders = lambda *leaves: np.stack(
        [
            mean(np.stack(leaves)[:, e], size * (chosen == e))
            for e in range(run.program.sizes.num_experts)
        ]
    )
    means = {
        "stem": all_clients,
        "head": all_clients,
        "experts": by_holders,
        "gate": by_holders if holders_alone else all_clients,
    }
    rate = float(run.hyper.server.learning_rate)
    return {
        part: jax.tree.map(
            lambda old, *leaves, m=means[part]: old + rate * m(*leaves),
            *(run.state.params[part], *(delta[part] for delta in deltas)),
        )
        for part in means
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["global", "holder_rows"])
def test_a_round_equals_a_loop_over_clients_and_experts(mode):
    run = start_round(**{"gate.mode": mode})
    sizes = run.program.sizes
    twin, clients = compile_twin(run), jnp.arange(sizes.num_clients)
    twins = [train_slowly(run, client, twin) for client in clients]
    chosen = np.array([expert for expert, _ in twins])
    assert 1 < len(set(chosen.tolist())) < sizes.num_experts  # one stays untrained
    state, metrics = play(run)
    held = np.eye(sizes.num_experts, dtype=bool)[chosen][:, None]
    np.testing.assert_array_equal(state.align.held, held)
    np.testing.assert_array_equal(state.align.times_held, held.astype(int))
    expected = merge_slowly(run, chosen, [d for _, d in twins], mode == "holder_rows")
    assert_same(state.params, expected, atol=2e-6, rtol=1e-4)
    before = run.state.params["experts"][MOE]["kernel"]
    moved = np.abs(state.params["experts"][MOE]["kernel"] - before)
    assert ((moved.max((1, 2)) > 1e-4) == held.any((0, 1))).all()
    examples = sizes.local_steps * sizes.batch_size
    load = examples * np.bincount(chosen, minlength=sizes.num_experts)
    np.testing.assert_array_equal(metrics["expert_load"][0], load)
    np.testing.assert_array_equal(state.align.usage[0], load)
    # Three parts beside the experts and one expert; a third of it forward alone.
    flops = 3 * 4 * examples + 4 * sizes.batch_size * sizes.num_experts
    assert metrics["client_flops"][0] == sizes.cohort_size * flops
    rest, expert = 4 * (256 + 64 + 4 * 5), 4 * 16
    down, up = rest + 4 * expert, rest + expert + 4 * (5 + sizes.num_experts)
    assert metrics["bytes_down"][0] == sizes.cohort_size * down
    assert metrics["bytes_up"][0] == sizes.cohort_size * up
    assert metrics["peak_client_parameters"][0] == down / 4


@pytest.mark.slow
def test_clients_choose_alike_on_any_devices_and_chunks():
    alone, metrics = play(start_round())
    for changes in ({"run.client_chunk": 2}, {"run.num_devices": 8}):
        state, found = play(start_round(**changes))
        np.testing.assert_array_equal(state.align.held, alone.align.held)
        assert_same(state.params, alone.params, atol=1e-6, rtol=1e-4)
        np.testing.assert_array_equal(found["expert_load"], metrics["expert_load"])
        np.testing.assert_allclose(found["bytes_up"], metrics["bytes_up"])


@pytest.mark.slow
def test_copies_part_after_a_dense_warm_up():
    """In the warm-up there is one expert to choose; then all are equal at first."""
    newest = {"fitness.feedback": "probe", "fitness.rate": 1.0}
    run = start_round(**{"upcycle.rounds": 1}, **newest)
    state, metrics = play(run)
    assert not state.align.held.any()  # a warm-up leaves no held sets behind
    sizes = run.program.sizes
    flops = 3 * 4 * sizes.local_steps * sizes.batch_size + 4 * sizes.batch_size
    assert metrics["client_flops"][0] == sizes.cohort_size * flops  # one is probed
    after, metrics = play(run._replace(state=state))
    losses = -np.log(np.asarray(after.align.fitness)[:, 0])  # of chosen or not
    assert np.ptp(losses, axis=1).max() < 1e-5 < 0.1 < losses.min()
    held = np.asarray(after.align.held)[:, 0]
    assert (held.sum(1) == 1).all() and held.any(0).sum() > 1
    kernels = np.asarray(after.params["experts"][MOE]["kernel"])
    assert np.ptp(kernels, axis=0).max() > 1e-4
