"""The world of the clients: a chain of processes, and what a round costs in it."""

from fedmoe_jax.base import Process
from fedmoe_jax.world.availability import DROPOUT_PROCESS, REACH_PROCESS
from fedmoe_jax.world.busy import BUSY_PROCESS
from fedmoe_jax.world.capacity_bias import BIAS_PROCESS
from fedmoe_jax.world.channel import WIRELESS_PROCESS
from fedmoe_jax.world.device_load import (
    BACKGROUND_PROCESS,
    BANDWIDTH_PROCESS,
    PRESSURE_PROCESS,
)
from fedmoe_jax.world.drift import IMAGES_PROCESS, LABELS_PROCESS
from fedmoe_jax.world.expert_links import LINKS_PROCESS

# In the order in which they apply: the radio channel is no faster than the links that
# other users have left.
PROCESSES: dict[str, Process] = {
    "pressure": PRESSURE_PROCESS,
    "background": BACKGROUND_PROCESS,
    "bandwidth": BANDWIDTH_PROCESS,
    "reach": REACH_PROCESS,
    "bias": BIAS_PROCESS,
    "busy": BUSY_PROCESS,
    "dropout": DROPOUT_PROCESS,
    "wireless": WIRELESS_PROCESS,
    "labels": LABELS_PROCESS,
    "images": IMAGES_PROCESS,
    "expert_links": LINKS_PROCESS,
}
