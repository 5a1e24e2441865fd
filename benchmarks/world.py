"""The cost of the world: rounds of 1,000 clients with its processes against without.

    python -m benchmarks.world

Drop-out and lost updates change what is averaged, not what is computed: every client of
the cohort is trained in both.
"""

import statistics

import jax

from benchmarks import page
from benchmarks.start import (
    Started,
    keep_running,
    make_config,
    make_images,
    share_out,
    start,
    time_interleaved,
)
from fedmoe_jax.runtime.xla import keep_host, set_cpu_devices

CLIENTS, REPETITIONS, CNN_REPETITIONS = 1_000, 15, 5
CHUNK = 250  # clients vmapped at once, on accelerators
FIELDS = {
    "num_clients": CLIENTS,
    "cohort_size": CLIENTS,
    "chunk_rounds": 1,
    "eval_every": 1,
}
DEVICES = {
    "devices.overload": "lose",
    "late.kind": "drop",
    "profile.kind": "estimated",
    "pressure.share": 0.3,
    "background.most": 0.5,
    "bandwidth.spread": 0.3,
    "availability.share": 0.8,
    "availability.persistence": 0.5,
    "availability.swing": 0.2,
    "availability.dropout": 0.2,
    "channel.kind": "wireless",
    "channel.csi": 0.9,
    "channel.backoff": 0.8,
    "reaction.kind": "hasten",
}
DRIFT = {"drift.start": 0, "drift.rounds": 30}
LABELS = DEVICES | DRIFT | {"drift.labels": 1.0}
EVERYTHING = LABELS | {"late.kind": "stale", "drift.images": "rotate"}
CASES = {
    "nothing": {},
    "devices, availability, channel, estimates, detector": DEVICES,
    "the same and label drift": LABELS,
    "the same, stale updates and images that rotate": EVERYTHING,
    "stale updates": {"late.kind": "stale"},
    "images that rotate": DRIFT | {"drift.images": "rotate"},
    "images that blur": DRIFT | {"drift.images": "blur", "drift.strength": 1.0},
    "images that fade": DRIFT | {"drift.images": "contrast", "drift.strength": 0.5},
}
NOTHING, ALL_DEVICES, ALL, BLUR = (list(CASES)[case] for case in (0, 2, 3, 6))
DIGITS, CIFAR10 = (8, 8, 1), (32, 32, 3)
# The network of the CIFAR-10 studies.
CNN = {"model.stem": "cnn", "model.stem_width": 32, "model.expert_width": 128}
ONE_STEP = CNN | {"local_steps": 1}


def start_with(changes: dict, shape: tuple[int, int, int]) -> Started:
    """The default study's model, but for the changes, on noise of this shape."""
    data = make_images(20_000, shape, 10)
    partition = share_out(CLIENTS, 20, 20_000, 10)
    chunk = 1 if jax.default_backend() == "cpu" else CHUNK
    config = make_config(**FIELDS, **changes, **{"run.client_chunk": chunk})
    return start(config, data, partition, jax.device_count())


def time_cases(
    cases: dict[str, dict], shape: tuple[int, int, int], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a round in each case, and times as long as with nothing."""
    runs = {
        name: keep_running(start_with(changes, shape))
        for name, changes in cases.items()
    }
    time_interleaved(runs, 2)
    seconds = time_interleaved(runs, repetitions)
    ratios = {
        name: [a / b for a, b in zip(values, seconds[NOTHING], strict=True)]
        for name, values in seconds.items()
    }
    return seconds, ratios


def table_of(seconds: dict[str, list[float]], ratios: dict[str, list[float]]) -> str:
    """One row for each case."""
    heads = ("what is on", "seconds a round", "times as long, same repetition")
    rows = [
        (name, page.spread(seconds[name]), page.spread(ratios[name]))
        for name in seconds
    ]
    return page.table(heads, rows)


def add_network(names: tuple[str, ...], network: dict) -> dict[str, dict]:
    """Some of the cases with another network."""
    return {name: CASES[name] | network for name in names}


def main() -> None:
    set_cpu_devices(0)
    keep_host()
    names = NOTHING, ALL_DEVICES, ALL, BLUR
    small = time_cases(CASES, DIGITS, REPETITIONS)
    large = time_cases(add_network(names, CNN), CIFAR10, CNN_REPETITIONS)
    short = time_cases(add_network(names, ONE_STEP), CIFAR10, CNN_REPETITIONS)
    middle = lambda timed, case: statistics.median(timed[1][case])
    body = "\n\n".join(
        [
            f"Rounds of {CLIENTS:,} clients, all in the cohort, with the small network "
            "of the default study, which leaves the world little to hide behind. With "
            "everything that happens to devices, links and labels a round takes "
            f"**{middle(small, ALL_DEVICES):.3f}** times as long as with nothing, with "
            "stale updates and rotating images besides "
            f"**{middle(small, ALL):.3f}** times. Drifting images are work for every "
            "image.",
            table_of(*small),
            "With the network of the CIFAR-10 studies, images of 32 x 32 x 3 and five "
            "steps of training a round, the default, everything takes "
            f"**{middle(large, ALL):.3f}** times as long as nothing.",
            table_of(*large),
            "With a single step, the least that a round can have: "
            f"**{middle(short, ALL):.3f}** times.",
            table_of(*short),
        ]
    )
    print(body)
    page.write_section("world", "The world", "python -m benchmarks.world", body)


if __name__ == "__main__":
    main()
