"""Every field of a config has a row that says what it allows."""

import itertools

from fedmoe_jax.config import list_options
from fedmoe_jax.configs import default
from fedmoe_jax.fields import AT_MOST, FREE_FIELDS, LISTS, MULTIPLE
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import STRATEGIES

# Checked where they are used: a name by `find_strategy`, paths by the loaders, a pair
# of lists by `draw_devices`; plug-ins by `check_plugins`; flags by ConfigDict, which
# keeps their type.
CHECKED_ELSEWHERE = {
    "strategy",
    "tuned",
    "data.name",
    "data.dir",
    "data.file",
    "data.image_key",
    "data.label_key",
    "data.text_key",
    "data.tokenizer",
    "evaluation.targets",
    "evaluation.baseline",
    "devices.tiers",
    "devices.shares",
}
CHECKED_ELSEWHERE |= {
    "model.remat",
    "model.scan",
    "model.base",
    "model.lora_fixed",
    "model.tied",
    "run.tensorboard",
    "evaluation.finetune",
    "privacy.observe",
    "devices.csv",
    "plugins",
}


def test_every_field_is_checked():
    fields, options = set(flatten(default.get_config().to_dict())), list_options()
    assert set(options) == fields
    checked = {name for name, option in options.items() if option.allowed is not None}
    assert fields - checked == CHECKED_ELSEWHERE
    lists = {f"compare.{name}" for name in LISTS}
    lists |= {f"tune.{name}" for name in ("rates", "servers", "measure")}
    assert FREE_FIELDS - fields == lists
    of_strategies = (strategy.at_most for strategy in STRATEGIES.values())
    pairs = (*AT_MOST, *MULTIPLE, *itertools.chain(*of_strategies))
    related = {name for pair in pairs for name in pair}
    assert related <= checked
