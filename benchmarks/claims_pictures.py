"""Pictures of stored numbers, each of which knows the numbers that it shows."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from fedmoe_jax.report.plots import DPI, STYLE

NOTE = "Description"  # a text of a PNG file


class Drawing(NamedTuple):
    """A picture that is to be.

    Attributes:
      note: all that it says, as the text by which it is known.
      draw: makes it.
    """

    note: str
    draw: Callable[[], Figure]


def is_drawn(path: Path, drawing: Drawing | None) -> bool:
    """Whether a file says what this picture does; none does where none should be."""
    if drawing is None:
        return False
    try:
        with Image.open(path) as picture:
            return picture.info.get(NOTE) == drawing.note
    except OSError:  # there is none, or it is damaged
        return False


@rc_context(STYLE)
def save_drawing(path: Path, drawing: Drawing) -> None:
    """Draws a picture, with its note inside."""
    drawing.draw().savefig(path, dpi=DPI, metadata={NOTE: drawing.note})
