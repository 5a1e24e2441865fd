"""The settings of JAX on which a run's numbers depend, whoever made them."""

import enum

import jax

from fedmoe_jax.options import UserError

# Settings that change draws, the form or precision of arithmetic, or how far XLA may
# rearrange it, as JAX has them.
DEFAULTS = {
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_default_matmul_precision": None,
    "jax_softmax_custom_jvp": False,
    "jax_use_direct_linearize": True,
    "jax_scan3": False,
    "jax_use_shardy_partitioner": True,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
}

Setting = bool | int | float | str | None


def read_settings() -> dict[str, Setting]:
    """The settings of this process, by name; those that its JAX has."""
    values = jax.config.values
    known = {name: values[name] for name in DEFAULTS if name in values}
    return {
        name: value.name.lower() if isinstance(value, enum.Enum) else value
        for name, value in known.items()
    }


def describe_settings() -> str:
    """The settings that are not JAX's own, on one line; empty where all are."""
    changed = read_settings().items() - DEFAULTS.items()
    return " ".join(f"{name}={value}" for name, value in sorted(changed))


def tell_settings() -> None:
    """Prints the settings that are not JAX's own, where there are any."""
    if settings := describe_settings():
        print(f"JAX is set to other numbers than usual: {settings}", flush=True)


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
            usual = was == DEFAULTS[name]
            variable = name.upper()
            allowed = f"no {variable}" if usual else f"{variable}={was}"
            raise UserError(
                f"{name}={now} is not allowed, as {where} was computed with {was}; "
                f"allowed: {allowed} in the environment, or another workdir"
            )
