"""Markov languages: their known limit, and texts that follow their own law."""

import numpy as np
from factories import make_options

from fedmoe_jax.data import markov


def test_find_stationary_by_hand():
    # Into the first letter with 1/2, out of it with 1/4: twice as often there.
    transitions = np.array([[0.75, 0.25], [0.5, 0.5]])
    np.testing.assert_allclose(markov.find_stationary(transitions), [2 / 3, 1 / 3])


def test_entropy_rates_are_those_of_the_texts():
    data = markov.load_markov(make_options(length=1))
    transitions, rates = draws = markov.draw_transitions(), markov.entropy_rates()
    assert all(np.isfinite(each).all() for each in draws)
    for language, rate in enumerate(rates):
        pairs = data.train["tokens"][data.stratum == language]
        bits = -np.log2(transitions[language][pairs[:, 0], pairs[:, 1]])
        assert len(bits) == markov.WRITERS * (markov.TRAIN - 1)
        assert abs(bits.mean() - rate) < 4 * bits.std() / np.sqrt(len(bits))
        others = np.delete(np.arange(markov.LANGUAGES), language)
        for other in others:  # another language's model needs more by far
            wrong = -np.log2(transitions[other][pairs[:, 0], pairs[:, 1]])
            assert wrong.mean() > rate + 0.5


def test_find_limit_weighs_languages_by_their_letters():
    rates, text = markov.entropy_rates(), ([0, 1, 1], [4, 2, 2])
    limit = markov.find_limit(*map(np.array, text))  # 3 letters of one, 2 of another
    np.testing.assert_allclose(limit, (3 * rates[0] + 2 * rates[1]) / 5)
    data = markov.load_markov(make_options(length=32))
    assert data.limit is not None  # there is as much text of every language
    np.testing.assert_allclose(data.limit, rates.mean())


def test_load_markov_is_always_the_same():
    first, again = (markov.load_markov(make_options(length=32)) for _ in range(2))
    np.testing.assert_array_equal(first.train["tokens"], again.train["tokens"])
    assert first.stratum_names == tuple(f"language{i}" for i in range(4))
    assert np.unique(first.owner).tolist() == list(range(8))
    assert (first.stratum == first.owner // markov.WRITERS).all()
