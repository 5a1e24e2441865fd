"""Names, shapes and places of a pretrained decoder's tensors.

Files keep matrices as [out, in], here they are [in, out], and heads have an axis of
their own. Every tensor of the tree is one tensor of the files, or E of them stacked.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fedmoe_jax.pretrained.architecture import Architecture

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


class Tensor(NamedTuple):
    """One leaf of the tree.

    Attributes:
      names: in the files; several are stacked along a new first axis.
      file_shape: of each of them there.
      transposed: whether the two axes of the files are swapped.
      shape: of each of them here.
    """

    names: tuple[str, ...]
    file_shape: tuple[int, ...]
    transposed: bool
    shape: tuple[int, ...]

    def convert(self, value: np.ndarray) -> np.ndarray:
        """One tensor of the files as it is here."""
        return (value.T if self.transposed else value).reshape(self.shape)

    def restore(self, value: np.ndarray) -> np.ndarray:
        """The way back of `convert`."""
        if not self.transposed:
            return value.reshape(self.file_shape)
        return value.reshape(self.file_shape[::-1]).T


def vector(name: str, *shape: int) -> Tensor:
    """A vector, or one that is cut into heads."""
    return Tensor((name,), (int(np.prod(shape)),), False, shape)


def matrix(
    names: str | tuple[str, ...],
    inputs: int,
    outputs: int,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """A matrix [inputs, outputs] here, [outputs, inputs] in the files."""
    names = (names,) if isinstance(names, str) else names
    return Tensor(names, (outputs, inputs), True, shape or (inputs, outputs))


def list_attention(arch: Architecture, prefix: str) -> dict[str, Tensor]:
    """The tensors of an attention."""
    width, own = arch.width, arch.head_width
    heads = {"query": arch.heads, "key": arch.kv_heads, "value": arch.kv_heads}
    found = {
        name: matrix(
            f"{prefix}.{PROJECTIONS[name]}.weight", width, n * own, (width, n, own)
        )
        for name, n in heads.items()
    }
    found["out"] = matrix(
        f"{prefix}.o_proj.weight", arch.heads * own, width, (arch.heads, own, width)
    )
    for name in arch.biased:
        shape = (heads[name], own) if name in heads else (width,)
        bias = vector(f"{prefix}.{PROJECTIONS[name]}.bias", *shape)
        found[f"{name}_bias"] = bias
    for name in ("query", "key") if arch.norm_of else ():
        shape = (own,) if arch.norm_of == "head" else (heads[name], own)
        found[f"{name}_norm"] = vector(f"{prefix}.{name[0]}_norm.weight", *shape)
    return found


def list_hidden(
    prefixes: tuple[str, ...], width: int, hidden: int, names: dict[str, str]
) -> dict[str, Tensor]:
    """The tensors of a SwiGLU network, or of one for each prefix, stacked."""
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        name: matrix(tuple(f"{p}.{names[name]}.weight" for p in prefixes), *size)
        for name, size in sizes.items()
    }


def list_mixture(arch: Architecture, prefix: str) -> dict:
    """The tensors of a mixture."""
    mixture, width = arch.mixture, arch.width
    assert mixture is not None
    mixtral = arch.family == "mixtral"
    place = f"{prefix}.{'block_sparse_moe' if mixtral else 'mlp'}"
    experts = tuple(f"{place}.experts.{e}" for e in range(mixture.experts))
    names = MIXTRAL if mixtral else SWIGLU
    gate = Tensor(
        (f"{place}.gate.weight",),
        (mixture.experts, width),
        False,
        (mixture.experts, width),
    )
    found = {
        "router": gate,
        "experts": list_hidden(experts, width, mixture.width, names),
    }
    if mixture.shared_width:
        shared = (f"{place}.shared_expert",)
        found["shared"] = list_hidden(shared, width, mixture.shared_width, SWIGLU)
        found["shared_gate"] = vector(f"{place}.shared_expert_gate.weight", width)
        found["shared_gate"] = found["shared_gate"]._replace(file_shape=(1, width))
    return found


def list_block(arch: Architecture, layer: int) -> dict:
    """The tensors of a block."""
    prefix = f"model.layers.{layer}"
    block = {
        "attention": list_attention(arch, f"{prefix}.self_attn"),
        "before": vector(f"{prefix}.input_layernorm.weight", arch.width),
        "after": vector(f"{prefix}.post_attention_layernorm.weight", arch.width),
    }
    if arch.mixes[layer]:
        return block | list_mixture(arch, prefix)
    hidden = list_hidden((f"{prefix}.mlp",), arch.width, arch.hidden_width, SWIGLU)
    return block | {"hidden": hidden}


def name_block(layer: int) -> str:
    """The name of a block in the tree."""
    return f"block{layer:03d}"


def list_tensors(arch: Architecture) -> dict:
    """The tree of a decoder's tensors."""
    table = Tensor(
        ("model.embed_tokens.weight",),
        (arch.vocabulary, arch.width),
        False,
        (arch.vocabulary, arch.width),
    )
    tree: dict[str, Any] = {
        "embedding": table,
        "norm": vector("model.norm.weight", arch.width),
    }
    if not arch.tied:
        tree["head"] = matrix("lm_head.weight", arch.width, arch.vocabulary)
    for layer in range(len(arch.mixes)):
        tree[name_block(layer)] = list_block(arch, layer)
    return tree


def walk(tree: dict) -> Iterator[Tensor]:
    """All tensors of a tree."""
    for each in tree.values():
        if isinstance(each, Tensor):
            yield each
        else:
            yield from walk(each)
