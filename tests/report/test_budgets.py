"""Accuracy at equal budgets, by hand."""

import math

import pytest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.report import budgets

from .fake_runs import NOTHING, make_row, make_run

GLOBAL = MEASURES["final_global_accuracy"]
ROUNDS, TRAFFIC, WORK, TIME, ENERGY = budgets.BUDGETS


def evaluated(count, share=1.0, top=0.8, **fields):
    """So many rounds, all evaluated; accuracy rises to `top`, costs are a share."""
    costs = dict(bytes_up=2e6, bytes_down=4e6, client_flops=1e9, simulated_seconds=30.0)
    costs |= dict(compute_joules=400.0, radio_joules=100.0)
    costs = {name: share * cost for name, cost in costs.items()} | fields
    return [
        make_row(
            at,
            global_accuracy=top * at / count,
            personal_accuracy=top * at / count,
            peak_client_parameters=5e4,
            late_clients=1.0,
            **costs,
        )
        for at in range(1, count + 1)
    ]


def texts_of(section, measure="Global %"):
    sheet = next(sheet for sheet in section.sheets if sheet.title == measure)
    return {
        label: dict(zip(sheet.heads[1:], [cell.text for cell in cells], strict=True))
        for label, cells in sheet.rows.items()
    }


def test_spend_by_hand(tmp_path):
    run = make_run(tmp_path, rows=evaluated(3))
    assert budgets.spend(run, ROUNDS).tolist() == [1, 2, 3]
    assert budgets.spend(run, TRAFFIC).tolist() == [6, 12, 18]
    assert budgets.spend(run, WORK).tolist() == [1, 2, 3]
    assert budgets.spend(run, TIME).tolist() == [0.5, 1, 1.5]
    assert budgets.spend(run, ENERGY).tolist() == [0.5, 1, 1.5]


def test_the_budget_is_the_smallest_total_that_is_spent(tmp_path):
    made = [
        make_run(tmp_path, "greedy", evaluated(4)),
        make_run(tmp_path, "random", evaluated(4, 0.5)),
        make_run(tmp_path, "local", evaluated(4, 0.0)),
    ]
    assert budgets.find_smallest(made, TRAFFIC) == 12
    assert budgets.find_smallest(made[2:], TRAFFIC) == math.inf
    assert budgets.find_smallest([make_run(tmp_path, rows=[])], ROUNDS) == math.inf


def test_value_within_is_the_last_evaluation_that_was_paid_for(tmp_path):
    run = make_run(tmp_path, rows=evaluated(4))  # 6 MB a round
    within = lambda most: budgets.value_within(run, GLOBAL, TRAFFIC, most)
    assert [within(most) for most in (6, 11.9, 12, 99)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.8]
    )
    assert within(5.9) == -math.inf
    unevaluated = make_run(tmp_path, rows=[make_row(1)])
    assert math.isnan(budgets.value_within(unevaluated, GLOBAL, TRAFFIC, 99))


def test_budget_section_by_hand(tmp_path):
    made = [
        make_run(tmp_path, "greedy", evaluated(4)),
        make_run(tmp_path, "greedy", evaluated(4, top=0.4), seed=1),
        make_run(tmp_path, "random", evaluated(4, 0.5)),
        make_run(tmp_path, "fedavg", evaluated(4, 5.0)),
        make_run(tmp_path, "local", evaluated(4, 0.0)),
    ]
    section = budgets.budget_section(made)
    titles = ["Global %", "Personal %"]
    assert [sheet.title for sheet in section.sheets] == titles
    texts = texts_of(section)
    heads = ["At 4 rounds", "At 12 MB", "At 2 GFLOP", "At 1 simulated min"]
    heads.append("At 1 kJ")
    beside = ["Peak client parameters, 1,000", "Late clients a round"]
    beside.append("Capacity violations a round")
    assert list(texts["greedy"]) == heads + beside
    # Half of the rounds: 0.4 and 0.2, 30 ± 12.7062 * 10.
    spread = ["60.0 ± 254.1", *["30.0 ± 127.1"] * 4]
    assert [texts["greedy"][head] for head in heads] == spread
    assert [texts["random"][head] for head in heads] == ["80.0 (1 seed)"] * 5
    assert [texts["fedavg"][head] for head in heads] == [
        *("80.0 (1 seed)", "–", "–", "–", "–")
    ]
    assert texts["greedy"][beside[0]] == "50.0 ± 0.0"
    assert [texts["local"][head] for head in heads[1:]] == [
        "80.0 (1 seed)",
        "80.0 (1 seed)",
        "does not apply",
        "does not apply",
    ]


def test_budgets_that_no_run_spends_are_left_out(tmp_path):
    rows = evaluated(2, **NOTHING | {"client_flops": 0.0})
    made = [make_run(tmp_path, label, rows) for label in ("local", "other")]
    texts = texts_of(budgets.budget_section(made))
    assert [head for head in texts["local"] if head.startswith("At ")] == [
        "At 2 rounds"
    ]
    assert budgets.budget_section(made[:1]) is None


def test_the_best_of_a_budget_is_bold(tmp_path):
    made = [
        make_run(tmp_path, "greedy", evaluated(4, 2.0)),
        make_run(tmp_path, "random", evaluated(4, top=0.6)),
    ]
    rows = budgets.budget_section(made).sheets[0].rows
    bold = {label: [cell.bold for cell in cells[:2]] for label, cells in rows.items()}
    assert bold == {"greedy": [True, False], "random": [False, True]}


@pytest.mark.parametrize(
    ("amount", "text"),
    [(40, "40"), (0.0371, "0.0371"), (9.96, "9.96"), (1234.56, "1,234.6")],
)
def test_show_amount(amount, text):
    assert budgets.show_amount(amount) == text
