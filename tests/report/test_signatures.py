"""Failure signatures on hand-made rows."""

import numpy as np
import pytest

from fedmoe_jax.report import signatures

from .fake_runs import CONFIG


def hand_rows(accuracy, load=(100, 100), **fields):
    """One evaluated row per accuracy; both experts alone are a tenth below it."""
    row = {"expert_load": list(load)} | fields
    alone = [[a - 0.1, a - 0.1] for a in accuracy]
    return [
        row | {"round": i + 1, "global_accuracy": a, "expert_accuracy": alone[i]}
        for i, a in enumerate(accuracy)
    ]


FLAT = [0.2, 0.4, 0.41, 0.41, 0.41, 0.41]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
SWINGING = [0.1, 0.3, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4]
BOTH = ["fitness", "usage"]
FITNESS_RATE = "fitness.rate: lower (now 0.3)"
LEARNING_RATE = "client.learning_rate: lower (now 0.02)"


@pytest.mark.parametrize(
    ("accuracy", "load", "present"),
    [(FLAT, (900, 100), True), (FLAT, (500, 500), False), (RISING, (900, 100), False)],
)
def test_plateau(accuracy, load, present):
    arrays = {"times_held": np.array([[3, 0], [2, 1]])}
    found = signatures.plateau(hand_rows(accuracy, load), arrays, CONFIG, BOTH)
    assert found.present == present
    assert f"expert 0 trained {load[0] / 10:.1f} %" in found.evidence or not present
    assert "25 % of client-expert pairs never met" in found.evidence
    assert found.knob == ("weights.usage: raise (now 0.5)" if present else "")


@pytest.mark.parametrize(
    ("accuracy", "change", "reads", "knob"),
    [
        (SWINGING, 0.2, BOTH, FITNESS_RATE),
        (SWINGING, 0.2, ["usage"], LEARNING_RATE),
        (SWINGING, 0.01, BOTH, LEARNING_RATE),
        (SWINGING, None, [], LEARNING_RATE),
        (RISING, 0.2, BOTH, ""),
        (RISING, None, [], ""),
    ],
)
def test_volatile(accuracy, change, reads, knob):
    rows = hand_rows(accuracy, fitness_change=change)
    found = signatures.volatile(rows, {}, CONFIG, reads)
    assert found.present == bool(knob)
    assert found.knob == knob
    assert ("fitness moves" in found.evidence) == (change is not None)


def test_a_dense_run_that_swings_by_20_points_is_named():
    accuracy = [0.1, 0.3, 0.5, 0.3, 0.5, 0.3, 0.5, 0.3]
    found = signatures.volatile(hand_rows(accuracy, [640]), {}, CONFIG, [])
    assert found.present and found.knob == LEARNING_RATE
    assert "global accuracy moves 20.0 points per evaluation" in found.evidence


def test_every_verdict_has_its_condition():
    early = signatures.check([], {}, CONFIG, BOTH)
    later = signatures.check(hand_rows(FLAT, (500, 500)), {}, CONFIG, BOTH)
    conditions = [found.condition for found in later]
    assert conditions == [found.condition for found in early]
    flat, swinging, waiting, stuck = conditions
    assert "less than 1 point" in flat and "above 0.3" in flat
    assert "more than 3 points" in swinging and "whether fitness moves" in swinging
    assert "over 3 times" in waiting and "over 10 %" in waiting
    assert "less than 0.5 of its fair share" in stuck


@pytest.mark.parametrize(
    ("slowest", "late", "knob"),
    [
        (40.0, 0, ""),
        (40.0, 2, "devices.buffer: raise (now 0.1), or devices.deadline: raise"),
        (90.0, 0, "devices.deadline: lower (now 60.0)"),
    ],
)
def test_stragglers(slowest, late, knob):
    times = {"simulated_seconds": slowest, "simulated_median_seconds": 20.0}
    rows = hand_rows(RISING, late_clients=late, **times)
    found = signatures.stragglers(rows, {"capacity": np.array([1, 1, 3])}, CONFIG, BOTH)
    assert found.present == bool(knob)
    assert found.knob.startswith(knob)
    assert f"{slowest / 20:.1f} times" in found.evidence
    assert "2 clients can hold one expert or none" in found.evidence


