"""A decoder transformer with a mixture of experts in every block, or every second one.

The stem holds what every client trains: embeddings, attention, norms, shared experts
and the hidden layers of blocks without a mixture. Every MoE layer has a gate and
experts of its own, named after its block. Where they are tied a client holds the same
experts in all blocks: to all others that is one MoE layer, whose experts have a part in
every block.

The model is pure functions of the tree of params, without Linen modules, because what
it computes with is not the tree that a module would have made: a client brings the rows
[K, ...] of each layer's experts [E, ...] (`models.submodel`), in vmap over clients with
other rows each, and `model.scan` stacks blocks only where it loops over them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fedmoe_jax.base import Links, Model, Route, Routing, Units
from fedmoe_jax.models import routing
from fedmoe_jax.models.links import SNR, receive, see_links
from fedmoe_jax.models.one_layer import choose_trained, freeze_others, split_rows
from fedmoe_jax.models.precision import einsum_float32
from fedmoe_jax.models.routed_experts import mix_routed
from fedmoe_jax.models.transformer_parts import (
    attend,
    average_prefix,
    draw,
    feed_forward,
    init_attention,
    init_feed_forward,
    normalise,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, PyTree

GATE_INPUTS = ("token", "prefix")
TIED = "blocks"  # the one MoE layer where all are tied
# On CPU experts gain from seeing only what is routed to them up to so many tokens, of
# more where they are so many times the active ones (`benchmarks/dispatch.py`).
FEW_TOKENS, MANY_EXPERTS = 1024, 4


class Shape(NamedTuple):
    """The sizes of a transformer, hashable.

    Attributes:
      blocks: number of blocks.
      moe_every: a mixture in every block (1), or in every second one (2), the last of
        each two.
      width: D.
      heads: of queries; `width` is a multiple.
      kv_heads: of keys and values; `heads` is a multiple.
      expert_width: F, hidden units of an expert.
      dense_width: hidden units of blocks without a mixture.
      shared_width: hidden units of the expert that every client trains in every MoE
        layer; 0 for none.
      num_experts: E of each layer.
      vocabulary: tokens.
      gate_input: a name in `GATE_INPUTS`: each token's hidden state, or the mean of
        those so far.
      tied: whether a client holds the same experts in all blocks.
      remat: whether backward passes compute blocks again instead of keeping them.
      scan: whether the blocks are one loop over stacked params.
      linked: whether gates see links to their experts.
      platform: `cpu`, `gpu` or `tpu`; on a `cpu` experts are looped over, or see only
        what is routed to them.
    """

    blocks: int
    moe_every: int
    width: int
    heads: int
    kv_heads: int
    expert_width: int
    dense_width: int
    shared_width: int
    num_experts: int
    vocabulary: int
    gate_input: str
    tied: bool
    remat: bool
    scan: bool
    linked: bool
    platform: str


def name_blocks(shape: Shape) -> list[tuple[str, bool]]:
    """Names of the blocks, in their order and sorted; whether each has a mixture."""
    every = shape.moe_every
    return [(f"block{i:03d}", i % every == every - 1) for i in range(shape.blocks)]


def init_block(key: Array, mixes: bool, shape: Shape) -> PyTree:
    """What all clients train of one block."""
    attention, hidden = jax.random.split(key)
    width = shape.shared_width if mixes else shape.dense_width
    block = {
        "attention": init_attention(
            attention, shape.width, shape.heads, shape.kv_heads
        ),
        "norm": jnp.ones((2, shape.width)),
    }
    if width:
        block["shared"] = init_feed_forward(hidden, shape.width, width)
    return block


def init(key: Array, shape: Shape) -> tuple[PyTree, PyTree]:
    """`Model.init`."""
    table, head, *keys = jax.random.split(key, 2 + shape.blocks)
    stem = {"embedding": draw(table, shape.vocabulary, shape.width, fan_in=1)}
    gates, experts = {}, {}
    for own, (name, mixes) in zip(keys, name_blocks(shape), strict=True):
        block, gate, expert = jax.random.split(own, 3)
        stem[name] = init_block(block, mixes, shape)
        if mixes:
            gates[name] = {
                "kernel": 0.1 * draw(gate, shape.num_experts, shape.width, fan_in=1),
                "bias": jnp.zeros(shape.num_experts),
            }
            if shape.linked:  # it learns what they are worth: at first nothing
                gates[name][SNR] = jnp.zeros(shape.num_experts)
            make = functools.partial(
                init_feed_forward, width=shape.width, hidden=shape.expert_width
            )
            experts[name] = jax.vmap(make)(jax.random.split(expert, shape.num_experts))
    head = {
        "norm": jnp.ones(shape.width),
        "kernel": draw(head, shape.width, shape.vocabulary, fan_in=shape.width),
    }
    if shape.tied:
        gates, experts = {TIED: gates}, {TIED: experts}
    return {"stem": stem, "gate": gates, "experts": experts, "head": head}, {}


def run_experts(experts: PyTree, x: Array, platform: str) -> Array:
    """Outputs [T, K, D] of the held experts, leaves [K, ...], on tokens [T, D]."""
    if platform != "cpu":
        return jax.vmap(feed_forward, in_axes=(0, None), out_axes=1)(experts, x)
    # On CPU a loop is faster: vmapping batches small products.
    outputs = [feed_forward(row, x) for row in split_rows(experts)]
    return jnp.stack(outputs, axis=1)


def run_linked(
    experts: PyTree, x: Array, held: Array, links: Links, platform: str
) -> Array:
    """As `run_experts`, on tokens as each expert receives them over its link.

    Args:
      experts: of the held ones, leaves [K, ...].
      x: [B, P, D].
      held: [K] int32, their numbers.
      links: to all E experts, of each of the B windows.
      platform: see `Shape`.
    """

    def run(row: PyTree, number: Array) -> Array:
        return feed_forward(row, receive(x, links, number).reshape(-1, x.shape[-1]))

    if platform != "cpu":
        return jax.vmap(run, out_axes=1)(experts, held)
    outputs = [run(row, held[i]) for i, row in enumerate(split_rows(experts))]
    return jnp.stack(outputs, axis=1)


def see_own_links(logits: Array, gate: PyTree, links: Links) -> Array:
    """Logits [B * P, E] of a gate that sees its window's links, see `see_links`."""
    repeat = lambda leaf: jnp.repeat(leaf, len(logits) // len(leaf), axis=0)
    seen = links._replace(seen=repeat(links.seen), charge=repeat(links.charge))
    return see_links(logits, gate[SNR], seen)


def sees_routed(route: Route, count: int, tokens: int, platform: str) -> bool:
    """Whether each of `count` experts runs on the tokens that are routed to it alone.

    Where a token can meet all of them, nothing is left out; what trains some of them
    needs the outputs of each.
    """
    chooses = route.num_active < count and route.gating != "sum"
    gains = tokens <= FEW_TOKENS or count >= MANY_EXPERTS * route.num_active
    plain = route.priority is None and route.links is None
    return platform == "cpu" and chooses and gains and plain


def mix_experts(
    gate: PyTree,
    experts: PyTree,
    x: Array,
    held: Array,
    slot: Array,
    route: Route,
    shape: Shape,
) -> tuple[Array, Routing]:
    """ONE MoE layer, dropless: a held expert sees every token that is routed to it.

    Args:
      gate: `kernel` [E, D] and `bias` [E].
      experts: of the held ones, leaves [K, ...].
      x: [B, P, D], normalised hidden states.
      held: [K] int32.
      slot: [K] bool.
      route: see `Route`, of this layer.
      shape: of the model.

    Returns:
      [B, P, D], and the routing of the layer, of all B * P positions.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if shape.num_experts == 1:
        outputs = run_experts(experts, tokens, shape.platform)
        gates = jnp.ones(outputs.shape[:2])
        return outputs[:, 0].reshape(x.shape), Routing(None, gates)
    seen = average_prefix(x) if shape.gate_input == "prefix" else x
    logits = jnp.einsum("bpd,ed->bpe", seen, gate["kernel"])
    logits = logits.reshape(len(tokens), -1) + gate["bias"][None]
    if route.links is not None:
        logits = see_own_links(logits, gate, route.links)
    gates = routing.make_gates(logits[:, held], slot, route)
    routed = sees_routed(route, len(held), len(tokens), shape.platform)
    if routed and x.dtype == jnp.float32:
        mixed: Array = mix_routed(experts, tokens, gates, route.num_active)
        return mixed.reshape(x.shape), Routing(logits, gates)
    if route.links is None:
        outputs = run_experts(experts, tokens, shape.platform)
    else:
        outputs = run_linked(experts, x, held, route.links, shape.platform)
    trained = choose_trained(gates, slot, route)
    if trained is not None:
        outputs = freeze_others(outputs, trained)
    mixed = jnp.einsum("tk,tkd->td", gates.astype(x.dtype), outputs)
    return mixed.reshape(x.shape), Routing(logits, gates, trained)


class Block(NamedTuple):
    """The params of ONE block.

    Attributes:
      stem: what all clients train of it.
      layer: `gate`, `experts`, `held` [K], `slot` [K], `bias` [K] (or None) and the
        number [] of its mixture; None without.
    """

    stem: PyTree
    layer: tuple[PyTree, PyTree, Array, Array, Array | None, Array] | None


def group_blocks(
    params: PyTree, held: Array, slot: Array, route: Route, shape: Shape
) -> tuple[list[list[Block]], list[Block]]:
    """Groups of `moe_every` blocks, the last of each with a mixture, and the rest."""
    gates, experts, blocks = params["gate"], params["experts"], []
    if shape.tied:
        gates, experts = gates[TIED], experts[TIED]
    for i, (name, mixes) in enumerate(name_blocks(shape)):
        layer, place = None, 0 if shape.tied else i // shape.moe_every
        if mixes:
            slots = held[place], slot[place], route.of_layer(place).bias
            number = jnp.int32(i // shape.moe_every)
            layer = gates[name], experts[name], *slots, number
        blocks.append(Block(params["stem"][name], layer))
    every = shape.moe_every
    whole = shape.blocks - shape.blocks % every
    groups = [blocks[i : i + every] for i in range(0, whole, every)]
    return groups, blocks[whole:]


def run_block(
    block: Block, x: Array, *, route: Route, shape: Shape
) -> tuple[Array, Routing | None]:
    """ONE block on hidden states [B, P, D], and the routing of its mixture."""
    stem, decision = block.stem, None
    x = x + attend(stem["attention"], normalise(x, stem["norm"][0]))
    hidden = normalise(x, stem["norm"][1])
    if "shared" in stem:
        x = x + feed_forward(stem["shared"], hidden)
    if block.layer is not None:
        gate, experts, held, slot, bias, number = block.layer
        route = route._replace(bias=bias)
        if route.links is not None:  # each layer sends anew, with noise of its own
            key = jax.vmap(jax.random.fold_in, (0, None))(route.links.key, number)
            route = route._replace(links=route.links._replace(key=key))
        mixed, decision = mix_experts(gate, experts, hidden, held, slot, route, shape)
        x = x + mixed
    return x, decision


RunBlock = Callable[[Block, Array], tuple[Array, Routing | None]]


def run_group(run: RunBlock, x: Array, group: list[Block]) -> tuple[Array, Routing]:
    """ONE group of blocks, and the routing of the last one."""
    decision = None
    for block in group:
        x, decision = run(block, x)
    assert decision is not None
    return x, decision


def stack(trees: Sequence[PyTree]) -> PyTree:
    """One tree of leaves [n, ...] from n of them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def loop_groups(
    run: RunBlock, groups: list[list[Block]], x: Array
) -> tuple[Array, Routing]:
    """All groups, each compiled by itself, and their routing, leaves [G, ...]."""
    layers = []
    for group in groups:
        x, decision = run_group(run, x, group)
        layers.append(decision)
    return x, stack(layers)


def scan_groups(
    run: RunBlock, groups: list[list[Block]], x: Array
) -> tuple[Array, Routing]:
    """As `loop_groups`, as one loop over stacked params: it compiles one group."""
    return jax.lax.scan(functools.partial(run_group, run), x, stack(groups))


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
    head = params["head"]
    run = functools.partial(run_block, route=route, shape=shape)
    run = jax.checkpoint(run) if shape.remat else run
    groups, rest = group_blocks(params, held, slot, route, shape)
    x = params["stem"]["embedding"][batch["tokens"]]
    x, layers = (scan_groups if shape.scan else loop_groups)(run, groups, x)
    for block in rest:
        x, _ = run(block, x)
    hidden = normalise(x, head["norm"])
    outputs: Array = einsum_float32("bpd,dv->bpv", hidden, head["kernel"])
    return outputs, join_tied(layers) if shape.tied else layers


def join_tied(joined: Routing) -> Routing:
    """The routing of tied layers [G, ...] as that of one.

    Logits are those of all blocks one after the other, so that losses of the gates are
    their mean over blocks; gates are their mean.

    Raises:
      UserError: the strategy trains some of the held experts, block by block.
    """
    if joined.trained is not None:
        raise UserError(
            "model.tied=True is not allowed with a strategy that trains some of the "
            "held experts on a batch; allowed: False"
        )
    logits = joined.logits
    if logits is not None:
        logits = logits.reshape(1, -1, logits.shape[-1])
    return Routing(logits, joined.gates.mean(axis=0, keepdims=True))


HIDDEN = (("gate", 1), ("up", 1), ("down", 0))  # leaves of a hidden layer, and axes


def list_units(shape: Shape) -> tuple[Units, ...]:
    """The hidden units of the stem's blocks and of an expert, see `base.Units`."""

    def hidden(name: str, part: str, count: int, *path: str) -> Units:
        leaves = tuple(((*path, leaf), axis) for leaf, axis in HIDDEN)
        return Units(name, part, count, leaves)

    blocks = name_blocks(shape)
    width = lambda mixes: shape.shared_width if mixes else shape.dense_width
    stem = tuple(
        hidden(name, "stem", width(mixes), name, "shared")
        for name, mixes in blocks
        if width(mixes)
    )
    if not shape.tied:
        return *stem, hidden("expert", "experts", shape.expert_width)
    parts = [name for name, mixes in blocks if mixes]
    return *stem, *(
        hidden(f"expert_{name}", "experts", shape.expert_width, name) for name in parts
    )


@functools.cache
def build_model(shape: Shape) -> Model:
    """The model of these sizes; equal sizes give the same functions."""
    return Model(
        init=functools.partial(init, shape=shape),
        apply=functools.partial(apply, shape=shape),
        units=list_units(shape),
    )


def check_shape(shape: Shape) -> None:
    """Raises UserError unless heads divide and some block has a mixture.

    Also for links to experts that are in several blocks.
    """
    if shape.linked and shape.tied:
        raise UserError(
            "model.tied=True is not allowed with links to experts (expert_links.kind); "
            "allowed: False"
        )
    rules = (
        ("model.heads", shape.heads, "model.stem_width", shape.width),
        ("model.kv_heads", shape.kv_heads, "model.heads", shape.heads),
    )
    for name, value, of, whole in rules:
        if whole % value:
            raise UserError(
                f"{name}={value} is not allowed; allowed: divisors of {of}={whole}"
            )
    if shape.width // shape.heads % 2:
        raise UserError(
            f"model.heads={shape.heads} is not allowed with model.stem_width="
            f"{shape.width}; allowed: heads of an even number of units"
        )
    if shape.blocks < shape.moe_every:
        raise UserError(
            f"model.blocks={shape.blocks} is not allowed with model.moe_every="
            f"{shape.moe_every}; allowed: >= {shape.moe_every}"
        )


def build(config: ConfigDict, batch: PyTree, num_outputs: int, platform: str) -> Model:
    """The model of a config; equal configs give the same functions.

    Args:
      config: gives `num_experts`, `gate.input` and the group `model`.
      batch: shapes of a batch with `tokens` [B, P].
      num_outputs: the vocabulary.
      platform: that it will run on, `cpu`, `gpu` or `tpu`, or `layers.ANY`.

    Raises:
      UserError: the batch has no tokens, or sizes do not fit each other.
    """
    if "tokens" not in batch:
        raise UserError(
            f"model.kind={config.model.kind!r} is not allowed with data without tokens "
            f"(they have {', '.join(batch)}); allowed: image_moe"
        )
    options = config.model
    for field in ("stem_dropout", "expert_dropout"):
        if options[field]:
            raise UserError(
                f"model.{field}={options[field]:g} is not allowed with model.kind="
                f"{options.kind!r}, which drops nothing; allowed: 0"
            )
    shape = Shape(
        blocks=options.blocks,
        moe_every=options.moe_every,
        width=options.stem_width,
        heads=options.heads,
        kv_heads=options.kv_heads,
        expert_width=options.expert_width,
        dense_width=options.dense_width,
        shared_width=options.shared_width,
        num_experts=config.num_experts,
        vocabulary=num_outputs,
        gate_input=config.gate.input,
        tied=options.tied,
        remat=options.remat,
        scan=options.scan,
        linked=config.expert_links.kind != "none",
        platform=platform,
    )
    check_shape(shape)
    return build_model(shape)
