"""Flower's client app; a module of its own, for an actor then loads it only once."""

import functools

import torch
import torch_models
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from meter import works
from torch_loop import train_client

app = ClientApp()


@functools.cache
def load(name: str):
    """Model, images, labels and ids, which an actor keeps between clients."""
    torch.set_num_threads(1)
    work = works.WORKS[name]
    images, labels = works.load_images(work)
    images = torch.from_numpy(works.normalise(images))
    ids = torch.from_numpy(works.load_ids(work)).long()
    return torch_models.build(work.model), images, torch.from_numpy(labels).long(), ids


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's epoch: weights come and go as records."""
    name = str(message.content["config"]["work"])
    work = works.WORKS[name]
    model, images, labels, ids = load(name)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    if work.pool is None:
        held = slice(client * work.examples, (client + 1) * work.examples)
    else:
        held = ids[client]
    train_client(model, images[held], labels[held], work.batch)
    metrics = MetricRecord({"num-examples": work.examples})
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    return Message(content=RecordDict(content), reply_to=message)
