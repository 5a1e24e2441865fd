"""Languages as Markov sources over one alphabet, so that the right answers are known.

Every language has transitions of its own between the same letters, so that a text shows
its language in pairs of letters alone. The bits that a letter needs, on average, when
the language is known are its entropy rate: the limit of every model. A client is served
best by the expert of its language.
"""

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.tokens import Tokens
from fedmoe_jax.data.windows import Document, make_text

LANGUAGES = 4
LETTERS = 12
SKEW = 2.5  # standard deviation of the log-odds of a transition
WRITERS = 2  # clients of each language
TRAIN, TEST = 4_000, 1_000  # letters of each


def draw_transitions() -> np.ndarray:
    """[languages, letters, letters] float64, rows sum to 1; always the same."""
    rng = np.random.default_rng(0)
    odds = np.exp(SKEW * rng.normal(size=(LANGUAGES, LETTERS, LETTERS)))
    return odds / odds.sum(axis=2, keepdims=True)


def find_stationary(transitions: np.ndarray) -> np.ndarray:
    """The share of each letter [letters] in an endless text."""
    excess = transitions.T - np.eye(len(transitions))
    system = np.concatenate([excess, np.ones((1, len(transitions)))])
    sums = np.append(np.zeros(len(transitions)), 1.0)
    return np.linalg.lstsq(system, sums, rcond=None)[0]


def entropy_rates() -> np.ndarray:
    """Bits a letter [languages] of each language, known in closed form."""
    transitions = draw_transitions()
    stationary = np.array([find_stationary(each) for each in transitions])
    bits = -(transitions * np.log2(transitions)).sum(axis=2)
    return (stationary * bits).sum(axis=1)


def find_limit(language: np.ndarray, length: np.ndarray) -> float:
    """Bits a letter below which no model comes on windows of text, but for chance.

    Args:
      language: [X] int of each window.
      length: [X] int, its letters, of which all but the first are predicted.
    """
    return float(np.average(entropy_rates()[language], weights=length - 1))


def write_text(
    transitions: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """A text [count] uint8 of one language, from its stationary law on."""
    edges = transitions.cumsum(axis=1)
    letter = rng.choice(len(transitions), p=find_stationary(transitions))
    text = np.zeros(count, np.uint8)
    for place, lot in enumerate(rng.random(count)):
        text[place] = letter
        letter = min(int(np.searchsorted(edges[letter], lot)), len(edges) - 1)
    return text


def load_markov(options: ConfigDict) -> Data:
    """Two clients of each of four languages, with 4,000 letters each, always the same.

    Args:
      options: the config's group `data`; gives `length`.

    Raises:
      UserError: windows are longer than a client's text.
    """
    rng = np.random.default_rng(1)
    documents = []
    for number, transitions in enumerate(draw_transitions()):
        for writer in range(WRITERS):
            text = write_text(transitions, TRAIN + TEST, rng)
            name = f"language{number}"
            client = f"{name} writer{writer}"
            parts = Tokens(text[:TRAIN]), Tokens(text[TRAIN:])
            documents.append(Document(client, name, *parts))
    data = make_text(documents, options.length, LETTERS, "data.name='markov'")
    return data._replace(limit=find_limit(data.test_stratum, data.test["length"]))
