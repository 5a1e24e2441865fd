"""Low-rank experts (LoRA, arXiv 2106.09685) on a frozen pretrained decoder.

Every MoE layer is a block's hidden layer. Where the base has a mixture there its
experts are the model's, each with pairs of its own and a row of the base's router; else
E experts share the base's hidden layer and differ by their pairs alone, and a gate that
the base lacks chooses between them. Expert e computes, of each of its three matrices W,

    x W + s (x a_e) b_e,   s = alpha / rank,

and starts as the base, as b is 0. What every client trains (the stem) are the pairs of
the attention's queries and values; the head is the base's. Nothing of the base is
trained, averaged or sent but once: it is `frozen["base"]`, one copy for all clients.

Averages of a and of b are not those of their products (FedIT averages so, arXiv
2305.05644). With `model.lora_fixed` a is drawn once and stays, so that averages of b
are those of the products (FFA-LoRA, arXiv 2403.12313).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import BASE, Base, Model, Route, Routing, Units
from fedmoe_jax.models import routing
from fedmoe_jax.models.decoder import add_shared, answer, attend
from fedmoe_jax.models.one_layer import choose_trained, freeze_others
from fedmoe_jax.models.transformer_parts import (
    average_prefix,
    draw,
    feed_forward,
    normalise_axes,
)
from fedmoe_jax.options import UserError, show
from fedmoe_jax.pretrained.architecture import Architecture, read_architecture
from fedmoe_jax.pretrained.tensors import list_tensors, name_block
from fedmoe_jax.pretrained.weights import (
    check_tensors,
    find_tensors,
    list_states,
    map_tensors,
    read_weights,
)
from fedmoe_jax.runtime.folders import resolve_folder
from fedmoe_jax.types import Array, PyTree

FIXED = "lora_a"  # in `frozen`, where a is not trained
ADAPTED = ("query", "value")  # projections of attention with pairs, as in LoRA


class Shape(NamedTuple):
    """The sizes of the model, hashable.

    Attributes:
      arch: of the base.
      folder: where it is, absolute.
      files: names, times and sizes of its files, so that others are another model.
      num_experts: E of each layer.
      rank: of the experts' pairs; 0 where they have whole differences from the base
        instead, see `finetune`.
      scale: s, of all pairs.
      attention: rank of the pairs of queries and values; 0 for none.
      fixed: whether a stays as it was drawn.
      gate_input: see `transformer.Shape`.
      remat: likewise.
      dtype: of the base's weights, a name in `precision.DTYPES`.
    """

    arch: Architecture
    folder: str
    files: tuple[tuple[str, int, int], ...]
    num_experts: int
    rank: int
    scale: float
    attention: int
    fixed: bool
    gate_input: str
    remat: bool
    dtype: str


def list_layers(arch: Architecture) -> list[str]:
    """The blocks with a MoE layer: those of the base that have one, else all."""
    every = arch.mixture is None
    return [name_block(i) for i, mixes in enumerate(arch.mixes) if mixes or every]


def expert_width(arch: Architecture) -> int:
    """F of the experts."""
    return arch.hidden_width if arch.mixture is None else arch.mixture.width


def init_pair(key: Array, inputs: int, outputs: tuple[int, ...], rank: int) -> PyTree:
    """`a` [inputs, rank] at random, and `b` [rank, ...outputs], which is 0."""
    a = draw(key, inputs, rank, fan_in=inputs)
    return {"a": a, "b": jnp.zeros((rank, *outputs))}


def init_expert(key: Array, shape: Shape) -> PyTree:
    """The pairs of ONE expert."""
    width, hidden = shape.arch.width, expert_width(shape.arch)
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(key, len(sizes))
    return {
        name: init_pair(own, inputs, (outputs,), shape.rank)
        for own, (name, (inputs, outputs)) in zip(keys, sizes.items(), strict=True)
    }


def init_stem(key: Array, shape: Shape) -> PyTree:
    """The pairs of every block's attention; {} without."""
    arch = shape.arch
    if not shape.attention:
        return {}
    heads = {"query": arch.heads, "value": arch.kv_heads}

    def init_block(key: Array) -> PyTree:
        keys = jax.random.split(key, len(ADAPTED))
        return {
            name: init_pair(
                own, arch.width, (heads[name], arch.head_width), shape.attention
            )
            for own, name in zip(keys, ADAPTED, strict=True)
        }

    keys = jax.random.split(key, len(arch.mixes))
    return {name_block(i): init_block(own) for i, own in enumerate(keys)}


