"""Text as windows of tokens: what a client trains on, and what it is tested on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.tokens import Tokens
from fedmoe_jax.options import UserError


class Document(NamedTuple):
    """The text of one client.

    Attributes:
      client: its name.
      stratum: its language, topic or whatever else the partition skews.
      train: n tokens.
      test: m tokens.
    """

    client: str
    stratum: str
    train: Tokens
    test: Tokens


def cut_windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that share their first and last token, so that each is a target once.

    Args:
      tokens: [n] int, n >= 2, or one number of each.
      length: P, targets of a window.

    Returns:
      [X, P + 1], zeros beyond the end of the last, and lengths [X] int32, >= 2.
    """
    count = -(-(len(tokens) - 1) // length)
    padded = np.zeros(count * length + 1, tokens.dtype)
    padded[: len(tokens)] = tokens
    start = length * np.arange(count)[:, None]
    sizes = np.minimum(len(tokens) - start[:, 0], length + 1)
    return padded[start + np.arange(length + 1)], sizes.astype(np.int32)


def join_windows(
    texts: Sequence[Tokens], length: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The windows of several texts, and each one's text [X].

    They are `tokens` and `length` and, where tokens are not one byte each, the `bytes`
    [X, P + 1] int32 of every token.
    """
    cut = [cut_windows(text.ids, length) for text in texts if len(text.ids) > 1]
    places = [place for place, text in enumerate(texts) if len(text.ids) > 1]
    rows = {
        "tokens": np.concatenate([tokens for tokens, _ in cut]),
        "length": np.concatenate([sizes for _, sizes in cut]),
    }
    sizes = [text.bytes for text in texts if text.bytes is not None]
    if sizes:
        windows = [cut_windows(each, length)[0] for each in sizes if len(each) > 1]
        rows["bytes"] = np.concatenate(windows).astype(np.int32)
    return rows, np.repeat(places, [len(sizes) for _, sizes in cut])


def note_losses(documents: Sequence[Document]) -> tuple[str, ...]:
    """A note where letters of texts are lost: their bits are of less than the text."""
    texts = [text for each in documents for text in (each.train, each.test)]
    lost = sum(not text.exact for text in texts)
    if not lost:
        return ()
    note = (
        f"warning: {lost} of {len(texts)} texts cannot be read from their tokens "
        "(unknown words, lower case, a tokenizer without a decoder, ...), so that "
        "their bits of a byte may be too low"
    )
    return (note,)


def make_text(
    documents: Sequence[Document], length: int, vocabulary: int, where: str
) -> Data:
    """`Data` of the task `text`; clients are natural, with own test windows.

    Args:
      documents: of all clients.
      length: P.
      vocabulary: tokens.
      where: the data, for messages.

    Raises:
      UserError: no client has a window's text to train on, or one has no text.
    """
    if not documents:
        raise UserError(f"{where} has no client; allowed: at least one, with text")
    for each in documents:
        counts = len(each.train.ids), len(each.test.ids)
        if min(counts) < 2:
            raise UserError(
                f"{where} has the client {each.client!r} with {counts[0]} tokens to "
                f"train on and {counts[1]} to test; allowed: at least 2 of both"
            )
    longest = max(len(each.train.ids) for each in documents)
    if longest <= length:
        raise UserError(
            f"data.length={length} is not allowed with {where}, whose longest client "
            f"has {longest} tokens to train on; allowed: 1 to {longest - 1}"
        )
    names = tuple(dict.fromkeys(each.stratum for each in documents))
    stratum = np.array([names.index(each.stratum) for each in documents], np.int32)
    train, owner = join_windows([each.train for each in documents], length)
    test, test_owner = join_windows([each.test for each in documents], length)
    return Data(
        train=train,
        test=test,
        stratum=stratum[owner],
        test_stratum=stratum[test_owner],
        stratum_names=names,
        task="text",
        owner=owner,
        test_owner=test_owner,
        vocabulary=vocabulary,
        notes=note_losses(documents),
    )
