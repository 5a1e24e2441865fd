"""Images with one label each as `Data`: the label is what the partition skews."""

from collections.abc import Sequence

import chex
import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.options import UserError

MOST_CLASSES = 2  # of each label that occurs; more are ids, years or codes


def label_images(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    label_names: tuple[str, ...],
) -> Data:
    """`Data` of the task `images`, with leaves `x` and `y`.

    Args:
      train_x: [X, H, W, F] uint8 or float32.
      train_y: [X] int32 in [0, L).
      test_x: [X', H, W, F], likewise.
      test_y: [X'] int32.
      label_names: L names.
    """
    chex.assert_rank([train_x, test_x], 4)
    kinds = [np.uint8 if x.dtype == np.uint8 else np.float32 for x in (train_x, test_x)]
    chex.assert_type([train_x, test_x], kinds)
    chex.assert_type([train_y, test_y], np.int32)
    return Data(
        train={"x": train_x, "y": train_y},
        test={"x": test_x, "y": test_y},
        stratum=train_y,
        test_stratum=test_y,
        stratum_names=label_names,
        task="images",
    )


def name_numbers(
    labels: Sequence[np.ndarray], where: str, way_on: str = ""
) -> tuple[str, ...]:
    """The numbers from 0 to the largest label, as names of labels without any.

    Args:
      labels: of each part of the data, [X] int.
      where: the labels, for messages.
      way_on: what else is allowed, for messages.

    Raises:
      UserError: one is negative, or fewer than half of these numbers occur.
    """
    found = np.unique(np.concatenate(labels))
    low, high = int(found[0]), int(found[-1])
    if low < 0 or high >= MOST_CLASSES * len(found):
        raise UserError(
            f"{where} has {len(found)} different labels from {low} to {high}; allowed: "
            f"0 to {len(found) - 1}, as at least half of the numbers from 0 to the "
            f"largest label have to occur{way_on}"
        )
    return tuple(map(str, range(high + 1)))
