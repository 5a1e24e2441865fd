"""The examples of each client, and its local steps."""

import numpy as np
import pytest
from factories import make_data, tiny_config

from fedmoe_jax.federation import count_steps, make_federation
from fedmoe_jax.types import Partition


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


# Examples of three classes that each of two clients owns, and each client's histogram:
# its own examples are the whole, not those of a class.
COUNTS = [[1, 3, 0], [2, 2, 4]]
LABEL_MIX = [[1 / 4, 3 / 4, 0], [1 / 4, 1 / 4, 1 / 2]]


@pytest.mark.parametrize("strategy", ["load_balanced", "centralised"])
def test_make_federation_gives_every_client_its_histogram(strategy):
    """Pooled data have one owner, but the histograms stay those of the clients."""
    partition = Partition(
        index=np.arange(16, dtype=np.int32).reshape(2, 8),
        size=np.array([4, 8], np.int32),
        label_counts=np.array(COUNTS, np.int32),
        public=np.zeros(0, np.int32),
    )
    config = tiny_config(strategy=strategy, num_clients=2, cohort_size=2)
    federation = make_federation(config, make_data(3), partition)
    assert federation.label_mix.dtype == np.float32
    np.testing.assert_allclose(federation.label_mix, LABEL_MIX, rtol=1e-6)
    sizes = {"load_balanced": [4, 8], "centralised": [12]}[strategy]
    assert federation.size.tolist() == sizes
