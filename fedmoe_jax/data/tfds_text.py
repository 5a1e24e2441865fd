"""Text of any TFDS data set in array_record form, without TensorFlow."""

from pathlib import Path

from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.text import KILO, divide, list_speakers, take_first
from fedmoe_jax.data.tfds import (
    SPLITS,
    check_format,
    choose_key,
    open_records,
    read_features,
)
from fedmoe_jax.data.tokens import load_coder
from fedmoe_jax.data.windows import Document, make_text
from fedmoe_jax.options import UserError


def load_records(source: Path, options: ConfigDict) -> Data:
    """The texts of a prepared data set, joined.

    With `data.client=file` the splits are those of the data set, and no example has a
    natural client; with `speaker` the training split's speakers are the clients, and
    the last tenth of each one's text is its test.

    Args:
      source: folder of the records.
      options: the group `data`, with `tokenizer`, and `text_key`, empty for the only
        text.

    Raises:
      UserError: in another file format, damaged, without a split `train` or `test` or
        text, or with too little of it; a tokenizer that cannot be read, or whose text
        is not UTF-8.
    """
    check_format(source, options.name)
    key = choose_key(read_features(source), "data.text_key", options.text_key, "text")
    train, test = (b"\n".join(texts) for texts in read_splits(source, key))
    where = f"data.name={options.name!r}"
    if options.client == "folder":
        raise UserError(
            f"data.client='folder' is not allowed with {where}; allowed: file, speaker"
        )
    coder = load_coder(options)
    for text in (train, test):
        coder.check(text, where)
    if options.client == "speaker":
        return divide(list_speakers({"train": train}, source), coder, options, where)
    notes = note_shortage(len(train), options.kilobytes, where)
    train = take_first(train, coder, options.kilobytes)
    test = take_first(test, coder, options.test_kilobytes)
    tokens = coder.encode(train), coder.encode(test)
    document = Document(options.name, options.name, *tokens)
    data = make_text([document], options.length, coder.vocabulary, where)
    return data._replace(owner=None, test_owner=None, notes=notes + data.notes)


def note_shortage(size: int, kilobytes: int, where: str) -> tuple[str, ...]:
    """A note where there are fewer bytes to train on than there were to be."""
    if size >= KILO * kilobytes:
        return ()
    note = f"{where} has {size:,} bytes to train on, less than data.kilobytes="
    return (f"{note}{kilobytes}",)


def read_splits(source: Path, key: str) -> list[list[bytes]]:
    """The texts of the splits `train` and `test`, in the order of the records.

    Raises:
      UserError: see `load_records`.
    """
    with open_records(source) as builder:
        splits = [builder.as_data_source(split) for split in SPLITS]
        return [[bytes(split[i][key]) for i in range(len(split))] for split in splits]
