"""The mixture of work M in PyTorch: one client's sub-model and its training."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from meter import works
from torch import nn
from torch.nn import functional


class Data(NamedTuple):
    """Images float32 [n, 12, 16, 16], channels last, and labels and clients' ids."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


def load(work: works.Work, count: int | None = None) -> Data:
    """The first `count` images, or all, as tensors; 2 x 2 blocks are channels."""
    images, labels = works.load_images(work)
    images = torch.from_numpy(works.normalise(images[:count])).permute(0, 3, 1, 2)
    blocks = functional.pixel_unshuffle(images, 2)
    return Data(
        blocks.contiguous(memory_format=torch.channels_last),
        torch.from_numpy(labels[:count]).long(),
        torch.from_numpy(works.load_ids(work).copy()).long(),
    )


def build_stem() -> nn.Sequential:
    """[B, 12, 16, 16] to [B, 64, 4, 4]: two convolutions with GroupNorm."""
    layers, inputs = [], 4 * works.IMAGE[2]
    for outputs in works.STEM:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        layers += [convolution, nn.GroupNorm(outputs // 8, outputs, eps=1e-6)]
        layers += [nn.MaxPool2d(2), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


def build_dense(inputs: int, outputs: int) -> nn.Linear:
    """A layer of unit gain, its biases 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def build_expert() -> nn.Sequential:
    """[n, 1024] to [n, 64]."""
    hidden, features = works.EXPERT
    first = build_dense(works.mixture_flattened_size(), hidden)
    return nn.Sequential(first, nn.ReLU(), build_dense(hidden, features))


class Mixture(nn.Module):
    """Stem, gate over all E experts, K experts and head."""

    def __init__(self, count: int):
        super().__init__()
        self.held = list(range(count))
        self.stem = build_stem()
        self.gate = nn.Linear(works.STEM[1], works.EXPERTS)
        nn.init.normal_(self.gate.weight, std=0.1)
        nn.init.zeros_(self.gate.bias)
        self.experts = nn.ModuleList(build_expert() for _ in range(count))
        self.head = build_dense(works.EXPERT[1], works.CLASSES)

    def forward(self, images):
        """Class logits [B, L], gate logits [B, E] and gates [B, K].

        An expert sees only the images that are routed to it: all of them where a client
        has no choice, and then nothing need be gathered.
        """
        features = self.stem(images)
        scores = self.gate(features.mean((2, 3)))
        active = min(works.ACTIVE, len(self.held))
        best, slot = scores[:, self.held].topk(active, dim=1)
        gates = torch.zeros(len(images), len(self.held))
        gates = gates.scatter(1, slot, best.softmax(1))
        flat = features.flatten(1)
        mixed = flat.new_zeros(len(flat), works.EXPERT[1])
        for k, expert in enumerate(self.experts):
            if active == len(self.held):
                mixed = mixed + expert(flat) * gates[:, k, None]
                continue
            row = (slot == k).any(1).nonzero().squeeze(1)
            output = expert(flat[row]) * gates[row, k, None]
            mixed = mixed.index_add(0, row, output)
        return self.head(mixed), scores, gates

    def pair(self, params: dict) -> Iterator[tuple]:
        """Pairs of an own parameter and the view of the server's value of it."""
        for name, parameter in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "experts":
                slot, _, rest = rest.partition(".")
                yield parameter, params[f"experts.{rest}"][self.held[int(slot)]]
            else:
                yield parameter, params[name]

    @torch.no_grad()
    def receive(self, params: dict, held: list[int]) -> None:
        """Takes the server's values, of the experts those with the ids `held`."""
        self.held = held
        for parameter, value in self.pair(params):
            parameter.copy_(value)

    @torch.no_grad()
    def add_change(self, params: dict, total: dict) -> None:
        """Adds this model less the server's to `total`, which is like `params`."""
        sums = (value for _, value in self.pair(total))
        for (parameter, start), value in zip(self.pair(params), sums, strict=True):
            value.add_(parameter).sub_(start)


@functools.cache
def build(count: int) -> Mixture:
    """The model of all clients with so many experts; they follow one another."""
    return Mixture(count)


@torch.no_grad()
def init() -> dict[str, torch.Tensor]:
    """The server's parameters by name, those of experts [E, ...]."""
    model = Mixture(works.EXPERTS)
    params = {}
    for name, value in model.named_parameters():
        part, _, rest = name.partition(".")
        if part == "experts":
            name = f"experts.{rest.partition('.')[2]}"
            params.setdefault(name, []).append(value.clone())
        else:
            params[name] = value.clone()
    stack = lambda value: torch.stack(value) if isinstance(value, list) else value
    return {name: stack(value) for name, value in params.items()}


def objective(logits, scores, labels, held: list[int]):
    """Cross-entropy, and the weighted `-log` of the gate mass on held experts."""
    held_mass = scores[:, held].logsumexp(1)
    calibration = (scores.logsumexp(1) - held_mass).mean()
    return functional.cross_entropy(logits, labels) + works.CALIBRATION * calibration


def train(model: Mixture, data: Data, client: int, work: works.Work, generator):
    """A client's steps of SGD, in place.

    Returns:
      NumPy [K] of its experts: accuracy weighted by gates, and images routed to them.
    """
    optimiser = torch.optim.SGD(
        model.parameters(),
        works.MIXTURE_LEARNING_RATE,
        momentum=works.MOMENTUM,
        fused=True,
    )
    order = torch.randperm(work.examples, generator=generator)
    drawn = data.ids[client, order[: work.steps * work.batch]]
    right, mass, load = torch.zeros(3, len(model.held))
    for batch in drawn.split(work.batch):
        labels = data.labels[batch]
        logits, scores, gates = model(data.images[batch])
        objective(logits, scores, labels, model.held).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            right += gates.T @ (logits.argmax(1) == labels).float()
            mass += gates.sum(0)
            load += (gates > 0).sum(0)
    return (right / mass.clamp(min=1e-6)).numpy(), load.numpy()


@torch.no_grad()
def evaluate(params: dict, data: Data) -> float:
    """Mean loss on the data with the experts that the gate chooses among all."""
    model = build(works.EXPERTS)
    model.receive(params, list(range(works.EXPERTS)))
    logits, _, _ = model(data.images)
    return functional.cross_entropy(logits, data.labels).item()
