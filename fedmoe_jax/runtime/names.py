"""Names of folders and files from a user's text, safe on any file system."""

import hashlib
import re

UNSAFE = re.compile(r"^\.+|[^A-Za-z0-9_.=,-]+")
LONGEST = 100  # characters; file systems take 143 or more


def safe_name(text: str, longest: int = LONGEST) -> str:
    """The text where it is safe, else what is safe of it and a digest of all of it.

    Safe are ASCII letters, digits and `_ . = , -` without a dot in front, and no more
    than `longest` characters. Different texts have different names.
    """
    name = UNSAFE.sub("_", text)
    fits = name == text and len(name) <= longest
    return name if fits else add_digest(name, text, longest)


def add_digest(name: str, text: str, longest: int) -> str:
    """A safe name, cut to `longest` with a digest of the text."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name[: longest - 9]}-{digest}"


def caseless_name(text: str, longest: int = LONGEST) -> str:
    """As `safe_name`, with a digest of a text that has capitals.

    Different texts have names that differ where case does not count, and a text has
    its name whatever other texts there are.
    """
    name = safe_name(text, longest)
    plain = name != text or text == text.lower()
    return name if plain else add_digest(name, text, longest)


def distinct_name(text: str, taken: set[str], longest: int = LONGEST) -> str:
    """As `safe_name`, and different from those taken where case does not count.

    Args:
      text: of the user.
      taken: the names so far, in lower case, which it joins.
      longest: characters.
    """
    name = safe_name(text, longest)
    if name.lower() in taken:
        name = add_digest(name, text, longest)
    taken.add(name.lower())
    return name
