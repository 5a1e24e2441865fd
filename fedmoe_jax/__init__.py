"""Federated mixture-of-experts training in JAX and Flax.

    import fedmoe_jax
    from fedmoe_jax.configs import default

    run = fedmoe_jax.run(default.get_config("smoke"))

A name is imported when it is first used, so that importing the package imports neither
JAX nor a model, and the program can set signals and flags before.
"""

import importlib
from typing import Any

_MODULES = {
    "run": "api",
    "load_run": "api",
    "predict": "api",
    "Run": "api",
    "load_plugins": "plugins",
    "Data": "base",
    "Task": "base",
    "Model": "base",
    "Strategy": "base",
    "Process": "base",
    "Option": "options",
    "Measure": "options",
    "UserError": "options",
}
__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll] see `__getattr__`


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _find_version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _find_version() -> str:
    from fedmoe_jax.version import find_version

    return find_version() or "0+unknown"
