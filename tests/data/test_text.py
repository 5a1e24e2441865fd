"""Folders of text: clients, strata, test texts, and what is refused in one line."""

import numpy as np
import pytest
from factories import make_options, train_tokenizer, write_tokenizer

from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.data.text import list_speeches
from fedmoe_jax.options import UserError

LATVIAN, WOLOF = "Iesākumā bija Vārds. " * 20, "Ca ndoorte la Kàddu gi nekkoon. " * 30


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "latvian/john.txt": LATVIAN,
        "latvian/mark.txt": LATVIAN[::-1],
        "wolof/john.txt": WOLOF,
        "wolof/notes.md": "no text",
    }.items():
        path = tmp_path / "nt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "nt"


def load(folder, **changes):
    options = {"length": 16} | changes
    return load_dataset(make_options(name="text", dir=str(folder), **options))


def read(rows, owner, client):
    """The text of one client, from its windows."""
    chosen = np.flatnonzero(owner == client)
    tokens, sizes = rows["tokens"][chosen], rows["length"][chosen]
    targets = [row[1:size] for row, size in zip(tokens, sizes, strict=True)]
    return bytes([tokens[0, 0]]) + np.concatenate(targets).tobytes()


def test_load_text_of_files_and_folders(folder):
    data = load(folder)
    assert data.stratum_names == ("latvian", "wolof") and data.vocabulary == 256
    for client, text in enumerate((LATVIAN, LATVIAN[::-1], WOLOF)):
        whole = text.encode()
        start = len(whole) - round(0.1 * len(whole))
        assert read(data.train, data.owner, client) == whole[:start]
        assert read(data.test, data.test_owner, client) == whole[start:]
    joined = load(folder, client="folder")
    assert joined.owner.max() == 1
    whole = (LATVIAN + LATVIAN[::-1]).encode()
    text = read(joined.train, joined.owner, 0) + read(joined.test, joined.test_owner, 0)
    assert text == whole


def test_linked_folders_are_read_as_their_copies(folder):
    links = folder.parent / "links"
    links.mkdir()
    for language in ("latvian", "wolof"):
        (links / language).symlink_to(folder / language)
    (links / "loop").symlink_to(links)  # is not followed for ever
    there, here = load(folder), load(links)
    np.testing.assert_array_equal(there.train["tokens"], here.train["tokens"])
    assert here.stratum_names == there.stratum_names


def test_load_text_trains_on_less_and_tests_on_the_same(folder):
    (folder / "wolof" / "john.txt").write_text(WOLOF * 9, encoding="utf-8")
    whole, short = load(folder), load(folder, kilobytes=1)
    assert len(read(short.train, short.owner, 2)) == 1000
    for name in whole.test:
        np.testing.assert_array_equal(whole.test[name], short.test[name])


def test_load_text_tests_on_the_first_of_the_test(folder):
    (folder / "wolof" / "john.txt").write_text(WOLOF * 90, encoding="utf-8")
    whole, short = load(folder), load(folder, test_kilobytes=1)
    text = read(whole.test, whole.test_owner, 2)
    assert len(text) > 1000
    assert read(short.test, short.test_owner, 2) == text[:1000]
    for name in whole.train:
        np.testing.assert_array_equal(whole.train[name], short.train[name])


PLAY = b"""Proud prologue.

ANNA:
%s

First Citizen:
Speak, %s: speak.

ANNA:
Away!
"""


def test_list_speeches_by_hand():
    play = PLAY % (b"We are one.", b"I said")
    assert list(list_speeches(play)) == [
        ("ANNA", b"We are one.\n"),
        ("First Citizen", b"Speak, I said: speak.\n"),
        ("ANNA", b"Away!\n"),
    ]


def test_a_line_of_verse_with_a_colon_is_no_heading():
    text = b"A:\nOne said,\nand answered thus:\nno.\n \nB:\nyes\n\nA:\nso\n"
    expected = [
        ("A", b"One said,\nand answered thus:\nno.\n"),
        ("B", b"yes\n"),
        ("A", b"so\n"),
    ]
    assert list(list_speeches(text)) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_that_end_in_a_colon_are_no_speakers(end):
    lines = b"ANNA:", b"He called thus:", b"Away!", b"", b"BEN:", b"So be it."
    play = end.join(lines)
    said = b"He called thus:" + end + b"Away!\n"
    assert list(list_speeches(play)) == [("ANNA", said), ("BEN", b"So be it.\n")]


def test_load_text_of_speakers_leaves_out_those_who_say_little(tmp_path):
    long = b"word " * 90
    (tmp_path / "play.txt").write_bytes(PLAY % (long, b"x"))
    data = load(tmp_path, client="speaker")
    assert data.stratum_names == ("ANNA",) and data.owner.max() == 0
    assert data.notes == (
        "1 of 2 clients have too little text for a window of 16 to train on and one to "
        "test, and are left out",
    )


