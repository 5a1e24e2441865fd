"""Windows of text: every token is a target once, and short texts are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.data.tokens import Tokens
from fedmoe_jax.data.windows import Document, cut_windows, make_text
from fedmoe_jax.options import UserError


def test_cut_windows_by_hand():
    tokens, length = cut_windows(np.arange(1, 8), 3)
    assert tokens.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]] and length.tolist() == [4, 4]
    tokens, length = cut_windows(np.arange(1, 7), 3)
    assert tokens.tolist() == [[1, 2, 3, 4], [4, 5, 6, 0]] and length.tolist() == [4, 3]


@given(count=st.integers(2, 99), length=st.integers(1, 40))
def test_cut_windows_has_every_token_as_a_target_once(count, length):
    tokens, sizes = cut_windows(np.arange(count), length)
    targets = [row[1:size] for row, size in zip(tokens, sizes, strict=True)]
    np.testing.assert_array_equal(np.concatenate(targets), np.arange(1, count))
    assert sizes.min() >= 2


def write(client, stratum, train, test):
    tokens = lambda count: Tokens(np.arange(count, dtype=np.uint8) % 7)
    return Document(client, stratum, tokens(train), tokens(test))


def test_make_text_has_natural_clients_and_strata():
    documents = [write("a", "x", 9, 5), write("b", "y", 4, 3), write("c", "x", 5, 2)]
    data = make_text(documents, 4, 7, "here")
    assert data.owner.tolist() == [0, 0, 1, 2] and data.test_owner.tolist() == [0, 1, 2]
    assert data.stratum_names == ("x", "y") and data.vocabulary == 7
    assert data.stratum.tolist() == [0, 0, 1, 0]
    assert data.test_stratum.tolist() == [0, 1, 0]
    assert data.train["length"].tolist() == [5, 5, 4, 5]
    assert data.train.keys() == data.test.keys() == {"tokens", "length"}


def test_make_text_has_the_bytes_of_every_token_and_says_what_is_lost():
    text = Tokens(np.arange(6), 10 * np.arange(6))
    data = make_text([Document("a", "x", text, text._replace(exact=False))], 3, 7, "")
    assert data.train["bytes"].tolist() == [[0, 10, 20, 30], [30, 40, 50, 0]]
    np.testing.assert_array_equal(data.train["bytes"], 10 * data.test["tokens"])
    (note,) = data.notes
    assert note.startswith("warning: 1 of 2 texts cannot be read") and "\n" not in note
    assert make_text([Document("a", "x", text, text)], 3, 7, "").notes == ()


def test_make_text_refuses_windows_beyond_every_text_and_clients_without():
    with pytest.raises(UserError, match="data.length=9 .* has 9 tokens .* 1 to 8"):
        make_text([write("a", "x", 9, 5)], 9, 7, "here")
    with pytest.raises(UserError, match="client 'b' with 9 tokens .* and 1 to test"):
        make_text([write("a", "x", 9, 5), write("b", "x", 9, 1)], 4, 7, "here")
    for count in (0, 1):  # no length would do
        with pytest.raises(UserError, match=f"{count} tokens .* 5 .* at least 2 of"):
            make_text([write("a", "x", count, 5)], 1, 7, "here")
    with pytest.raises(UserError, match="here has no client; allowed: at least one"):
        make_text([], 1, 7, "here")
