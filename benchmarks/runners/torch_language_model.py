"""The transformer of work L in PyTorch: one client's sub-model and its training."""

import functools
from collections.abc import Iterator

import torch
from meter import works
from torch import nn
from torch.nn import functional

BASE, EPSILON = 10_000.0, 1e-6  # of rotary positions and of norms


def draw(*shape: int, fan_in: int) -> nn.Parameter:
    """Normal weights with the variance 1 / `fan_in`."""
    return nn.Parameter(torch.randn(shape) * fan_in**-0.5)


class Attention(nn.Module):
    """Causal attention with rotary positions; heads share keys and values in groups."""

    def __init__(self):
        super().__init__()
        self.size = works.WIDTH // works.HEADS
        self.heads = [works.HEADS, works.KV_HEADS, works.KV_HEADS]
        rows = self.size * sum(self.heads)
        self.inward = draw(rows, works.WIDTH, fan_in=works.WIDTH)
        self.outward = draw(works.WIDTH, works.WIDTH, fan_in=works.WIDTH)
        rate = BASE ** (-torch.arange(self.size // 2) / (self.size // 2))
        angle = torch.arange(works.WINDOW)[:, None] * rate
        self.register_buffer("cos", angle.cos()[None, :, None])
        self.register_buffer("sin", angle.sin()[None, :, None])

    def rotate(self, x):
        """[B, P, H, W], turned by its position."""
        first, second = x.chunk(2, dim=-1)
        turned = first * self.cos - second * self.sin
        return torch.cat([turned, second * self.cos + first * self.sin], dim=-1)

    def forward(self, x):
        heads = functional.linear(x, self.inward).unflatten(-1, (-1, self.size))
        query, key, value = heads.split(self.heads, dim=2)
        mixed = functional.scaled_dot_product_attention(
            self.rotate(query).transpose(1, 2),
            self.rotate(key).transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=works.HEADS != works.KV_HEADS,
        )
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.outward)


class Experts(nn.Module):
    """K experts with SwiGLU; `hidden` has the rows of the gate, then those of `up`."""

    def __init__(self, count: int):
        super().__init__()
        width, units = works.WIDTH, works.HIDDEN_UNITS
        self.hidden = draw(count, 2 * units, width, fan_in=width)
        self.down = draw(count, width, units, fan_in=units)

    def forward(self, tokens, slot, weights):
        """[T, D] of the mixture.

        An expert sees only the tokens that are routed to it: all of them where a client
        has no choice, and then nothing need be gathered.

        Args:
          tokens: [T, D].
          slot: [T, A] int64, experts of each token.
          weights: [T, A] of their outputs.
        """
        count, active = len(self.hidden), slot.shape[1]
        each = list(zip(self.hidden.unbind(), self.down.unbind(), strict=True))
        if active == count:
            gates = torch.zeros(len(tokens), count).scatter(1, slot, weights)
            outputs = [apply_expert(*own, tokens) for own in each]
            return sum(out * gates[:, k, None] for k, out in enumerate(outputs))
        order = slot.flatten().argsort()
        token = order // active
        load = torch.bincount(slot.flatten(), minlength=count).tolist()
        rows = tokens.index_select(0, token).split(load)
        outputs = torch.cat(
            [apply_expert(*own, row) for own, row in zip(each, rows, strict=True)]
        )
        weighted = outputs * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, token, weighted)


def apply_expert(hidden, down, tokens):
    """[n, D] of one expert."""
    gate, up = functional.linear(tokens, hidden).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


class Block(nn.Module):
    """Attention, then a mixture whose gate scores the mean of the states so far."""

    def __init__(self, count: int):
        super().__init__()
        self.held = list(range(count))
        self.attention = Attention()
        self.norm = nn.ParameterList(torch.ones(works.WIDTH) for _ in range(2))
        self.gate = nn.Linear(works.WIDTH, works.EXPERTS)
        nn.init.normal_(self.gate.weight, std=0.1)
        nn.init.zeros_(self.gate.bias)
        self.experts = Experts(count)
        positions = torch.arange(1.0, works.WINDOW + 1)
        self.register_buffer("share", 1 / positions[None, :, None])

    def forward(self, x):
        """[B, P, D], and of T = B x P tokens: scores [T, E], slots, weights [T, A]."""
        x = x + self.attention(normalise(x, self.norm[0]))
        hidden = normalise(x, self.norm[1])
        scores = self.gate(hidden.cumsum(1) * self.share).flatten(0, 1)
        active = min(works.ACTIVE, len(self.held))
        best, slot = scores[:, self.held].topk(active, dim=1)
        weights = best.softmax(1)
        mixed = self.experts(hidden.flatten(0, 1), slot, weights)
        return x + mixed.view_as(x), (scores, slot, weights)


