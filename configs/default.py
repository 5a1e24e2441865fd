"""Every default of the project, and the run on digits: see `fedmoe_jax.configs`."""

from fedmoe_jax.configs.default import get_config, shrink

__all__ = ["get_config", "shrink"]
