"""Step 4 of a round: the cohort trains, spread over devices and streamed through each.

Every device walks its share of the clients in chunks, vmaps `client_update` over a
chunk and adds the results to running sums, so that memory does not grow with the
cohort. One psum at the end joins the devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.aggregate import Sums, accumulate, weigh, zero_sums
from fedmoe_jax.client import ClientInput, ClientUpdate, is_local, step_weights
from fedmoe_jax.rules import Rules
from fedmoe_jax.runtime.scheduling import chunk_size, schedule
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import Array, Federation, Feedback, Hyper, PyTree
from fedmoe_jax.world.outcome import STALE, Outcome

# (inputs, experts that it sends [], whether its update is finite []) -> outcome, of ONE
JudgeFn = Callable[[ClientInput, Array, Array], Outcome]


@struct.dataclass
class Report:
    """What the server keeps of each client's update (leading C axis).

    Attributes:
      feedback: per-slot feedback [C, K].
      loss: [C] float32 nats.
      accuracy: [C] float32.
      outcome: what became of the client's round.
      sent: [C] float32, experts whose update it sends.
      own: trained personal parts, by name like params; {} where there are none.
      variate: new control variates, like params; {} where there are none.
    """

    feedback: Feedback
    loss: Array
    accuracy: Array
    outcome: Outcome
    sent: Array
    own: PyTree
    variate: PyTree

    @property
    def arrived(self) -> Array:
        """[C] bool, whether the client's update counts."""
        return self.outcome.arrived


def train_own(inputs: ClientInput, update: ClientUpdate, local_experts: int) -> PyTree:
    """ONE client's personal parts after training."""

    def add_rows(old: Array, delta: Array) -> Array:
        local = is_local(inputs.held, old.shape[0], local_experts)
        kept = (inputs.slot & local).reshape((-1,) + (1,) * (delta.ndim - 1))
        return old.at[inputs.held].add(jnp.where(kept, delta, 0.0))

    def add_part(part: str) -> PyTree:
        add = add_rows if part == "experts" else jnp.add
        return jax.tree.map(add, inputs.own[part], update.delta[part])

    return {part: add_part(part) for part in inputs.own}


def renew_variate(
    inputs: ClientInput, update: ClientUpdate, hyper: Hyper, momentum: float
) -> PyTree:
    """ONE client's new control variate: its mean gradient (SCAFFOLD, option II).

    `c_i <- c_i - c - delta / (a lr)` with `c - c_i` the inputs's correction and `a` how
    often a gradient ends up in the delta, which is the number of steps in the paper,
    where there is no momentum.
    """
    if not inputs.correction:
        return {}
    rate = 1.0 / (step_weights(inputs.steps, momentum) * hyper.client_learning_rate)
    renew = lambda correction, delta: -correction - rate * delta
    return jax.tree.map(renew, inputs.correction, update.delta)


def make_report(
    update: ClientUpdate,
    inputs: ClientInput,
    sent: Array,
    outcome: Outcome,
    hyper: Hyper,
    rules: Rules,
) -> Report:
    """The report of ONE client.

    Args:
      update: what the client returned.
      inputs: what it was sent.
      sent: [] float32, experts that it sends.
      outcome: what became of its round.
      hyper: hyperparameters.
      rules: what stays with the client.
    """
    return Report(
        feedback=update.feedback,
        loss=update.loss,
        accuracy=update.accuracy,
        outcome=outcome,
        sent=sent,
        own=train_own(inputs, update, rules.local_experts),
        variate=renew_variate(inputs, update, hyper, rules.momentum),
    )


def keep_if(condition: Array, weights: dict[str, Array]) -> dict[str, Array]:
    """The weights of ONE client, or zeros."""
    return jax.tree.map(lambda weight: jnp.where(condition, weight, 0.0), weights)


def cast_code(report: Report, dtype: jnp.dtype) -> Report:
    """The report with outcomes' codes in another dtype."""
    code = report.outcome.code.astype(dtype)
    return report.replace(outcome=report.outcome.replace(code=code))


def take_inputs(inputs: ClientInput, position: Array) -> ClientInput:
    """Tasks at positions of any shape; positions beyond the cohort get zero steps."""
    count = inputs.client.shape[0]
    taken = jax.tree.map(lambda leaf: leaf[jnp.minimum(position, count - 1)], inputs)
    return taken.replace(steps=jnp.where(position < count, taken.steps, 0))


