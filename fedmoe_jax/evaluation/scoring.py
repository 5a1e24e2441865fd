"""Scores of one batch of test examples, of a model with parts.

* global: the top-A of all E experts; soft: all E, weighted by the gate.
* personal: the top-A of each client's held experts.
* prior: the same outputs, shifted by the client's own label prior.
* expert: one expert alone.

Every expert's own outputs [B, E, L] are computed once, and each score is that of one
mixture of them: the head is linear, and what the gates leave of 1 is its own answer.
A shared expert's outputs are added to those of every expert before the head, and to
those of none, which is what `base.Parts` says of them.
Where parts of the model are personal the server has none of them, and the global scores
are those of each client's own model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links, Parts, Route, Scores
from fedmoe_jax.evaluation.priors import Priors
from fedmoe_jax.models.dispatch import dispatch
from fedmoe_jax.models.one_layer import (
    add_shared,
    apply_experts,
    apply_linked,
    log_probabilities,
    run_shared,
    show_gate,
)
from fedmoe_jax.models.routing import gate_logits, make_gates
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Federation, PyTree, SimState


class Examples(NamedTuple):
    """One batch of test examples.

    Attributes:
      batch: of the task, leaves [B, ...].
      stratum: [B, L] float, one-hot strata, zero rows for padding.
      real: [B] bool, false for padding.
      links: to the experts; None for perfect ones.
    """

    batch: PyTree
    stratum: Array
    real: Array
    links: Links | None = None


class Encoded(NamedTuple):
    """One batch of test examples as gates see it.

    Attributes:
      examples: the batch.
      features: [B, ...] float, output of the server's stem.
      seen: [B, ...] float, what gates read of them, see `show_gate`.
      logits: [B, E] float of the server's gate, None where gates are personal.
      shared: [B, O] float, outputs of the shared expert, None where there is none.
    """

    examples: Examples
    features: Array
    seen: Array
    logits: Array | None
    shared: Array | None = None


class Answers(NamedTuple):
    """The outputs that the mixtures of one batch are made of.

    Attributes:
      each: [B, E, L] float, of every expert, alone or with the shared one;
        probabilities where they are mixed.
      none: [L] float, of the head without any of these experts, [B, L] with the shared
        one; None where gates sum to 1.
    """

    each: Array
    none: Array | None = None


class ClientView(NamedTuple):
    """ONE client in evaluation (a leading N axis for all of them).

    Attributes:
      personal: the client's own parts, {} where the server's serve all.
      held: [G, E] bool, the experts it routes among; [E] of ONE layer.
      wanted: [L] float32, 1 for strata that the client has, else 0.
      bias: [G, E] float32, of its gate logits, [E] of ONE layer; None without one.
    """

    personal: PyTree
    held: Array
    wanted: Array
    bias: Array | None = None


class Models(NamedTuple):
    """The models that are scored: of every client, or each that several share once.

    Attributes:
      view: leaves [n, ...]; `wanted` are strata that any client of the model has.
      count: [] int32, how many of them there are; others are not scored.
    """

    view: ClientView
    count: Array


def find_participants(state: SimState) -> Array:
    """[N] bool, clients that hold experts and of which an update has counted."""
    return state.align.held.any(axis=(1, 2)) & (state.participation.rounds > 0)


def view_clients(
    state: SimState, federation: Federation, bias: Array | None
) -> ClientView:
    """All clients [N]; one that never got through has no experts and may use all.

    It has no bias then; others have that of `bias` [N, G, E], or None without any.
    Where the data are pooled it is one, with the strata of all.
    """
    held = state.align.held & find_participants(state)[:, None, None]
    mix = federation.label_mix.reshape(len(held), -1, federation.label_mix.shape[1])
    return ClientView(
        personal=state.personal,
        held=held | ~held.any(axis=2, keepdims=True),
        wanted=(mix.sum(axis=1) > 0).astype(jnp.float32),
        bias=None if bias is None else jnp.where(held, bias, 0.0),
    )


def join_frozen(state: SimState, federation: Federation, program: Program) -> PyTree:
    """The params with the parts that the strategy has frozen."""
    frozen = {part: federation.frozen[part] for part in program.strategy.frozen}
    return state.params | frozen


def is_wanted(examples: Examples, wanted: Array) -> Array:
    """[] bool, whether any example is of a stratum that is wanted, [L] float."""
    return (examples.stratum @ wanted > 0).any()


def keep_wanted(
    score: Callable[[], PyTree], examples: Examples, wanted: Array
) -> PyTree:
    """What `score` finds of the examples, or zeros where none of them is wanted [L]."""
    empty = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(score))
    return jax.lax.cond(is_wanted(examples, wanted), score, empty)


def sum_strata(values: Array, scores: Scores, stratum: Array) -> Array:
    """Values [B, ...positions] of each stratum [L], summed by the scores' weights."""
    if scores.weight is not None:
        values = values * scores.weight
    return values.reshape(len(stratum), -1).sum(axis=1) @ stratum


