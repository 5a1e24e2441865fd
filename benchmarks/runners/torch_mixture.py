"""No framework: work M in PyTorch, `--processes` workers of one thread each.

Server and workers as a competent user would write them: a worker trains its share of
the cohort one client after the other, every client the experts that it holds, and an
expert sees only the examples that are routed to it. The workers return sums, which the
server merges.
"""

import meter
import numpy as np
import torch
import torch_mixture_model as mixture
from meter import works
from torch import multiprocessing

PRIOR, RATE, IDLE, USAGE_DECAY = 0.5, 0.3, 0.9, 0.9  # of fitness and usage


def start_worker(name: str) -> None:
    """Loads the data once; `data` stays in the worker."""
    global data
    torch.set_num_threads(1)
    data = mixture.load(works.WORKS[name])


def train_share(params, jobs, work, seed: int):
    """Trains the clients of `jobs`, pairs (client, held experts), one after the other.

    Returns:
      The sum of their changes (of experts by id), how many trained each expert, and
      the accuracy and the load of each client's experts.
    """
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    count, feedback = torch.zeros(works.EXPERTS), []
    for client, held in jobs:
        model = mixture.build(len(held))
        model.receive(params, held)
        accuracy, load = mixture.train(model, data, client, work, generator)
        model.add_change(params, total)
        count[held] += torch.as_tensor(load > 0, dtype=count.dtype)
        feedback.append((client, held, accuracy, load))
    return total, count, feedback


def merge(params, results, work) -> None:
    """Adds the mean change in place; an expert's over the clients that trained it."""
    totals, counts, _ = zip(*results, strict=True)
    holders = torch.stack(counts).sum(0)
    for name, value in params.items():
        change = torch.stack([total[name] for total in totals]).sum(0)
        if name.startswith("experts."):
            change /= holders.clamp(min=1).view(-1, *[1] * (change.dim() - 1))
        else:
            change /= work.cohort
        value.add_(change, alpha=works.SERVER_LEARNING_RATE)


class Alignment:
    """The load-balanced rule: a client holds its best by fitness less usage."""

    def __init__(self, clients: int):
        noise = np.random.default_rng(0).uniform(-0.01, 0.01, (clients, works.EXPERTS))
        self.fitness = PRIOR + noise
        self.usage = np.zeros(works.EXPERTS)

    def assign(self, client: int) -> list[int]:
        """The ids of the experts that a client trains in this round."""
        fitness = self.fitness[client]
        gain = (fitness - fitness.min()) / max(np.ptp(fitness), 1e-9)
        scores = gain - self.usage / max(self.usage.max(), 1.0)
        return np.argsort(-scores)[: works.HELD[client]].tolist()

    def learn(self, feedback) -> None:
        """Moves the scores of what was trained; all others forget."""
        old = self.fitness
        self.fitness = IDLE * old + (1 - IDLE) * PRIOR
        self.usage *= USAGE_DECAY
        for client, held, accuracy, load in feedback:
            moved = (1 - RATE) * old[client, held] + RATE * accuracy
            self.fitness[client, held] = np.where(load > 0, moved, old[client, held])
            self.usage[held] += load


def run_round(params, pool, alignment, number: int, work, processes: int) -> None:
    """One round; every worker gets clients that hold as much as those of others."""
    cohort = works.sample_cohort(work, number)
    jobs = [(int(client), alignment.assign(client)) for client in cohort]
    jobs.sort(key=lambda job: -len(job[1]))
    shares = [jobs[rank::processes] for rank in range(processes)]
    calls = [
        (params, share, work, number * processes + rank)
        for rank, share in enumerate(shares)
    ]
    results = pool.starmap(train_share, calls, chunksize=1)
    merge(params, results, work)
    alignment.learn([one for result in results for one in result[2]])


def main() -> None:
    work, rounds, processes = meter.parse_flags()
    name = next(name for name, known in works.WORKS.items() if known == work)
    torch.manual_seed(0)
    checked = mixture.load(work, works.CHECKED)
    params = mixture.init()
    alignment = Alignment(work.clients)
    before = mixture.evaluate(params, checked)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, start_worker, (name,)) as pool:
        clock = meter.Meter()
        for number in range(rounds):
            run_round(params, pool, alignment, number, work, processes)
            clock.end_round()
        meter.finish(before, mixture.evaluate(params, checked))


if __name__ == "__main__":
    main()