def test_load_text_notes_that_clients_have_less_than_they_were_to_have(folder):
    """Nine tenths of 480, 480 and 990 bytes are trained on."""
    (note,) = load(folder, kilobytes=1).notes
    assert note == (
        "3 of 3 clients have less text to train on than data.kilobytes=1, "
        "'latvian/john.txt' the least with 432 bytes"
    )
    (folder / "wolof" / "john.txt").write_text("wolof " * 500, encoding="utf-8")
    (folder / "latvian" / "mark.txt").write_text("", encoding="utf-8")
    left_out, short = load(folder, kilobytes=1).notes
    assert left_out.startswith("1 of 3 clients have too little text for a window of 16")
    assert short == (
        "1 of 2 clients have less text to train on than data.kilobytes=1, "
        "'latvian/john.txt' the least with 432 bytes"
    )
    assert load(folder, kilobytes=0).notes == (left_out,)


def test_load_text_notes_no_shortage_where_there_is_exactly_enough(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1111)  # 111 of them are the test
    assert load(tmp_path, kilobytes=1).notes == ()
    (tmp_path / "a.txt").write_bytes(b"x" * 1110)
    assert load(tmp_path, kilobytes=1).notes[0].endswith("with 999 bytes")


@pytest.mark.parametrize(
    ("text", "train", "test"), [("", 0, 0), ("x", 1, 0), ("x" * 14, 13, 1)]
)
def test_load_text_says_what_is_needed_where_clients_have_nothing(
    tmp_path, capsys, text, train, test
):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"data.dir={str(tmp_path)!r} has no client with enough text, as the longest "
        f"has {train} tokens to train on and {test} to test, its last tenth; allowed: "
        "more than data.length=16 of both for some client"
    )
    assert capsys.readouterr().err == ""


def test_load_text_takes_bytes_that_are_no_utf8(tmp_path):
    text = bytes(range(256)) * 4
    (tmp_path / "raw.txt").write_bytes(text)
    data = load(tmp_path)
    assert text == read(data.train, data.owner, 0) + read(data.test, data.test_owner, 0)


def test_load_text_of_a_tokenizer_divides_the_same_text(folder, tmp_path):
    tokenizer = train_tokenizer(LATVIAN)
    options = {"tokenizer": write_tokenizer(tmp_path, tokenizer), "length": 2}
    data, plain = load(folder, **options), load(folder, length=2)
    assert data.vocabulary == tokenizer.get_vocab_size()
    assert data.stratum_names == plain.stratum_names and data.notes == ()
    for client, text in enumerate((LATVIAN, LATVIAN[::-1], WOLOF)):
        whole = text.encode()
        parts = [(data.train, data.owner), (data.test, data.test_owner)]
        ids = [read_ids(rows, owner, client) for rows, owner in parts]
        train, test = (tokenizer.decode(each.tolist()).encode() for each in ids)
        assert train + test == whole
        assert 0 <= round(0.9 * len(whole)) - len(train) < 2  # at a character
        for (rows, owner), part, first in zip(parts, (train, test), ids, strict=True):
            chosen = owner == client
            left = tokenizer.decode([first[0]]).encode()
            assert rows["bytes"][chosen, 1:].sum() == len(part) - len(left)


def read_ids(rows, owner, client):
    """The tokens of one client, from its windows."""
    chosen = np.flatnonzero(owner == client)
    tokens, sizes = rows["tokens"][chosen], rows["length"][chosen]
    targets = [row[1:size] for row, size in zip(tokens, sizes, strict=True)]
    return np.concatenate([tokens[0, :1], *targets])


def test_load_text_of_a_tokenizer_is_bounded_in_bytes(tmp_path):
    tokenizer = train_tokenizer(LATVIAN)
    (tmp_path / "long.txt").write_text("ā" * 5000, encoding="utf-8")
    (tmp_path / "odd.txt").write_text("b" + "ā" * 5000, encoding="utf-8")
    path = write_tokenizer(tmp_path, tokenizer)
    data = load(tmp_path, tokenizer=path, kilobytes=1)
    ids = [read_ids(data.train, data.owner, client).tolist() for client in (0, 1)]
    texts = [tokenizer.decode(each) for each in ids]
    assert texts == ["ā" * 500, "b" + "ā" * 499]


def test_load_text_of_a_tokenizer_names_a_file_that_is_no_utf8(folder, tmp_path):
    (folder / "wolof" / "raw.txt").write_bytes(bytes(range(256)) * 4)
    load(folder)
    with pytest.raises(UserError, match="raw.txt is not UTF-8, as its byte 128") as e:
        load(folder, tokenizer=write_tokenizer(tmp_path, train_tokenizer(WOLOF)))
    assert "\n" not in str(e.value)


def test_load_text_refuses_in_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "loose.txt").write_text("of no folder")
    cases = [
        ({"folder": ""}, "data.dir='' is not allowed"),
        ({"folder": tmp_path / "empty"}, "holds no .txt file"),
        ({"folder": tmp_path / "none"}, "is no folder; allowed: a folder of .txt"),
        ({"folder": folder, "client": "folder"}, "which is in no folder of its own"),
        (
            {"folder": folder, "client": "speaker"},
            "no speech under a line 'NAME:' after",
        ),
        (
            {"folder": folder, "length": 500},
            "data.length=500 .* longest client has 891 tokens to train on and 99 to "
            "test; allowed: 1 to 98",
        ),
        (
            {"folder": folder, "length": 99},
            "data.length=99 is not allowed .*; allowed: 1 to 98",
        ),
    ]
    for case, told in cases:
        with pytest.raises(UserError, match=told) as error:
            load(**case)
        assert "\n" not in str(error.value) and "; allowed: " in str(error.value)
