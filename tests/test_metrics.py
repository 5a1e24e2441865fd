"""The metrics of one round, by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    COSTS,
    make_align,
    make_devices,
    make_federation,
    make_feedback,
    make_hyper,
    make_replies,
)

from fedmoe_jax.metrics import (
    LISTED,
    account,
    add_metrics,
    count_exchange,
    count_outcomes,
    measure_answers,
    measure_learning,
    measure_load,
    measure_server,
    measure_stages,
    measure_strategy,
    measure_work,
)
from fedmoe_jax.options import UserError, group
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.strategies import fedjets
from fedmoe_jax.world.costs import Traffic, scale_costs
from fedmoe_jax.world.outcome import (
    BROKEN,
    DROPOUT,
    DROPPED,
    MERGED,
    OUTCOMES,
    UNREACHABLE,
    Conditions,
    Outcome,
)
from fedmoe_jax.world.participation import Participation

NONE = np.zeros(3, np.float32)


def make_program(silent=False, **static):
    """The static parts that metrics read."""
    static = {"devices.deadline": 30.0, "late.kind": "wait"} | static
    static = {"run.client_chunk": 2} | static
    return SimpleNamespace(
        costs=COSTS,
        device_costs=scale_costs(COSTS, 2),
        static=group(static, "Static"),
        strategy=SimpleNamespace(silent=silent),
        sizes=SimpleNamespace(cohort_size=3, batch_size=8, num_experts=4, num_active=2),
        mesh=SimpleNamespace(shape={CLIENTS: 1}),
        processes=(),
    )


# Three of four clients. Client 2 is merged, client 0 drops out halfway through its
# training, and client 3 cannot be reached.
COHORT = np.int32([2, 0, 3])
OUTCOME = Outcome(
    code=np.int32([MERGED, DROPOUT, UNREACHABLE]),
    phases=np.float32([[10, 20, 5]] * 3),
    spent=np.float32([[1, 1, 1], [1, 0.5, 0], [0, 0, 0]]),
)
TRAFFIC = Traffic(
    *map(np.float32, ([2, 1, 1], [2, 1, 1], NONE, [2, 1, 1])),  # held to received
    *map(np.float32, ([10, 5, 5], NONE, NONE)),  # reported, shown, new
)


def account_for(program, exchanged=(NONE, NONE), outcome=OUTCOME, **devices):
    devices = dict(power=[2, 3, 5], radio=[1, 2, 4], upload=100, download=500) | devices
    participation = Participation(
        rounds=np.int32([0, 1, 3, 0]),
        equipped=np.ones(4, bool),
        capacity=np.int32([1, 1, 2, 1]),
        client=COHORT,
        outcome=outcome,
    )
    examples = np.full(3, 8, np.float32)
    conditions = Conditions(COHORT, make_devices(3, **devices), None, TRAFFIC, examples)

    @jax.jit
    def run(participation, conditions, exchanged):
        sent = jnp.ones(3)
        return account(participation, conditions, sent, exchanged, None, program)

    found = run(participation, conditions, exchanged)
    return {name: float(value) for name, value in found.items()}


def test_count_exchange_of_experts_as_the_devices_feel_them():
    devices = make_devices(2, upload=100, download=500)
    exchanged = np.float32([1, 0]), np.float32([2, 3])
    # Experts are of 2,000 bytes there.
    found = count_exchange(exchanged, devices, make_program())
    assert found.tolist() == [20 + 8, 12]


def test_account_by_hand():
    assert account_for(make_program()) == {
        "bytes_up": 500 + 1000 + 4 * 10,
        "bytes_down": (500 + 2000) + (500 + 1000),
        "client_flops": 8 * (10 + 40) + 0.5 * 8 * (10 + 20),
        "wasted_bytes": 500 + 1000,
        "wasted_flops": 0.5 * 8 * (10 + 20),
        "compute_joules": 2 * 20 + 3 * 10,
        "radio_joules": 1 * (10 + 5) + 2 * 10,
        "peak_client_parameters": (500 + 2000) / 4,
        "simulated_seconds": 35,
        "simulated_median_seconds": (35 + 20) / 2,  # of those who began
        "late_clients": 1,
        "capacity_violations": 0,
        "participation_jain": pytest.approx(16 / (4 * 10)),
    }


def test_account_of_stale_updates_ends_at_the_deadline():
    found = account_for(make_program(**{"late.kind": "stale"}))
    assert found["simulated_seconds"] == 30 and found["late_clients"] == 1
    assert found["simulated_median_seconds"] == (35 + 20) / 2


def test_account_counts_dropped_clients_as_late_and_what_they_did_as_wasted():
    spent = np.float32([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    code = np.int32([DROPPED, DROPPED, UNREACHABLE])
    found = account_for(make_program(), outcome=Outcome(code, OUTCOME.phases, spent))
    assert found["late_clients"] == 2 and found["simulated_seconds"] == 30
    assert found["wasted_bytes"] == found["bytes_down"] and found["bytes_up"] == 0
    assert found["wasted_flops"] == found["client_flops"]


@pytest.mark.slow
def test_account_counts_violations_of_clients_that_were_reached():
    # Four copies of 1,000 bytes for what all share and of 2,000 for every expert.
    need = 4 * (1000 + 2000 * np.float32([2, 1, 1]))
    fits = lambda memory: account_for(make_program(), memory=memory)
    assert fits(need)["capacity_violations"] == 0
    assert fits(need - 1)["capacity_violations"] == 2
    assert fits(need - [0, 1, 1])["capacity_violations"] == 1


@pytest.mark.slow
def test_account_of_exchanged_experts_takes_time_and_bytes():
    exchanged = np.float32([1, 0, 0]), np.float32([0, 2, 0])
    plain, found = (account_for(make_program(), e) for e in ((NONE, NONE), exchanged))
    assert found["bytes_up"] - plain["bytes_up"] == 1000
    assert found["bytes_down"] - plain["bytes_down"] == 2000
    assert found["simulated_seconds"] == 35 + 2000 / 100
    assert found["radio_joules"] == plain["radio_joules"] + 1 * 20 + 2 * 8
    assert found["compute_joules"] == plain["compute_joules"]
    silent = account_for(make_program(silent=True), exchanged)
    assert silent["bytes_up"] == plain["bytes_up"] - 1000  # nor does it send its own


@pytest.mark.parametrize(("test_active", "routed"), [(0, 10 + 2 * 20), (1, 10 + 20)])
def test_measure_answers_by_hand(test_active, routed):
    """A third of 10 FLOPs for what all share, of 20 for each expert; A = 2, E = 4."""
    fields = dict(test_active=test_active, mix="outputs", gating="chosen")
    program = make_program()
    program.strategy = SimpleNamespace(**fields)
    found = measure_answers(program)
    np.testing.assert_allclose(found["answer_flops"], routed / 3)
    np.testing.assert_allclose(found["soft_answer_flops"], (10 + 4 * 20) / 3)


def test_measure_stages_counts_the_servers_own_examples_before_the_round():
    program, hyper = make_program(), make_hyper(fedjets={"steps": 3})
    program.strategy = SimpleNamespace(server_examples=fedjets.count_public)
    flops = [float(measure_stages(i, hyper, program)["server_flops"]) for i in range(3)]
    assert flops == [27 * 3 * 8, 0, 0]  # three batches of eight
    program.strategy = SimpleNamespace(server_examples=None)
    assert float(measure_stages(0, hyper, program)["server_flops"]) == 0


def test_count_outcomes_counts_each_client_once():
    code = np.int32([MERGED, MERGED, UNREACHABLE, BROKEN])
    found = count_outcomes(Outcome(code, np.ones((4, 3)), np.ones((4, 3))))
    assert list(found) == [f"{name}_clients" for name in OUTCOMES]
    expected = {"merged": 2, "lost_unreachable": 1, "nonfinite": 1}
    for name in OUTCOMES:
        assert found[f"{name}_clients"] == expected.get(name, 0)


def learn_from(arrived, alarms=None, **after):
    """Metrics of two of three clients with two layers of two experts."""
    shape = 3, 2, 2
    held = np.zeros(shape, bool)
    held[2, :, 0] = held[0, 0, 1] = held[1] = True
    before = make_align(1, 1, fitness=np.full(shape, 0.5), held=held)
    held = np.zeros(shape, bool)
    held[2, :, 0] = held[0, :, 1] = held[1] = True  # the last is not in the cohort
    fitness = np.full(shape, 0.5)
    fitness[2, :, 0], fitness[0, 1, 1], fitness[0, 0, 0] = (0.6, 0.8), 0.3, 0.9
    fields = dict(fitness=fitness, held=held) | after
    replies = make_replies(
        make_feedback(np.zeros((2, 2, 1))),
        arrived,
        loss=np.array([3.0, 100.0]),
        accuracy=np.array([0.25, 0.75]),
    )
    detect = lambda alarms: SimpleNamespace(alarms=np.array(alarms))
    if alarms:
        before = before.replace(detector=detect([1, 2]))
        fields["detector"] = detect(alarms)
    cohort = np.array([2, 0])
    return measure_learning(before, before.replace(**fields), replies, cohort)


def test_measure_learning_by_hand():
    found = learn_from([True, False])
    assert found["train_loss"] == 3 and found["train_accuracy"] == 0.25
    # Four pairs are held: changes 0.1, 0.3, 0 and 0.2, and one is new.
    np.testing.assert_allclose(found["fitness_change"], 0.6 / 4, rtol=1e-6)
    assert found["assignment_change"] == 1 / 4
    assert set(found) == {
        *("train_loss", "train_accuracy", "fitness_change", "assignment_change")
    }


def test_measure_learning_has_no_loss_where_nobody_arrived():
    found = learn_from([False, False])
    assert np.isnan(found["train_loss"]) and np.isnan(found["train_accuracy"])
    assert found["assignment_change"] == 1 / 4


def test_measure_learning_has_alarms():
    found = learn_from([True, True], alarms=[4, 2])
    assert found["drift_alarms"] == 3 and found["train_loss"] == 51.5


def test_measure_strategy_sums_counts_and_averages_others_over_layers():
    state = {"swapped": np.array([3, 4]), "mass": np.ones((2, 3))}
    state["groups"] = np.array([4.0, 1.0])
    assert measure_strategy(state) == {"swapped": 7, "groups": 2.5}


def test_add_metrics_refuses_a_name_that_is_taken():
    assert add_metrics({"load_cv": 0.5}, {"wet": 1.0}) == {"load_cv": 0.5, "wet": 1.0}
    with pytest.raises(UserError, match="the metric 'load_cv', which is taken"):
        add_metrics({"load_cv": 0.5}, {"load_cv": 0.0})


def test_measure_load_is_the_mean_over_layers():
    even, one = [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 20.0]
    measure = jax.jit(measure_load)
    found = measure(np.float32([even, one]), warming=False)
    np.testing.assert_allclose(found["load_cv"], np.sqrt(3) / 2, rtol=1e-6)
    np.testing.assert_allclose(found["load_entropy"], 1 / 2, rtol=1e-6)
    assert found["starved_experts"] == 1.5
    assert found["expert_load"].tolist() == [even, one]
    np.testing.assert_allclose(found["layer_load_cv"], [0, np.sqrt(3)], atol=1e-6)
    np.testing.assert_allclose(found["layer_load_entropy"], [1, 0], atol=1e-6)
    assert found["layer_starved_experts"].tolist() == [0, 3]
    alone = measure(np.float32([one]), warming=False)
    assert alone["expert_load"].tolist() == one and alone["starved_experts"] == 3
    assert alone.keys() == {"expert_load", "load_cv", "load_entropy", "starved_experts"}


def test_measure_load_leaves_the_dense_warm_up_out():
    load = np.float32([[0, 0, 0, 20], [5, 5, 5, 5]])
    found = measure_load(load, warming=np.True_)
    assert found.pop("expert_load").tolist() == load.tolist()
    assert all(np.isnan(numbers).all() for numbers in found.values()) and found


@pytest.mark.parametrize(("chunk", "wasted"), [(1, 0), (2, 1 - 6 / 10)])
def test_measure_work_counts_the_steps_of_ragged_clients(chunk, wasted):
    federation = make_federation(steps=np.int32([1, 9, 4, 1]))
    program = make_program(**{"run.client_chunk": chunk})
    found = jax.jit(lambda f: measure_work(f, COHORT, program))(federation)
    assert found["examples"] == (4 + 1 + 1) * 8
    # Chunks of two: one of 4 steps, one of 1 that is half empty.
    np.testing.assert_allclose(found["wasted_share"], wasted, atol=1e-6)


@pytest.mark.parametrize("clients", [LISTED, LISTED + 1])
def test_measure_server_lists_the_participation_of_few_clients(clients):
    state = SimpleNamespace(
        belief=SimpleNamespace(capacity=np.full(clients, 2)),
        participation=SimpleNamespace(rounds=np.arange(clients)),
    )
    buffered = np.full(clients, 2)
    buffered[:2] = 1, 4
    found = measure_server(state, jnp.asarray(buffered))
    np.testing.assert_allclose(found["capacity_error"], 3 / clients, rtol=1e-6)
    assert ("participation" in found) == (clients <= LISTED)
