"""One load-balanced run on CIFAR-10: 20 clients, Dirichlet(0.1), 8 experts.

    python launch.py --config=configs/cifar10.py --workdir=DIR

CIFAR-10 is read through TFDS from TFDS_DATA_DIR. The argument `smoke` makes it short.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    """The CIFAR-10 run. `argument` is empty or `smoke`."""
    config = default.get_config(argument)
    config.data.name = "cifar10"
    config.model.stem = "cnn"
    config.model.stem_width = 32
    config.model.expert_width = 128
    config.client.learning_rate, config.client.clip = 0.03, 1.0
    config.devices.model_scale = 130.0
    if not argument:
        config.local_steps = 30
        config.eval_every, config.chunk_rounds = 2, 1
    return config
