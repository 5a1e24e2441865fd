"""Tokens of text: bytes, or a tokenizer's, with the bytes that each stands for."""

import sys

import numpy as np
import pytest
from factories import make_options, train_tokenizer, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.data.tokens import (
    BYTES,
    check_utf8,
    encode,
    find_start,
    load_coder,
    share_bytes,
)
from fedmoe_jax.options import UserError

LATVIAN = "Iesākumā bija Vārds, un Vārds bija pie Dieva, un Dievs bija Vārds. "


def know_words(*words):
    """Whole words, in lower case; all others are one token."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    table = {word: i for i, word in enumerate(("?", *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(table, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def load(folder, tokenizer):
    return load_coder(make_options(tokenizer=write_tokenizer(folder, tokenizer)))


def test_load_coder_without_a_file_takes_bytes():
    assert load_coder(make_options()) is BYTES and BYTES.vocabulary == 256
    raw = bytes(range(256))
    BYTES.check(raw, "here")
    assert BYTES.encode(raw).ids.tolist() == list(range(256))
    assert BYTES.cut("ā".encode(), 1) == 1


def test_load_coder_takes_the_vocabulary_without_padding_and_truncation(tmp_path):
    tokenizer = train_tokenizer(LATVIAN)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=999)
    coder = load(tmp_path, tokenizer)
    found = coder.encode(LATVIAN.encode())
    assert coder.vocabulary == tokenizer.get_vocab_size() <= 300
    assert 3 < len(found.ids) < 100 and found.ids.dtype == np.uint16
    assert found.bytes is not None and found.bytes.sum() == len(LATVIAN.encode())


def test_encode_takes_no_special_tokens():
    from tokenizers import processors

    tokenizer = know_words("un", "vārds", "</s>")
    pairs = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=pairs
    )
    found = encode(tokenizer, "un vārds".encode(), np.dtype(np.uint8))
    assert found.ids.tolist() == [1, 2]


def test_encode_by_hand_counts_bytes_and_says_what_is_lost():
    tokenizer, kind = know_words("un", "vārds"), np.dtype(np.uint8)
    found = encode(tokenizer, " un vārds  un\n".encode(), kind)
    # What is left out counts for the token after it, or for the last one.
    assert found.ids.tolist() == [1, 2, 1] and found.exact
    assert found.bytes is not None and found.bytes.tolist() == [3, 7, 5]
    for text in ("Un", "un ah"):
        assert not encode(tokenizer, text.encode(), kind).exact


@pytest.mark.slow
@given(text=st.text(max_size=40))
def test_encode_of_byte_pairs_counts_every_byte_once(text):
    found = encode(PAIRS, text.encode(), np.dtype(np.uint16))
    assert found.exact and found.bytes is not None
    assert found.bytes.sum() == len(text.encode()) and (found.bytes >= 0).all()
    assert len(found.bytes) == len(found.ids)


PAIRS = train_tokenizer(LATVIAN)


def test_share_bytes_gives_a_character_to_its_first_token():
    # The first two tokens share the letter of two bytes, the third is `b`.
    assert share_bytes("āb".encode(), np.array([1, 1, 2])).tolist() == [2, 0, 1]
    assert share_bytes(b"", np.array([], int)).tolist() == []


def test_find_start_never_divides_a_character():
    text = "aā日👩".encode()
    starts = [0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10]
    assert [find_start(text, place) for place in range(11)] == starts


def test_check_utf8_names_the_place():
    check_utf8(LATVIAN.encode(), "here")
    with pytest.raises(UserError, match="^here is not UTF-8, as its byte 2 shows; all"):
        check_utf8(b"ab\xff", "here")


def test_load_coder_refuses_in_one_line(tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"model": {}}')
    for path in (damaged, tmp_path / "none.json", tmp_path, "gs://bucket/t.json"):
        with pytest.raises(UserError, match="^data.tokenizer='") as error:
            load_coder(make_options(tokenizer=str(path)))
        assert "\n" not in str(error.value) and "; allowed: " in str(error.value)


def test_load_coder_says_how_to_install_the_package(tmp_path, monkeypatch):
    path = write_tokenizer(tmp_path, know_words())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="'pip install tokenizers'") as error:
        load_coder(make_options(tokenizer=path))
    assert "\n" not in str(error.value)
