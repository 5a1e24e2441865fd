"""The tasks: what a batch is and what a good output is. One table names them all."""

from fedmoe_jax.base import Task
from fedmoe_jax.options import UserError
from fedmoe_jax.tasks.images import IMAGES
from fedmoe_jax.tasks.text import TEXT

TASKS: dict[str, Task] = {"images": IMAGES, "text": TEXT}


def list_augments() -> tuple[str, ...]:
    """`none`, and the augmentations of all tasks, those of plug-ins too."""
    augments = (augment for task in TASKS.values() for augment in task.augments)
    return "none", *dict(augments)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}")
    return TASKS[name]
