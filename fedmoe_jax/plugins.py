"""Records from outside the package, which join its tables: `--plugins=my_module`.

A plug-in is a module that defines tables of the package's own names, such as
`STRATEGIES = {"mine": MINE}`. Its strategies and processes carry their own config
fields, with defaults (`Option.default`), and these join the config.
"""

import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from fedmoe_jax.measures import check_measure
from fedmoe_jax.options import Option, UserError
from fedmoe_jax.runtime.files import brief
from fedmoe_jax.tables import PLUGINS, Plugin, find_tables

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
FIELD = re.compile(r"[a-z]\w*(\.[a-z]\w*)?")


def load_plugins(*modules: str) -> None:
    """Imports modules and joins their records to the package's tables.

    A config that is made afterwards has their fields. A module that has joined before
    joins anew, at its place: its file is read again, and in a notebook
    `load_plugins("__main__")` takes what the cells define.

    Args:
      *modules: as in an `import` statement.

    Raises:
      UserError: there is no such module, it cannot be imported, it defines no table, or
        it defines a record or a config field of a name that is taken.
    """
    imported = {name: _import(name) for name in modules}
    before, tables = dict(PLUGINS), find_tables()
    rows = {name: dict(table) for name, table in tables.items()}
    try:
        for name in before:
            leave(name)
        for name in dict.fromkeys([*before, *imported]):  # each keeps its place
            _join(name, imported.get(name) or sys.modules[name])
    except UserError:
        _replace(PLUGINS, before)
        for name, table in tables.items():
            _replace(table, rows[name])
        raise


def _replace(table: dict, rows: dict) -> None:
    table.clear()
    table.update(rows)


def _import(name: str) -> Any:
    file = not isinstance(name, str) or name.endswith(".py")
    if file or not MODULE.fullmatch(name):
        raise UserError(
            f"--plugins: {name!r} is no name of a module; allowed: my_module, without "
            "folder and .py, and each by itself: load_plugins('one', 'other')"
        )
    try:
        module = importlib.import_module(name)
        file = name in PLUGINS and getattr(module, "__file__", None)
        return importlib.reload(module) if file and name != "__main__" else module
    except UserError:
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UserError(
                f"--plugins: there is no module {name!r}; allowed: names of modules in "
                "the current folder, in PYTHONPATH or installed"
            ) from None
        raise UserError(
            f"--plugins: {name!r} cannot be imported ({place_error(error)}); allowed: "
            f"a module that 'python -c \"import {name}\"' imports"
        ) from error


def place_error(error: Exception) -> str:
    """An exception of a module's own code, with the line where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "importlib" not in frame.filename]
    where = f"{own[0].filename}, line {own[0].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {brief(error)}"


def leave(name: str) -> None:
    """Takes the records of a module out of the tables again, if it has joined."""
    tables = find_tables()
    for table, records in PLUGINS.pop(name, Plugin({}, {})).records.items():
        for record in records:
            del tables[table][record]


def _join(name: str, module: Any) -> None:
    from fedmoe_jax.config import list_options  # imports JAX

    tables, fields = find_tables(), list_options()
    own = {
        table: getattr(module, table)
        for table in tables
        if getattr(module, table, tables[table]) is not tables[table]
    }
    if not own:
        raise UserError(
            f"--plugins: {name} defines no table; allowed: {', '.join(tables)}, "
            "each a dict of names and records"
        )
    for table, records in own.items():
        _check_names(f"--plugins: {table} of {name}", records, tables[table])
    for key, measure in own.get("MEASURES", {}).items():
        check_measure(key, measure)
    options = [
        option
        for records in own.values()
        for record in records.values()
        for option in getattr(record, "options", ())
    ]
    defaults = _take_defaults(f"--plugins: {name}", options, fields)
    for table, records in own.items():
        tables[table].update(records)
    names = {table: tuple(records) for table, records in own.items()}
    PLUGINS[name] = Plugin(names, defaults)


def _check_names(where: str, records: Any, table: Mapping[str, Any]) -> None:
    if not isinstance(records, Mapping):
        raise UserError(
            f"{where} is a {type(records).__name__}; allowed: a dict of names and "
            "records"
        )
    row = next(iter(table.values()))
    kind = "a function" if callable(row) else type(row).__name__
    for name, record in records.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where} has {name!r}; allowed: names, as text")
        if name in table:
            raise UserError(
                f"{where} has {name!r}, which is taken; allowed: a name other than "
                f"{', '.join(table)}"
            )
        if not (callable(record) if callable(row) else isinstance(record, type(row))):
            raise UserError(
                f"{where} has {name!r}, a value of type {type(record).__name__}; "
                f"allowed: {kind}"
            )


def _take_defaults(
    where: str, options: Iterable[Option], fields: dict[str, Option]
) -> dict[str, Any]:
    """Defaults of the options that are no fields yet; records may share a field."""
    new: dict[str, Option] = {}
    for option in options:
        name = option.name
        if (fields | new).get(name, option) != option:
            raise UserError(
                f"{where} has the option {name!r}, which is a field of another meaning "
                "already; allowed: a group of its own"
            )
        if name in fields:
            continue
        if not FIELD.fullmatch(name):
            raise UserError(
                f"{where} has the option {name!r}; allowed: names such as mine.rate"
            )
        if option.default is None:
            raise UserError(
                f"{where} has the option {name!r} without a default; allowed: "
                f"Option({name!r}, ..., default=VALUE)"
            )
        if not isinstance(option.default, bool | int | float | str | tuple):
            raise UserError(
                f"{where} has the option {name!r} with a default that is a "
                f"{type(option.default).__name__}; allowed: bool, int, float, str, "
                "tuple"
            )
        new[name] = option
    return {name: option.default for name, option in new.items()}
