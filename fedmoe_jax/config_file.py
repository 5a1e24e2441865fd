"""A config's file on the command line: `FILE`, or `FILE:ARGUMENT`."""

import inspect
import os
import runpy
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from fedmoe_jax.options import UserError


def split_config(text: str) -> tuple[str, ...]:
    """`FILE` or `FILE:ARGUMENT` in its parts; a file that is there may have colons."""
    places = [at for at, letter in enumerate(text) if letter == ":"]
    if Path(text).is_file() or not places:
        return (text,)
    files = (at for at in reversed(places) if Path(text[:at]).is_file())
    at = next(files, places[0])
    return text[:at], text[at + 1 :]


def call_config(file: str, words: list[str]) -> Any:
    """The result of `get_config` of a file, with the argument if there is one.

    Raises:
      UserError: it has none, takes no argument, or refuses this one.
    """
    names: dict[str, Any] = runpy.run_path(file, run_name="config_config")
    if "get_config" not in names:
        raise UserError(f"config={file} has no get_config; allowed: one that has")
    if words and not inspect.signature(names["get_config"]).parameters:
        raise UserError(
            f"config={file}:{words[0]} has an argument; allowed: none, as get_config "
            f"of {file} takes none"
        )
    try:
        return names["get_config"](*words)
    except ValueError as error:
        text = " ".join(str(error).split())
        if "allowed:" not in text:  # a fault in the file, and no refusal of its own
            raise
        raise UserError(text) from None


def describe_fault(file: str, error: Exception) -> str:
    """An error in a config's own code on one line, with its place in the file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    lines += [getattr(error, "lineno", None)]  # of a syntax error
    place = f" in line {lines[0]}" if lines[0] else ""
    text = " ".join(str(error).split())
    return (
        f"config={file} ends in {type(error).__name__}{place} ({text}); allowed: a "
        "file whose get_config returns a ConfigDict"
    )


class ConfigFile(flags.ArgumentParser):
    """Loads a config's file; ml_collections' own parser takes no colon in its path."""

    def parse(self, argument: str) -> ConfigDict:
        """The locked config of `FILE[:ARGUMENT]`.

        Raises:
          UserError: there is no such file, it has no `get_config`, or that refuses the
            argument with a ValueError, ends in another error or returns something else.
        """
        file, *words = split_config(os.path.expanduser(argument))
        if not Path(file).is_file():
            raise UserError(
                f"config={argument} is no file; allowed: FILE or FILE:ARGUMENT, a "
                "Python file with get_config such as configs/default.py"
            )
        try:
            config = call_config(file, words)
        except (UserError, SystemExit):
            raise
        except Exception as error:
            raise UserError(describe_fault(file, error)) from None
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"config={file} returns a {type(config).__name__} from get_config; "
                "allowed: a ConfigDict"
            )
        return config.lock()
