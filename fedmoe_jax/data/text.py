"""Folders of text: a client is a file, a folder or a speaker."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.tokens import Coder, load_coder
from fedmoe_jax.data.windows import Document, make_text
from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.files import brief
from fedmoe_jax.runtime.folders import resolve_folder

# Of a speech, after a blank line: verse has lines that end in a colon, too.
HEADING = re.compile(rb"(?:\A|^[ \t\r]*\n)([^\n:]{1,60}):[ \t\r]*$", re.M)
TEST_SHARE = 0.1  # of each client's text, its end
KILO = 1000


def load_text(options: ConfigDict) -> Data:
    """Loads the .txt files of `options.dir`.

    The last tenth of each client's text is its test. Of the rest the first
    `options.kilobytes` are trained on, all where it is 0, so that more text is tested
    on the same; of the test the first `options.test_kilobytes`, likewise.

    Args:
      options: the config's group `data`: `dir`, `client` (see `CLIENTS`), `length`,
        `kilobytes`, `test_kilobytes` and `tokenizer`.

    Raises:
      UserError: no folder, no files, files that cannot be read or hold nothing, windows
        that are longer than any client's text, a tokenizer that cannot be read, or one
        with a file that is not UTF-8.
    """
    if not options.dir:
        raise UserError(
            "data.dir='' is not allowed with data.name='text'; allowed: a folder of "
            ".txt files"
        )
    folder = resolve_folder("data.dir", options.dir)
    coder, files = load_coder(options), read_files(folder)
    for name, text in files.items():
        coder.check(text, str(folder / name))
    texts = CLIENTS[options.client](files, folder)
    return divide(texts, coder, options, f"data.dir={str(folder)!r}")


def list_texts(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The .txt files of a folder and its folders, of linked ones, too.

    Args:
      folder: to look in.
      above: the folders that it lies in; a link to one of them is not followed.
    """
    here = folder.resolve()
    if here in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from list_texts(path, above | {here})
        elif path.suffix == ".txt":
            yield path


