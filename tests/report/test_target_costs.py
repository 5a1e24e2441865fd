"""Costs to target accuracies, by hand."""

from fedmoe_jax.report.target_costs import target_section

from .fake_runs import CONFIG, NOTHING, make_row, make_run


def climb(tmp_path, label, at, seed=0, count=4, **costs):
    """A run that has 60 % from round `at` on, and 30 % before; 6 MB, 500 J a round."""
    rows = [
        make_row(n, global_accuracy=0.6 if n >= at else 0.3, **costs)
        for n in range(1, count + 1)
    ]
    run = make_run(tmp_path, label, rows, seed=seed)
    targets = {"evaluation": {"targets": [0.3, 0.6]}}
    return run._replace(config=CONFIG | run.config | targets)


def texts_of(sheet):
    return {label: [cell.text for cell in row] for label, row in sheet.rows.items()}


def test_target_section_by_hand(tmp_path):
    runs = [
        climb(tmp_path, "greedy", 3),
        climb(tmp_path, "greedy", 9, seed=1),
        climb(tmp_path, "greedy", 2, seed=2),
        climb(tmp_path, "random", 2, simulated_seconds=90.0, compute_joules=900.0),
        climb(tmp_path, "local", 9, **NOTHING),
    ]
    section = target_section(runs)
    low, high = section.sheets
    assert [low.title, high.title] == ["30 %", "60 %"]
    assert list(high.heads[1:]) == ["Rounds", "Simulated min", "kJ", "MB"]
    assert texts_of(high) == {
        "greedy": ["3 (2/3)", "1.5 (2/3)", "1.5 (2/3)", "18 (2/3)"],
        "random": ["2 (1/1)", "3 (1/1)", "2 (1/1)", "12 (1/1)"],
        "local": ["– (0/1)", "does not apply", "does not apply", "– (0/1)"],
    }
    bold = {label: [cell.bold for cell in row] for label, row in high.rows.items()}
    assert bold["greedy"] == [False, True, True, False]
    assert bold["random"] == [True, False, False, True]
    assert texts_of(low)["greedy"] == ["1 (3/3)", "0.5 (3/3)", "0.5 (3/3)", "6 (3/3)"]


def test_target_section_is_of_several_labels_whose_devices_are_simulated(tmp_path):
    assert target_section([climb(tmp_path, "greedy", 3)]) is None
    still = [climb(tmp_path, label, 2, **NOTHING) for label in ("local", "other")]
    assert target_section(still) is None
