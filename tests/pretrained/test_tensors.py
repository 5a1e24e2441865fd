"""Names, shapes and places of the tensors of a checkpoint."""

import numpy as np
import pytest
from checkpoints import FAMILIES, make_config, make_tensors

from fedmoe_jax.pretrained.architecture import make_architecture
from fedmoe_jax.pretrained.tensors import list_tensors, walk


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_one_place_and_comes_back(family):
    config = make_config(family)
    tensors = make_tensors(config, family)
    arch = make_architecture(config, "")
    listed = [name for tensor in walk(list_tensors(arch)) for name in tensor.names]
    assert sorted(listed) == sorted(tensors)
    for tensor in walk(list_tensors(arch)):
        for name in tensor.names:
            there = tensor.convert(tensors[name])
            assert there.shape == tensor.shape
            np.testing.assert_array_equal(tensor.restore(there), tensors[name])