def init_gate(key: Array, shape: Shape) -> PyTree:
    """ONE gate: what is added to the base's router, or a gate of its own."""
    kernel = draw(key, shape.num_experts, shape.arch.width, fan_in=1)
    kernel *= 0.1 if shape.arch.mixture is None else 0.0
    return {"kernel": kernel, "bias": jnp.zeros(shape.num_experts)}


def take_pairs(tree: PyTree, name: str) -> PyTree:
    """Only the leaves `name`, a or b, of a tree of pairs."""
    if set(tree) == {"a", "b"}:
        return {name: tree[name]}
    return {key: take_pairs(each, name) for key, each in tree.items()}


def join_pairs(first: PyTree, second: PyTree) -> PyTree:
    """One tree of two that have other leaves in the same places."""
    joined = dict(first)
    for name, each in second.items():
        known = joined.get(name)
        joined[name] = each if known is None else join_pairs(known, each)
    return joined


def init(key: Array, shape: Shape) -> tuple[PyTree, PyTree]:
    """`Model.init`."""
    stem_key, *keys = jax.random.split(key, 1 + len(list_layers(shape.arch)))
    gates, experts = {}, {}
    for own, name in zip(keys, list_layers(shape.arch), strict=True):
        gate, expert = jax.random.split(own)
        gates[name] = init_gate(gate, shape)
        make = functools.partial(init_expert, shape=shape)
        experts[name] = jax.vmap(make)(jax.random.split(expert, shape.num_experts))
    pairs, frozen = {"stem": init_stem(stem_key, shape), "experts": experts}, {}
    if shape.fixed:
        take = lambda name: {part: take_pairs(own, name) for part, own in pairs.items()}
        pairs, frozen = take("b"), {FIXED: take("a")}
    return pairs | {"gate": gates, "head": {}}, frozen


def multiply(pair: PyTree, x: Array) -> Array:
    """`(x a) b` of ONE pair: [..., inputs] -> [..., *outputs]."""
    return jnp.tensordot(x @ pair["a"], pair["b"], 1)


def adapt_attention(pairs: PyTree, scale: float) -> Callable[[str, Array], Any]:
    """What pairs add to queries and values, see `decoder.attend`."""
    return lambda name, x: scale * multiply(pairs[name], x) if name in pairs else 0.0


def run_expert(
    pairs: PyTree, x: Array, base: tuple[Array, Array], scale: float
) -> tuple[Array, Array]:
    """Hidden units [T, F] of ONE expert, and what its last pair adds to them, [T, D].

    Args:
      pairs: `gate`, `up` and `down`.
      x: [T, D].
      base: outputs [T, F] of the base's `gate` and `up`.
      scale: s.
    """
    gate, up = (
        each + scale * multiply(pairs[name], x)
        for name, each in zip(("gate", "up"), base, strict=True)
    )
    hidden = jax.nn.silu(gate) * up
    return hidden, scale * multiply(pairs["down"], hidden)


def run_shared_base(
    pairs: PyTree, weights: PyTree, x: Array, gates: Array, shape: Shape
) -> Array:
    """The mixture [T, D] of experts that share the base's hidden layer.

    The base's matrices are met once: the first two before the experts part, the last
    one when their hidden units are mixed.

    Args:
      pairs: of the held experts, leaves [K, ...].
      weights: `gate`, `up` [D, F] and `down` [F, D].
      x: [T, D].
      gates: [T, K].
      shape: of the model.
    """
    base = x @ weights["gate"], x @ weights["up"]
    run = jax.vmap(run_expert, (0, None, None, None), 1)
    hidden, low = run(pairs, x, base, shape.scale)
    gates = gates.astype(x.dtype)
    mixed = jnp.einsum("tk,tkf->tf", gates, hidden) @ weights["down"]
    return mixed + jnp.einsum("tk,tkd->td", gates, low)


