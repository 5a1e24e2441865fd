"""The device mesh: one axis, `clients`, for cohorts and test images."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedmoe_jax.types import PyTree, UserError

CLIENTS = "clients"


def build_mesh(num_devices: int) -> Mesh:
    """A mesh of the first `num_devices` devices (0: all) along `clients`.

    Raises:
      UserError: more devices are asked for than there are.
    """
    available = jax.device_count()
    if not 0 <= num_devices <= available:
        raise UserError(
            f"run.num_devices={num_devices} is not allowed; "
            f"allowed: 0 (all) to {available}, the devices of this machine"
        )
    devices = jax.devices()[: num_devices or available]
    # Explicit axes, the default, would not let the model code reshape freely.
    return jax.make_mesh(
        (len(devices),), (CLIENTS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every leaf to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))
