"""What do assignments leak, and what does hiding them cost? Attacks over epsilon.

    python launch.py --config=configs/privacy.py:digits --workdir=runs/privacy
    python -m fedmoe_jax.attack runs/privacy --workdir=runs/privacy_attacks
    python launch.py --config=configs/privacy.py:members,digits --workdir=runs/members
    python -m fedmoe_jax.attack runs/members --workdir=runs/members_attacks
    python launch.py --config=configs/privacy.py:groups,digits \\
      --settings=results/regimes_permuted/settings.json --workdir=runs/privacy_groups
    python -m fedmoe_jax.attack runs/privacy_groups --workdir=runs/groups_attacks

Every run is observed: the first command writes the usual report, the second attacks
what a listener on the link or the server has seen, and prints attacks beside accuracy,
load CV and expert-label information. `random` leaks nothing by its assignments,
`greedy` and `load_balanced` follow the clients' feedback, `flex_moe` couples clients by
load bounds, `fedavg_active` has no assignment at all. Feedback is the relative probe,
by which assignments follow data; that of training accuracy, by which they hardly do, is
there for comparison. Over a range of strengths each: noisy feedback, private selection,
randomised requests with cover traffic, and clipped, noisy sums of updates (DP-FedAvg);
and all of them at once for `greedy`. Half of each client's examples are its own test
set, so that an example is trained on in about half of the seeds, as LiRA's shadows need
it. `digits` is on the embedded digits, 50 clients that all take part; else it is on
CIFAR-10, 20 of 50 clients a round, with the rows that decide. `members` has 20 seeds,
thus 19 shadows, of the rows without a defence and of clipped sums with a little noise.

`groups` asks the same where an assignment by data pays: labels mean something else in
each of four groups of clients, which have all labels equally often, and attacks look
for a client's group; the rates are those of the recipe there. Feedback is the probe,
and gates have no bias, since that would send fitness along, but in some rows with noisy
feedback, of which it then is, and in one without a defence to compare these with. All
20 clients take part, and nothing is set aside, so that no member is looked for. There
are training alone, and `prototypes`, whose messages no defence covers, too. `smoke` is
short. docs/privacy.md says what each attacker knows and what is guaranteed.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import compare, default

STRATEGIES = ("random", "greedy", "load_balanced", "flex_moe", "fedavg_active")
READERS = ("greedy", "load_balanced", "flex_moe")  # of the clients' feedback
FEEDBACK = tuple(f"privacy.feedback_noise={s}" for s in (0.1, 1.0, 10.0, 30.0))
SELECTION = tuple(f"privacy.selection={e}" for e in (100.0, 10.0, 1.0, 0.1))
REQUESTS = tuple(f"privacy.flip={e}" for e in (3.0, 1.0, 0.1))
BOUND = "privacy.clip=1.0"
UPDATES = tuple(f"{BOUND},privacy.noise={z}" for z in (0.0, 0.1, 1.0, 3.0, 10.0))
EVERYTHING = (
    "greedy: privacy.feedback_noise=0.3,privacy.selection=10.0,privacy.flip=1.0,"
    f"{BOUND},privacy.noise=0.1"
)
# A run on CIFAR-10 takes minutes: the strengths that hide assignments on the digits.
DECISIVE = (
    "",
    "greedy: fitness.feedback=accuracy",
    "greedy: privacy.feedback_noise=10.0",
    "greedy: privacy.selection=1.0",
    "greedy: privacy.flip=0.1",
    f"greedy: {BOUND},privacy.noise=0.1",
    f"fedavg_active: {BOUND},privacy.noise=0.1",
)
IN_GROUPS = ("random", "greedy", "load_balanced", "prototypes")
ALONE = ("fedavg_active", "local_active")
BIASED = "gate.bias=5.0"


def of_each(strategies: Sequence[str], changes: Sequence[str]) -> tuple[str, ...]:
    """Every change for each of some strategies alone."""
    return tuple(f"{name}: {change}" for change in changes for name in strategies)


def list_changes() -> tuple[str, ...]:
    """Every defence over a range of strengths, for the strategies that it concerns."""
    return (
        "",
        *of_each(READERS, ("fitness.feedback=accuracy",)),
        *of_each(("random", *READERS), FEEDBACK),
        *of_each(READERS, (*SELECTION, *REQUESTS)),
        *UPDATES,
        EVERYTHING,
    )


def set_groups(config: ConfigDict, *, digits: bool) -> None:
    """Groups that call things by other names, and the defences of assignments."""
    config.partition.kind, config.groups.kind = "iid", "permuted"
    config.partition.test_share, config.partition.validation_share = 0.0, 0.0
    config.fitness.feedback, config.loss.calibration = "probe", 1.0
    config.num_clients = config.cohort_size = 20
    config.compare.strategies = (*IN_GROUPS, *ALONE)
    readers = ("greedy", "load_balanced")
    config.compare.changes = (
        "",
        *of_each(readers, (*FEEDBACK, *SELECTION, *REQUESTS)),
        *of_each((*readers, "fedavg_active"), (f"{BOUND},privacy.noise=0.1",)),
        *of_each(("load_balanced",), (BIASED, *(f"{BIASED},{f}" for f in FEEDBACK))),
    )
    if not digits:
        hidden = FEEDBACK[2], SELECTION[2], REQUESTS[2], f"{BOUND},privacy.noise=0.1"
        config.compare.changes = ("", *of_each(("load_balanced",), hidden))


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins `groups` or `members`, `digits` and `smoke`."""
    groups, argument = compare.take_word(argument, "groups")
    members, own = False, ["groups"]
    if not groups:  # where nobody looks for members
        members, argument = compare.take_word(argument, "members")
        own.append("members")
    words = argument.split(",")
    config = compare.get_config(argument, own)
    config.privacy.observe, config.fitness.feedback = True, "relative_probe"
    config.partition.test_share, config.partition.validation_share = 0.5, 0.1
    config.partition.min_size, config.num_clients, config.cohort_size = 6, 50, 50
    config.compare.strategies, config.compare.seeds = STRATEGIES, tuple(range(5))
    config.compare.changes = list_changes()
    config.evaluation.baseline = ""
    if "digits" not in words:
        config.cohort_size = 20
        config.num_rounds, config.local_steps = 100, 10
        config.eval_every, config.checkpoint.every = 20, 20
        config.chunk_rounds = 5
        config.compare.changes, config.compare.seeds = DECISIVE, (0, 1, 2)
    if members:
        config.compare.changes = "", f"{BOUND},privacy.noise=0.1"
        config.compare.seeds = tuple(range(20))
    if groups:
        set_groups(config, digits="digits" in words)
    if "smoke" in words:
        default.shrink(config)
        config.compare.strategies = "random", "greedy"
        config.compare.seeds = (0, 1, 2)
        config.compare.changes = "", "privacy.flip=1.0"
    return config