def run_experts(pairs: PyTree, weights: PyTree, x: Array, shape: Shape) -> Array:
    """Outputs [T, K, D] of each held expert by itself.

    Args:
      pairs: leaves [K, ...]; with rank 0 differences, like the weights.
      weights: of the base's experts, leaves [K, ...], or [...] of one that all share.
      x: [T, D].
      shape: of the model.
    """

    def run(pairs: PyTree, weights: PyTree) -> Array:
        if not shape.rank:
            return feed_forward(jax.tree.map(jnp.add, weights, pairs), x)
        base = x @ weights["gate"], x @ weights["up"]
        hidden, low = run_expert(pairs, x, base, shape.scale)
        return hidden @ weights["down"] + low

    own = None if shape.arch.mixture is None else 0
    return jax.vmap(run, (0, own), 1)(pairs, weights)


def score_gate(gate: PyTree, block: PyTree, x: Array, shape: Shape) -> Array:
    """Gate logits [B * P, E] of hidden states [B, P, D].

    A gate with other rows than experts, which reads features, is without the router.
    """
    seen = average_prefix(x) if shape.gate_input == "prefix" else x
    kernel = gate["kernel"]
    if "router" in block and len(kernel) == shape.num_experts:
        kernel = kernel + block["router"]
    logits = jnp.einsum("bpd,ed->bpe", seen, kernel) + gate["bias"][None, None]
    return logits.reshape(-1, logits.shape[-1])


def mix_experts(
    gate: PyTree,
    pairs: PyTree,
    block: PyTree,
    x: Array,
    held: Array,
    slot: Array,
    route: Route,
    shape: Shape,
) -> tuple[Array, Routing]:
    """ONE MoE layer, dropless, and the routing of all B * P positions.

    Args:
      gate: `kernel` [E, D] and `bias` [E].
      pairs: of the held experts, leaves [K, ...].
      block: of the base.
      x: [B, P, D], normalised hidden states.
      held: [K] int32.
      slot: [K] bool.
      route: of this layer.
      shape: of the model.

    Returns:
      [B, P, D], and the routing.
    """
    mixture, tokens = shape.arch.mixture, x.reshape(-1, x.shape[-1])
    if mixture is None:
        weights = block["hidden"]
    else:
        weights = jax.tree.map(lambda leaf: leaf[held], block["experts"])
    logits, gates = None, jnp.ones((len(tokens), 1))
    if shape.num_experts > 1:
        if mixture is not None and not mixture.normalised and route.gating == "chosen":
            route = route._replace(gating="all")
        logits = score_gate(gate, block, x, shape)
        gates = routing.make_gates(logits[:, held], slot, route)
        if route.gating == "all" and mixture is not None:
            # A share of all experts, as in the base, also of those that are not held.
            share = jnp.where(slot[None], jax.nn.softmax(logits)[:, held], 0.0)
            gates = gates * share.sum(axis=1, keepdims=True)
    trained = choose_trained(gates, slot, route)
    if mixture is None and trained is None and shape.rank:
        mixed = run_shared_base(pairs, weights, tokens, gates, shape)
    else:
        outputs = run_experts(pairs, weights, tokens, shape)
        if trained is not None:
            outputs = freeze_others(outputs, trained)
        mixed = jnp.einsum("tk,tkd->td", gates.astype(x.dtype), outputs)
    return mixed.reshape(x.shape), Routing(logits, gates, trained)


class Block(NamedTuple):
    """ONE block.

    Attributes:
      base: its weights.
      pairs: of its attention, {} without.
      layer: `gate`, pairs of the experts, `held` [K], `slot` [K] and `bias` [K] (or
        None) of its MoE layer; None without.
    """

    base: PyTree
    pairs: PyTree
    layer: tuple[PyTree, PyTree, Array, Array, Array | None] | None


