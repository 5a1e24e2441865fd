"""From a config to a program: what a strategy leaves open, and what it overwrites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    E,
    K,
    make_config,
    make_data,
    make_devices,
    make_federation,
    make_inputs,
    make_program,
    tiny_config,
    use_linear_model,
)

from fedmoe_jax.aggregate import (
    all_rows,
    by_examples,
    by_routed,
    held_rows,
    no_rows,
)
from fedmoe_jax.align.affinity import by_fitness
from fedmoe_jax.base import PARTS, Strategy
from fedmoe_jax.client import build_client_update
from fedmoe_jax.models.flops import shape_params
from fedmoe_jax.models.routing import calibrate_gate
from fedmoe_jax.options import UserError
from fedmoe_jax.program import (
    check_layers,
    check_state,
    configure,
    count_report,
    find_overwritten,
    longest,
    make_hyper,
    make_static,
    resolve,
    take_frozen,
)
from fedmoe_jax.strategies import STRATEGIES, find_strategy
from fedmoe_jax.world.limits import true_capacity

NOTHING = Strategy(about="Leaves all to the config.", assign=None)
OPEN = {"personal", "gate_weight", "expert_weight", "gate_loss", "every_expert"}


@pytest.mark.parametrize(
    ("mode", "personal", "rows"),
    [
        ("global", (), all_rows),
        ("holder_rows", (), held_rows),
        ("personal", ("gate",), no_rows),
    ],
)
@pytest.mark.parametrize(
    ("weight", "experts"), [("examples", by_examples), ("routed", by_routed)]
)
def test_resolve_takes_from_the_config(mode, personal, rows, weight, experts):
    config = make_config(**{"gate.mode": mode, "merge.weight": weight})
    found = resolve(NOTHING, config)
    expected = dict(personal=personal, gate_weight=rows, expert_weight=experts)
    expected |= dict(gate_loss=calibrate_gate, every_expert=True)
    assert expected.keys() == OPEN
    assert found == NOTHING._replace(**expected)


@pytest.mark.parametrize(("experts", "every"), [(16, True), (17, False)])
def test_resolve_computes_every_expert_where_there_are_few(experts, every):
    assert resolve(NOTHING, make_config(num_experts=experts)).every_expert is every


@pytest.mark.parametrize("name", STRATEGIES)
def test_resolve_fills_exactly_what_is_none(name):
    strategy, config = find_strategy(name), configure(make_config(strategy=name))
    filled = resolve(NOTHING, config)
    found = resolve(strategy, config)
    for field in Strategy._fields:
        value = getattr(strategy, field)
        if value is None and field in OPEN:
            value = getattr(filled, field)
            assert value is not None
        if field == "local_experts":
            value = min(value, config.num_experts)
        if field == "stages":
            assert [act for _, act in found.stages] == [act for _, act in value]
            continue
        if field == "affinity":  # the default config has no bias
            value = None
        assert getattr(found, field) == value, field


def test_resolve_keeps_what_is_false_or_empty():
    """An empty choice is a choice: only None leaves it to the config."""
    strategy = NOTHING._replace(personal=(), every_expert=False)
    found = resolve(strategy, make_config(**{"gate.mode": "personal"}))
    assert found.personal == () and found.every_expert is False


def test_resolve_keeps_an_affinity_where_there_is_a_bias():
    config = make_config(**{"gate.bias": 0.1})
    assert resolve(NOTHING, config).affinity is by_fitness
    own = NOTHING._replace(affinity=max)
    assert resolve(own, config).affinity is max
    assert resolve(own, make_config()).affinity is None


def test_resolve_looks_up_the_rounds_of_stages():
    stages = (0, min), ("fedmoe.warm_up", max), (8, sum)
    found = resolve(NOTHING._replace(stages=stages), make_config())
    assert found.stages == ((0, min), (2, max), (8, sum))
    fields = {"upcycle.rounds": 4, "prototypes.period": 12}
    again = NOTHING._replace(stages=((tuple(fields), max),))
    rounds = [when for when, _ in resolve(again, make_config(**fields)).stages]
    assert rounds == [4, 16, 28, 40]


@pytest.mark.parametrize(
    ("when", "given"),
    [
        (7, "round 7"),
        (-2, "round -2"),
        (42, "round 42"),
        ("drift.start", "drift.start=3"),
    ],
)
def test_resolve_refuses_stages_within_a_chunk_or_beyond_the_run(when, given):
    config = make_config(**{"drift.start": 3, "chunk_rounds": 2})
    config.strategy = "mine"
    with pytest.raises(UserError) as caught:
        resolve(NOTHING._replace(stages=((0, min), (when, max))), config)
    assert str(caught.value) == (
        f"strategy='mine' has a stage at {given}, which is not allowed; allowed: "
        "multiples of chunk_rounds=2, 0 to num_rounds=40"
    )


def test_resolve_refuses_a_stage_at_a_field_that_is_missing():
    with pytest.raises(UserError, match="a stage at 'mine.when', which is no field"):
        resolve(NOTHING._replace(stages=(("mine.when", min),)), make_config())


def test_resolve_keeps_no_more_local_experts_than_there_are():
    config = configure(make_config(strategy="fedmoe_da"))
    assert resolve(find_strategy("fedmoe_da"), config).local_experts == 8
    assert resolve(find_strategy("pfedmoe"), config).local_experts == 1


def test_find_overwritten_reports_what_flex_moe_overwrites():
    config = make_config(strategy="flex_moe")
    expected = {
        "gate.mode": "personal",
        "merge.weight": "routed",
        "fitness.idle": "keep",
        "loss.calibration": 0.0,
    }
    assert find_overwritten(config) == expected
    assert config.gate.mode == "global"  # the user's config stays
    config.update_from_flattened_dict(expected)
    assert find_overwritten(config) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load_balanced", {}),
        ("hfedmoe", {"max_held": 8}),
        (
            "fedadam_active",
            {
                "num_experts": 1,
                "max_held": 1,
                "num_active": 1,
                "model.expert_width": 2 * 64,
                "server.optimizer": "fedadam",
                "server.learning_rate": 0.01,
            },
        ),
    ],
)
def test_find_overwritten_by_hand(name, expected):
    assert find_overwritten(make_config(strategy=name)) == expected


@pytest.mark.parametrize(
    ("name", "fields", "bias"),
    [
        ("greedy", {}, 2.0),
        ("greedy", {"num_experts": 1, "max_held": 1, "num_active": 1}, 0.0),
        ("fedavg_active", {}, 0.0),
        ("heterofl", {}, 0.0),
    ],
)
def test_configure_leaves_no_bias_where_no_gate_chooses(name, fields, bias):
    config = make_config(strategy=name, **{"gate.bias": 2.0}, **fields)
    assert configure(config).gate.bias == make_hyper(config).gate.bias == bias
    assert ("gate.bias" in find_overwritten(config)) == (bias == 0)


def test_make_hyper_and_make_static_are_of_the_config_that_is_used():
    prox = make_config(**{"strategy": "fedprox", "fedprox.coefficient": 0.25})
    assert make_hyper(prox).client.prox == np.float32(0.25)
    assert make_static(configure(prox)).prox and not make_static(prox).prox
    whole = make_hyper(make_config(**{"drift.start": 3}))
    assert whole.drift.start.dtype == np.int32 and whole.drift.start == 3
    assert whole.fitness.rate.dtype == np.float32


def test_build_program_counts_capacity_in_the_users_slots():
    sizes = make_program(strategy="hfedmoe").sizes
    assert (sizes.max_held, sizes.max_capacity, sizes.num_layers) == (E, K, 1)
    program = make_program(strategy="local")
    assert program.strategy.personal == PARTS and program.sizes.num_experts == 1
    assert hash(program) == hash(make_program(strategy="local"))


@pytest.mark.parametrize(("name", "numbers"), [("fedmix", E), ("random", 0)])
def test_build_program_counts_the_numbers_of_a_report(name, numbers):
    assert make_program(strategy=name).report_numbers == numbers


def test_count_report_counts_every_layer():
    program, hyper = make_program(strategy="fedmix"), make_hyper(tiny_config())
    batch = program.batch.of(program.sizes.batch_size)
    repeat = lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape[1:]), leaf.dtype)
    three = jax.tree.map(repeat, program.routing)
    assert count_report(program.strategy, three, batch, hyper) == 3 * E
    assert count_report(NOTHING, three, batch, hyper) == 0
    dense = three._replace(logits=None)  # one expert: nothing is routed
    assert count_report(program.strategy, dense, batch, hyper) == 0


def train_once(**changes):
    """The move of the head in two local steps on the same four examples."""
    program = use_linear_model(make_program(**changes))
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1))
    federation = make_federation(
        train={"x": jnp.asarray(x, jnp.uint8), "y": jnp.arange(4)},
        index=jnp.arange(4)[None],
        size=jnp.array([4]),
        statistics={"mean": jnp.full((8, 8, 1), 0.5), "std": jnp.ones((8, 8, 1))},
        frozen={},
    )
    one = (1, 1, program.sizes.max_held)
    held = np.broadcast_to(np.arange(one[-1], dtype=np.int32), one)
    inputs = make_inputs(held, np.ones(one, bool), steps=np.array([2], np.int32))
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    key = jax.random.key(0)
    update = jax.jit(build_client_update(program))
    hyper = make_hyper(tiny_config(**changes))
    params, _ = program.model.init(key)
    result = update(params, inputs, federation, hyper, key)
    return np.asarray(result.delta["head"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["load_balanced", "fedavg"])
def test_build_program_takes_the_clients_momentum(strategy):
    """With steps so small that both have one gradient g, the second moves by 1.9 g."""
    changes = {"strategy": strategy, "client.learning_rate": 1e-3}
    plain = train_once(**changes, **{"client.momentum": 0.0})
    moved = train_once(**changes, **{"client.momentum": 0.9})
    assert np.abs(plain).max() > 1e-5
    np.testing.assert_allclose(moved, 1.45 * plain, rtol=0.02, atol=1e-6)


@pytest.mark.slow
def test_build_program_takes_the_clients_optimiser():
    changes = {"client.learning_rate": 1e-3, "client.optimizer": "adam"}
    np.testing.assert_allclose(np.abs(train_once(**changes)).max(), 2e-3, rtol=0.01)


def test_check_layers_refuses_a_model_without_parts():
    program = make_program()
    config, whole = make_config(strategy="fedjets"), program.model._replace(parts=None)
    fedjets = find_strategy("fedjets")
    check_layers(config, fedjets, program.model, 1)
    check_layers(config, program.strategy, whole, 1)
    with pytest.raises(UserError, match="strategy='fedjets' .* which has no parts"):
        check_layers(config, fedjets, whole, 1)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("client.learning_rate", 0.0, "> 0"), ("num_active", 9, "1 to max_held=2")],
)
def test_build_program_refuses_what_a_strategy_configures_beyond_its_range(
    monkeypatch, field, value, allowed
):
    def configure(config):
        config.update_from_flattened_dict({field: value})
        return config

    odd = find_strategy("greedy")._replace(configure=configure)
    monkeypatch.setitem(STRATEGIES, "greedy", odd)
    told = f"^{field}={value} is not allowed, as strategy='greedy' configures it; "
    with pytest.raises(UserError, match=f"{told}allowed: {allowed}"):
        make_program(strategy="greedy")


@pytest.mark.parametrize("state", [jnp.zeros(3), [jnp.zeros(3)], {"a": {"b": 0.0}}])
def test_check_state_refuses_all_but_a_dict_of_arrays(state):
    config, sizes = make_config(strategy="greedy"), make_program().sizes
    check_state(config, NOTHING, sizes)
    odd = NOTHING._replace(init=lambda sizes: state)
    with pytest.raises(UserError, match="strategy='greedy' has an `init`"):
        check_state(config, odd, sizes)


def test_longest_is_a_power_of_two_where_clients_differ():
    steps = np.array([3, 5, 4])
    assert [longest(steps, ragged) for ragged in (False, True)] == [5, 8]
    assert longest(np.array([8, 1]), True) == 8
    assert longest(np.array([1, 1]), True) == 1


# ---- a shared expert


def test_build_program_counts_a_shared_expert_with_the_stem():
    """TINY's stem has 8 outputs, an expert 4 hidden units and 4 outputs."""
    plain, found = (make_program(**{"model.shared_width": n}).costs for n in (0, 4))
    numbers = 8 * 4 + 4 + 4 * 4 + 4  # two products with their biases: those of a routed
    assert plain.expert_bytes == 4 * numbers
    more = {"stem_bytes": 4 * numbers, "travel_bytes": 4 * numbers}
    more |= {name: plain.expert_flops for name in ("shared_flops", "dense_flops")}
    expected = {name: getattr(plain, name) + value for name, value in more.items()}
    assert found == plain._replace(**expected)
    # So one routed expert fewer fits the same memory.
    room = plain.shared_bytes + plain.gate_bytes + 2 * plain.expert_bytes
    devices = make_devices(1, memory=4 * room)
    capacity = lambda costs: true_capacity(
        devices,
        costs,
        buffer=jnp.zeros(()),
        examples=jnp.ones(1),
        deadline=100.0,
        communication_share=0.5,
        max_capacity=4,
        probed=0,
    )
    assert (capacity(plain).tolist(), capacity(found).tolist()) == ([2], [1])


