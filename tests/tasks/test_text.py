"""Windows of tokens: targets, weights and scores by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.base import Data
from fedmoe_jax.options import UserError
from fedmoe_jax.tasks.text import TEXT, find_largest


def make_data(tokens, length, vocabulary=5):
    rows = {"tokens": np.array(tokens, np.uint8), "length": np.array(length, np.int32)}
    stratum = np.zeros(len(tokens), np.int32)
    return Data(rows, rows, stratum, stratum, ("a",), "text", vocabulary=vocabulary)


def test_prepare_predicts_every_token_after_the_first():
    data = make_data([[1, 2, 3, 4], [4, 3, 0, 0]], [4, 2])
    batch = TEXT.prepare(
        {name: jnp.asarray(x) for name, x in data.train.items()}, TEXT.statistics(data)
    )
    assert batch["tokens"].tolist() == [[1, 2, 3], [4, 3, 0]]
    assert batch["target"].tolist() == [[2, 3, 4], [3, 0, 0]]
    assert batch["weight"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["tokens"].dtype == batch["target"].dtype == jnp.int32


def test_bytes_are_those_of_the_targets():
    rows = {"tokens": jnp.array([[1, 2, 3]]), "length": jnp.array([3])}
    batch = TEXT.prepare(rows | {"bytes": jnp.array([[9, 4, 2]])}, {})
    assert batch["bytes"].tolist() == [[4, 2]]
    scores = TEXT.loss(jnp.zeros((1, 2, 5)), batch)
    assert scores.bytes is batch["bytes"]
    assert TEXT.loss(jnp.zeros((1, 2, 5)), TEXT.prepare(rows, {})).bytes is None


def test_loss_is_nats_and_accuracy_of_every_position():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    batch = {"target": jnp.array([[1, 2]]), "weight": jnp.array([[1.0, 0.0]])}
    scores = TEXT.loss(logits, batch)
    np.testing.assert_allclose(scores.loss, [[np.log(4), -np.log(0.8)]], rtol=1e-6)
    assert scores.score.tolist() == [[0, 1]] and scores.weight is batch["weight"]


def test_the_largest_logit_is_that_of_argmax_even_where_several_are():
    logits = np.random.default_rng(0).integers(-3, 3, (4, 50, 7)).astype(np.float32)
    np.testing.assert_array_equal(find_largest(logits), logits.argmax(-1))
    assert find_largest(jnp.array([1.0, jnp.nan])) == 2


def test_the_vocabulary_is_the_width_of_the_outputs():
    assert TEXT.num_outputs(make_data([[1, 2]], [2])) == 5
    assert TEXT.add_prior is None


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (make_data([[1, 5]], [2]), "train tokens from 1 to 5; allowed: 0 to .*=5"),
        (make_data([[1, 2]], [2], None), "vocabulary=None"),
        (make_data([[1]], [1]), r"train\['tokens'\] uint8\[1, 1\]"),
        (
            make_data([[1, 2]], [2])._replace(train={"x": np.zeros(3)}),
            "leaves x; allowed: whole numbers",
        ),
    ],
)
def test_statistics_refuse_other_rows_in_one_line(data, told):
    with pytest.raises(UserError, match=told) as error:
        TEXT.statistics(data)
    assert "\n" not in str(error.value)
