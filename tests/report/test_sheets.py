"""Further tables, as HTML and as Markdown."""

from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.sheets import Section, Sheet, section_html, section_markdown

CELLS = [Cell("+1.0", 1.0, True), Cell("<2", 2.0)]
SHEET = Sheet("A & b", ("Strategy", "x_y", "z"), {"a|b": CELLS})
SECTION = Section("Less a|b", "Words.", [SHEET])


def test_section_html_escapes_names_and_marks_bold_cells():
    text = section_html(SECTION)
    assert "<h2>Less a|b</h2>" in text and "<h3>A &amp; b</h3>" in text
    assert "<td>a|b</td>" in text and "<p>Words.</p>" in text
    assert '<td class="number"><b>+1.0</b></td><td class="number">&lt;2</td>' in text


def test_section_markdown_by_hand():
    assert section_markdown(SECTION).splitlines() == [
        "## Less a\\|b",
        "",
        "### A \\& b",
        "",
        "| Strategy | x\\_y | z |",
        "| --- | --- | --- |",
        "| `a\\|b` | **+1.0** | <2 |",
        "",
        "Words.",
    ]


def test_a_section_without_a_table_has_its_words():
    bare = SECTION._replace(sheets=())
    assert section_html(bare) == "<h2>Less a|b</h2><p>Words.</p>"
    assert section_markdown(bare) == "## Less a\\|b\n\nWords.\n"
