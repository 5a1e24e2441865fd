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
            f"data.name={name!r} is not in {tmp_path}; allowed: digits, synthetic, "
            "cifar10, arrays, text, markov, or a data set of TFDS that 'python -m "
            f"fedmoe_jax.data NAME --data_dir={tmp_path}' has prepared"
        )


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_load_dataset_gives_the_same_arrays_every_time(name):
    np.random.seed(1)
    first = load_dataset(make_options(name=name))
    np.random.seed(2)
    again = load_dataset(make_options(name=name))
    jax.tree.map(np.testing.assert_array_equal, first[:4], again[:4])
    assert first[4:] == again[4:]


def test_load_dataset_refuses_a_tokenizer_without_text(monkeypatch):
    monkeypatch.setattr(module, "prepare", None)  # it is not reached
    for name in ("digits", "synthetic", "markov", "cifar10"):
        with pytest.raises(UserError) as error:
            load_dataset(make_options(name=name, tokenizer="t.json"))
        assert str(error.value) == (
            f"data.tokenizer='t.json' is not allowed with data.name={name!r}, which "
            "has no text to encode; allowed: ''"
        )


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *((name, field) for name in ("digits", "markov") for field in ("dir", "file")),
        ("arrays", "dir"),
        ("text", "file"),
        ("mnist", "file"),
    ],
)
def test_load_dataset_refuses_a_path_that_it_would_not_read(name, field):
    with pytest.raises(UserError) as error:
        load_dataset(make_options(name=name, **{field: "mine"}))
    assert str(error.value) == (
        f"data.{field}='mine' is not allowed with data.name={name!r}, which does not "
        "read it; allowed: ''"
    )


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
