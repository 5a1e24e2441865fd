"""A two-layer transformer against loops over tokens, heads and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from fedmoe_jax.base import Links, Route
from fedmoe_jax.models import image_moe, transformer
from fedmoe_jax.models.flops import count_activation_bytes, count_forward_flops
from fedmoe_jax.models.links import receive
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import UserError
from fedmoe_jax.tasks.batches import shape_batch
from fedmoe_jax.tasks.text import TEXT

SHAPE = transformer.Shape(
    blocks=2,
    moe_every=1,
    width=8,
    heads=2,
    kv_heads=1,
    expert_width=6,
    dense_width=7,
    shared_width=0,
    num_experts=4,
    vocabulary=5,
    gate_input="token",
    tied=False,
    remat=False,
    scan=False,
    linked=False,
    platform="cpu",
)
TOKENS = jnp.array([[1, 2, 3, 4, 0, 2], [3, 3, 1, 0, 0, 4]])
HELD = jnp.array([[2, 0, 1], [3, 1, 0]])
SLOT = jnp.array([[True, True, False], [True, True, True]])


def make_params(shape):
    params, frozen = transformer.build_model(shape).init(jax.random.key(0))
    assert frozen == {}
    return jax.tree.map(lambda leaf: 2 * leaf, params)  # so that gates differ


def run(shape, params, held=HELD, slot=SLOT, active=2, bias=None):
    own = take_submodel(params, {}, held, 0) if shape.num_experts > 1 else params
    route = Route(active, bias=bias)
    batch = {"tokens": TOKENS}
    model = transformer.build_model(shape)
    return model.apply(own, {}, batch, held, slot, route, None)


def norm(x, scale):
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def hidden_layer(own, x):
    return (silu(x @ own["gate"]) * (x @ own["up"])) @ own["down"]


def turn(x, place):
    """Rotary positions of one head's numbers at one place."""
    half = len(x) // 2
    turned = x.copy()
    for i in range(half):
        angle = place * 10_000 ** (-i / half)
        turned[i] = x[i] * np.cos(angle) - x[half + i] * np.sin(angle)
        turned[half + i] = x[half + i] * np.cos(angle) + x[i] * np.sin(angle)
    return turned


def attend_slowly(own, normed, place):
    """One position's attention over those before it, head by head."""
    out = np.zeros(normed.shape[1])
    heads, kv_heads = own["query"].shape[1], own["key"].shape[1]
    for head in range(heads):
        group = head // (heads // kv_heads)
        query = turn(normed[place] @ own["query"][:, head], place)
        keys = [turn(x @ own["key"][:, group], q) for q, x in enumerate(normed)]
        scores = np.array([query @ k for k in keys[: place + 1]]) / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        values = normed[: place + 1] @ own["value"][:, group]
        out += weights @ values @ own["out"][head]
    return out


def route_slowly(gate, seen, held, slot, active):
    """Gates of one token over the slots: softmax over the best held experts."""
    logits = gate["kernel"] @ seen + gate["bias"]
    own = np.where(slot, logits[held], -np.inf)
    best = np.argsort(-own)[: min(active, slot.sum())]
    gates = np.zeros(len(held))
    gates[best] = np.exp(own[best] - own[best].max())
    return logits, gates / gates.sum()


