"""Parts of a comparison: all of it, once, about equally much work."""

import pytest
from factories import tiny_study

from fedmoe_jax.options import UserError
from fedmoe_jax.train.compare import list_members
from fedmoe_jax.train.parts import (
    cut_evenly,
    measure_work,
    parse_part,
    sort_members,
    take_part,
)
from fedmoe_jax.train.plan import plan_waves


def names_of(members):
    return [member.name for member in members]


@pytest.mark.parametrize("text", ["9/8", "0/8", "x", "", "1/0", "-1/2", "1.0/2", "3"])
def test_parse_part_refuses_what_is_no_part(text):
    with pytest.raises(UserError, match=f"^--only={text} is not allowed; allowed: PA"):
        parse_part(text)


def test_parse_part():
    assert parse_part("3/8") == (3, 8) and parse_part("1/1") == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 11, 12, 13, 40])
def test_every_member_is_in_one_part(parts):
    changes = ("", "num_rounds=40", "local_steps=9")
    members = list_members(tiny_study(("random", "fedavg"), changes, (0, 1)))
    taken = [take_part(members, (number, parts)) for number in range(1, parts + 1)]
    names = [name for part in taken for name in names_of(part)]
    assert sorted(names) == sorted(names_of(members))
    place = names_of(members).index
    assert all(part == sorted(part, key=place) for part in map(names_of, taken))
    assert sum(not part for part in taken) == max(0, parts - len(members))


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (7, 7), (5, 3), (24, 5)])
def test_equal_runs_are_divided_evenly(count, parts):
    members = list_members(tiny_study(("random",), seeds=tuple(range(count))))
    sizes = [len(piece) for piece in cut_evenly(members, parts)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_a_long_run_has_a_part_for_itself():
    changes = ("", "num_rounds=40")  # ten times as long
    members = list_members(tiny_study(("random",), changes, (0,)))
    members += list_members(tiny_study(("greedy",), seeds=(0, 1, 2)))
    works = [measure_work(member.config) for member in members]
    assert works[1] == 10 * works[0]
    parts = [take_part(members, (number, 2)) for number in (1, 2)]
    assert ["random-num_rounds=40-seed0"] in map(names_of, parts)


@pytest.mark.slow
def test_runs_that_share_a_program_are_neighbours():
    """The guess from configs alone is what the plans say."""
    strategies = ("fedavg", "random", "greedy", "fedprox")
    changes = ("num_experts=4", "", "partition.alpha=0.5", "fitness.rate=0.5")
    members = list_members(tiny_study(strategies, changes, (0,)))
    order = names_of(sort_members(members))
    for wave in plan_waves(members):
        places = sorted(order.index(name) for name in wave.names)
        assert places == list(range(places[0], places[-1] + 1))
