"""Text of TFDS data sets: its own splits, or the speakers of a play."""

import os
from pathlib import Path

import numpy as np
import pytest
from factories import make_options, train_tokenizer, write_tokenizer

from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.options import UserError

from .test_tfds import prepare

SPEECH = "ANNA:\n{}\n\nBEN:\n{}\n\n"
TRAIN = [SPEECH.format("we are " * 40, "you " * 90), SPEECH.format("one " * 40, "ah")]
TEST = ["CARL:\nNobody knows what is said here.\n"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    import tensorflow_datasets as source

    root = tmp_path_factory.mktemp("tfds")
    features = source.features.FeaturesDict({"text": source.features.Text()})
    examples = {"train": TRAIN, "test": TEST}
    rows = {split: [{"text": t} for t in texts] for split, texts in examples.items()}
    prepare(root, features, rows, name="play")
    prepare(root, features, {"train": rows["train"]}, name="half")
    return root


def load(root, **changes):
    options = {"name": "play", "length": 16, "dir": str(root)} | changes
    return load_dataset(make_options(**options))


def test_load_records_has_the_splits_of_the_data_set(root):
    data = load(root)
    assert data.owner is data.test_owner is None and data.stratum_names == ("play",)
    text = "\n".join(TEST).encode()
    tokens, sizes = data.test["tokens"], data.test["length"]
    targets = [row[1:size] for row, size in zip(tokens, sizes, strict=True)]
    assert np.concatenate(targets).tobytes() == text[1:]
    # Records may be stored in another order, but every letter is there once.
    letters = np.bincount(np.frombuffer("\n".join(TRAIN).encode(), np.uint8))
    assert data.train["length"].sum() - len(data.train["length"]) + 1 == letters.sum()


def test_load_records_notes_that_there_is_less_than_there_was_to_be(root):
    """Of 655 and 177 bytes, and the end of a line between them."""
    assert load(root, kilobytes=1).notes == (
        "data.name='play' has 833 bytes to train on, less than data.kilobytes=1",
    )
    assert load(root).notes == ()


def test_load_records_has_speakers_as_clients(root):
    data = load(root, client="speaker")
    assert data.stratum_names == ("ANNA", "BEN") and data.test_owner.tolist()
    assert set(data.owner) == {0, 1}


def test_load_records_in_tokens_of_a_tokenizer(root, tmp_path):
    tokenizer = train_tokenizer(TRAIN[0])
    path = write_tokenizer(tmp_path, tokenizer)
    data, text = load(root, tokenizer=path, length=2), "\n".join(TEST)
    targets = [
        row[1:size].tolist()
        for row, size in zip(data.test["tokens"], data.test["length"], strict=True)
    ]
    first = data.test["tokens"][0, 0]
    assert tokenizer.decode([first, *sum(targets, [])]) == text
    left = len(tokenizer.decode([first]))
    assert data.test["bytes"][:, 1:].sum() == len(text) - left
    speakers = load(root, tokenizer=path, length=2, client="speaker")
    assert speakers.stratum_names == ("ANNA", "BEN")
    assert speakers.vocabulary == data.vocabulary == tokenizer.get_vocab_size()


def test_load_records_refuses_in_one_line(root):
    cases = [
        ({"client": "folder"}, "data.client='folder' .* allowed: file, speaker"),
        ({"text_key": "label"}, "data.text_key='label' .* allowed: text"),
        ({"name": "half"}, "has no split 'test'; allowed: .* this has train"),
        ({"length": 5000}, "data.length=5000 is not allowed with data.name='play'"),
        ({"image_key": "text"}, "data.image_key='text' .* does not read it; allowed"),
    ]
    for changes, told in cases:
        with pytest.raises(UserError, match=told) as error:
            load(root, **changes)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_load_records_of_shakespeare():
    where = os.environ.get("TFDS_DATA_DIR", "")
    if not (Path(where) / "tiny_shakespeare").is_dir():
        pytest.skip("tiny_shakespeare is not in TFDS_DATA_DIR")
    options = {"name": "tiny_shakespeare", "length": 64}
    data = load_dataset(make_options(**options))
    trained = data.train["length"].sum() - len(data.train["length"]) + 1
    assert trained == 1_003_854 and data.task == "text"
    speakers = load_dataset(make_options(**options, client="speaker"))
    assert "ROMEO" in speakers.stratum_names and len(speakers.stratum_names) > 50
