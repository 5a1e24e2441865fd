"""The models. One table names them all."""

from collections.abc import Callable

from fedmoe_jax.base import Model
from fedmoe_jax.models import finetune, image_moe, lora, transformer

# (config, shapes of a batch, width of the outputs, platform) -> model; the config is as
# the strategy configures it. Equal arguments must give the same functions, as runs
# share compiled programs by them. The platform is that of the devices, or `layers.ANY`
# for the model whose FLOPs are counted.
MODELS: dict[str, Callable[..., Model]] = {
    "image_moe": image_moe.build,
    "transformer": transformer.build,
    "lora": lora.build,
    "finetune": finetune.build,
}
