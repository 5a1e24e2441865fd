"""The distinct rows of a bool array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmoe_jax.evaluation.distinct import WORD, find_distinct, keep_apart, pack_bits


def test_pack_bits_by_hand():
    rows = jnp.zeros((2, WORD + 2), bool).at[0, 0].set(True).at[1, WORD + 1].set(True)
    rows = rows.at[1, 3].set(True)
    assert pack_bits(rows).tolist() == [[1, 0], [8, 2]]


@pytest.mark.parametrize("shape", [(40, 1, 3), (40, 2, WORD), (40, WORD + 1)])
def test_find_distinct_is_numpys_unique(shape):
    rng = np.random.default_rng(0)
    rows = rng.random(shape) < 0.5
    rows = rows[rng.integers(0, 12, len(rows))]
    found = jax.jit(find_distinct)(jnp.asarray(rows))
    assert found.count == len(np.unique(rows, axis=0)) <= 12
    np.testing.assert_array_equal(rows[found.first][found.kind], rows)
    firsts = rows[found.first[: int(found.count)]]
    assert len(np.unique(firsts, axis=0)) == found.count


def test_keep_apart_shares_no_row():
    found = keep_apart(3)
    assert found.first.tolist() == found.kind.tolist() == [0, 1, 2]
    assert found.count == 3
