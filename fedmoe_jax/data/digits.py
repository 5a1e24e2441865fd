"""scikit-learn's handwritten digits, which come with the package and need no file."""

import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.images import label_images


def load_digits() -> Data:
    """Images [X, 8, 8, 1], 1437 to train and 360 to test.

    Pixels are rescaled from 0..16 to 0..255. The stratified split is fixed.
    """
    # scikit-learn takes a second to import, and other data sets do not need it.
    from sklearn import datasets, model_selection

    source = datasets.load_digits()
    x = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        x,
        source.target.astype(np.int32),
        test_size=0.2,
        stratify=source.target,
        random_state=0,
    )
    names = tuple(str(label) for label in source.target_names)
    return label_images(train_x, train_y, test_x, test_y, names)
