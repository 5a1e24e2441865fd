"""Can assignment and gating use the channel? Two comparisons in a wireless world.

    python launch.py --config=configs/channel.py:digits --workdir=runs/channel
    python launch.py --config=configs/channel.py:gate,digits --workdir=runs/gate
    python launch.py --config=configs/channel.py --workdir=runs/channel_cifar
    python launch.py --config=configs/channel.py:gate --workdir=runs/gate_cifar

*Assignment*: clients in a radio cell whose updates are dropped past the deadline. The
data alone decide (`load_balanced`), the channel alone (`channel_only`), or both
(`channel_aware`), with profiles that do not see the channel; errors of the channel's
measurement, stale measurements of a slow and a fast channel, shorter and longer
deadlines, one at a time; then without a price of time and with a high one, with
profiles that see the channel, with pruned experts, which differ in size, and with
probes as feedback. Read
accuracies at equal simulated time and energy, costs to target accuracies, outage, MB
lost and load CV.

*Gating* (`gate`): experts behind links with noise. A plain gate and one that sees its
links, trained with perfect links, with the simulated ones, or in two stages, with a
loss by their time, or a price of it, and a loss that keeps the gate from collapse.
Read accuracy over links beside global accuracy, and the wait for links.

Five seeds on the digits (`digits`, eight minutes for both), three on CIFAR-10 with the
rows that decide, nine runs of assignments and fifteen of gates. `smoke` is short.
"""

from ml_collections import ConfigDict

from configs import compare

STRATEGIES = ("load_balanced", "channel_only", "channel_aware")
KNOWLEDGE = ("channel.csi=1.0", "channel.csi=0.7")
STALE = ("channel.refresh=5", "channel.refresh=5,channel.persistence=0.5")
DEADLINES = ("devices.deadline=40.0", "devices.deadline=160.0")
PRICES = ("channel_aware: channel_aware.price=0.0",)
PRICES += ("channel_aware: channel_aware.price=3.0",)
# Feedback by which fitness follows the data more than by training accuracy.
PROBES = "fitness.feedback=relative_probe"
PRUNED = tuple(f"{name}: pruning.kind=lamp" for name in STRATEGIES)
SEEN = tuple(f"{name}: profile.links=round" for name in STRATEGIES)
SIGHT, START = "expert_links.sight=0.0", "expert_links.start"
FAST = "expert_links.persistence=0.5"
FADING = FAST, f"{SIGHT},{FAST}"
PENALTY = "loss.latency=1.0"


def compare_assignments(config: ConfigDict, words: set[str]) -> None:
    """Clients in a radio cell, in place."""
    config.channel.kind, config.late.kind = "wireless", "drop"
    config.channel.csi, config.channel.backoff = 0.95, 0.8
    config.profile.links = "device"
    config.devices.deadline = 80.0 if "digits" in words else 120.0
    config.compare.strategies = STRATEGIES
    config.evaluation.baseline = "load_balanced"
    if "smoke" in words:
        config.compare.changes = ("", *PRICES[:1])
    elif "digits" in words:
        changes = *KNOWLEDGE, *STALE, *DEADLINES, *PRICES, *SEEN, *PRUNED
        config.compare.changes = ("", *changes, PROBES)


def compare_gates(config: ConfigDict, words: set[str]) -> None:
    """Experts behind links, in place."""
    config.expert_links.kind = "wireless"
    config.expert_links.snr, config.expert_links.spread = 0.0, 8.0
    config.compare.strategies = ("load_balanced",)
    config.evaluation.baseline = f"load_balanced {SIGHT}"
    config.compare.changes = ("", SIGHT, PENALTY)
    if "smoke" not in words:
        config.compare.changes += FADING
    two_stages = f"{START}={config.num_rounds // 2}"
    if "digits" in words and "smoke" not in words:
        config.compare.changes += (
            f"{SIGHT},{START}={config.num_rounds}",
            f"{SIGHT},{PENALTY}",
            "expert_links.price=2.0",
            two_stages,
            f"{two_stages},loss.load=0.1",
            "expert_links.csi=0.7",
        )


def get_config(argument: str = "") -> ConfigDict:
    """The study. `argument` joins any of `gate`, `digits` and `smoke` with commas."""
    gate, rest = compare.take_word(argument, "gate")
    config, words = compare.get_config(rest, ["gate"]), set(rest.split(","))
    compare.support_claims(config, rest)
    if "smoke" not in words:
        config.compare.seeds = tuple(range(5 if "digits" in words else 3))
    if not words & {"smoke", "digits"}:
        config.num_rounds, config.local_steps = 60, 10
        config.eval_every, config.chunk_rounds, config.checkpoint.every = 5, 5, 20
    (compare_gates if gate else compare_assignments)(config, words)
    return config