def run_block(
    block: Block, x: Array, *, route: Route, shape: Shape
) -> tuple[Array, Routing | None]:
    """ONE block on hidden states [B, P, D], and the routing of its MoE layer."""
    arch, base = shape.arch, block.base
    adapt = adapt_attention(block.pairs, shape.scale)
    hidden = normalise_axes(x, base["before"], arch.epsilon)
    x = x + attend(base["attention"], hidden, arch, adapt)
    hidden = normalise_axes(x, base["after"], arch.epsilon)
    if block.layer is None:
        return x + feed_forward(base["hidden"], hidden), None
    gate, pairs, held, slot, bias = block.layer
    route = route._replace(bias=bias)
    mixed, decision = mix_experts(gate, pairs, base, hidden, held, slot, route, shape)
    return x + mixed + add_shared(base, hidden), decision


def take_fixed(
    params: PyTree, frozen: PyTree, held: Array, shape: Shape
) -> tuple[PyTree, PyTree]:
    """Stem and experts with the a that nobody trains, of the experts `held` [G, K]."""
    stem, experts = params["stem"], params["experts"]
    if not shape.fixed:
        return stem, experts
    fixed = frozen[FIXED]
    own = {
        name: jax.tree.map(lambda leaf, g=layer: leaf[held[g]], fixed["experts"][name])
        for layer, name in enumerate(list_layers(shape.arch))
    }
    return join_pairs(stem, fixed["stem"]), join_pairs(experts, own)


def apply(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    held: Array,
    slot: Array,
    route: Route,
    key: Array | None,
    *,
    shape: Shape,
) -> tuple[Array, Routing]:
    """`Model.apply`: `tokens` [B, P] int32 -> logits [B, P, vocabulary], routing.

    Nothing is dropped at random; `key` is not used.
    """
    base = frozen[BASE]
    stem, experts = take_fixed(params, frozen, held, shape)
    run = functools.partial(run_block, route=route, shape=shape)
    run = jax.checkpoint(run) if shape.remat else run
    names, layers = list_layers(shape.arch), []
    x = base["embedding"][batch["tokens"]]
    for name in map(name_block, range(len(shape.arch.mixes))):
        layer = None
        if name in names:
            g = names.index(name)
            slots = held[g], slot[g], route.of_layer(g).bias
            layer = params["gate"][name], experts[name], *slots
        x, decision = run(Block(base[name], stem.get(name, {}), layer), x)
        layers += [] if decision is None else [decision]
    whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return answer(base, x, shape.arch), whole


def shape_base(arch: Architecture, dtype: str) -> PyTree:
    """Shapes of all weights of a base, without reading them."""

    def shape(tensor: Any) -> jax.ShapeDtypeStruct:
        stacked = (len(tensor.names),) if len(tensor.names) > 1 else ()
        return jax.ShapeDtypeStruct((*stacked, *tensor.shape), dtype)

    return map_tensors(shape, list_tensors(arch))


@functools.lru_cache(1)
def load_base(
    arch: Architecture, folder: str, files: tuple[tuple[str, int, int], ...], dtype: str
) -> PyTree:
    """All weights of a base, on the host, once for all runs of a process."""
    return read_weights(arch, Path(folder), dtype)


def list_units(shape: Shape) -> tuple[Units, ...]:
    """The ranks of an expert's pairs, see `base.Units`."""
    sides = {"b": 0} if shape.fixed else {"a": 1, "b": 0}
    return tuple(
        Units(
            name,
            "experts",
            shape.rank,
            tuple(((name, side), axis) for side, axis in sides.items()),
        )
        for name in ("gate", "up", "down")
    )


def make_base(shape: Shape) -> Base:
    """The base of a model of these sizes."""
    files = shape.arch, shape.folder, shape.files, shape.dtype
    return Base(
        shapes=functools.partial(shape_base, shape.arch, shape.dtype),
        load=functools.partial(load_base, *files),
        sparse=shape.arch.mixture is not None,
    )


