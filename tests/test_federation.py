"""Who owns what, and how many steps each takes."""

import numpy as np
import pytest
from factories import tiny_config

from fedmoe_jax.federation import count_steps


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (0.0, [5, 5, 5, 5, 5]),
        (1.0, [1, 1, 1, 2, 3]),
        (2.0, [1, 2, 2, 3, 5]),
        (0.1, [1, 1, 1, 1, 1]),
        (2.5, [1, 2, 3, 3, 6]),
    ],
)
def test_count_steps_by_hand(epochs, steps):
    config = tiny_config(local_epochs=epochs, local_steps=5, batch_size=32)
    size = np.array([1, 20, 32, 33, 65])
    found = count_steps(config, size)
    assert found.tolist() == steps and found.dtype == np.int32


def test_count_steps_of_thirds_of_an_epoch_does_not_round_up():
    config = tiny_config(local_epochs=1 / 3, batch_size=10)
    assert count_steps(config, np.array([30, 90, 91])).tolist() == [1, 3, 4]
