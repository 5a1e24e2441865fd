"""Trained runs as files of other libraries, which compute the same with them."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import ACTIVE, EXPERTS, V, make_tokens, save_checkpoint
from safetensors.numpy import load_file

from configs import default
from fedmoe_jax.base import BASE, Route
from fedmoe_jax.export import (
    check_llama,
    main,
    save_adapters,
    save_fine_tuned,
    save_llama,
)
from fedmoe_jax.models import finetune, lora, transformer
from fedmoe_jax.models.decoder import decode
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.architecture import read_architecture
from fedmoe_jax.pretrained.weights import read_weights

TOKENS = jnp.asarray(make_tokens()[:, :9])


class Trained(NamedTuple):
    """What of a run is exported."""

    params: dict
    frozen: dict


def make_run(folder, family, build=lora.build, **changes):
    """A shape and a run whose pairs do something."""
    save_checkpoint(folder, family)
    config = default.get_config()
    config.model.kind, config.model.base = "lora", str(folder)
    fields = {"model.lora_rank": 3, "model.lora_attention": 2, "num_experts": EXPERTS}
    config.update_from_flattened_dict(fields | changes)
    model = build(config, {"tokens": TOKENS}, V, "cpu")
    params, frozen = model.init(jax.random.key(0))
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape)
    fixed = frozen | {BASE: model.base.load()}
    return model, Trained(jax.tree.map(noise, params), fixed)


def ask(model, run, expert):
    """Logits of the model with one expert in every layer."""
    held = jnp.full((len(run.params["gate"]), 1), expert)
    own = take_submodel(run.params, {}, held, 0)
    slots = held, jnp.ones(held.shape, bool), Route(1)
    return model.apply(own, run.frozen, {"tokens": TOKENS}, *slots, None)[0]


@pytest.mark.parametrize("fixed", [False, True])
def test_an_adapter_holds_what_an_expert_adds(fixed, tmp_path):
    changes = {"model.lora_fixed": fixed}
    model, run = make_run(tmp_path / "base", "llama", **changes)
    shape = model.apply.keywords["shape"]
    folders = save_adapters(shape, run, tmp_path / "out")
    assert [path.name for path in folders] == [f"expert{e}" for e in range(EXPERTS)]
    tensors = load_file(folders[2] / "adapter_model.safetensors")
    config = json.loads((folders[2] / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["rank_pattern"] == {"q_proj": 2, "v_proj": 2}
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = dict(base)
    for name in base:
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.weight" in tensors:
            a, b = (tensors[f"{place}.lora_{x}.weight"] for x in "AB")
            module = place.split(".")[-1]
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            merged[name] = base[name] + alpha / len(a) * (b @ a)
    assert sum(name.endswith("lora_A.weight") for name in tensors) == 2 * (3 + 2)

    def change(_, tensors):
        tensors |= merged

    folder = save_checkpoint(tmp_path / "merged", "llama", change)
    arch = read_architecture(folder)
    expected = decode(read_weights(arch, folder, "float32"), TOKENS, arch)
    np.testing.assert_allclose(ask(model, run, 2), expected, atol=1e-4)
    gates = load_file(tmp_path / "out" / "gates.safetensors")
    assert gates["block001.kernel"].shape == (EXPERTS, 16)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_adapters_of_a_run_in_bfloat16_are_those_of_its_parameters(family, tmp_path):
    files = []
    for dtype in ("float32", "bfloat16"):
        changes = {"model.dtype": dtype}
        model, run = make_run(tmp_path / dtype, family, **changes)
        shape = model.apply.keywords["shape"]
        folders = save_adapters(shape, run, tmp_path / f"{dtype}_out")
        found = [load_file(path / "adapter_model.safetensors") for path in folders]
        files.append(found)
    for plain, low in zip(*files, strict=True):
        assert {value.dtype.name for value in low.values()} == {"float32"}
        jax.tree.map(np.testing.assert_array_equal, plain, low)


# The libraries' own, of renamed settings and of experts that they fuse.
of_libraries = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
)


def load_adapter(base, adapter):
    """tokens -> logits of a checkpoint with an adapter, by the libraries' own code."""
    torch, transformers, peft = map(
        pytest.importorskip, ("torch", "transformers", "peft")
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()

    def answer(tokens):
        with torch.no_grad():
            return theirs(torch.tensor(np.asarray(tokens))).logits.numpy()

    return answer


@of_libraries
def test_adapters_compute_the_same_in_peft(tmp_path):
    model, run = make_run(tmp_path / "base", "qwen2")
    folders = save_adapters(model.apply.keywords["shape"], run, tmp_path / "out")
    for expert in (0, 3):
        logits = load_adapter(tmp_path / "base", folders[expert])(TOKENS)
        np.testing.assert_allclose(ask(model, run, expert), logits, atol=1e-4)


@of_libraries
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_the_adapter_of_a_mixture_computes_the_same_in_peft(family, tmp_path):
    """With the router of the base, which an adapter leaves as it is."""
    transformers = pytest.importorskip("transformers")
    if family == "qwen2_moe" and int(transformers.__version__.split(".")[0]) > 4:
        pytest.skip("peft 0.21 finds no experts of qwen2_moe in transformers 5")
    model, run = make_run(tmp_path / "base", family)
    gates = jax.tree.map(jnp.zeros_like, run.params["gate"])
    run = run._replace(params=run.params | {"gate": gates})
    (folder,) = save_adapters(model.apply.keywords["shape"], run, tmp_path / "out")
    logits = load_adapter(tmp_path / "base", folder)(TOKENS)
    held = jnp.broadcast_to(jnp.arange(EXPERTS), (len(gates), EXPERTS))
    slots = held, jnp.ones(held.shape, bool), Route(ACTIVE)
    ours = model.apply(run.params, run.frozen, {"tokens": TOKENS}, *slots, None)[0]
    np.testing.assert_allclose(ours, logits, atol=1e-4)


def test_one_adapter_has_the_experts_of_a_mixture(tmp_path):
    model, run = make_run(tmp_path / "base", "mixtral")
    shape = model.apply.keywords["shape"]
    (folder,) = save_adapters(shape, run, tmp_path / "out")
    tensors = load_file(folder / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w3"
    pair = jax.tree.map(lambda leaf: leaf[3], run.params["experts"]["block001"]["up"])
    np.testing.assert_array_equal(tensors[f"{place}.lora_A.weight"], pair["a"].T)
    np.testing.assert_array_equal(tensors[f"{place}.lora_B.weight"], pair["b"].T)


SHAPE = transformer.Shape(
    **dict(blocks=2, moe_every=1, width=8, heads=2, kv_heads=1, expert_width=6),
    **dict(dense_width=7, shared_width=0, num_experts=1, vocabulary=V),
    **dict(
        gate_input="token",
        tied=False,
        remat=False,
        scan=False,
        linked=False,
        platform="cpu",
    ),
)


@pytest.mark.slow
def test_a_transformer_with_one_expert_is_a_llama_checkpoint(tmp_path):
    model = transformer.build_model(SHAPE)
    params, _ = model.init(jax.random.key(0))
    save_llama(SHAPE, Trained(params, {}), tmp_path)
    slots = jnp.zeros((2, 1), int), jnp.ones((2, 1), bool), Route(1)
    expected, _ = model.apply(params, {}, {"tokens": TOKENS}, *slots, None)
    arch = read_architecture(tmp_path)
    found = decode(read_weights(arch, tmp_path, "float32"), TOKENS, arch)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_fine_tuned_base_is_a_checkpoint_like_it(family, tmp_path):
    changes = {"model.kind": "finetune", "num_experts": 1}
    model, run = make_run(tmp_path / "base", family, finetune.build, **changes)
    shape, folder = model.apply.keywords["shape"], tmp_path / "out"
    save_fine_tuned(shape, run, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())
    arch = read_architecture(folder)
    found = decode(read_weights(arch, folder, "float32"), TOKENS, arch)
    np.testing.assert_allclose(ask(model, run, 0), found, atol=1e-4)
    with pytest.raises(UserError, match="num_experts=2 of the run is not allowed"):
        save_fine_tuned(shape._replace(num_experts=2), run, folder)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_experts", 4, "num_experts=4 of the run is not allowed; allowed: 1"),
        ("moe_every", 2, "model.moe_every=2 of the run is not allowed; allowed: 1"),
        ("shared_width", 3, "model.shared_width=3 of the run is not allowed"),
    ],
)
def test_other_transformers_are_no_llama(field, value, told):
    with pytest.raises(UserError, match=told):
        check_llama(SHAPE._replace(**{field: value}))


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert not (tmp_path / "out").exists()