def test_take_frozen_gives_the_gate_a_stem_without_the_shared_expert():
    program = make_program(strategy="fedjets", **{"model.shared_width": 4})
    params, _ = shape_params(program.model)
    trained, frozen = take_frozen(params, {}, program.model, program.strategy)
    assert trained == params and "shared" in params["stem"]
    rest = {name: x for name, x in params["stem"].items() if name != "shared"}
    assert frozen == {"gate_stem": rest}


WIDE = 16
# Multiplications of the convolutions and layers: places times sizes of kernels. Padded
# ones meet the image in (3 n - 2) ** 2 places, (3 n - 1) ** 2 with stride 2.
LENET = 144 * 25 * WIDE + 4 * 25 * WIDE * 42 + 42 * 20 * WIDE
FIRST = 22**2 * WIDE + 2 * 22**2 * WIDE**2
SECOND = (11**2 + 4**2) * 2 * WIDE**2 + 10**2 * 4 * WIDE**2
THIRD = (5**2 + 2**2) * 8 * WIDE**2 + 4**2 * 16 * WIDE**2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "side", "products"),
    [("lenet", 16, LENET), ("resnet8", 8, FIRST + SECOND + THIRD)],
)
def test_flops_are_those_of_plain_convolutions(stem, side, products):
    """Not of the forms, with zeros in their kernels, that are fast on a CPU."""
    changes = {"model.stem": stem, "model.stem_width": WIDE, "model.expert": "dense"}
    program = make_program(make_data(shape=(side, side, 1)), **changes)
    assert program.platform == "cpu"
    forward, training = 2 * products, program.costs.shared_flops
    assert 3 * forward <= training < 3.3 * forward
