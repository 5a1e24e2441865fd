"""No framework: work L in PyTorch, `--processes` workers of one thread each.

Server and workers as those of work M, see `torch_mixture.py`; every client keeps the
experts of each block that it drew at the start.
"""

import meter
import numpy as np
import torch
import torch_language_model as language
from meter import works
from torch import multiprocessing


def start_worker(name: str) -> None:
    """Loads the data once; `windows` stays in the worker."""
    global windows
    torch.set_num_threads(1)
    windows = load(works.WORKS[name])


def load(work: works.Work) -> torch.Tensor:
    """All windows, int64 [N x M, WINDOW + 1]."""
    return torch.from_numpy(works.load_windows(work)[0]).long()


def draw_held(work: works.Work) -> list[list[list[int]]]:
    """The experts of every client and block, uniformly."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.permutation(works.EXPERTS)[:count].tolist()
    return [
        [draw(works.LANGUAGE_HELD[client]) for _ in range(works.BLOCKS)]
        for client in range(work.clients)
    ]


def train_share(params, jobs, work, seed: int):
    """Trains the clients of `jobs`, pairs (client, held experts), one after the other.

    Returns:
      The sum of their changes (of experts by id), and how many trained each expert of
      each block.
    """
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    count = torch.zeros(works.BLOCKS, works.EXPERTS)
    for client, held in jobs:
        model = language.build(len(held[0]))
        model.receive(params, held)
        order = torch.randperm(work.examples, generator=generator)
        drawn = client * work.examples + order[: work.steps * work.batch]
        batches = windows[drawn].unflatten(0, (work.steps, work.batch))
        _, _, mass = language.train(model, batches)
        model.add_change(params, total)
        for layer, own in enumerate(held):
            count[layer, own] += (mass[layer] > 0).float()
    return total, count


def merge(params, results, work) -> None:
    """Adds the mean change in place; an expert's over the clients that trained it."""
    totals, counts = zip(*results, strict=True)
    holders = torch.stack(counts).sum(0)
    for name, value in params.items():
        change = torch.stack([total[name] for total in totals]).sum(0)
        layer = language.layer_of(name)
        if layer is None:
            change /= work.cohort
        else:
            change /= holders[layer].clamp(min=1).view(-1, 1, 1)
        value.add_(change, alpha=works.SERVER_LEARNING_RATE)


def run_round(params, pool, held, number: int, work, processes: int) -> None:
    """One round; every worker gets clients that hold as much as those of others."""
    cohort = works.sample_cohort(work, number)
    jobs = [(int(client), held[client]) for client in cohort]
    jobs.sort(key=lambda job: -len(job[1][0]))
    calls = [
        (params, jobs[rank::processes], work, number * processes + rank)
        for rank in range(processes)
    ]
    merge(params, pool.starmap(train_share, calls, chunksize=1), work)


def main() -> None:
    work, rounds, processes = meter.parse_flags()
    name = next(name for name, known in works.WORKS.items() if known == work)
    torch.manual_seed(0)
    checked = load(work)[works.checked_windows(work)]
    params, held = language.init(), draw_held(work)
    before = language.evaluate(params, checked)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, start_worker, (name,)) as pool:
        clock = meter.Meter()
        for number in range(rounds):
            run_round(params, pool, held, number, work, processes)
            clock.end_round()
        meter.finish(before, language.evaluate(params, checked))


if __name__ == "__main__":
    main()