@functools.cache
def build_model(shape: Shape) -> Model:
    """The model of these sizes; equal sizes give the same functions."""
    return Model(
        init=functools.partial(init, shape=shape),
        apply=functools.partial(apply, shape=shape),
        units=list_units(shape),
        base=make_base(shape),
    )


def check_options(options: ConfigDict) -> None:
    """Raises UserError for what this model cannot do."""
    for field in ("stem_dropout", "expert_dropout", "shared_width", "tied", "scan"):
        value, off = options[field], type(options[field])()
        if value != off:
            raise UserError(
                f"model.{field}={value} is not allowed with model.kind="
                f"{options.kind!r}; allowed: {off}"
            )


def check_fit(shape: Shape, config: ConfigDict, length: int, vocabulary: int) -> None:
    """Raises UserError unless experts, gates, windows and tokens fit the base."""
    arch, mixture = shape.arch, shape.arch.mixture
    where = f"model.base={show(shape.folder)}"
    if vocabulary > arch.vocabulary:
        raise UserError(
            f"data with {vocabulary} tokens are not allowed with {where}; allowed: at "
            f"most {arch.vocabulary}, the rows of its embedding"
        )
    if arch.window and length > arch.window:
        raise UserError(
            f"data.length={length} is not allowed with {where}; allowed: at most "
            f"{arch.window}, the window of its attention"
        )
    if mixture is None:
        return
    known = {"num_experts": mixture.experts, "num_active": mixture.active}
    for name, allowed in known.items():
        if config[name] != allowed:
            raise UserError(
                f"{name}={config[name]}, as strategy={config.strategy!r} has it, is "
                f"not allowed with {where}; allowed: {allowed}, as in its mixtures"
            )
    if shape.gate_input != "token":
        raise UserError(
            f"gate.input={shape.gate_input!r} is not allowed with {where}, whose "
            "router reads tokens; allowed: 'token'"
        )


def make_shape(config: ConfigDict, batch: PyTree, num_outputs: int, rank: int) -> Shape:
    """The sizes of the model of a config.

    Args:
      config: gives `num_experts`, `gate.input` and the group `model`.
      batch: shapes of a batch with `tokens` [B, P].
      num_outputs: the vocabulary of the data, at most that of the base.
      rank: of the experts' pairs; 0 for differences, without pairs of the attention.

    Raises:
      UserError: the batch has no tokens, the base is not there or damaged, or sizes do
        not fit it.
    """
    options = config.model
    if "tokens" not in batch:
        raise UserError(
            f"model.kind={options.kind!r} is not allowed with data without tokens "
            f"(they have {', '.join(batch)}); allowed: image_moe"
        )
    if not options.base:
        raise UserError(
            f"model.base='' is not allowed with model.kind={options.kind!r}; allowed: "
            "the folder of a pretrained model, with config.json and *.safetensors"
        )
    check_options(options)
    folder = resolve_folder("model.base", options.base).resolve()
    arch = read_architecture(folder)
    check_tensors(arch, find_tensors(folder), folder)
    shape = Shape(
        arch=arch,
        folder=str(folder),
        files=list_states(folder),
        num_experts=config.num_experts,
        rank=rank,
        scale=options.lora_alpha / rank if rank else 1.0,
        attention=options.lora_attention if rank else 0,
        fixed=bool(options.lora_fixed and rank),
        gate_input=config.gate.input,
        remat=options.remat,
        dtype=options.dtype,
    )
    check_fit(shape, config, batch["tokens"].shape[1], num_outputs)
    return shape


def build(config: ConfigDict, batch: PyTree, num_outputs: int, platform: str) -> Model:
    """The model of a config; equal configs give the same functions.

    Args:
      config: gives `num_experts`, `gate.input` and the group `model`.
      batch: shapes of a batch with `tokens` [B, P].
      num_outputs: the vocabulary of the data, at most that of the base.
      platform: that it will run on, not read.

    Raises:
      UserError: see `make_shape`.
    """
    rank = config.model.lora_rank
    return build_model(make_shape(config, batch, num_outputs, rank))
