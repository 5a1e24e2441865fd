"""Mixtures, needed pairs and views of clients, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_align, make_data, make_federation, make_program

from fedmoe_jax.base import Route, Scores
from fedmoe_jax.evaluation.scoring import (
    Answers,
    ClientView,
    Encoded,
    Examples,
    Models,
    count_values,
    divide_bits,
    find_needed,
    list_values,
    read_answers,
    score_mixture,
    sum_strata,
    view_clients,
)
from fedmoe_jax.types import SimState
from fedmoe_jax.world.participation import init_participation

PROGRAM = make_program(make_data(2))


def make_examples(labels):
    """Examples of two classes, which are the strata too; -1 for padding."""
    y = jnp.array(labels)
    return Examples({"y": y}, jax.nn.one_hot(y, 2), y >= 0)


@pytest.mark.parametrize(
    ("shape", "weight", "expected"),
    [
        ((3,), None, [1.0 + 2.0, 4.0]),
        ((3,), [1.0, 0.0, 3.0], [1.0, 12.0]),
        ((3, 2), None, [1.0 + 2.0 + 4.0 + 8.0, 16.0 + 32.0]),
        ((3, 2), [1.0, 0.0, 3.0, 0.0, 0.0, 1.0], [1.0 + 12.0, 32.0]),
    ],
)
def test_sum_strata_by_hand(shape, weight, expected):
    """Powers of two in three examples, of one position or two."""
    values = 2.0 ** jnp.arange(np.prod(shape)).reshape(shape)
    if weight:
        weight = jnp.array(weight).reshape(shape)
    stratum = make_examples([0, 0, 1]).stratum
    found = sum_strata(values, Scores(values, values, weight), stratum)
    assert found.tolist() == expected


def test_divide_bits_gives_those_of_a_byte():
    values = jnp.array([[0.5, 6.0, 4.0], [0.25, 3.0, 0.0]])
    found = divide_bits(values)
    assert found[0].tolist() == [0.5, 1.5] and found[1, 0] == 0.25
    for fewer in (values[:, :1], values[:, :2], values[0, :2]):
        assert divide_bits(fewer) is fewer


def test_list_values_by_hand():
    one, two = jnp.ones(2), 2 * jnp.ones(2)
    texts = PROGRAM._replace(task=PROGRAM.task._replace(bits=True))
    for program, scores, expected in (
        (PROGRAM, Scores(one, two, bytes=one), [2.0]),
        (texts, Scores(jnp.log(4.0) * one, one), [1.0, 2.0]),
        (texts, Scores(jnp.log(4.0) * one, one, bytes=3 * one), [1.0, 2.0, 3.0]),
    ):
        found = [float(each[0]) for each in list_values(scores, program)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert count_values(program._replace(scores=scores)) == len(expected)


def test_score_mixture_by_hand():
    gates = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    answers = jnp.array([[[4.0, 0.0], [0.0, 3.0]]] * 3)
    examples = make_examples([0, 1, -1])
    # The first is right (2.0 against 1.5), the second wrong, the third is padding.
    found = score_mixture(gates, Answers(answers), examples, PROGRAM)
    assert found.tolist() == [[1.0, 0.0]]  # one value: accuracy


def test_score_mixture_gives_the_head_what_gates_leave():
    gates = jnp.array([[0.25, 0.25], [0.5, 1.5]])
    each = jnp.array([[[4.0, 0.0], [0.0, 3.0]]] * 2)
    answers = Answers(each, jnp.array([0.0, 1.0]))
    # 1.0 against 0.75 + 0.5; and 2.0 against 4.5 less 1.0.
    for labels, right in (([0, 0], [0.0, 0.0]), ([1, 1], [0.0, 2.0])):
        found = score_mixture(gates, answers, make_examples(labels), PROGRAM)
        assert found.tolist() == [right]


def test_read_answers_of_probabilities_are_their_logarithms():
    strategy = PROGRAM.strategy._replace(mix="probabilities")
    odds = jnp.array([0.25, 0.75])
    found = read_answers(odds, PROGRAM._replace(strategy=strategy))
    np.testing.assert_allclose(found, np.log([0.25, 0.75]), rtol=1e-6)
    assert read_answers(odds, PROGRAM) is odds


def test_find_needed_by_hand():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0]] * 3)
    clients = ClientView(
        personal={},
        held=jnp.array([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]], bool),
        wanted=jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    )
    models = Models(clients, jnp.int32(2))  # the third row is none
    features = jnp.zeros((3, 1))
    encoded = Encoded(make_examples([0, 1, -1]), features, features, logits)
    need = find_needed(encoded, models, Route(1))
    # Expert 0 is the server's choice, 2 the first client's for its label 0, 1 the
    # second's for its label 1; expert 3 and padding are never needed.
    assert need.astype(int).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_find_needed_sees_the_bias_of_each_client():
    """Of the second and third expert the first client would choose the second."""
    clients = ClientView(
        personal={},
        held=jnp.array([[0, 1, 1, 0], [0, 1, 1, 0]], bool),
        wanted=jnp.ones((2, 2)),
        bias=jnp.array([[0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 1.5, 0.0]]),
    )
    features, logits = jnp.zeros((1, 1)), jnp.array([[3.0, 2.0, 1.0, 0.0]])
    encoded = Encoded(make_examples([0]), features, features, logits)
    need = lambda count: find_needed(encoded, Models(clients, count), Route(1))
    assert need(jnp.int32(1)).astype(int).tolist() == [[1, 1, 0, 0]]
    assert need(jnp.int32(2)).astype(int).tolist() == [[1, 1, 1, 0]]


def view(held, mix, rounds, bias=None):
    held = jnp.array(held, bool)[:, None]
    fields = dict.fromkeys(SimState.__dataclass_fields__) | {"personal": {}}
    align = make_align(len(held), held.shape[2], held=held)
    sizes = PROGRAM.sizes._replace(num_clients=len(held))
    took_part = init_participation(sizes).replace(rounds=jnp.array(rounds))
    state = SimState(**fields | {"align": align, "participation": took_part})
    return view_clients(state, make_federation(label_mix=jnp.array(mix)), bias)


def test_view_clients_lets_those_without_experts_use_all():
    """The second holds nothing, and no update of the third has counted."""
    mix = [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    clients = view([[0, 1, 0], [0, 0, 0], [0, 1, 0]], mix, [1, 1, 0])
    assert clients.held[:, 0].tolist() == [[False, True, False], [True] * 3, [True] * 3]
    assert clients.wanted.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_view_clients_lets_those_without_experts_have_no_bias():
    mix = [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    bias = jnp.arange(1.0, 10).reshape(3, 1, 3)
    clients = view([[0, 1, 1], [0, 0, 0], [0, 1, 0]], mix, [1, 1, 0], bias)
    assert clients.bias[:, 0].tolist() == [[0, 2, 3], [0, 0, 0], [0, 0, 0]]


def test_view_clients_of_pooled_data_is_one_with_all_strata():
    clients = view([[1]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [1])
    assert clients.held.shape == (1, 1, 1) and clients.wanted.tolist() == [[1, 0, 1]]
