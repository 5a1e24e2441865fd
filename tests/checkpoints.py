"""Tiny checkpoints of every family, in the names and shapes of their files.

`python tests/checkpoints.py` makes `tests/models/logits.npz`, what `transformers`
computes with them: it needs PyTorch, transformers and safetensors.
"""

import importlib
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

V, D, F, H, KV, W, LAYERS, EXPERTS, ACTIVE = 40, 16, 24, 4, 2, 4, 2, 4, 2
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": KV,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SPARSE = {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
        "head_dim": 6,
    },
    "mistral": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 6},
    "mixtral": {
        "model_type": "mixtral",
        "rope_theta": 1e6,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
    },
    "olmoe": {
        "model_type": "olmoe",
        "rope_theta": 10000.0,
        "norm_topk_prob": False,
        **SPARSE,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "rope_theta": 1e6,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        **SPARSE,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "head_dim": 6,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        **SPARSE,
    },
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def make_config(family):
    """The content of `config.json`."""
    own = FAMILIES[family]
    return COMMON | own | {"architectures": [ARCHITECTURES[own["model_type"]]]}


def list_hidden(prefix, width, names=("gate_proj", "up_proj", "down_proj")):
    """Shapes of one SwiGLU network, [out, in] as in the files."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (width, D), up: (width, D), down: (D, width)}


def list_attention(kind, config, prefix):
    """Shapes of one attention."""
    width = config.get("head_dim", D // H)
    rows = {"q": H * width, "k": KV * width, "v": KV * width}
    shapes = {f"{prefix}.{n}_proj.weight": (size, D) for n, size in rows.items()}
    shapes[f"{prefix}.o_proj.weight"] = (D, H * width)
    if kind in ("qwen2", "qwen2_moe"):
        shapes |= {f"{prefix}.{n}_proj.bias": (size,) for n, size in rows.items()}
    if kind in ("qwen3", "qwen3_moe"):
        shapes |= {f"{prefix}.{n}_norm.weight": (width,) for n in "qk"}
    if kind == "olmoe":
        shapes |= {f"{prefix}.{n}_norm.weight": (rows[n],) for n in "qk"}
    return shapes


def list_layer(kind, config, layer):
    """Shapes of one block."""
    prefix = f"model.layers.{layer}"
    shapes = list_attention(kind, config, f"{prefix}.self_attn")
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}.{name}.weight"] = (D,)
    sparse = "num_experts_per_tok" in config
    if not sparse or layer in config.get("mlp_only_layers", ()):
        return shapes | list_hidden(f"{prefix}.mlp", F)
    if kind == "mixtral":
        moe, names, width = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2"), F
    else:
        moe, names = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
        width = config.get("moe_intermediate_size", F)
    shapes[f"{moe}.gate.weight"] = (EXPERTS, D)
    for expert in range(EXPERTS):
        shapes |= list_hidden(f"{moe}.experts.{expert}", width, names)
    if kind == "qwen2_moe":
        shared = config["shared_expert_intermediate_size"]
        shapes |= list_hidden(f"{moe}.shared_expert", shared)
        shapes[f"{moe}.shared_expert_gate.weight"] = (1, D)
    return shapes


def list_shapes(config):
    """Names and shapes of all tensors of a checkpoint."""
    kind = config["model_type"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(LAYERS):
        shapes |= list_layer(kind, config, layer)
    return shapes


def make_tensors(config, family):
    """Random float32 tensors by name, the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(family.encode()))
    tensors = {}
    for name, shape in sorted(list_shapes(config).items()):
        draw = rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)
        tensors[name] = (draw + name.endswith("norm.weight")).astype(np.float32)
    return tensors


def measure_bytes(family):
    """Bytes of all tensors of a checkpoint."""
    tensors = make_tensors(make_config(family), family)
    return sum(value.nbytes for value in tensors.values())


def make_tokens():
    """[2, 32] tokens, longer than the context that llama3 was scaled from."""
    return np.random.default_rng(0).integers(0, V, (2, 32))


def save_checkpoint(folder, family, change=lambda config, tensors: None):
    """Writes `config.json` and `model.safetensors`, after `change` in place."""
    config = make_config(family)
    tensors = make_tensors(config, family)
    change(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def ask_transformers(family):
    """Logits [2, 32, V] of the library, which loads every tensor and misses none."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), family)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    faults = {name: found for name, found in info.items() if found}
    assert not faults, faults
    with torch.no_grad():
        return model.eval()(torch.tensor(make_tokens())).logits.numpy()


if __name__ == "__main__":
    file = Path(__file__).parent / "models" / "logits.npz"
    np.savez_compressed(file, **{name: ask_transformers(name) for name in FAMILIES})
