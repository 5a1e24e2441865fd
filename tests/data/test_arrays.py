"""One's own arrays: what is read, and what is refused in one line."""

import numpy as np
import pytest
from factories import make_config, make_options

from fedmoe_jax.data.arrays import load_arrays
from fedmoe_jax.data.load import load_dataset
from fedmoe_jax.federation import make_federation, make_partition
from fedmoe_jax.options import UserError

RNG = np.random.default_rng(0)
MINE = {
    "train_x": RNG.integers(0, 256, (12, 4, 6), np.uint8),
    "train_y": np.arange(12) % 3,
    "test_x": RNG.integers(0, 256, (6, 4, 6), np.uint8),
    "test_y": np.arange(6) % 3,
}


def load(folder, **arrays):
    np.savez(folder / "mine.npz", **arrays)
    options = make_options(name="arrays", file=str(folder / "mine.npz"))
    return load_dataset(options)


def test_load_arrays_of_one_channel(tmp_path):
    data = load(tmp_path, **MINE, label_names=np.array(["a", "b", "c"]))
    np.testing.assert_array_equal(data.train["x"][..., 0], MINE["train_x"])
    np.testing.assert_array_equal(data.test["y"], MINE["test_y"])
    assert data.stratum_names == ("a", "b", "c") and data.owner is None


def test_load_arrays_of_floats_normalises_every_channel(tmp_path):
    x = RNG.normal([3.0, -1e3], [0.1, 20.0], (12, 4, 6, 2))
    data = load(tmp_path, **MINE | {"train_x": x, "test_x": x[:6]})
    assert data.train["x"].dtype == np.float32 and data.stratum_names == ("0", "1", "2")
    federation = make_federation(
        config := make_config(
            num_clients=2, cohort_size=2, **{"partition.min_size": 1}
        ),
        data,
        make_partition(config, data),
    )
    pixels = data.train["x"] / 255.0
    mean, std = federation.statistics["mean"], federation.statistics["std"]
    normal = (pixels - mean) / std
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, rtol=1e-3)


@pytest.mark.parametrize("ids", [[30, 10, 20], ["f30", "Ann", "f20"]])
def test_load_arrays_numbers_the_clients_anew(tmp_path, ids):
    clients = np.array(ids * 4)
    data = load(tmp_path, **MINE, train_client=clients, test_client=clients[:6])
    assert data.owner.tolist() == [2, 0, 1] * 4
    assert data.test_owner.tolist() == [2, 0, 1] * 2


def test_load_arrays_takes_any_labels_that_have_names(tmp_path):
    labels = {"train_y": np.full(12, 5), "test_y": np.full(6, 6)}
    names = np.array(["a", "b", "c", "d", "e", "f", "g", "h"])
    assert load(tmp_path, **MINE | labels, label_names=names).stratum_names == (*names,)


def test_load_arrays_takes_labels_of_which_half_occur(tmp_path):
    labels = {"train_y": np.arange(12) % 3, "test_y": np.full(6, 7)}
    data = load(tmp_path, **MINE | labels)  # 0, 1, 2 and 7
    assert data.stratum_names == tuple("01234567")
    with pytest.raises(UserError, match="4 different labels from 0 to 8; .* 0 to 3"):
        load(tmp_path, **MINE | labels | {"test_y": np.full(6, 8)})


BAD = {
    "no labels": ({"train_y": None}, "has no train_y"),
    "another name": ({"x": np.ones(3)}, "has x; allowed: train_x"),
    "fewer labels": (
        {"test_y": np.zeros(5, int)},
        r"has test_y int64\[5\]; .* 6 whole",
    ),
    "one label": ({"test_y": np.array(1)}, r"has test_y int64\[\]; .* 6 whole"),
    "float labels": ({"train_y": np.zeros(12)}, r"has train_y float64\[12\]; .* whole"),
    "negative labels": ({"train_y": np.arange(12) - 1}, "has train_y .* numbers >= 0"),
    "flat images": ({"train_x": np.ones((12, 9))}, r"has train_x float64\[12, 9\]"),
    "whole images": ({"train_x": np.ones((12, 4, 6), int)}, "has train_x int64"),
    "other images": ({"test_x": MINE["test_x"][:, 1:]}, "has rows of 'x'"),
    "other kind": ({"test_x": MINE["test_x"] / 255.0}, "has rows of 'x' uint8"),
    "not finite": ({"train_x": np.full((12, 4, 6), np.nan)}, "finite floats"),
    "huge labels": (
        {"train_y": np.arange(12) % 3 * 700_000_000},
        r"has 5 different labels from 0 to 1400000000; allowed: 0 to 4, .* label_names",
    ),
    "sparse labels": (
        {"train_y": np.arange(12) % 4 * 1000, "test_y": np.zeros(6, int)},
        "has 4 different labels from 0 to 3000; allowed: 0 to 3, as at least half",
    ),
    "few names": ({"label_names": np.array(["a"])}, "has 1 label_names; .* least 3"),
    "names in rows": (
        {"label_names": np.array([["a", "b"], ["c", "d"]])},
        r"has label_names <U1\[2, 2\]; allowed: names \[L\]",
    ),
    "one name": ({"label_names": np.array("abc")}, r"has label_names <U3\[\]; allowed"),
    "a name twice": (
        {"label_names": np.array(["a", "b", "c", "b"])},
        "has 'b' 2 times in label_names; allowed: each once",
    ),
    "half clients": ({"train_client": np.ones(11, int)}, "has train_client int64"),
    "half named clients": (
        {"train_client": np.array(["a"] * 11)},
        r"has train_client <U1\[11\]; allowed: 12 whole numbers >= 0 or texts, one for",
    ),
    "float clients": ({"train_client": np.zeros(12)}, "has train_client float64"),
    "other ids": (
        {"train_client": np.array(["1"] * 12), "test_client": np.ones(6, int)},
        r"has test_client int64\[6\]; allowed: texts, as in train_client",
    ),
    "other numbers": (
        {"train_client": np.ones(12, int), "test_client": np.array(["1"] * 6)},
        r"has test_client <U1\[6\]; allowed: whole numbers, as in train_client",
    ),
    "test clients": (
        {"test_client": np.ones(6, int)},
        "has test_client; allowed: train",
    ),
    "no examples": (
        {"train_x": MINE["train_x"][:0], "train_y": MINE["train_y"][:0]},
        r"has train_x uint8\[0, 4, 6\]",
    ),
    "strange client": (
        {"train_client": np.zeros(12, int), "test_client": np.ones(6, int)},
        "has no training example of the test_client 1; allowed: clients of train",
    ),
    "strange name": (
        {"train_client": np.array(["a"] * 12), "test_client": np.array(["b"] * 6)},
        "has no training example of the test_client 'b'",
    ),
    "objects": ({"label_names": np.array([1, "a", None], object)}, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_load_arrays_refuses_in_one_line(tmp_path, case):
    changes, told = BAD[case]
    arrays = {name: x for name, x in (MINE | changes).items() if x is not None}
    with pytest.raises(UserError, match=told) as error:
        load(tmp_path, **arrays)
    assert "\n" not in str(error.value) and "; allowed: " in str(error.value)


def test_load_arrays_needs_a_file(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("", str(tmp_path / "none.npz"), str(tmp_path / "text.npz")):
        with pytest.raises(UserError, match="data.file") as error:
            load_arrays(make_options(name="arrays", file=name))
        assert "\n" not in str(error.value)
