"""Data sets by name: what is known, what fits together, and the command line."""

import jax
import numpy as np
import pytest
from factories import make_options

from fedmoe_jax.data import load as module
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.load import check_data, load_dataset
from fedmoe_jax.options import UserError


def test_load_dataset_refuses_an_unknown_name_in_one_line(tmp_path):
    for name in ("mnist", "../digits", "", "a/b/c"):
        with pytest.raises(UserError) as error:
            load_dataset(make_options(name=name, dir=str(tmp_path)))
        assert str(error.value) == (
            f"data.name={name!r} is not in {tmp_path}; allowed: digits, "
            "digit_pairs, synthetic, cifar10, arrays, text, markov, or a data set of "
            f"TFDS that 'python -m fedmoe_jax.data NAME --data_dir={tmp_path}' has "
            "prepared"
        )


@pytest.mark.parametrize("name", ["digits", "digit_pairs", "synthetic"])
def test_load_dataset_gives_the_same_arrays_every_time(name):
    np.random.seed(1)
    first = load_dataset(make_options(name=name))
    np.random.seed(2)
    again = load_dataset(make_options(name=name))
    jax.tree.map(np.testing.assert_array_equal, first[:4], again[:4])
    assert first[4:] == again[4:]


CHANGED = {
    "file": "mine.npz",
    "dir": "mine",
    "client": "speaker",
    "length": 64,
    "kilobytes": 1,
    "test_kilobytes": 1,
    "tokenizer": "t.json",
    "image_key": "foo",
    "label_key": "bar",
    "text_key": "text",
}
DEFAULTS = {"client": "file", "length": 32, "kilobytes": 0, "test_kilobytes": 0}
UNREAD = {
    "digits": tuple(CHANGED),
    "digit_pairs": tuple(CHANGED),
    "synthetic": tuple(CHANGED),
    "cifar10": ("file", "client", *tuple(CHANGED)[3:6], "text_key"),
    "arrays": tuple(CHANGED)[1:],
    "text": ("file", "image_key", "label_key", "text_key"),
    "markov": ("file", "dir", *tuple(CHANGED)[4:]),
    "mnist": ("file",),
}


@pytest.mark.parametrize("name", UNREAD)
def test_load_dataset_refuses_a_field_that_it_would_not_read(name, monkeypatch):
    monkeypatch.setattr(module, "prepare", None)  # it is not reached
    for field in UNREAD[name]:
        value = CHANGED[field]
        with pytest.raises(UserError) as error:
            load_dataset(make_options(name=name, **{field: value}))
        assert str(error.value) == (
            f"data.{field}={value!r} is not allowed with data.name={name!r}, which "
            f"does not read it; allowed: {DEFAULTS.get(field, '')!r}"
        )


def test_load_dataset_leaves_the_fields_to_a_loader_from_outside(monkeypatch):
    seen = []

    def load(options):
        seen.append({field: options[field] for field in CHANGED})
        return load_digits()

    monkeypatch.setitem(module.DATASETS, "mine", load)
    load_dataset(make_options(name="mine", **CHANGED))
    assert seen == [CHANGED]


def test_load_dataset_of_markov_has_writers_whatever_a_client_of_text_is():
    first, other = (
        load_dataset(make_options(name="markov", client=client, length=64))
        for client in ("file", "folder")
    )
    jax.tree.map(np.testing.assert_array_equal, first[:4], other[:4])


def test_load_dataset_names_the_configs_that_are_prepared(tmp_path):
    for path in ("emnist/byclass/3.1.0", "emnist/letters/3.0.0", "mnist/3.0.1"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "dataset_info.json").touch()
    (tmp_path / "emnist" / "empty").mkdir()
    embedded = "digits, digit_pairs, synthetic"
    cases = {
        "emnist": f"emnist/byclass, emnist/letters, {embedded}",
        "emnist/digits": f"emnist/byclass, emnist/letters, {embedded}",
        "mnist/small": f"mnist, {embedded}",
        "svhn": embedded,
        "../emnist": embedded,
    }
    for name, listed in cases.items():
        with pytest.raises(UserError) as error:
            load_dataset(make_options(name=name, dir=str(tmp_path)))
        told = f"data.name={name!r} is not in {tmp_path}; allowed: {listed}, cifar10, "
        assert str(error.value).startswith(told)


MISFITS = {
    "fewer strata": lambda data: {"stratum": data.stratum[1:]},
    "unknown stratum": lambda data: {"stratum": data.stratum + 1},
    "no labels": lambda data: {"test": {"x": data.test["x"]}},
    "smaller images": lambda data: {"test": data.test | {"x": data.test["x"][:, 1:]}},
    "fewer owners": lambda data: {"owner": data.stratum[1:]},
    "owner of none": lambda data: {"owner": data.stratum - 1},
    "test owners alone": lambda data: {"test_owner": data.test_stratum},
    "strange test owners": lambda data: {
        "owner": data.stratum,
        "test_owner": data.test_stratum + 1,
    },
    "half owners": lambda data: {"owner": data.stratum / 2},
    "list of strata": lambda data: {"stratum": data.stratum.tolist()},
    "strange limit": lambda data: {"limit": np.ones(3)},
    "negative limit": lambda data: {"limit": -0.5},
    "other strata": lambda data: {"stratum": data.stratum.astype(np.int64)},
}


def test_check_data_refuses_arrays_that_do_not_fit():
    digits = load_digits()
    check_data("digits", digits)
    for change in MISFITS.values():
        with pytest.raises(UserError, match="^data.name='digits' has ") as error:
            check_data("digits", digits._replace(**change(digits)))
        assert "\n" not in str(error.value) and "; allowed: " in str(error.value)
