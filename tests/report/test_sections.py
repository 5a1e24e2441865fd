"""What a report compares beyond its table of final numbers."""

import pytest

from fedmoe_jax.report.sections import list_sections, markdown_tables

from .fake_runs import load_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return load_runs(tmp_path_factory.mktemp("runs"))


def test_list_sections_leaves_out_what_has_nothing_to_say(runs):
    titles = lambda made: [section.title for section in list_sections(made, "random")]
    assert titles(runs) == ["Paired differences: less random", "At equal budgets"]
    assert titles(runs[:2]) == []


def test_markdown_tables_has_the_final_numbers_and_the_sections(runs):
    head, *sections = markdown_tables(runs, "random").split("\n## ")
    assert head.startswith("| Strategy | Seeds |") and "`greedy`" in head
    assert sections[0].startswith("Paired differences: less random\n")
    assert len(sections) == 2