def normalise(x, scale):
    return functional.rms_norm(x, scale.shape, scale, EPSILON)


class Transformer(nn.Module):
    """Embedding, blocks with `count` experts each, and the head."""

    def __init__(self, count: int):
        super().__init__()
        self.embedding = draw(works.VOCABULARY, works.WIDTH, fan_in=1)
        self.blocks = nn.ModuleList(Block(count) for _ in range(works.BLOCKS))
        self.norm = nn.Parameter(torch.ones(works.WIDTH))
        self.head = draw(works.VOCABULARY, works.WIDTH, fan_in=works.WIDTH)

    def forward(self, tokens):
        """Logits [T, V] of tokens [B, P] int64, and the routing of each block."""
        x, routing = functional.embedding(tokens, self.embedding), []
        for block in self.blocks:
            x, routed = block(x)
            routing.append(routed)
        x = normalise(x, self.norm).flatten(0, 1)
        return functional.linear(x, self.head), routing

    def pair(self) -> Iterator[tuple[str, nn.Parameter, list[int] | slice]]:
        """Name, own parameter, and the rows of the server's that it is."""
        for name, parameter in self.named_parameters():
            number = layer_of(name)
            rows = slice(None) if number is None else self.blocks[number].held
            yield name, parameter, rows

    @torch.no_grad()
    def receive(self, params: dict, held: list[list[int]]) -> None:
        """Takes the server's values, of the experts of each block those it `held`."""
        for block, own in zip(self.blocks, held, strict=True):
            block.held = own
        for name, parameter, rows in self.pair():
            parameter.copy_(params[name][rows])

    @torch.no_grad()
    def add_change(self, params: dict, total: dict) -> None:
        """Adds this model less the server's to `total`, which is like `params`."""
        for name, parameter, rows in self.pair():
            total[name][rows] += parameter - params[name][rows]


def layer_of(name: str) -> int | None:
    """The block of experts' parameters; None for others."""
    parts = name.split(".")
    return int(parts[1]) if "experts" in parts else None


@functools.cache
def build(count: int) -> Transformer:
    """The model of all clients with so many experts; they follow one another."""
    return Transformer(count)


@torch.no_grad()
def init() -> dict[str, torch.Tensor]:
    """The server's parameters by name, those of experts [E, ...]."""
    model = Transformer(works.EXPERTS)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def objective(model: Transformer, logits, routing, targets):
    """Cross-entropy, and each block's weighted `-log` of the mass on held experts."""
    loss = functional.cross_entropy(logits, targets)
    for block, (scores, _, _) in zip(model.blocks, routing, strict=True):
        missed = scores.logsumexp(1) - scores[:, block.held].logsumexp(1)
        loss = loss + works.LANGUAGE_CALIBRATION * missed.mean()
    return loss


@torch.no_grad()
def sum_feedback(routing, right, count: int):
    """Of each block's experts [2, G, K]: gate mass on right tokens, and gate mass."""
    sums = torch.zeros(2, len(routing), count)
    for layer, (_, slot, weights) in enumerate(routing):
        sums[0, layer].index_add_(
            0, slot.flatten(), (weights * right[:, None]).flatten()
        )
        sums[1, layer].index_add_(0, slot.flatten(), weights.flatten())
    return sums


def train(model: Transformer, batches):
    """A client's steps of AdamW on windows [T, B, P + 1] int64, in place.

    Returns:
      Losses [T]; of each block's experts [G, K] the accuracy weighted by gates, and the
      gate mass.
    """
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        parameters, works.LANGUAGE_LEARNING_RATE, weight_decay=0.0, fused=True
    )
    count = len(model.blocks[0].held)
    losses, feedback = [], torch.zeros(2, works.BLOCKS, count)
    for windows in batches:
        targets = windows[:, 1:].flatten()
        logits, routing = model(windows[:, :-1])
        loss = objective(model, logits, routing, targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, works.CLIP)
        optimiser.step()
        right = (logits.detach().argmax(1) == targets).float()
        feedback += sum_feedback(routing, right, count)
        losses.append(loss.detach())
    right, mass = feedback
    return torch.stack(losses), right / mass.clamp(min=1e-6), mass


@torch.no_grad()
def evaluate(params: dict, windows) -> float:
    """Mean loss on windows with the experts that the gates choose among all."""
    model = build(works.EXPERTS)
    model.receive(params, [list(range(works.EXPERTS))] * works.BLOCKS)
    logits, _ = model(windows[:, :-1])
    return functional.cross_entropy(logits, windows[:, 1:].flatten()).item()
