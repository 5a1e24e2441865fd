"""Weights of a folder: all of them, in their places, or one clear line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_config, make_tensors, save_checkpoint
from safetensors.numpy import save_file

from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.architecture import read_architecture
from fedmoe_jax.pretrained.weights import (
    check_tensors,
    digest,
    find_tensors,
    list_files,
    read_weights,
)
from fedmoe_jax.runtime.sharding import align


def test_weights_of_several_files_in_bfloat16(tmp_path):
    config = make_config("qwen2_moe")
    tensors = make_tensors(config, "qwen2_moe")
    (tmp_path / "config.json").write_text(json.dumps(config))
    short = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    names = sorted(short)
    for number, own in enumerate((names[:9], names[9:])):
        part = {name: short[name] for name in own}
        save_file(part, tmp_path / f"model-{number}.safetensors")
    arch = read_architecture(tmp_path)
    weights = read_weights(arch, tmp_path, "float32")
    for leaf in jax.tree.leaves(weights):  # a CPU device uses them as they are
        assert np.shares_memory(align(leaf), leaf)
    experts = weights["block000"]["experts"]["up"]
    assert experts.dtype == np.float32 and experts.shape == (4, 16, 12)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    np.testing.assert_array_equal(experts[3], short[name].astype(np.float32).T)


def drop(config, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def shorten(config, tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][1:])


def quantise(config, tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (quantise, "up_proj.weight of type I8; allowed: F64, F32, F16, BF16"),
        (
            drop,
            "has no tensor model.layers.1.mlp.up_proj.weight, which .*; allowed: all",
        ),
        (shorten, r"up_proj.weight of shape \(23, 16\); allowed: \(24, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, told, tmp_path):
    folder = save_checkpoint(tmp_path, "llama", change)
    with pytest.raises(UserError, match=told):
        check_tensors(read_architecture(folder), find_tensors(folder), folder)


def test_a_folder_without_weights_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \*.safetensors; allowed: a folder"):
        find_tensors(tmp_path)
    folder = save_checkpoint(tmp_path, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged .*; allowed: whole safetensors"):
        find_tensors(folder)


def test_files_are_those_of_the_index_and_no_tensor_is_there_twice(tmp_path):
    folder = save_checkpoint(tmp_path, "llama")
    file = folder / "model.safetensors"
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).write_bytes(file.read_bytes())
    assert list_files(folder) == [file]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    assert list_files(folder) == [folder / "two.safetensors"]
    index.unlink()
    file.unlink()
    with pytest.raises(UserError, match="is in .*one.safetensors and .*; allowed: ea"):
        find_tensors(folder)


def test_a_digest_knows_weights_and_config(tmp_path):
    def change(config, tensors):
        tensors["model.norm.weight"] += 1

    first, same, other = (tmp_path / name for name in ("a", "b", "c"))
    for folder in (first, same):
        save_checkpoint(folder, "llama")
    save_checkpoint(other, "llama", change)
    assert digest(first) == digest(same) != digest(other)
    (same / "config.json").write_text("{}")
    assert digest(first) != digest(same)
