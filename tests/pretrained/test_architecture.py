"""What a `config.json` says, and what is refused."""

import pytest
from checkpoints import EXPERTS, FAMILIES, D, H, V, make_config

from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.architecture import (
    Rope,
    make_architecture,
    read_architecture,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family):
    arch = make_architecture(make_config(family), "config.json")
    assert (arch.width, arch.heads, arch.vocabulary) == (D, H, V)
    assert arch.family == FAMILIES[family]["model_type"]
    assert (arch.mixture is None) == (not any(arch.mixes))
    assert arch.mixture is None or arch.mixture.experts == EXPERTS
    assert hash(arch) == hash(make_architecture(make_config(family), "elsewhere"))


def test_blocks_with_a_mixture():
    config = make_config("qwen3_moe") | {"num_hidden_layers": 5}
    assert make_architecture(config, "").mixes == (False, True, True, True, True)
    sparse = config | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert make_architecture(sparse, "").mixes == (False, True, False, False, False)


def test_positions_are_read_from_either_generation_of_configs():
    old = make_config("llama") | {"rope_theta": 5e5}
    new = make_config("llama") | {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}
    }
    assert (
        make_architecture(old, "").rope == make_architecture(new, "").rope == Rope(5e5)
    )


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        (
            "llama",
            {"model_type": "gpt2"},
            "model_type='gpt2' is unknown; allowed: llam",
        ),
        ("llama", {"model_type": None}, "model_type=None is unknown"),
        (
            "llama",
            {"hidden_act": "gelu"},
            "hidden_act='gelu' is not allowed; allowed: s",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not allowed; allowed: None"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_scaling of type 'yarn' is unknown; allowed: default, linear, llama3",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config=.* is not allowed; allowed: None",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'; allowed: full_attention",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_parameters differ between layers",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "low_freq_factor is missing",
        ),
        ("llama", {"num_hidden_layers": None}, "has a field of another kind"),
        ("llama", {"rope_scaling": "linear"}, "has a field of another kind"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "has a field of another kind"),
        ("llama", {"model_type": ["llama"]}, "model_type=.* is unknown"),
        (
            "qwen2",
            {"use_sliding_window": True},
            "use_sliding_window=True is not allowed",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(family, change, told):
    with pytest.raises(UserError, match=told):
        make_architecture(make_config(family) | change, "config.json")


def test_a_missing_field_is_named():
    config = make_config("mixtral")
    del config["num_local_experts"]
    with pytest.raises(UserError, match="config.json: num_local_experts is missing"):
        make_architecture(config, "config.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "has no config.json; allowed: a folder of a pretrained model"),
        ("{", "config.json cannot be read"),
        ("[1]", "config.json is damaged: it holds no JSON object"),
    ],
)
def test_a_folder_without_a_config_is_refused(text, told, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=told):
        read_architecture(tmp_path)