def place_reports(reports: Report, position: Array, count: int) -> Report:
    """This device's reports at their places in the cohort [C], zeros elsewhere."""

    def place(leaf: Array) -> Array:
        empty = jnp.zeros((count, *leaf.shape[1:]), leaf.dtype)
        return empty.at[position].set(leaf, mode="drop")

    return jax.tree.map(place, reports)


def train_share(
    params: PyTree,
    chunks: ClientInput,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    judge: JudgeFn,
    rules: Rules,
) -> tuple[tuple[Sums, ...], Report]:
    """What ONE device does: streams its chunks of inputs through `client_update`.

    Args:
      params: the server's params.
      chunks: inputs with leading axes [chunks, clients of a chunk].
      federation: data and sizes.
      hyper: hyperparameters.
      key: the round's training key; each client folds its id into it.
      client_update: for ONE client.
      judge: what becomes of ONE client's round.
      rules: how clients are weighted, and what stays with them.

    Returns:
      Sums over this device's clients, see `build_train_cohort`, and their reports with
      one leading axis.
    """
    stale = rules.world.late == "stale"  # then sums have a second row for them

    def one_client(inputs: ClientInput) -> tuple[ClientUpdate, dict, Report]:
        client_key = jax.random.fold_in(key, inputs.client)
        update = client_update(params, inputs, federation, hyper, client_key)
        size = federation.size[inputs.client]
        weights = weigh(inputs, update, size, hyper, rules)
        sent = (weights["experts"] > 0).sum().astype(jnp.float32)
        outcome = judge(inputs, sent, update.finite)
        report = make_report(update, inputs, sent, outcome, hyper, rules)
        return update, keep_if(outcome.arrived, weights), report

    def add_client(totals: Sums, client: tuple) -> tuple[Sums, None]:
        code, *client = client
        which = (code == STALE).astype(jnp.int32) if stale else 0
        return accumulate(totals, which, *client), None

    def one_chunk(totals: Sums, chunk: ClientInput) -> tuple[Sums, Report]:
        if chunk.client.shape[0] == 1:  # vmapping one client would group convolutions
            returned = one_client(jax.tree.map(lambda leaf: leaf[0], chunk))
            returned = jax.tree.map(lambda leaf: leaf[None], returned)
        else:
            returned = jax.vmap(one_client)(chunk)
        updates, weights, reports = returned
        clients = reports.outcome.code, chunk, updates, weights
        totals, _ = jax.lax.scan(add_client, totals, clients)
        return totals, reports

    rows = lambda leaf: jnp.zeros((1 + stale, *leaf.shape))
    start = jax.tree.map(rows, zero_sums(params))
    totals, reports = jax.lax.scan(one_chunk, start, chunks)
    take = lambda row: jax.tree.map(lambda leaf: leaf[row], totals)
    sums = tuple(take(row) for row in range(1 + stale))
    clients = chunks.client.size  # not -1: reports may have leaves without numbers
    join = lambda leaf: leaf.reshape(clients, *leaf.shape[2:])
    return sums, jax.tree.map(join, reports)


def build_train_cohort(
    client_update: Callable[..., ClientUpdate], judge: JudgeFn, rules: Rules
) -> Callable[..., tuple[tuple[Sums, ...], Report]]:
    """Builds `train_cohort(params, inputs, federation, hyper, key) -> (sums, Report)`.

    It is written for one device and joins the devices of the mesh axis `clients`.

    Args:
      client_update: for ONE client, see `client.build_client_update`.
      judge: what becomes of ONE client's round.
      rules: clients vmapped at once, see `chunk_size`; weights; what stays with them.

    Returns:
      A function of params, inputs [C], the federation, hyperparameters and the round's
      training key; sums and reports [C] are the same on all devices. There are the sums
      of what is merged now and, with `late="stale"`, of what is merged in the next
      round.
    """

    def train_cohort(
        params: PyTree,
        inputs: ClientInput,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> tuple[tuple[Sums, ...], Report]:
        count, num_devices = inputs.client.shape[0], jax.lax.axis_size(CLIENTS)
        chunk = chunk_size(count, num_devices, rules.client_chunk)
        position = schedule(inputs.steps, num_devices, chunk)
        position = position[jax.lax.axis_index(CLIENTS)]  # [chunks, clients of a chunk]
        sums, reports = train_share(
            params,
            take_inputs(inputs, position),
            federation,
            hyper,
            key,
            client_update=client_update,
            judge=judge,
            rules=rules,
        )
        placed = place_reports(reports, position.reshape(-1), count)
        # With a single dtype the devices are joined by a single collective.
        sums, report = jax.lax.psum((sums, cast_code(placed, jnp.float32)), CLIENTS)
        return sums, cast_code(report, jnp.int32)

    return train_cohort
