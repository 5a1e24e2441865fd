"""Text of users: on one line, of few letters, and as it is in Markdown."""

import pytest

from fedmoe_jax.report.text import (
    escape_markdown,
    one_line,
    quote_markdown,
    shorten,
)


def test_one_line_keeps_letters_of_any_language_and_drops_what_is_none():
    assert one_line(" a\nb\r\n\tc\x1b[2J\x00 ") == "a b c [2J"
    assert one_line("kräftig 😀 \udcff") == "kräftig 😀"


def test_shorten_cuts_in_the_middle():
    assert shorten("a" * 60) == "a" * 60
    cut = shorten("greedy-" + "x" * 500 + "-seed3")
    assert len(cut) == 60
    assert cut.startswith("greedy-xx") and cut.endswith("xx-seed3") and "..." in cut
    assert shorten("abcdefgh", 7) == "ab...gh"
    assert shorten("abcdefgh", 8) == "abcdefgh"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", "a\\|b"),
        ("<b> _x_ *y* `z`", "\\<b\\> \\_x\\_ \\*y\\* \\`z\\`"),
        ("$\\frac$ [/q]", "\\$\\\\frac\\$ \\[/q\\]"),
        ("two\nlines", "two lines"),
    ],
)
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("load_balanced", "`load_balanced`"),
        ("a|b\nc", "`a\\|b c`"),
        ("`", "`` ` ``"),
        ("a```b", "```` a```b ````"),
    ],
)
def test_quote_markdown(text, quoted):
    assert quote_markdown(text) == quoted
