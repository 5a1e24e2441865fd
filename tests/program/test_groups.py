"""Whole runs of clients in groups: who knows the groups serves them."""

import numpy as np
import pytest
from factories import SMALL, arrays_of, make_config, rows_of, run_alone

import fedmoe_jax
from fedmoe_jax.report.runs import load_run

GROUPS = {"groups.kind": "permuted", "groups.count": 2}
SIDES = {
    "partition.test_share": 0.2,
    "partition.validation_share": 0.1,
    "partition.unseen": 2,
}


def run_digits(strategy, **changes):
    """The last row of a short run on the digits, each client with one expert."""
    fields = {
        "strategy": strategy,
        "num_rounds": 6,
        "eval_every": 6,
        "chunk_rounds": 1,
        "num_clients": 8,
        "cohort_size": 8,
        "num_experts": 2,
        "max_held": 1,
        "num_active": 1,
        "partition.kind": "iid",
        "client.learning_rate": 0.1,
        "evaluation.dense_experts": 1,
        "run.num_devices": 1,
    }
    rows = fedmoe_jax.run(make_config(**fields | GROUPS | changes)).rows
    return {name: values[-1] for name, values in rows.items()}


@pytest.mark.slow
def test_an_assignment_by_groups_beats_one_model_where_labels_are_permuted():
    """No model without the group is right in both, so one model has half at most."""
    oracle, dense = run_digits("oracle"), run_digits("fedavg")
    assert dense["personal_accuracy"] <= 0.5 and dense["global_accuracy"] <= 0.5
    assert oracle["global_accuracy"] <= 0.5
    assert oracle["personal_accuracy"] > 0.7
    np.testing.assert_allclose(oracle["expert_group_information"], 1.0, atol=1e-5)
    assert dense["expert_group_information"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [0, 2])
def test_clients_that_choose_the_best_expert_find_the_groups(warm_up):
    """As well as an assignment that knows them, from copies, too."""
    rounds = {"num_rounds": 8, "eval_every": 8}
    found = run_digits("ifca", **rounds, **{"upcycle.rounds": warm_up})
    dense = run_digits("fedavg_active", **rounds)
    assert dense["personal_accuracy"] < 0.5 < 0.7 < found["personal_accuracy"]
    np.testing.assert_allclose(found["expert_group_information"], 1.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["prototypes", "update_groups"])
def test_clients_that_are_asked_once_are_found_to_be_in_groups(strategy):
    """Prototypes are asked for again, when labels have drifted, to the same end."""
    rounds = {"num_rounds": 8, "eval_every": 8, "upcycle.rounds": 2}
    drift = {"drift.labels": 1.0, "drift.start": 4, "drift.rounds": 1}
    again = drift | {"prototypes.period": 2} if strategy == "prototypes" else {}
    found = run_digits(strategy, **rounds, **again, **{"partition.unseen": 2})
    assert found["groups"] == 2 and found["personal_accuracy"] > 0.7
    assert found["unseen_accuracy"] > 0.7  # of newcomers; one model has half at most
    np.testing.assert_allclose(found["expert_group_information"], 1.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotation_permuted", "inversion"])
def test_a_run_with_groups_is_whole(kind, tmp_path):
    """Own tests, validation and unseen clients; a run and its report's arrays."""
    config = make_config(**SMALL | SIDES | GROUPS | {"groups.kind": kind})
    assert run_alone(config, tmp_path)
    last, arrays = rows_of(tmp_path)[-1], arrays_of(tmp_path)
    names = "own_test", "unseen", "validation_personal", "validation_personal_prior"
    assert all(0 <= last[f"{name}_accuracy"] <= 1 for name in names)
    assert len(last["stratum_accuracy"]) == len(arrays["label_names"]) == 20
    assert len(arrays["group_names"]) == 2
    counts = arrays["label_counts"].reshape(4, 2, 10).sum(axis=2)
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert (counts > 0).sum(axis=0).tolist() == [2, 2]
    run = load_run(tmp_path)
    assert run is not None and "group_names" in run.arrays
