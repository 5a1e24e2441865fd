"""The settings of JAX on which a run's numbers depend, whoever made them."""

import jax

from fedmoe_jax.options import UserError

# Settings that change every draw or the precision of every number, as JAX has them.
DEFAULTS = {
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
}


def read_settings() -> dict[str, bool | str | None]:
    """The settings of this process, by name."""
    return {name: getattr(jax.config, name) for name in DEFAULTS}


def describe_settings() -> str:
    """The settings that are not JAX's own, on one line; empty where all are."""
    changed = read_settings().items() - DEFAULTS.items()
    return " ".join(f"{name}={value}" for name, value in sorted(changed))


def check_settings(saved: dict, where: str) -> None:
    """Checks that this process computes as the one that saved a state.

    Args:
      saved: settings by name; of those it lacks nothing is known.
      where: the state, for the message.

    Raises:
      UserError: a setting differs.
    """
    for name, now in read_settings().items():
        was = saved.get(name, now)
        if was != now:
            raise UserError(
                f"{name}={now} is not allowed, as {where} was computed with {was}; "
                f"allowed: {name.upper()}={was} in the environment, or another workdir"
            )
