"""Parts of a comparison, each for a process of its own: `--only=3/8` is the third."""

import re
from collections.abc import Hashable, Sequence

from ml_collections import ConfigDict

from fedmoe_jax.config import list_options
from fedmoe_jax.options import STATIC, TRACED, UserError, show
from fedmoe_jax.runtime.files import flatten
from fedmoe_jax.strategies import find_strategy, traits
from fedmoe_jax.train.plan import Member

# Groups of fields that describe the clients, of which only static ones are compiled.
OF_CLIENTS = ("seed", "strategy", "partition.", "devices.")

Part = tuple[int, int]  # its number from 1 on, and how many there are
WHOLE: Part = (1, 1)


def parse_part(text: str) -> Part:
    """`3/8` as numbers.

    Raises:
      UserError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        many = parts if parts > 1 else 8
        raise UserError(
            f"--only={show(text)[1:-1]} is not allowed; allowed: PART/PARTS, as "
            f"1/{many} to {many}/{many}"
        )
    return part, parts


def name_part(part: Part) -> str:
    """The part as the flag that asks for it."""
    return "--only={}/{}".format(*part)


def take_part(members: Sequence[Member], part: Part) -> list[Member]:
    """The members of one part, in their order.

    Every member is in one part, and parts are about equally much work; runs that share
    a program are in few parts. A part is empty only where there are fewer members than
    parts. Machines and what is finished change nothing.
    """
    number, parts = part
    chosen = {
        member.name for member in cut_evenly(sort_members(members), parts)[number - 1]
    }
    return [member for member in members if member.name in chosen]


def sort_members(members: Sequence[Member]) -> list[Member]:
    """Members in an order in which runs that share a program are neighbours."""
    programs = [guess_program(member.config) for member in members]
    strategies = [member.config.strategy for member in members]
    place = lambda at: (
        programs.index(programs[at]),
        strategies.index(strategies[at]),
    )
    return [members[at] for at in sorted(range(len(members)), key=place)]


def guess_program(config: ConfigDict) -> Hashable:
    """Equal for runs that share a program, as far as a config says without its data."""
    strategy = find_strategy(config.strategy)
    configured = strategy.configure(ConfigDict(config.to_dict()))
    values, options = flatten(configured.to_dict()), list_options()
    fixed = {
        name: str(values[name])
        for name, option in options.items()
        if option.scope == STATIC
        or (option.scope != TRACED and not name.startswith(OF_CLIENTS))
    }
    return traits(strategy), tuple(sorted(fixed.items()))


def measure_work(config: ConfigDict) -> float:
    """The work of a run in examples that its clients train on, > 0."""
    passes = config.local_epochs or config.local_steps
    return config.num_rounds * config.cohort_size * passes * config.batch_size


def cut_evenly(members: Sequence[Member], parts: int) -> list[list[Member]]:
    """Cuts a sequence into `parts` pieces of about equal work, the last ones empty."""
    works = [measure_work(member.config) for member in members]
    pieces, start = [], 0
    for left in range(parts, 0, -1):
        share, most = sum(works[start:]) / left, len(members) - left + 1
        end, work = min(start + 1, len(members)), sum(works[start : start + 1])
        while end < most and abs(work + works[end] - share) < abs(work - share):
            work, end = work + works[end], end + 1
        end = len(members) if left == 1 else end
        pieces.append(list(members[start:end]))
        start = end
    return pieces
