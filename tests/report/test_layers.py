"""The measures of each MoE layer, by hand."""

import pytest

from fedmoe_jax.measures import LAYERS, MEASURES
from fedmoe_jax.report import layers

from .fake_runs import make_row, make_run

BOTH = [[1.0, 1.0], [2.0, 0.0]]  # [G, E]
# Load trained nothing in round 2; rounds 3 and 4 are evaluated, 4 alone is final.
ROWS = [
    make_row(1, expert_load=BOTH, layer_load_cv=[0.0, 1.0]),
    make_row(2, expert_load=BOTH, layer_load_cv=[None, None]),
    make_row(
        3,
        expert_load=BOTH,
        layer_load_cv=[0.2, 0.5],
        layer_starved_experts=[0.0, 1.0],
        layer_group_information=[0.9, 0.1],
    ),
    make_row(4, expert_load=BOTH, layer_group_information=[0.25, 0.75]),
]


def texts(section):
    (sheet,) = section.sheets
    rows = {label: [cell.text for cell in cells] for label, cells in sheet.rows.items()}
    return sheet.heads, rows


def test_count_layers_by_hand():
    assert layers.count_layers([]) == layers.count_layers([make_row(1)]) == 0
    assert layers.count_layers(ROWS) == layers.count_layers(ROWS[2:]) == 2
    assert layers.count_layers([{"layer_load_cv": None}]) == 0


def test_layers_section_by_hand(tmp_path):
    """Load over the rounds that train any, group information of the last evaluation."""
    heads, rows = texts(layers.layers_section([make_run(tmp_path, rows=ROWS)]))
    assert heads == ("Strategy", "Load CV", "Starved experts", "Group info, bits")
    assert rows == {
        "greedy, layer 0": ["0.10 (1 seed)", "0.0 (1 seed)", "0.25 (1 seed)"],
        "greedy, layer 1": ["0.75 (1 seed)", "1.0 (1 seed)", "0.75 (1 seed)"],
    }


def test_layers_section_averages_over_seeds(tmp_path):
    other = [make_row(1, expert_load=BOTH, layer_load_cv=[0.3, 0.95])]
    early = make_run(tmp_path, "random", [make_row(1, expert_load=BOTH)])
    runs = [make_run(tmp_path, rows=ROWS), make_run(tmp_path, rows=other, seed=1)]
    _, rows = texts(layers.layers_section([*runs, early]))
    # Standard deviation sqrt(2) / 10 of 0.1 and 0.3: 12.7062 * 0.1.
    assert [cells[0] for cells in rows.values()] == ["0.20 ± 1.27", "0.85 ± 1.27"]
    assert rows["greedy, layer 0"][1:] == ["0.0 (1/2 seeds)", "0.25 (1/2 seeds)"]
    runs[1].rows[0]["diverged"] = 1.0
    _, rows = texts(layers.layers_section(runs))
    assert [cells[0][-1] for cells in rows.values()] == ["†", "†"]


def test_no_section_without_a_mixture_of_several_layers(tmp_path):
    dense = [make_row(1, expert_load=[[2.0], [2.0]], layer_load_cv=[0.0, 0.0])]
    runs = [make_run(tmp_path), make_run(tmp_path, "fedavg", dense)]
    assert layers.layers_section(runs) is None
    assert layers.layers_section([make_run(tmp_path, rows=[])]) is None


@pytest.mark.parametrize("key", LAYERS)
def test_every_measure_of_layers_has_a_column(key):
    assert MEASURES[key].over and MEASURES[key].title