def run_slowly(shape, params, held, slot, active):
    """Outputs [B, P, V], logits [G, P', E] and gates [G, P', K], token by token."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    stem, outputs, routed = params["stem"], [], []
    for row in np.asarray(TOKENS):
        x = stem["embedding"][row]
        layer = 0
        for name, mixes in transformer.name_blocks(shape):
            block = stem[name]
            normed = np.array([norm(each, block["norm"][0]) for each in x])
            x = x + [
                attend_slowly(block["attention"], normed, p) for p in range(len(x))
            ]
            normed = np.array([norm(each, block["norm"][1]) for each in x])
            if "shared" in block:
                x = x + [hidden_layer(block["shared"], each) for each in normed]
            if not mixes:
                continue
            gate, experts = params["gate"][name], params["experts"][name]
            for place, each in enumerate(normed):
                prefix = shape.gate_input == "prefix"
                seen = normed[: place + 1].mean(0) if prefix else each
                own = np.asarray(held[layer]), np.asarray(slot[layer])
                logits, gates = route_slowly(gate, seen, *own, active)
                routed.append((layer, logits, gates))
                for k, expert in enumerate(np.asarray(held[layer])):
                    one = {part: leaf[expert] for part, leaf in experts.items()}
                    x[place] = x[place] + gates[k] * hidden_layer(one, each)
            layer += 1
        normed = np.array([norm(each, params["head"]["norm"]) for each in x])
        outputs.append(normed @ params["head"]["kernel"])
    of_layer = lambda g, at: np.array([r[at] for r in routed if r[0] == g])
    layers = range(len(params["gate"]))
    return (
        np.array(outputs),
        np.array([of_layer(g, 1) for g in layers]),
        np.array([of_layer(g, 2) for g in layers]),
    )


CASES = {
    "tokens": {},
    "prefix": {"gate_input": "prefix"},
    "shared": {"shared_width": 4},
    "every second": {"blocks": 3, "moe_every": 2},
    "compute again": {"remat": True},
    "accelerator": {"platform": "gpu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_apply_is_its_slow_twin(case):
    shape = SHAPE._replace(**CASES[case])
    params = make_params(shape)
    layers = len(params["gate"])
    held, slot = HELD[:layers], SLOT[:layers]
    outputs, routing = run(shape, params, held, slot)
    slow, logits, gates = run_slowly(shape, params, held, slot, 2)
    close = dict(rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(outputs, slow, **close)
    np.testing.assert_allclose(routing.logits, logits, **close)
    np.testing.assert_allclose(routing.gates, gates, **close)
    assert outputs.shape == (2, 6, 5) and routing.trained is None


@pytest.mark.slow
def test_remat_gives_the_same_gradients():
    params = make_params(SHAPE)

    def loss(params, shape):
        return jnp.square(run(shape, params)[0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (gradient(params, SHAPE._replace(remat=on)) for on in (False, True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, plain, again)


@pytest.mark.slow
def test_gradients_on_cpu_are_those_of_all_experts_on_all_tokens():
    params = make_params(SHAPE)

    def loss(params, shape):
        outputs, routing = run(shape, params)
        return jnp.square(outputs).sum() + jnp.sin(routing.logits).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    routed = gradient(params, SHAPE)
    dense = gradient(params, SHAPE._replace(platform="gpu"))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    jax.tree.map(close, routed, dense)


@pytest.mark.parametrize(
    ("route", "platform", "expected"),
    [
        (Route(2), "cpu", True),
        (Route(3), "cpu", False),  # of three experts
        (Route(2), "gpu", False),
        (Route(2, gating="all"), "cpu", True),
        (Route(2, gating="sum"), "cpu", False),
        (Route(2, priority=lambda gates: gates.sum(0)), "cpu", False),
    ],
)
def test_experts_see_what_is_routed_to_them(route, platform, expected):
    assert transformer.sees_routed(route, 3, 1024, platform) == expected


def test_many_tokens_see_all_of_few_experts():
    found = [transformer.sees_routed(Route(2), k, 2048, "cpu") for k in (3, 7, 8)]
    assert found == [False, False, True]


BIASED = CASES | {
    "tied": {"tied": True},
    "one loop": {"scan": True},
    "one loop, again": {"scan": True, "remat": True, "gate_input": "prefix"},
    "one loop, tied": {"scan": True, "tied": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BIASED)
def test_a_bias_is_that_of_shifted_gates_but_for_the_logits(case):
    """Each layer has one of its own, tied blocks the same."""
    shape = SHAPE._replace(**BIASED[case])
    params = make_params(shape)
    layers = len(params["gate"])
    held, slot = HELD[:layers], SLOT[:layers]
    bias = jnp.array([[4.0, 0.0, 9.0], [0.0, 1.0, 5.0]])[:layers]
    found, routing = run(shape, params, held, slot, bias=bias)
    plain, before = run(shape, params, held, slot)
    shift = lambda gate, g: (
        gate | {"bias": gate["bias"].at[held[g][slot[g]]].add(bias[g][slot[g]])}
    )
    gates = params["gate"]
    if shape.tied:
        blocks = {name: shift(gate, 0) for name, gate in gates["blocks"].items()}
        gates = {"blocks": blocks}
    else:
        gates = {name: shift(gates[name], g) for g, name in enumerate(sorted(gates))}
    expected, after = run(shape, params | {"gate": gates}, held, slot)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(routing.gates, after.gates, atol=1e-5)
    np.testing.assert_array_equal(routing.logits[0, :12], before.logits[0, :12])
    assert np.abs(found - plain).max() > 0.01
    assert np.abs(after.logits - routing.logits).max() > 3


SCANNED = {
    "plain": {},
    "every second, one over": {"blocks": 5, "moe_every": 2, "shared_width": 4},
    "compute again": {"remat": True},
    "tied": {"tied": True},
    "one expert": {"num_experts": 1},
    "some are trained": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SCANNED)
def test_a_loop_over_blocks_is_the_blocks_one_by_one(case):
    """Outputs, routing and gradients, each layer with a held set of its own."""
    shape = SHAPE._replace(**SCANNED[case])
    params = make_params(shape)
    one, layers = shape.num_experts == 1, len(params["gate"])
    held = jnp.zeros((layers, 1), int) if one else HELD[:layers]
    slot = jnp.ones((layers, 1), bool) if one else SLOT[:layers]
    route = Route(1 if one else 2)
    if case == "some are trained":
        route = route._replace(priority=lambda gates: gates.sum(0), budget=jnp.int32(1))
    own = params if one else take_submodel(params, {}, held, 0)

    def loss(own, shape):
        batch, model = {"tokens": TOKENS}, transformer.build_model(shape)
        outputs, routing = model.apply(own, {}, batch, held, slot, route, None)
        total = jnp.square(outputs).sum() + jnp.square(routing.gates[..., 0]).sum()
        return total, (outputs, routing)

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, found), (looped_grads, looped) = (
        grad(own, shape._replace(scan=scan)) for scan in (False, True)
    )
    assert jax.tree.structure(found) == jax.tree.structure(looped)
    assert (found[1].trained is not None) == (case == "some are trained")
    pairs = (grads, found), (looped_grads, looped)
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        most = float(jnp.abs(jnp.float32(a)).max())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * most)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["stem"]))


def test_a_loop_over_blocks_compiles_one_of_them():
    def count(blocks, scan):
        shape = SHAPE._replace(blocks=blocks, scan=scan, shared_width=4)
        params, _ = jax.eval_shape(
            transformer.build_model(shape).init, jax.random.key(0)
        )
        everything = jnp.tile(jnp.arange(4), (blocks, 1)), jnp.ones((blocks, 4), bool)
        apply = lambda params: transformer.apply(
            *(params, {}, {"tokens": TOKENS}, *everything, Route(2), None), shape=shape
        )
        return str(jax.make_jaxpr(apply)(params)).count("dot_general[")

    assert count(2, True) == count(9, True) < count(2, False) < count(9, False)


@pytest.mark.slow
def test_costs_of_a_loop_are_those_of_the_blocks_one_by_one():
    for every in (1, 2):
        built = [
            build_counted(blocks=5, moe_every=every, scan=scan)
            for scan in (False, True)
        ]
        plain, looped = (count_forward_flops(*each) for each in built)
        assert plain == looped and plain["experts"] > 0
        plain, looped = (count_activation_bytes(*each, 2) for each in built)
        np.testing.assert_allclose(looped, plain, rtol=0.05)


def test_tied_layers_are_those_that_hold_the_same():
    """The same params, the same held sets in both blocks: the same outputs."""
    params = make_params(SHAPE)
    join = lambda part: {transformer.TIED: params[part]}
    tied = params | {"gate": join("gate"), "experts": join("experts")}
    held, slot = HELD[:1], SLOT[:1]
    outputs, routing = run(SHAPE._replace(tied=True), tied, held, slot)
    both = jnp.concatenate([held, held]), jnp.concatenate([slot, slot])
    expected, layers = run(SHAPE, params, *both)
    np.testing.assert_array_equal(outputs, expected)
    assert routing.logits.shape == (1, 24, 4) and routing.gates.shape == (1, 12, 3)
    np.testing.assert_array_equal(routing.logits[0, 12:], layers.logits[1])
    np.testing.assert_allclose(routing.gates[0], layers.gates.mean(axis=0), rtol=1e-6)


def test_later_tokens_change_nothing_before_them():
    for gate_input in transformer.GATE_INPUTS:
        shape = SHAPE._replace(gate_input=gate_input)
        params = make_params(shape)
        first = run(shape, params)[0]
        global TOKENS
        before, TOKENS = TOKENS, TOKENS.at[:, 4:].set(1)
        try:
            second = run(shape, params)[0]
        finally:
            TOKENS = before
        np.testing.assert_allclose(first[:, :4], second[:, :4], rtol=1e-5, atol=1e-5)
        assert not np.allclose(first[:, 4:], second[:, 4:])


@pytest.mark.slow
def test_one_expert_needs_no_gate():
    shape = SHAPE._replace(num_experts=1)
    params = make_params(shape)
    one = jnp.zeros((2, 1), int), jnp.ones((2, 1), bool)
    outputs, routing = run(shape, params, *one, active=1)
    assert routing.logits is None and (routing.gates == 1).all()
    doubled = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), params["experts"])
    rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), params["gate"])
    two = params | {"experts": doubled, "gate": rows}
    everything = jnp.array([[0, 1]] * 2), jnp.ones((2, 2), bool)
    same, _ = run(SHAPE._replace(num_experts=2), two, *everything)
    np.testing.assert_allclose(outputs, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heads": 3}, "model.heads=3 .* divisors of model.stem_width=8"),
        ({"kv_heads": 3}, "model.kv_heads=3 .* divisors of model.heads=4"),
        ({"heads": 8}, "heads of an even number"),
        ({"blocks": 1, "moe_every": 2}, "model.blocks=1 .* allowed: >= 2"),
    ],
)
def test_build_refuses_sizes_that_do_not_fit(changes, told):
    config = default.get_config()
    config.model.update({"stem_width": 8, "heads": 4, "kv_heads": 4} | changes)
    if changes.get("heads"):
        config.model.kv_heads = config.model.heads
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 6), jnp.int32)}
    with pytest.raises(UserError, match=told) as error:
        transformer.build(config, tokens, 5, "cpu")
    assert "\n" not in str(error.value)


def build_counted(**changes):
    """The transformer of a config, and the shapes of its batches."""
    config = default.get_config()
    small = {"stem_width": 8, "expert_width": 6, "dense_width": 7, "blocks": 2}
    config.model.update(small | changes)
    rows = {name: np.zeros((1, 6), np.int32) for name in ("tokens", "target", "weight")}
    batch = shape_batch(rows, {}, TEXT._replace(prepare=lambda rows, statistics: rows))
    return transformer.build(config, batch.of(1), 5, "cpu"), batch


def test_dense_blocks_have_a_width_of_their_own():
    narrow, wide = (
        build_counted(moe_every=2, expert_width=width)[0].init(jax.random.key(0))[0]
        for width in (6, 60)
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(narrow["stem"]) == count(wide["stem"])
    assert 10 * count(narrow["experts"]) == count(wide["experts"])


def test_activations_grow_with_the_experts_and_with_remat_too():
    for remat in (False, True):
        model, batch = build_counted(remat=remat)
        found = [count_activation_bytes(model, batch, count) for count in (1, 2, 4)]
        each = 2 * 6 * (2 * 6 + 8) * 4  # blocks x tokens x (hidden, outputs) x 4 B
        assert found[1] - found[0] > each and found[2] - found[1] > 2 * each


def test_build_refuses_dropout():
    with pytest.raises(UserError, match="model.expert_dropout=0.5 .* allowed: 0"):
        build_counted(expert_dropout=0.5)


def test_build_refuses_images():
    config = default.get_config()
    config.model.kind = "transformer"
    images = {"x": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)}
    with pytest.raises(UserError, match="data without tokens .* image_moe"):
        transformer.build(config, images, 5, "cpu")
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 6), jnp.int32)}
    with pytest.raises(UserError, match="data without images .* transformer"):
        image_moe.build(config, tokens, 5, "cpu")


LINKED = SHAPE._replace(linked=True)


def make_links(snr, **changes):
    """Links of two windows to four experts, which gates do not see."""
    snr = jnp.broadcast_to(jnp.float32(snr), (2, 4))
    key, nothing = jax.random.split(jax.random.key(7), 2), jnp.zeros((2, 4))
    links = Links(snr=snr, seen=nothing, charge=nothing, time=nothing, key=key)
    return links._replace(**changes)


def run_over(links, shape=LINKED, params=None):
    params = params or make_params(shape)
    own = take_submodel(params, {}, HELD, 0)
    route = Route(2, links=links)
    apply = transformer.build_model(shape).apply
    return apply(own, {}, {"tokens": TOKENS}, HELD, SLOT, route, None)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_perfect_links_change_nothing(scan):
    """Gates have one leaf more, and draws are those without."""
    shape = LINKED._replace(scan=scan)
    params = make_params(shape)
    plain = jax.tree.map(jnp.asarray, params)
    for gate in plain["gate"].values():
        assert not gate.pop("snr").any()
    expected = run(SHAPE._replace(scan=scan), plain)
    found = run_over(make_links(jnp.inf), shape, params)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_each_expert_gets_a_windows_tokens_with_noise_of_its_own(platform):
    shape, links = LINKED._replace(platform=platform), make_links(0.5)
    params, x = make_params(shape), jax.random.normal(jax.random.key(1), (2, 6, 8))
    experts = jax.tree.map(lambda leaf: leaf[HELD[0]], params["experts"]["block000"])
    found = transformer.run_linked(experts, x, HELD[0], links, platform)
    for slot, expert in enumerate(HELD[0]):
        own = jax.tree.map(lambda leaf, s=slot: np.asarray(leaf[s]), experts)
        received = np.asarray(receive(x, links, expert)).reshape(12, 8)
        assert np.abs(received - np.asarray(x).reshape(12, 8)).max() > 0.5
        expected = hidden_layer(own, received)
        np.testing.assert_allclose(found[:, slot], expected, rtol=1e-4, atol=1e-4)


def test_layers_send_with_noise_of_their_own():
    """Two equal blocks on equal inputs differ in nothing but their noise."""
    params, links = make_params(LINKED), make_links(1.0)
    layer = params["gate"]["block000"], params["experts"]["block000"]
    slots = jnp.arange(4), jnp.ones(4, bool), None
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    outputs = [
        transformer.run_block(
            transformer.Block(
                params["stem"]["block000"], (*layer, *slots, jnp.int32(number))
            ),
            x,
            route=Route(2, links=links),
            shape=LINKED,
        )[0]
        for number in (0, 0, 1)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-2


def test_a_gate_sees_the_links_of_its_window():
    params = make_params(LINKED)
    gate = params["gate"]["block001"] | {"snr": jnp.array([1.0, 0.0, -2.0, 0.5])}
    seen = -jnp.arange(8.0).reshape(2, 4)
    links = make_links(jnp.inf, seen=seen, charge=jnp.full((2, 4), 0.25))
    logits = jax.random.normal(jax.random.key(2), (12, 4))
    found = transformer.see_own_links(logits, gate, links)
    for position in range(12):
        shift = np.asarray(gate["snr"]) * np.asarray(seen)[position // 6] - 0.25
        np.testing.assert_allclose(found[position], logits[position] + shift, rtol=1e-5)


def test_links_to_tied_experts_are_refused():
    with pytest.raises(UserError, match="model.tied=True .* links .*; allowed: False"):
        transformer.check_shape(LINKED._replace(tied=True))
