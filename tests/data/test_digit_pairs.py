"""Pairs of digits are made of the digits, training and test apart."""

import numpy as np

from fedmoe_jax.data.digit_pairs import PAIRS, load_digit_pairs
from fedmoe_jax.data.digits import load_digits


def test_load_digit_pairs_puts_two_digits_of_the_same_part_side_by_side():
    digits, pairs = load_digits(), load_digit_pairs()
    assert pairs.stratum_names[7] == "07" and len(pairs.stratum_names) == 100
    for single, double in ((digits.train, pairs.train), (digits.test, pairs.test)):
        assert double["x"].shape == (PAIRS * len(single["y"]), 8, 16, 1)
        label = {x.tobytes(): y for x, y in zip(single["x"], single["y"], strict=True)}
        halves = np.split(double["x"], 2, axis=2)
        left, right = ([label[half.tobytes()] for half in side] for side in halves)
        np.testing.assert_array_equal(double["y"] // 10, left)
        np.testing.assert_array_equal(double["y"] % 10, right)
        for side in (left, right):  # every digit is as often on each side
            np.testing.assert_array_equal(
                np.bincount(side), PAIRS * np.bincount(single["y"])
            )
    assert np.bincount(pairs.train["y"], minlength=100).min() > 70
