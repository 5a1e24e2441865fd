"""Hidden units and channels of the image models' parts, which pruning can leave out."""

from fedmoe_jax.base import Units

Leaf = tuple[tuple[str, ...], int]


def _kernel(layer: str, axis: int) -> Leaf:
    return (layer, "kernel"), axis


def _bias(layer: str) -> Leaf:
    return (layer, "bias"), 0


def _norm(layer: str) -> tuple[Leaf, Leaf]:
    return ((layer, "scale"), 0), ((layer, "bias"), 0)


def list_expert_units(expert: str, width: int) -> tuple[Units, ...]:
    """The units of one expert, a name in `image_parts.EXPERTS`."""
    outputs = _kernel("Dense_0", 0)  # of the second layer, a row for each unit
    leaves = {
        "mlp": (_kernel("Dense_1", 1), _bias("Dense_1"), outputs),
        "dense": (_kernel("Dense_0", 1), _bias("Dense_0")),
        "conv": (_kernel("Conv_0", 3), *_norm("norm"), outputs),
    }
    return (Units("expert", "experts", width, leaves[expert]),)


def list_stem_units(stem: str, width: int) -> tuple[Units, ...]:
    """The units of a stem, a name in `image_parts.STEMS`, layer by layer.

    Of ResNet-8 the channels between the two convolutions of each block: all others are
    added to what passes the block by.
    """
    wide = 8 * width // 3
    layers = {
        "flat": (),
        "mlp": (
            (width, (_kernel("Dense_0", 1), _bias("Dense_0"), *_norm("LayerNorm_0"))),
        ),
        "cnn": (
            (width, (_kernel("Conv_0", 3), *_norm("norm1"), _kernel("Conv_1", 2))),
            (2 * width, (_kernel("Conv_1", 3), *_norm("norm2"))),
        ),
        "simple_cnn": (
            (width, (_kernel("Conv_0", 3), _bias("Conv_0"), _kernel("Conv_1", 2))),
            (2 * width, (_kernel("Conv_1", 3), _bias("Conv_1"))),
        ),
        "lenet": (
            (width, (_kernel("Conv_0", 3), _bias("Conv_0"), _kernel("Conv_1", 2))),
            (wide, (_kernel("Conv_1", 3), _bias("Conv_1"), _kernel("Dense_0", 0))),
            (20 * width, (_kernel("Dense_0", 1), _bias("Dense_0"))),
        ),
        "resnet8": tuple(
            (
                2**block * width,
                (
                    _kernel(f"Conv_{2 * block + 1}", 3),
                    *_norm(f"norm{block}a"),
                    _kernel(f"Conv_{2 * block + 2}", 2),
                ),
            )
            for block in range(3)
        ),
    }
    return tuple(
        Units(f"stem{i}", "stem", count, leaves)
        for i, (count, leaves) in enumerate(layers[stem])
    )
