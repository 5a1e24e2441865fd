"""Names of files from a user's text."""

import pytest

from fedmoe_jax.runtime.names import LONGEST, caseless_name, distinct_name, safe_name

SAFE = ("greedy", "a-fitness.rate=0.3,usage.decay=0.9", "A_b", "x" * LONGEST)
WILD = ("../d", "a/b", "a\\b", "a b", "a:b", ".a", "..", "ä", "a\n", "nul\0", "\udcff")


@pytest.mark.parametrize("text", SAFE)
def test_a_safe_text_is_its_own_name(text):
    assert safe_name(text) == text


@pytest.mark.parametrize("text", [*WILD, "x" * (LONGEST + 1), "y" * 5000])
def test_another_text_gets_a_safe_short_name(text, tmp_path):
    name = safe_name(text)
    assert name != text and name == safe_name(name) and len(name) <= LONGEST
    (tmp_path / name).write_text("here")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_texts_that_are_different_have_different_names():
    texts = [*SAFE, *WILD, "a_b", "_d", "a?b", "x" * 200, "x" * 200 + "y"]
    assert len({safe_name(text) for text in texts}) == len(texts)


def test_caseless_names_differ_without_case_and_do_not_depend_on_others():
    texts = ("a-d.csv", "a-D.csv", "A-D.csv", "a b", "A b", "x" * 200, "X" * 200)
    names = [caseless_name(text) for text in texts]
    assert names[0] == "a-d.csv" and names[3] == safe_name("a b")
    assert len({name.lower() for name in names}) == len(texts)
    assert all(len(name) <= LONGEST for name in names)


def test_distinct_names_differ_without_case():
    taken = set()
    names = [distinct_name(text, taken) for text in ("Mine", "mine", "MINE", "other")]
    assert names[0] == "Mine" and names[3] == "other"
    assert len({name.lower() for name in names}) == 4 and taken == {
        name.lower() for name in names
    }
