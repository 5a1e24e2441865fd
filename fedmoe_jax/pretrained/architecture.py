"""What a pretrained decoder computes, from the `config.json` of its folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.files import read_json

EPSILON, BASE = 1e-6, 10_000.0  # where a config leaves them out


class Rope(NamedTuple):
    """Rotary positions.

    Attributes:
      base: of the wavelengths.
      kind: `default`, `linear`, or `llama3`, which stretches long wavelengths alone.
      factor: by which positions are compressed.
      low: wavelengths above `context / low` are stretched by the whole factor.
      high: those below `context / high` are left as they are.
      context: positions that the model was first trained on.
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 0


class Mixture(NamedTuple):
    """The mixtures of a decoder.

    Attributes:
      experts: E of each.
      active: A, of each token.
      width: hidden units of an expert.
      normalised: whether the gates of the A chosen experts sum to 1; else they are the
        largest of the softmax over all.
      shared_width: hidden units of the expert that sees every token, whose outputs a
        gate of its own scales; 0 without one.
    """

    experts: int
    active: int
    width: int
    normalised: bool
    shared_width: int = 0


class Architecture(NamedTuple):
    """A pretrained decoder, hashable.

    Attributes:
      family: `model_type` of its config.
      width: D.
      heads: of queries.
      kv_heads: of keys and values; `heads` is a multiple.
      head_width: numbers of a head.
      hidden_width: hidden units of blocks without a mixture.
      vocabulary: tokens.
      epsilon: of a mean square in norms.
      rope: rotary positions.
      biased: the projections of attention that have a bias, of `query`, `key`, `value`
        and `out`.
      norm_of: what queries and keys are normalised over: `head`, `all` heads or ``.
      tied: whether the head is the embedding.
      mixture: of the blocks that have one; None without any.
      mixes: of every block, whether it has a mixture.
      window: positions that attention sees, at most; 0 for all.
    """

    family: str
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden_width: int
    vocabulary: int
    epsilon: float
    rope: Rope
    biased: tuple[str, ...]
    norm_of: str
    tied: bool
    mixture: Mixture | None
    mixes: tuple[bool, ...]
    window: int = 0


QKV = ("query", "key", "value")
Fields = Mapping[str, Any]


class Family(NamedTuple):
    """What a `model_type` fixes.

    Attributes:
      biased: config -> projections of attention with a bias.
      norm_of: see `Architecture`.
      mixture: config -> its mixture; None without.
    """

    biased: Callable[[Fields], tuple[str, ...]]
    norm_of: str = ""
    mixture: Callable[[Fields], Mixture] | None = None


def read_mixtral(fields: Fields) -> Mixture:
    """Of `mixtral`, whose experts are as wide as hidden layers."""
    return Mixture(
        experts=fields["num_local_experts"],
        active=fields["num_experts_per_tok"],
        width=fields["intermediate_size"],
        normalised=True,
    )


def read_mixture(fields: Fields) -> Mixture:
    """Of the other families with one."""
    return Mixture(
        experts=fields["num_experts"],
        active=fields["num_experts_per_tok"],
        width=fields.get("moe_intermediate_size") or fields["intermediate_size"],
        normalised=bool(fields.get("norm_topk_prob", False)),
        shared_width=fields.get("shared_expert_intermediate_size") or 0,
    )


def as_configured(fields: Fields) -> tuple[str, ...]:
    """All projections where `attention_bias` is set, else none."""
    return (*QKV, "out") if fields.get("attention_bias") else ()


FAMILIES = {
    "llama": Family(as_configured),
    "mistral": Family(lambda fields: ()),
    "qwen2": Family(lambda fields: QKV),
    "qwen3": Family(as_configured, norm_of="head"),
    "mixtral": Family(lambda fields: (), mixture=read_mixtral),
    "olmoe": Family(as_configured, norm_of="all", mixture=read_mixture),
    "qwen2_moe": Family(
        lambda fields: QKV if fields.get("qkv_bias", True) else (),
        mixture=read_mixture,
    ),
    "qwen3_moe": Family(as_configured, norm_of="head", mixture=read_mixture),
}
# Fields that would change what is computed, and the values that leave it as it is here.
PLAIN = {
    "hidden_act": ("silu", "swish"),
    "clip_qkv": (None,),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
WINDOWED = ("mistral", "mixtral")  # whose `sliding_window` counts by itself
FULL = "full_attention"  # of `layer_types`
ROPES = ("default", "linear", "llama3")


def read_rope(fields: Fields, where: str) -> Rope:
    """Rotary positions, of the fields of either generation of configs.

    Raises:
      UserError: their kind is unknown.
    """
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or fields.get("rope_theta") or BASE
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(
            f"{where}: rope_parameters differ between layers; allowed: one kind for all"
        )
    if kind not in ROPES:
        raise UserError(
            f"{where}: rope_scaling of type {show(kind)} is unknown; allowed: "
            f"{', '.join(ROPES)}"
        )
    if kind == "default":
        return Rope(float(base))
    if kind == "linear":
        return Rope(float(base), kind, float(scaling["factor"]))
    return Rope(
        float(base),
        kind,
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def list_mixing(fields: Fields, family: Family) -> tuple[bool, ...]:
    """Of every block, whether it has a mixture."""
    every, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers")
    return tuple(
        family.mixture is not None
        and layer not in (dense or ())
        and (layer + 1) % every == 0
        for layer in range(fields["num_hidden_layers"])
    )


def check_plain(fields: Fields, where: str) -> None:
    """Raises UserError where a field asks for what is not computed here."""
    for name, allowed in PLAIN.items():
        value = fields.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"{where}: {name}={show(value)} is not allowed; allowed: "
                f"{', '.join(map(str, allowed))}"
            )
    others = {*(fields.get("layer_types") or ())} - {FULL}
    if others:
        raise UserError(
            f"{where}: layer_types has {show(min(map(str, others)))}; allowed: {FULL}"
        )


def make_architecture(fields: Fields, where: str) -> Architecture:
    """The architecture of a config.

    Args:
      fields: of `config.json`.
      where: its name in messages.

    Raises:
      UserError: it is of an unknown family, or a field is missing or not supported.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={show(kind)} is unknown; allowed: "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    try:
        check_plain(fields, where)
        heads, width = fields["num_attention_heads"], fields["hidden_size"]
        mixes = list_mixing(fields, family)
        return Architecture(
            family=kind,
            width=width,
            heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads,
            head_width=fields.get("head_dim") or width // heads,
            hidden_width=fields["intermediate_size"],
            vocabulary=fields["vocab_size"],
            epsilon=float(fields.get("rms_norm_eps", EPSILON)),
            rope=read_rope(fields, where),
            biased=family.biased(fields),
            norm_of=family.norm_of,
            tied=bool(fields.get("tie_word_embeddings", False)),
            mixture=family.mixture(fields) if family.mixture else None,
            mixes=mixes,
            window=int(fields.get("sliding_window") or 0) * (kind in WINDOWED),
        )
    except KeyError as error:
        raise UserError(
            f"{where}: {error.args[0]} is missing; allowed: the fields of a {kind} "
            "config"
        ) from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} has a field of another kind ({error}); allowed: the fields of a "
            f"{kind} config"
        ) from None


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a folder.

    Raises:
      UserError: it has no readable `config.json`; see `make_architecture`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"model.base={show(str(folder))} has no config.json; allowed: a folder of "
            "a pretrained model, with config.json and *.safetensors"
        )
    return make_architecture(read_json(path), str(path))
