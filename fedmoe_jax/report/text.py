"""Text of users, such as names of tiers and changes, on its way to a reader."""

import re

MOST_LETTERS = 60  # of a name in a picture or in the progress


def one_line(text: str) -> str:
    """The text without line ends, control characters and halves of surrogate pairs."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shorten(text: str, most: int = MOST_LETTERS) -> str:
    """The text on one line of at most `most` letters, cut in the middle.

    Names that grow with every changed field differ at their ends, too.
    """
    text = one_line(text)
    head = (most - 3) // 2
    return text if len(text) <= most else f"{text[:head]}...{text[head + 3 - most :]}"


def escape_markdown(text: str) -> str:
    """The text on one line, to be read in Markdown as it is, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|$~#&])", r"\\\1", one_line(text))


def quote_markdown(text: str) -> str:
    """The text on one line as Markdown's code, also in a table."""
    text = one_line(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
