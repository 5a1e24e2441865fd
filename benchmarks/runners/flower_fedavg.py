"""Flower's simulation engine: `FedAvg` over Ray actors of one CPU each.

`--processes` is the number of actors; each keeps the data as float32 tensors.
"""

import os

# Both would otherwise report to their makers; read when they are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import flower_client
import meter
import torch
import torch_models
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from meter import works


def build_server(work, name: str, rounds: int) -> ServerApp:
    """FedAvg without evaluation; Flower's round hook serves as the clock."""
    torch.manual_seed(0)
    model = torch_models.build(work.model)
    images, labels = works.load_images(work)
    images = torch.from_numpy(works.normalise(images[: works.CHECKED]))
    labels = torch.from_numpy(labels).long()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        clocks = []

        def end_round(number, arrays):
            if number == 0:
                clocks.append(meter.Meter())
            else:
                clocks[0].end_round()

        grid.pull_interval = 0.01  # 0.1 s, its default, would rule the short rounds
        before = torch_models.evaluate(model, images, labels)
        share = work.cohort / work.clients
        strategy = FedAvg(
            fraction_train=share, fraction_evaluate=0.0, min_train_nodes=work.cohort
        )
        result = strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            rounds,
            train_config=ConfigRecord({"work": name}),
            evaluate_fn=end_round,
        )
        model.load_state_dict(result.arrays.to_torch_state_dict())
        meter.finish(before, torch_models.evaluate(model, images, labels))

    return app


def main() -> None:
    work, rounds, actors = meter.parse_flags()
    name = next(name for name, known in works.WORKS.items() if known == work)
    run_simulation(
        build_server(work, name, rounds),
        flower_client.app,
        work.clients,
        backend_config={
            "init_args": {"num_cpus": actors, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
