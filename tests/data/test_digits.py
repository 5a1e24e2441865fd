"""The digits are scikit-learn's, rescaled and split."""

import numpy as np
from sklearn import datasets

from fedmoe_jax.data.digits import load_digits


def test_load_digits_rescales_and_splits_evenly():
    digits = load_digits()
    assert digits.train["x"].shape == (1437, 8, 8, 1)
    assert digits.test["x"].shape == (360, 8, 8, 1)
    assert digits.stratum_names == tuple("0123456789")
    assert digits.train["x"].min() == 0 and digits.train["x"].max() == 255
    everything = np.concatenate([digits.train["x"], digits.test["x"]]).reshape(1797, -1)
    source = np.rint(datasets.load_digits().data * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(
        np.sort(everything.view("V64").ravel()), np.sort(source.view("V64").ravel())
    )
    counts = np.bincount(digits.test["y"])
    np.testing.assert_allclose(
        counts, np.bincount(datasets.load_digits().target) / 5, atol=1
    )