def list_values(scores: Scores, program: Program) -> list[Array]:
    """The V values of every position: score and, of some tasks, bits, and bytes."""
    if not program.task.bits:
        return [scores.score]
    bytes_ = [] if scores.bytes is None else [scores.bytes]
    return [scores.score, scores.loss / math.log(2), *bytes_]


def count_values(program: Program) -> int:
    """V, see `list_values`."""
    return len(jax.eval_shape(lambda s: list_values(s, program), program.scores))


def divide_bits(values: Array) -> Array:
    """Means of accuracy and, if there are such, of bits, which are those of a byte.

    Args:
      values: [..., V], means over positions; with three the second is divided by the
        third, the mean bytes of a position.
    """
    if values.shape[-1] < 3:
        return values
    accuracy, bits, bytes_ = jnp.moveaxis(values, -1, 0)
    return jnp.stack([accuracy, bits / jnp.maximum(bytes_, 1e-6)], axis=-1)


def sum_values(scores: Scores, examples: Examples, program: Program) -> Array:
    """Sums of the values in each stratum, [V, L]."""
    values = list_values(scores, program)
    return jnp.stack([sum_strata(each, scores, examples.stratum) for each in values])


def sum_scores(outputs: PyTree, examples: Examples, program: Program) -> Array:
    """Sums of the values of the model's outputs in each stratum, [V, L]."""
    scores = program.task.loss(outputs, examples.batch)
    return sum_values(scores, examples, program)


def score_prior(
    outputs: PyTree, log_share: Array, examples: Examples, program: Program
) -> Array:
    """Scores [V, L] of a model's outputs, shifted by the prior [L] of ONE client."""
    assert program.task.add_prior is not None
    return sum_scores(program.task.add_prior(outputs, log_share), examples, program)


def make_rows(
    num_models: int, priors: Priors | None, examples: Examples, program: Program
) -> dict[str, Array]:
    """Empty rows: `personal` [models, V, L] and, with priors, `prior` [m, V, L]."""
    each = count_values(program), examples.stratum.shape[1]
    rows = {"personal": jnp.zeros((num_models, *each))}
    if priors is not None:
        rows["prior"] = jnp.zeros((len(priors.row), *each))
    return rows


