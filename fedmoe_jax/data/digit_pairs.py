"""Two of scikit-learn's digits side by side: a hundred classes without a file."""

import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.images import label_images

PAIRS = 8  # that begin with each digit


def load_digit_pairs() -> Data:
    """Images [X, 8, 16, 1] of the numbers 00 to 99, 11496 to train and 2880 to test.

    Each of the digits is eight times the left one, beside others of its part, training
    or test, at random. The draw is fixed.
    """
    digits, rng = load_digits(), np.random.default_rng(0)
    train_x, train_y = _pair_up(digits.train["x"], digits.train["y"], rng)
    test_x, test_y = _pair_up(digits.test["x"], digits.test["y"], rng)
    names = tuple(f"{number:02}" for number in range(100))
    return label_images(train_x, train_y, test_x, test_y, names)


def _pair_up(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images [X, H, W, 1] of digits [X], and the numbers that they show."""
    left = np.tile(np.arange(len(y)), PAIRS)
    right = np.concatenate([rng.permutation(len(y)) for _ in range(PAIRS)])
    return np.concatenate([x[left], x[right]], axis=2), 10 * y[left] + y[right]
