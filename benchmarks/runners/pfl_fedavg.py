"""pfl-research: its `FederatedAveraging` on its `SimulatedBackend`.

`--processes` workers of one thread each train shares of the cohort and all-reduce. The
data are float32 tensors ahead of time, as in pfl's own CIFAR-10 benchmark, and a user's
batches are slices that pfl cuts once.
"""

import os
import socket
import subprocess
import sys

import meter
import numpy as np
from meter import works


def free_port() -> int:
    """A port that is free."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_workers(count: int) -> list[subprocess.Popen]:
    """Starts workers 1 to `count` - 1 and makes this process worker 0."""
    addresses = ",".join(f"localhost:{free_port()}" for _ in range(count))
    os.environ["PFL_WORKER_ADDRESSES"] = addresses
    workers = []
    for rank in range(1, count):
        environment = {**os.environ, "PFL_WORKER_RANK": str(rank)}
        command = [sys.executable, *sys.argv]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        )
    os.environ["PFL_WORKER_RANK"] = "0"
    return workers


def build_backend(work, images, labels):
    """Users drawn at random, as pfl does it: with replacement."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.data import FederatedDataset
    from pfl.data.dataset import Dataset
    from pfl.data.sampling import get_user_sampler

    ids = works.load_ids(work)
    if work.pool is None:
        x, y = images.split(work.examples), labels.split(work.examples)
        held = [Dataset((x[user], y[user]), user_id=user) for user in range(len(ids))]
        fetch = held.__getitem__
    else:
        fetch = lambda user: Dataset((images[ids[user]], labels[ids[user]]), user)
    sampler = get_user_sampler("random", range(work.clients))
    users = FederatedDataset(fetch, sampler)
    return SimulatedBackend(users, users, postprocessors=[WeightByUser()])


def build_model(network):
    """A `PyTorchModel`; its metrics are constant, for no evaluation is timed."""
    import torch
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel
    from torch.nn import functional

    network.loss = lambda x, y: functional.cross_entropy(network(x), y)
    network.metrics = lambda x, y: {"examples": Weighted.from_unweighted(len(x))}
    server = torch.optim.SGD(network.parameters(), works.SERVER_LEARNING_RATE)
    return PyTorchModel(network, torch.optim.SGD, server)


def build_callback():
    """Reports every round."""
    from pfl.callback.base import TrainingProcessCallback
    from pfl.metrics import Metrics

    class Clock(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            self.meter = meter.Meter()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, **_):
            self.meter.end_round()
            return False, Metrics()

    return Clock()


def train(model, backend, work, rounds: int) -> None:
    """FedAvg; round 0 calls the metrics, the others train only."""
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams

    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_learning_rate=works.LEARNING_RATE,
            local_num_epochs=1,
            local_batch_size=work.batch,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[build_callback()],
        send_metrics_to_platform=False,
    )


def main() -> None:
    work, rounds, processes = meter.parse_flags()
    workers = []
    if processes > 1 and "PFL_WORKER_RANK" not in os.environ:
        workers = start_workers(processes)
    import torch
    import torch_models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    images, labels = works.load_images(work)
    images = torch.from_numpy(works.normalise(images))
    labels = torch.from_numpy(labels).long()
    network = torch_models.build(work.model)
    model = build_model(network)  # first: it tells pfl that the framework is PyTorch
    before = torch_models.evaluate(network, images, labels)
    train(model, build_backend(work, images, labels), work, rounds)
    after = torch_models.evaluate(network, images, labels)
    meter.finish(before, after)
    for worker in workers:
        worker.wait(timeout=60)


if __name__ == "__main__":
    main()
