"""The way back: a trained run as files that Hugging Face's libraries read.

    python -m fedmoe_jax.export RUN FOLDER

A run of `model.kind=lora` becomes adapters in the form that `peft` reads: of a dense
base one for each expert, `FOLDER/expert0` and so on, with the pairs of the attention in
each; of a base with mixtures one for all, whose names are those of its experts.
`FOLDER/gates.safetensors` has the gates, which no adapter knows. A run of a transformer
with one expert becomes a `llama` checkpoint, which may be a base in its turn; one of
`model.kind=finetune` with one expert a checkpoint like its base.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmoe_jax.api import Run, load_run
from fedmoe_jax.base import BASE
from fedmoe_jax.models import finetune, lora, transformer
from fedmoe_jax.models.precision import find_float32
from fedmoe_jax.models.transformer_parts import BASE as ROPE_BASE
from fedmoe_jax.models.transformer_parts import EPSILON
from fedmoe_jax.options import UserError
from fedmoe_jax.pretrained.architecture import Architecture, make_architecture
from fedmoe_jax.pretrained.tensors import (
    MIXTRAL,
    PROJECTIONS,
    SWIGLU,
    Tensor,
    list_tensors,
    name_block,
)
from fedmoe_jax.pretrained.weights import import_safetensors
from fedmoe_jax.runtime.files import read_json, write_bytes, write_json
from fedmoe_jax.types import PyTree

PREFIX = "base_model.model."  # of names in an adapter
Tensors = dict[str, np.ndarray]


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
      UserError: the library is not installed.
    """
    import_safetensors()
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_bytes(path, save(whole, {"format": "pt"}))


def list_pair(name: str, pair: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """A pair's matrices, [rank, in] and [out, rank] as in the files."""
    b = np.asarray(pair["b"])
    yield f"{PREFIX}{name}.lora_A.weight", np.asarray(pair["a"]).T
    yield f"{PREFIX}{name}.lora_B.weight", b.reshape(len(b), -1).T


def list_attention(stem: PyTree, arch: Architecture) -> Iterator[tuple]:
    """The pairs of all blocks' attention."""
    for layer in range(len(arch.mixes)):
        for name, pair in stem.get(name_block(layer), {}).items():
            place = f"model.layers.{layer}.self_attn.{PROJECTIONS[name]}"
            yield from list_pair(place, pair)


def list_expert(
    experts: PyTree, expert: int, arch: Architecture
) -> Iterator[tuple[str, np.ndarray]]:
    """The pairs of ONE expert in all layers."""
    mixtral = arch.family == "mixtral"
    names = MIXTRAL if mixtral else SWIGLU
    own = f".experts.{expert}" if arch.mixture else ""
    for layer in range(len(arch.mixes)):
        for name, pair in experts.get(name_block(layer), {}).items():
            place = "block_sparse_moe" if mixtral else "mlp"
            one = {leaf: value[expert] for leaf, value in pair.items()}
            where = f"model.layers.{layer}.{place}{own}.{names[name]}"
            yield from list_pair(where, one)


def describe_adapter(shape: lora.Shape, tensors: Tensors) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Modules of a mixture are named in full, as `model.layers.0.mlp.experts.3.up_proj`:
    shared experts and dense blocks have layers of the same names. Of a dense base the
    last part is enough, as all of them have pairs.
    """
    places = {name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in tensors}
    short = {place.split(".")[-1] for place in places}
    modules = places if shape.arch.mixture else short
    attention = {PROJECTIONS[name] for name in lora.ADAPTED}
    ranks = {name: shape.attention for name in sorted(short & attention)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.folder,
        "r": shape.rank,
        "lora_alpha": shape.scale * shape.rank,
        "rank_pattern": ranks,
        "alpha_pattern": {n: shape.scale * rank for n, rank in ranks.items()},
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def save_adapters(shape: lora.Shape, run: Run, folder: Path) -> list[Path]:
    """Writes the adapters and gates of a run; returns the adapters' folders."""
    arch, params = shape.arch, run.params
    everything = jnp.broadcast_to(
        jnp.arange(shape.num_experts), (len(params["gate"]), shape.num_experts)
    )
    stem, experts = lora.take_fixed(params, run.frozen, everything, shape)
    attention = dict(list_attention(stem, arch))
    pairs = [dict(list_expert(experts, e, arch)) for e in range(shape.num_experts)]
    if arch.mixture:
        whole = {name: value for own in pairs for name, value in own.items()}
        adapters = {folder: attention | whole}
    else:
        adapters = {
            folder / f"expert{e}": attention | own for e, own in enumerate(pairs)
        }
    for path, tensors in adapters.items():
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / "adapter_model.safetensors", tensors)
        write_json(path / "adapter_config.json", describe_adapter(shape, tensors))
    gates = {}
    for name, gate in params["gate"].items():
        router = run.frozen[BASE][name].get("router", 0.0)
        gates[f"{name}.kernel"] = np.asarray(gate["kernel"]) + router
        gates[f"{name}.bias"] = np.asarray(gate["bias"])
    write_tensors(folder / "gates.safetensors", gates)
    return list(adapters)


