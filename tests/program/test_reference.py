"""A tiny run on the digits computes what it did when its numbers were stored.

Other tests compare parts of a run with each other or with slow twins; a change of what
all of them compute, as of a default, a draw or an order of steps, shows here alone.
Where it is meant, store the new numbers and say so in CHANGELOG.md.
"""

import jax
import numpy as np
import pytest
from factories import make_config

import fedmoe_jax

CONFIG = {
    "seed": 0,
    "strategy": "load_balanced",
    "data.name": "digits",
    "partition.kind": "dirichlet",
    "partition.alpha": 1.0,
    "num_rounds": 8,
    "eval_every": 4,
    "chunk_rounds": 1,
    "num_clients": 4,
    "cohort_size": 3,
    "num_experts": 3,
    "max_held": 2,
    "num_active": 2,
    "local_steps": 2,
    "batch_size": 4,
    "client.learning_rate": 0.3,
    "model.stem_width": 4,
    "model.expert_width": 4,
    "model.feature_width": 4,
    "run.num_devices": 1,
}

LOAD = [
    [24, 16, 8],
    [0, 24, 24],
    [24, 8, 16],
    [16, 24, 8],
    [24, 0, 24],
    [16, 24, 8],
    [0, 24, 24],
    [24, 0, 24],
]
NUMBERS = {
    "train_loss": [
        *(2.380591, 2.698354, 2.362056, 2.377981),
        *(2.336818, 2.352709, 2.332968, 2.264364),
    ],
    "fitness_change": [
        *(0.1373677, 0.1283635, 0.0962783, 0.0895130),
        *(0.0597537, 0.0574076, 0.0529524, 0.0577747),
    ],
    "radio_joules": [
        *(9.502434, 9.502434, 9.502434, 2.773688),
        *(9.331604, 9.331604, 9.502434, 9.331604),
    ],
    "bytes_up": [5076] * 8,
    "bytes_down": [4956] * 8,
    "client_flops": [59400] * 8,
}
ACCURACIES = {  # after rounds 4 and 8
    "global_accuracy": [0.1027778, 0.1888889],
    "global_soft_accuracy": [0.1027778, 0.1916667],
    "personal_accuracy": [0.0937939, 0.1733977],
    "personal_prior_accuracy": [0.1567584, 0.2111742],
    "expert_accuracy": [
        [0.1027778, 0.1027778, 0.0805556],
        [0.1583333, 0.0916667, 0.1083333],
    ],
}
# Absolute values of the final params, summed.
PARAMS = {"stem": 36.34044, "gate": 1.415503, "experts": 38.74691, "head": 20.75897}
ONE_IMAGE = 0.01  # that is answered otherwise, of 360, or of a client's own classes


@pytest.mark.slow
def test_a_tiny_image_run_is_the_stored_one():
    """To 1e-4, not bitwise: sums are rounded otherwise on other machines."""
    run = fedmoe_jax.run(make_config(**CONFIG))
    assert run.rows["expert_load"].tolist() == LOAD
    for name, values in NUMBERS.items():
        np.testing.assert_allclose(run.rows[name], values, rtol=1e-4, err_msg=name)
    for name, values in ACCURACIES.items():
        found = run.rows[name][[3, 7]]
        np.testing.assert_allclose(found, values, atol=ONE_IMAGE, err_msg=name)
    for part, total in PARAMS.items():
        leaves = jax.tree.leaves(run.params[part])
        found = sum(np.abs(leaf).sum(dtype=float) for leaf in leaves)
        np.testing.assert_allclose(found, total, rtol=1e-4, err_msg=part)
