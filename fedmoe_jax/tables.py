"""The tables of records, and the modules from outside that have joined them.

Nothing here imports JAX before `find_tables` is called, so that the defaults can be
read without it.
"""

import importlib
from typing import Any, NamedTuple

# Every table that plug-ins can add to, by its module and its name there.
TABLES = (
    ("fedmoe_jax.data.load", "DATASETS"),
    ("fedmoe_jax.tasks", "TASKS"),
    ("fedmoe_jax.models", "MODELS"),
    ("fedmoe_jax.strategies", "STRATEGIES"),
    ("fedmoe_jax.world", "PROCESSES"),
    ("fedmoe_jax.measures", "MEASURES"),
)


class Plugin(NamedTuple):
    """The records and config fields of one module.

    Attributes:
      records: the names of its records, by table.
      defaults: of the config fields that are its own, by dotted name.
    """

    records: dict[str, tuple[str, ...]]
    defaults: dict[str, Any]


PLUGINS: dict[str, Plugin] = {}  # by the name of the module, in the order of joining


def find_tables() -> dict[str, dict[str, Any]]:
    """Every table that plug-ins can add to, by its name: name of a record -> record."""
    return {
        name: getattr(importlib.import_module(module), name) for module, name in TABLES
    }


def list_plugins() -> tuple[str, ...]:
    """The names of the modules that have joined."""
    return tuple(PLUGINS)


def list_defaults() -> dict[str, Any]:
    """The defaults of the plug-ins' config fields, by dotted name."""
    return {
        name: value
        for plugin in PLUGINS.values()
        for name, value in plugin.defaults.items()
    }
