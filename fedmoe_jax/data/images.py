"""Images with one label each as `Data`: the label is what the partition skews."""

import chex
import numpy as np

from fedmoe_jax.base import Data


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
