"""Models in bfloat16: close to float32, and float32 wherever something is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import EXPERTS, V, make_tokens, save_checkpoint
from factories import fill, plan_run, start_run
from jax.extend.core import jaxprs_in_params

from configs import default
from fedmoe_jax.base import BASE, Route
from fedmoe_jax.models import MODELS
from fedmoe_jax.models.precision import DTYPES, cast, compute_in, find_float32
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.round import build_run_rounds

KINDS = ("mlp", "cnn", "resnet8", "transformer", "prefix", "scan", "lora", "olmoe")
IMAGES = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)
TOKENS = make_tokens()[:, :9]


def choose_model(kind, folder, platform="cpu"):
    """A model in float32, and a batch."""
    config = default.get_config()
    fields = {"num_experts": EXPERTS}
    if kind in ("lora", "olmoe"):
        save_checkpoint(folder, {"lora": "llama"}.get(kind, kind))
        fields |= {"model.kind": "lora", "model.base": str(folder)}
        fields |= {"model.lora_attention": 2, "model.dtype": "bfloat16"}
        fields |= {"num_active": 2}
    elif kind in ("transformer", "prefix", "scan"):
        fields |= {"model.kind": "transformer", "model.stem_width": 16}
        fields |= {"gate.input": "prefix" if kind == "prefix" else "token"}
        fields |= {"model.scan": kind == "scan", "model.remat": kind == "scan"}
        fields |= {"model.shared_width": 8}
    else:
        fields |= {"model.stem": kind, "model.stem_width": 16}
        fields |= {"model.expert": "conv" if kind == "cnn" else "mlp"}
        fields |= {"model.shared_width": 8}
    config.update_from_flattened_dict(fields)
    text = config.model.kind != "image_moe"
    batch = {"tokens": TOKENS} if text else {"x": IMAGES}
    return MODELS[config.model.kind](config, batch, V, platform), batch


def evaluate(model, batch, params, frozen):
    """Outputs and routing with three held experts in every layer."""
    held = jnp.tile(jnp.array([2, 0, 1]), (len(params["gate"]), 1))
    own = take_submodel(params, {}, held, 0)
    slots = held, jnp.ones(held.shape, bool), Route(2)
    return model.apply(own, frozen, batch, *slots, None)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_and_keeps_float32(kind, platform, tmp_path):
    model, batch = choose_model(kind, tmp_path, platform)
    low = compute_in(model, "bfloat16")
    params, frozen = model.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * fill(leaf), params)
    if model.base is not None:
        frozen = frozen | {BASE: model.base.load()}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
        shapes = jax.tree.leaves(model.base.shapes())
        assert {leaf.dtype.name for leaf in shapes} == {"bfloat16"}

    def loss(params, model, frozen):
        outputs, routing = evaluate(model, batch, params, frozen)
        score = jax.nn.log_softmax(outputs)[..., 0].mean() + routing.logits.var()
        return score, (outputs, routing)

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    exact, (outputs, routing) = gradient(params, model, cast(frozen, jnp.float32))
    found, (answers, decisions) = gradient(params, low, frozen)
    kept = jax.tree.leaves((found, answers, decisions))
    assert {leaf.dtype.name for leaf in kept} == {"float32"}
    # Which experts are chosen may differ where two score the same in eight bits.
    same = (routing.gates > 0) == (decisions.gates > 0)
    assert same.mean() > 0.9
    spread = float(jnp.std(outputs))
    assert float(jnp.abs(answers - outputs).mean()) < 0.05 * spread
    found, exact = jax.device_get((found, exact))
    norm = lambda tree: np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(tree)))
    apart = norm(jax.tree.map(np.subtract, found, exact))
    assert 0 < apart < 0.2 * norm(exact)


def list_products(jaxpr):
    """Dtypes of the operands of all products and convolutions, nested ones too."""
    found = []
    for each in jaxpr.eqns:
        if each.primitive.name in ("dot_general", "conv_general_dilated"):
            kinds = (each.invars[i].aval.dtype.name for i in (0, 1))
            found.append((each.invars[1].aval.shape, *kinds))
        for inner in jaxprs_in_params(each.params):
            found += list_products(inner)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_but_the_gates_is_in_bfloat16(kind, tmp_path):
    model, batch = choose_model(kind, tmp_path, "gpu")
    low = compute_in(model, "bfloat16")
    params, frozen = model.init(jax.random.key(0))
    if model.base is not None:
        frozen = frozen | {BASE: jax.tree.map(jnp.asarray, model.base.load())}
    trace = lambda params: evaluate(low, batch, params, frozen)
    products = list_products(jax.make_jaxpr(trace)(params).jaxpr)
    wide = [shape for shape, *kinds in products if kinds != ["bfloat16"] * 2]
    kernels = {params["gate"][name]["kernel"].shape for name in params["gate"]}
    assert set(wide) == kernels
    gates = 1 if kind == "scan" else len(params["gate"])  # one loop has one product
    assert len(wide) == gates < len(products)


def test_float32_is_the_model_itself(tmp_path):
    model, _ = choose_model("mlp", tmp_path)
    assert compute_in(model, "float32") is model
    low = compute_in(model, "bfloat16")
    assert low is compute_in(model, "bfloat16")
    assert find_float32(low) is model and find_float32(model) is model
    other = model._replace(apply=functools.partial(model.apply, model="another"))
    assert find_float32(other) is other


@pytest.mark.slow
def test_rounds_in_bfloat16_keep_a_state_in_float32_and_stay_close():
    def train(dtype):
        plan = plan_run(**{"model.dtype": dtype, "client.learning_rate": 0.05})
        run = start_run(plan, plan.program)
        rounds = build_run_rounds(plan.program)
        state, metrics = rounds(run.state, run.federation, run.hyper)
        return state, metrics

    (low, found), (state, expected) = train("bfloat16"), train("float32")
    kinds = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert kinds(low) == kinds(state) and kinds(found) == kinds(expected)
    np.testing.assert_allclose(found["train_loss"], expected["train_loss"], rtol=0.02)
    assert np.any(found["train_loss"] != expected["train_loss"])


def test_costs_are_those_of_float32():
    low, plain = (plan_run(**{"model.dtype": d}).program.costs for d in DTYPES[::-1])
    assert low == plain