def read_files(folder: Path) -> dict[str, bytes]:
    """The .txt files of a folder and its folders, linked ones too, by path, sorted.

    Raises:
      UserError: there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.dir={str(folder)!r} is no folder; allowed: a folder of .txt files"
        )
    try:
        paths = sorted(path for path in list_texts(folder) if path.is_file())
        found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    except OSError as error:
        raise UserError(
            f"data.dir={str(folder)!r} cannot be read ({brief(error)}); allowed: a "
            "folder of .txt files"
        ) from error
    if not found:
        raise UserError(
            f"data.dir={str(folder)!r} holds no .txt file; allowed: a folder of .txt "
            "files, or of folders of them"
        )
    return found


Text = tuple[str, str, bytes]  # client, stratum, text


def list_files(files: dict[str, bytes], folder: Path) -> list[Text]:
    """Every file is a client; its stratum is its first folder, if it is in one."""
    del folder
    return [(name, Path(name).parts[0], text) for name, text in files.items()]


def list_folders(files: dict[str, bytes], folder: Path) -> list[Text]:
    """Every first folder is a client and a stratum.

    Raises:
      UserError: a file is in none.
    """
    joined: dict[str, bytes] = {}
    for name, text in files.items():
        first, *rest = Path(name).parts
        if not rest:
            raise UserError(
                f"data.client='folder' is not allowed with {folder / name}, which is "
                "in no folder of its own; allowed: file"
            )
        joined[first] = joined.get(first, b"") + text
    return [(name, name, text) for name, text in joined.items()]


def list_speakers(files: dict[str, bytes], folder: Path) -> list[Text]:
    """Every speaker is a client and a stratum, with the speeches under its `NAME:`.

    Such a line follows a blank one, or is the first.

    Raises:
      UserError: there is no such heading.
    """
    joined: dict[str, bytes] = {}
    for text in files.values():
        for name, speech in list_speeches(text):
            joined[name] = joined.get(name, b"") + speech
    if not joined:
        raise UserError(
            f"data.client='speaker' is not allowed with {folder}, which has no speech "
            "under a line 'NAME:' after a blank one; allowed: file, folder"
        )
    return [(name, name, text) for name, text in joined.items()]


def list_speeches(text: bytes) -> Iterator[tuple[str, bytes]]:
    """Speaker and text of every speech, in their order."""
    found = list(HEADING.finditer(text))
    ends = [*(each.start() for each in found[1:]), len(text)]
    for heading, end in zip(found, ends, strict=False):
        speech = text[heading.end() : end].strip() + b"\n"
        yield heading[1].decode("utf-8", "replace").strip(), speech


CLIENTS = {"file": list_files, "folder": list_folders, "speaker": list_speakers}


def divide(texts: list[Text], coder: Coder, options: ConfigDict, where: str) -> Data:
    """`Data` of the texts; clients too short for a test window are left out.

    Raises:
      UserError: all are too short.
    """
    documents = [encode_parts(each, coder, options) for each in texts]
    counts = [(len(each.train.ids), len(each.test.ids)) for each in documents]
    enough = [min(count) > options.length for count in counts]
    if not any(enough):
        refuse_lengths(counts, options, where)
    kept = [each for each, long in zip(documents, enough, strict=True) if long]
    read = [each for each, long in zip(texts, enough, strict=True) if long]
    data = make_text(kept, options.length, coder.vocabulary, where)
    notes = note_left_out(enough, options.length)
    notes += note_shortage(read, coder, options.kilobytes)
    return data._replace(notes=notes + data.notes)


def refuse_lengths(
    counts: list[tuple[int, int]], options: ConfigDict, where: str
) -> NoReturn:
    """Raises UserError: no client has a window to train on and one to test.

    Args:
      counts: tokens that each client has to train on and to test.
      options: the config's group `data`.
      where: the data, for the message.
    """
    length, kilobytes = options.length, options.kilobytes
    if kilobytes and max(test for _, test in counts) > length:
        raise UserError(
            f"data.kilobytes={kilobytes} is not allowed with data.length={length}; "
            "allowed: 0, or more than a window"
        )
    train, test = max(counts, key=min)
    has = f"has {train} tokens to train on and {test} to test"
    if min(train, test) < 2:
        raise UserError(
            f"{where} has no client with enough text, as the longest {has}, its last "
            f"tenth; allowed: more than data.length={length} of both for some client"
        )
    raise UserError(
        f"data.length={length} is not allowed with {where}, whose longest client "
        f"{has}; allowed: 1 to {min(train, test) - 1}"
    )


def note_left_out(enough: Sequence[bool], length: int) -> tuple[str, ...]:
    """A note where clients [n] do not have enough text for windows of this length."""
    if all(enough):
        return ()
    note = (
        f"{len(enough) - sum(enough)} of {len(enough)} clients have too little text "
        f"for a window of {length} to train on and one to test, and are left out"
    )
    return (note,)


def note_shortage(
    texts: Sequence[Text], coder: Coder, kilobytes: int
) -> tuple[str, ...]:
    """A note where clients have less text to train on than they were to have."""
    sizes = {client: find_test(text, coder) for client, _, text in texts}
    short = {name: size for name, size in sizes.items() if size < KILO * kilobytes}
    if not short:
        return ()
    size, least = min((size, name) for name, size in short.items())
    note = (
        f"{len(short)} of {len(sizes)} clients have less text to train on than "
        f"data.kilobytes={kilobytes}, {show(least)} the least with {size:,} bytes"
    )
    return (note,)


def encode_parts(text: Text, coder: Coder, options: ConfigDict) -> Document:
    """The tokens that one client trains and is tested on, see `load_text`."""
    client, stratum, whole = text
    start = find_test(whole, coder)
    train = take_first(whole[:start], coder, options.kilobytes)
    test = take_first(whole[start:], coder, options.test_kilobytes)
    return Document(client, stratum, coder.encode(train), coder.encode(test))


def take_first(text: bytes, coder: Coder, kilobytes: int) -> bytes:
    """So much of the text's start, all of it for 0."""
    return text[: coder.cut(text, min(len(text), KILO * kilobytes or len(text)))]


def find_test(text: bytes, coder: Coder) -> int:
    """The first byte of a client's test, before which all may be trained on."""
    return coder.cut(text, len(text) - round(TEST_SHARE * len(text)))
