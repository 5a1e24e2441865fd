"""What a report compares beyond its table of final numbers."""

import pytest

from fedmoe_jax.report.sections import list_sections, markdown_tables

from .fake_runs import IN_PARTS, load_runs, make_labels, make_row, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return load_runs(tmp_path_factory.mktemp("runs"))


def test_list_sections_leaves_out_what_has_nothing_to_say(runs, tmp_path):
    titles = lambda made: [section.title for section in list_sections(made, "random")]
    pairs = "Paired differences: less random"
    costs = "At equal budgets", "Costs to target accuracies"
    assert titles(runs) == [pairs, *costs]
    parts = "Assignment, and what else the system does"
    assert titles(make_labels(tmp_path, **IN_PARTS)) == [pairs, parts, *costs]
    assert titles(runs[:2]) == []
    layered = make_row(1, layer_load_cv=[0.1, 0.2])
    assert titles([make_run(tmp_path, rows=[layered])]) == ["MoE layers"]


def test_markdown_tables_has_the_final_numbers_and_the_sections(runs):
    head, *sections = markdown_tables(runs, "random").split("\n## ")
    assert head.startswith("| Strategy | Seeds |") and "`greedy`" in head
    assert sections[0].startswith("Paired differences: less random\n")
    assert len(sections) == 3
