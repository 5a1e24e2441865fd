"""No framework: a PyTorch loop over the cohort. `--processes` is its threads."""

import os

# Threads that wait by spinning bring each other to a halt on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import meter
import torch
import torch_models
from meter import works
from torch.nn import functional


def train_client(model, images, labels, batch: int) -> None:
    """One epoch of SGD in place."""
    optimiser = torch.optim.SGD(model.parameters(), lr=works.LEARNING_RATE)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        functional.cross_entropy(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()


def run_round(model, clients, work) -> None:
    """Trains each (images, labels) of `clients` and adds the mean change in place."""
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    total = [torch.zeros_like(p) for p in start]
    for images, labels in clients:
        train_client(model, images, labels, work.batch)
        with torch.no_grad():
            for p, s, t in zip(params, start, total, strict=True):
                t.add_(p).sub_(s)
                p.copy_(s)
    with torch.no_grad():
        for p, t in zip(params, total, strict=True):
            p.add_(t, alpha=works.SERVER_LEARNING_RATE / work.cohort)


def main() -> None:
    work, rounds, threads = meter.parse_flags()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = works.load_images(work)
    images = torch.from_numpy(works.normalise(images))
    labels = torch.from_numpy(labels).long()
    ids = torch.from_numpy(works.load_ids(work)).long()
    if work.pool is None:
        x, y = images.split(work.examples), labels.split(work.examples)
        fetch = lambda client: (x[client], y[client])
    else:
        fetch = lambda client: (images[ids[client]], labels[ids[client]])
    model = torch_models.build(work.model)
    before = torch_models.evaluate(model, images, labels)
    clock = meter.Meter()
    for number in range(rounds):
        cohort = works.sample_cohort(work, number)
        run_round(model, (fetch(int(client)) for client in cohort), work)
        clock.end_round()
    meter.finish(before, torch_models.evaluate(model, images, labels))


if __name__ == "__main__":
    main()
