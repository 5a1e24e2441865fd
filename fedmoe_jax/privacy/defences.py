"""The defences that a config turns on, and whether they fit each other; no JAX."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fedmoe_jax.options import UserError, show

# Numbers that turn a defence on where they are not 0.
DEFENCES = ("feedback_noise", "selection", "flip", "clip")


def is_private(config: ConfigDict) -> bool:
    """Whether a config has any defence, or noise that belongs to one."""
    return any(config.privacy[name] > 0 for name in (*DEFENCES, "noise"))


def find_flags(config: ConfigDict, silent: bool) -> dict[str, bool]:
    """The defences that shape a program, by the names of their numbers.

    Args:
      config: of the run.
      silent: whether nothing travels between clients and server; then there is nothing
        to defend.
    """
    return {
        f"privacy.{name}": config.privacy[name] > 0 and not silent
        for name in (*DEFENCES, "noise")
    }


def check_privacy(values: Mapping[str, Any]) -> None:
    """Checks that the defences of a config fit each other.

    Args:
      values: all fields by dotted name, each allowed by itself.

    Raises:
      UserError: noise on sums of updates without a bound, weights by loss of updates
        with one, or a delta that would allow the data of a whole client to be
        published.
    """
    noise, clip = values["privacy.noise"], values["privacy.clip"]
    if noise > 0 and not clip > 0:
        raise UserError(
            f"privacy.noise={show(noise)} is not allowed with privacy.clip="
            f"{show(clip)}, as updates without a bound have no sensitivity; allowed: "
            "0, or privacy.clip > 0"
        )
    power = values["fairness.power"]
    if clip > 0 and power > 0:
        raise UserError(
            f"fairness.power={show(power)} is not allowed with privacy.clip="
            f"{show(clip)}, which bounds updates that weigh alike; allowed: 0"
        )
    delta, clients = values["privacy.delta"], values["num_clients"]
    on = [name for name in DEFENCES if values[f"privacy.{name}"] > 0]
    if on and delta * clients >= 1:
        raise UserError(
            f"privacy.delta={show(delta)} is not allowed with privacy.{on[0]}="
            f"{show(values[f'privacy.{on[0]}'])} and num_clients={clients}, as one "
            "client's data could be published; allowed: less than 1 / num_clients = "
            f"{1 / clients:.3g}"
        )
