"""From text to tokens: bytes, or those of a tokenizer that the user names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import brief
from fedmoe_jax.runtime.folders import resolve_folder


class Tokens(NamedTuple):
    """A text in tokens.

    Attributes:
      ids: [n] unsigned, in [0, vocabulary).
      bytes: [n] int >= 0, bytes of the text that each stands for; they sum to all of
        it. None for one each.
      exact: whether all letters of the text can be read from them.
    """

    ids: np.ndarray
    bytes: np.ndarray | None = None
    exact: bool = True


class Coder(NamedTuple):
    """How texts become tokens.

    Attributes:
      vocabulary: number of tokens.
      check: (text, its place for messages) -> None; raises UserError where the text
        cannot be encoded.
      cut: (text, place) -> the last place up to this one where it can be divided.
      encode: a text that `check` has passed -> its tokens.
    """

    vocabulary: int
    check: Callable[[bytes, str], None]
    cut: Callable[[bytes, int], int]
    encode: Callable[[bytes], Tokens]


BYTES = Coder(
    vocabulary=256,
    check=lambda text, where: None,
    cut=lambda text, place: place,
    encode=lambda text: Tokens(np.frombuffer(text, np.uint8)),
)


def load_coder(options: ConfigDict) -> Coder:
    """The tokenizer of the file `options.tokenizer`, bytes where it is empty.

    Args:
      options: the config's group `data`.

    Raises:
      UserError: the package `tokenizers` is not installed, or the file is none of its.
    """
    if not options.tokenizer:
        return BYTES
    tokenizer = read_tokenizer(options.tokenizer)
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=0)
    return Coder(
        vocabulary=vocabulary,
        check=check_utf8,
        cut=find_start,
        encode=lambda text: encode(tokenizer, text, np.min_scalar_type(vocabulary - 1)),
    )


def read_tokenizer(file: str) -> Any:
    """The tokenizer of a file, without its own padding and truncation.

    Raises:
      UserError: see `load_coder`.
    """
    fault = f"data.tokenizer={file!r} is not allowed"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError(
            f"{fault} without the package tokenizers; allowed: '', or after "
            "'pip install tokenizers' its file tokenizer.json"
        ) from None
    path = resolve_folder("data.tokenizer", file)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The package raises bare exceptions.
    except Exception as error:
        raise UserError(
            f"{fault} ({brief(error)}); allowed: a file tokenizer.json of the package "
            "tokenizers"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_utf8(text: bytes, where: str) -> None:
    """Raises UserError unless the text is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8, as its byte {error.start} shows; allowed: "
            "data.tokenizer='', which takes bytes as tokens, or text in UTF-8"
        ) from None


def find_start(text: bytes, place: int) -> int:
    """The first byte of the character that the byte at `place` belongs to."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def encode(tokenizer: Any, text: bytes, kind: np.dtype) -> Tokens:
    """The tokens of a text in UTF-8, without special ones; ids of a dtype."""
    letters = text.decode()
    found = tokenizer.encode(letters, add_special_tokens=False)
    ends = np.array([end for _, end in found.offsets], np.int64)
    ids = np.array(found.ids, np.int64).astype(kind)
    return Tokens(ids, share_bytes(text, ends), is_exact(tokenizer, found, letters))


def share_bytes(text: bytes, ends: np.ndarray) -> np.ndarray:
    """The bytes [n] that each token stands for: those up to its end, each byte once.

    What the tokenizer has left out counts for the token after it, at the end of the
    text for the last one.

    Args:
      text: UTF-8.
      ends: [n] int, characters of the text before the end of each token.
    """
    starts = np.flatnonzero(np.frombuffer(text, np.uint8) & 0xC0 != 0x80)
    reached = np.maximum.accumulate(np.append(starts, len(text))[ends])
    reached[-1:] = len(text)
    return np.diff(reached, prepend=0)


def is_exact(tokenizer: Any, found: Any, letters: str) -> bool:
    """Whether a text can be read from its tokens, but for white space."""
    if tokenizer.decoder is None:
        read = "".join(found.tokens)
    else:
        read = tokenizer.decode(found.ids, skip_special_tokens=False)
    return "".join(read.split()) == "".join(letters.split())