def describe_llama(shape: transformer.Shape) -> dict[str, Any]:
    """The `config.json` of a transformer with one expert."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.width,
        "intermediate_size": shape.expert_width,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_BASE,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def arrange_llama(params: PyTree, shape: transformer.Shape) -> PyTree:
    """Params of a transformer with one expert as the tree of a pretrained decoder."""
    stem, head = params["stem"], params["head"]
    tree = {"embedding": stem["embedding"], "norm": head["norm"]}
    tree["head"] = head["kernel"]
    for layer in range(shape.blocks):
        name = name_block(layer)
        block, experts = stem[name], params["experts"][name]
        tree[name] = {
            "attention": block["attention"],
            "before": block["norm"][0],
            "after": block["norm"][1],
            "hidden": {part: value[0] for part, value in experts.items()},
        }
    return tree


def list_files(listed: dict, tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a checkpoint."""
    for name, each in listed.items():
        if isinstance(each, Tensor):
            yield each.names[0], each.restore(np.asarray(tree[name]))
        else:
            yield from list_files(each, tree[name])


def save_llama(shape: transformer.Shape, run: Run, folder: Path) -> None:
    """Writes a transformer with one expert as a `llama` checkpoint."""
    fields = describe_llama(shape)
    arch = make_architecture(fields, "config.json")
    tree = arrange_llama(run.params, shape)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(list_files(list_tensors(arch), tree))
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", fields)


def sum_weights(run: Run) -> PyTree:
    """The weights of a fine-tuned dense base with one expert."""
    stem, experts = run.params["stem"], run.params["experts"]
    hidden = {
        name: stem[name] | {"hidden": jax.tree.map(lambda leaf: leaf[0], own)}
        for name, own in experts.items()
    }
    return finetune.add(run.frozen[BASE], stem | hidden)


def save_fine_tuned(shape: lora.Shape, run: Run, folder: Path) -> None:
    """Writes a fine-tuned base with the config of the base.

    Raises:
      UserError: the model has several experts, for which its base has no place.
    """
    if shape.num_experts > 1:
        raise UserError(
            f"num_experts={shape.num_experts} of the run is not allowed with model."
            "kind='finetune'; allowed: 1, as in dense controls, which a checkpoint "
            "like its base can hold"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(list_files(list_tensors(shape.arch), sum_weights(run)))
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", read_json(Path(shape.folder) / "config.json"))


def check_llama(shape: transformer.Shape) -> None:
    """Raises UserError unless a transformer is a `llama` model."""
    faults = {
        "num_experts": (shape.num_experts, 1),
        "model.moe_every": (shape.moe_every, 1),
        "model.shared_width": (shape.shared_width, 0),
        "model.tied": (shape.tied, False),
    }
    for name, (value, allowed) in faults.items():
        if value != allowed:
            raise UserError(
                f"{name}={value} of the run is not allowed; allowed: {allowed}, as in "
                "dense controls, which a llama checkpoint can hold"
            )


def export(run: Run, folder: Path) -> list[Path]:
    """Writes a run's model for other libraries.

    Args:
      run: from `load_run`.
      folder: is made.

    Returns:
      The folders that `peft` or `transformers` load.

    Raises:
      UserError: the folder has files, the run has no state, parts of its model are the
        clients' own, or its model has no such form.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; allowed: a new folder")
    if run.state is None or run.plan is None:
        raise UserError("the run has no checkpoint; allowed: one with a state")
    program = run.plan.program
    if program.strategy.personal:
        raise UserError(
            f"strategy={run.config.strategy!r} of the run is not allowed, whose "
            f"{', '.join(program.strategy.personal)} are the clients' own; allowed: "
            "strategies whose model is the server's"
        )
    own = find_float32(program.model)
    shape = getattr(own.apply, "keywords", {}).get("shape")
    if isinstance(shape, lora.Shape) and shape.rank:
        return save_adapters(shape, run, folder)
    if isinstance(shape, lora.Shape):
        save_fine_tuned(shape, run, folder)
        return [folder]
    if isinstance(shape, transformer.Shape):
        check_llama(shape)
        save_llama(shape, run, folder)
        return [folder]
    raise UserError(
        f"model.kind={run.config.model.kind!r} of the run is not allowed; allowed: "
        "lora, or transformer or finetune with one expert"
    )


def main(arguments: list[str] | None = None) -> int:
    """Exports a run; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fedmoe_jax.export",
        description="Writes a trained run as files that peft or transformers read: "
        "adapters of model.kind=lora, or a checkpoint of a transformer or fine-tuned "
        "base with one expert.",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="where to write; is made")
    flags = parser.parse_args(arguments)
    try:
        for path in export(load_run(flags.run), flags.folder):
            print(path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