def set_rows(
    rows: dict[str, Array],
    number: Array | int,
    outputs: PyTree,
    priors: Priors | None,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """The rows with the scores of ONE model and of its clients' priors.

    Args:
      rows: see `make_rows`.
      number: [] int32, the model's row.
      outputs: the model's.
      priors: of the clients.
      examples: the batch.
      program: the task.
    """
    personal = sum_scores(outputs, examples, program)
    found = {"personal": rows["personal"].at[number].set(personal)}
    if priors is None:
        return found

    def add(place: Array, scores: Array) -> Array:
        shifted = score_prior(outputs, priors.log_share[place], examples, program)
        return scores.at[place].set(shifted)

    own = priors.start[number], priors.start[number + 1]
    return found | {"prior": jax.lax.fori_loop(*own, add, rows["prior"])}


def take_parts(program: Program) -> Parts:
    """The parts of the model, which has them wherever this file scores it."""
    assert program.model.parts is not None
    return program.model.parts


def encode(params: PyTree, examples: Examples, program: Program) -> Encoded:
    """The examples behind the server's stem and gate."""
    parts = take_parts(program)
    features = parts.stem(params["stem"], examples.batch, None)
    seen, logits = show_gate(parts, params, examples.batch, features), None
    if not program.strategy.personal:
        (gate,) = params["gate"].values()
        logits = gate_logits(gate, seen, examples.links)
    shared = run_shared(parts, params["stem"], features, None)
    return Encoded(examples, features, seen, logits, shared)


def take_model(models: Models, number: Array) -> ClientView:
    """ONE of the models."""
    return jax.tree.map(lambda leaf: leaf[number], models.view)


def own_logits(client: ClientView, encoded: Encoded) -> Array:
    """[B, E] gate logits of ONE client: the server's, unless gates are personal."""
    if "gate" not in client.personal:
        assert encoded.logits is not None
        return encoded.logits
    (gate,) = client.personal["gate"].values()
    return gate_logits(gate, encoded.seen, encoded.examples.links)


def route_own(logits: Array, client: ClientView, how: Route) -> Array:
    """[B, E] gates of ONE client over the experts it holds, with its bias."""
    return make_gates(logits, client.held, how._replace(bias=client.bias))


def route_all(logits: Array, how: Route) -> Array:
    """[B, E] gates over all experts, without a bias."""
    return make_gates(logits, jnp.ones(logits.shape[1], bool), how)


def find_needed(encoded: Encoded, models: Models, how: Route) -> Array:
    """Pairs that the server, or a model of which the stratum is wanted, routes to.

    Args:
      encoded: one batch.
      models: of the clients.
      how: the routing in evaluation.

    Returns:
      [B, E] bool, false for padding.
    """
    examples = encoded.examples
    real = examples.real[:, None]

    def add(number: Array, need: Array) -> Array:
        client = take_model(models, number)
        logits = own_logits(client, encoded)
        wanted = (examples.stratum @ client.wanted)[:, None] > 0
        need |= wanted & (route_own(logits, client, how) > 0)
        if client.personal:
            need |= real & (route_all(logits, how) > 0)
        return need

    if encoded.logits is None:
        need = jnp.zeros((len(real), models.view.held.shape[1]), bool)
    else:
        need = real & (route_all(encoded.logits, how) > 0)
    return jax.lax.fori_loop(0, models.count, add, need)


def mix_answers(gates: Array, answers: Answers, program: Program) -> Array:
    """Outputs [B, L] of one mixture, see `score_mixture`."""
    mixed = jnp.einsum("be,bel->bl", gates, answers.each)
    if answers.none is not None:
        left = 1 - gates.sum(axis=1, keepdims=True)
        mixed += left * (answers.none if answers.none.ndim == 2 else answers.none[None])
    return read_answers(mixed, program)


def share_gates(gates: Array, program: Program) -> Array:
    """Gates [..., E] as shares that sum to 1, as they mostly do already."""
    if program.strategy.gating == "chosen":
        return gates
    return gates / jnp.maximum(gates.sum(axis=-1, keepdims=True), 1e-6)


def sum_gates(gates: Array, scores: Scores, stratum: Array) -> Array:
    """Gate mass [E, L] of gates [B, E], each by the weight of its positions."""
    if scores.weight is not None:
        gates = gates * scores.weight.reshape(len(gates), -1).sum(axis=1)[:, None]
    return jnp.einsum("be,bl->el", gates, stratum)


def wait_for_links(gates: Array, links: Links) -> Array:
    """The time of each answer [B], that of the slowest link which its gates [B, E] use.

    In deadlines of an answer, see `Links.time`.
    """
    return jnp.where(gates > 0, links.time, 0.0).max(axis=1)


def score_mixture(
    gates: Array, answers: Answers, examples: Examples, program: Program
) -> Array:
    """Scores [V, L] of one mixture.

    Args:
      gates: [B, E] float.
      answers: of the experts.
      examples: the batch.
      program: the task, and how experts are mixed.
    """
    return sum_scores(mix_answers(gates, answers, program), examples, program)


def read_answers(answers: Array, program: Program) -> Array:
    """Outputs as the task reads them, from answers [..., L]."""
    probabilities = program.strategy.mix == "probabilities"
    return log_probabilities(answers) if probabilities else answers


def score_routed(
    logits: Array, answers: Answers, examples: Examples, program: Program
) -> dict[str, Array]:
    """Scores of one gate over all experts: `global`, `soft` [V, L], `routed` [1, E, L].

    With links also `delay` [1, L], see `wait_for_links`, times weights.

    `soft` mixes every expert and is left out where not all are computed.
    """
    how = evaluation_route(program)
    gates = route_all(logits, how)
    outputs = mix_answers(gates, answers, program)
    scores = program.task.loss(outputs, examples.batch)
    shares = share_gates(gates, program)
    counts = {
        "global": sum_values(scores, examples, program),
        "routed": sum_gates(shares, scores, examples.stratum)[None],
    }
    if examples.links is not None:
        delay = wait_for_links(gates, examples.links)
        counts["delay"] = sum_gates(delay[:, None], scores, examples.stratum)
    if program.strategy.every_expert:
        soft = route_all(logits, how._replace(num_active=logits.shape[1]))
        counts["soft"] = score_mixture(soft, answers, examples, program)
    return counts


def evaluation_route(program: Program) -> Route:
    """The routing in evaluation, as the strategy has it."""
    strategy = program.strategy
    num_active = strategy.test_active or program.sizes.num_active
    return Route(num_active, mix=strategy.mix, gating=strategy.gating)


def score_experts(
    answers: Answers, examples: Examples, program: Program
) -> dict[str, Array]:
    """Scores of every expert without a gate: `expert` [E, V, L]."""
    score = lambda one: sum_scores(read_answers(one, program), examples, program)
    return {"expert": jax.vmap(score, in_axes=1)(answers.each)}


def answer_experts(
    head: PyTree, outputs: Array, shared: Array | None, program: Program
) -> Array:
    """Every expert's outputs [B, E, L], or probabilities where they are mixed.

    Args:
      head: params.
      outputs: [B, E, O] float, of the experts.
      shared: [B, O] float, of the shared one, or None.
      program: a model with parts.
    """
    answers = take_parts(program).head(head, add_shared(outputs, shared))
    mixed = program.strategy.mix == "probabilities"
    return jax.nn.softmax(answers) if mixed else answers


def answer_none(
    head: PyTree,
    experts: PyTree,
    features: Array,
    shared: Array | None,
    program: Program,
) -> Array | None:
    """The head's outputs [L] or [B, L] without any routed expert, see `Answers`."""
    parts, strategy = take_parts(program), program.strategy
    if strategy.gating == "chosen" or strategy.mix == "probabilities":
        return None
    if shared is not None:
        return parts.head(head, shared)
    one = jax.tree.map(lambda leaf: leaf[0], experts)
    outputs = jax.eval_shape(lambda: parts.expert(one, features, None))
    return parts.head(head, jnp.zeros(outputs.shape[1:]))


def apply_all(
    experts: PyTree, features: Array, links: Links | None, program: Program
) -> Array:
    """Outputs [B, E, O] of all experts on features [B, ...], over links if any."""
    run = take_parts(program), experts, features, None
    if links is None:
        return apply_experts(*run)
    return apply_linked(*run, jnp.arange(program.sizes.num_experts), links)


def answer_personal(
    client: ClientView, examples: Examples, params: PyTree, program: Program
) -> tuple[Array, Answers]:
    """Gate logits [B, E] and the answers of ONE client's own whole model."""
    everything = jnp.arange(program.sizes.num_experts)[None]
    parts, local = take_parts(program), program.strategy.local_experts
    own = take_submodel(params, client.personal, everything, local)
    (gate,), (experts,) = own["gate"].values(), own["experts"].values()
    features = parts.stem(own["stem"], examples.batch, None)
    outputs = apply_all(experts, features, examples.links, program)
    shared = run_shared(parts, own["stem"], features, None)
    answers = Answers(
        each=answer_experts(own["head"], outputs, shared, program),
        none=answer_none(own["head"], experts, features, shared, program),
    )
    seen = show_gate(parts, own, examples.batch, features)
    return gate_logits(gate, seen, examples.links), answers


def answer_needed(
    params: PyTree, encoded: Encoded, models: Models, program: Program
) -> Array:
    """Outputs [B, E, L] of the server's experts, of all or of those that are needed."""
    (experts,), head = params["experts"].values(), params["head"]
    parts = take_parts(program)
    links, features = encoded.examples.links, encoded.features
    if program.strategy.every_expert:
        outputs = apply_all(experts, features, links, program)
        return answer_experts(head, outputs, encoded.shared, program)
    need = find_needed(encoded, models, evaluation_route(program))
    answers = dispatch(parts, experts, head, features, need, encoded.shared, links)
    mixed = program.strategy.mix == "probabilities"
    return jax.nn.softmax(answers) if mixed else answers


def answer_server(
    params: PyTree, encoded: Encoded, models: Models, program: Program
) -> Answers:
    """The answers of the server's model."""
    (experts,), head = params["experts"].values(), params["head"]
    return Answers(
        each=answer_needed(params, encoded, models, program),
        none=answer_none(head, experts, encoded.features, encoded.shared, program),
    )


def score_models(
    models: Models,
    priors: Priors | None,
    answer: Callable[[ClientView], tuple[Array, Answers]],
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """Scores `personal`, `prior`; with personal parts those of `score_whole`, too.

    Args:
      models: of the clients, all n of them where parts are personal.
      priors: of the clients, of all n where parts are personal; or None.
      answer: ONE client -> its gate logits [B, E] and answers.
      examples: the batch.
      program: whether the outputs of all experts are there, and how they are mixed.
    """

    how = evaluation_route(program)

    def score_own(one: tuple[ClientView, Array | None]) -> dict[str, Array]:
        client, log_share = one
        logits, answers = answer(client)
        gates = route_own(logits, client, how)
        outputs = mix_answers(gates, answers, program)
        counts = {"personal": sum_scores(outputs, examples, program)}
        if log_share is not None:
            counts["prior"] = score_prior(outputs, log_share, examples, program)
        return counts | score_whole(logits, answers, examples, program)

    if models.view.personal:
        return jax.lax.map(score_own, (models.view, priors and priors.log_share))

    def add(number: Array, rows: dict[str, Array]) -> dict[str, Array]:
        client = take_model(models, number)
        logits, answers = answer(client)
        gates = route_own(logits, client, how)
        outputs = mix_answers(gates, answers, program)
        return set_rows(rows, number, outputs, priors, examples, program)

    rows = make_rows(len(models.view.held), priors, examples, program)
    return jax.lax.fori_loop(0, models.count, add, rows)


def score_whole(
    logits: Array, answers: Answers, examples: Examples, program: Program
) -> dict[str, Array]:
    """Scores of one gate over all experts: those of `score_routed`, and `expert`."""
    counts = score_routed(logits, answers, examples, program)
    if program.strategy.every_expert:
        counts |= score_experts(answers, examples, program)
    return counts


def score_parts(
    params: PyTree,
    models: Models,
    priors: Priors | None,
    examples: Examples,
    program: Program,
) -> dict[str, Array]:
    """All scores of one batch; every expert is computed once.

    Args:
      params: with the parts that are frozen.
      models: of the clients.
      priors: of the clients; None for none.
      examples: the batch.
      program: a model with parts.

    Returns:
      See `evaluate.count_examples`.
    """
    held, bias = jax.tree.map(
        lambda leaf: leaf[:, 0], (models.view.held, models.view.bias)
    )
    models = models._replace(view=models.view._replace(held=held, bias=bias))
    personal = program.strategy.personal
    if set(personal) - {"gate"}:
        answer = lambda client: answer_personal(client, examples, params, program)
        return score_models(models, priors, answer, examples, program)
    encoded = encode(params, examples, program)
    answers = answer_server(params, encoded, models, program)
    answer = lambda client: (own_logits(client, encoded), answers)
    counts = score_models(models, priors, answer, examples, program)
    if encoded.logits is not None:
        counts |= score_whole(encoded.logits, answers, examples, program)
    return counts