def test_a_dense_run_has_no_experts_to_hand_out():
    times = {"simulated_seconds": 80.0, "simulated_median_seconds": 20.0}
    rows = hand_rows(RISING, load=(100,), late_clients=0, **times)
    found = signatures.stragglers(rows, {}, CONFIG, BOTH)
    assert found.present
    assert found.knob == "model.expert_width: lower (now 16), as the model is dense"
    assert "trained" not in signatures.plateau(rows, {}, CONFIG, BOTH).evidence


@pytest.mark.parametrize(
    ("alone", "load", "present"),
    [(0.1, (950, 50), True), (0.1, (500, 500), False), (0.3, (950, 50), False)],
)
def test_stuck_expert(alone, load, present):
    rows = hand_rows(RISING, load)
    rows[0]["expert_accuracy"], rows[-1]["expert_accuracy"] = [0.1, 0.1], [0.5, alone]
    greedy = CONFIG | {"strategy": "greedy"}
    found = signatures.stuck_expert(rows, {}, greedy, ["fitness"])
    assert found.present == present
    assert "expert 1" in found.evidence
    assert ("greedy ignores usage" in found.knob) == present
    assert ("specialised?" in found.evidence) == (load[1] == 500)
    unsaid = signatures.stuck_expert(rows, {}, greedy, None)
    assert ("of use where greedy reads usage" in unsaid.knob) == present


def layer_rows():
    """Rows of two layers; expert 1 of layer 1 has a twentieth and learns nothing."""
    rows = hand_rows(FLAT, [[500, 500], [950, 50]])
    alone = [[0.1, 0.1], [0.1, 0.1]], [[0.5, 0.5], [0.5, 0.1]]
    for row in rows:
        row["expert_accuracy"] = alone[row["round"] == len(rows)]
    return rows


def test_plateau_names_layer_and_expert():
    arrays = {"times_held": np.array([[[3, 0], [2, 1]]])}  # [N, G, E]
    found = signatures.plateau(layer_rows(), arrays, CONFIG, BOTH)
    assert "layer 1 expert 0 trained 95.0 % and layer 1 expert 1 5.0 %" in (
        found.evidence
    )
    assert "25 % of client-expert pairs never met" in found.evidence


def test_stuck_expert_names_layer_and_expert():
    found = signatures.stuck_expert(layer_rows(), {}, CONFIG, BOTH)
    assert found.present and found.evidence == (
        "layer 1 expert 1 alone 10.0 % -> 10.0 %, 5.0 % of the load (fair: 50.0 %)"
    )


def test_check_claims_nothing_of_too_few_rows():
    for rows in ([], hand_rows(RISING[:3]), [{"round": 1}]):
        for found in signatures.check(rows, {}, CONFIG, BOTH):
            assert not found.present and not found.knob
            assert found.evidence.startswith(signatures.TOO_EARLY)


def test_check_follows_the_order_of_the_paper():
    names = [found.name for found in signatures.check([], {}, CONFIG, BOTH)]
    assert names == [
        "Accuracy plateaus early",
        "High round-to-round variance",
        "Frequent stragglers or timeouts",
        "An expert never improves",
    ]


def test_share_load_adds_the_rounds_up():
    rows = [{"expert_load": [[1, 3], [0, 0]]}, {}, {"expert_load": [[2, 2], [0, 0]]}]
    np.testing.assert_allclose(signatures.share_load(rows), [[3 / 8, 5 / 8], [0, 0]])
    assert signatures.share_load([]).shape == (1, 0)
