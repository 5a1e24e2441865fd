"""Output that fails for no letter, whatever the terminal can show."""

import codecs
import io
import sys

PLAIN = {"±": "+-", "–": "-", "…": "..."}  # of the package's own tables
SPELL = "fedmoe_jax.spell"


def spell(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: letters that an encoding lacks, in ASCII.

    Raises:
      UnicodeError: something else than encoding has failed.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end


def spell_output() -> None:
    """Makes printing replace what the output cannot encode, where it would raise."""
    codecs.register_error(SPELL, spell)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=SPELL)
