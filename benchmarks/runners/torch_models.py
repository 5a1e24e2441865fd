"""The models of the works in PyTorch, shared by the PyTorch peers' runners."""

import torch
from meter import works
from torch import nn
from torch.nn import functional


class ChannelsFirst(nn.Module):
    """[B, H, W, F] to [B, F, H, W] as a view: its strides are channels-last."""

    def forward(self, images):
        return images.permute(0, 3, 1, 2)


def build(name: str) -> nn.Sequential:
    """A model from [B, 32, 32, 3] to logits [B, 10]; the CNN is pfl's `simple_cnn`."""
    if name == "mlp":
        layers = [nn.Flatten(), nn.Linear(3072, works.HIDDEN), nn.ReLU()]
        layers.append(nn.Linear(works.HIDDEN, works.CLASSES))
    else:
        first, second = works.CHANNELS
        layers = [ChannelsFirst(), nn.Conv2d(3, first, 3), nn.ReLU()]
        layers += [nn.Conv2d(first, second, 3), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Dropout(works.DROPOUT[0]), nn.Flatten()]
        layers += [nn.Linear(works.flattened_size(), works.DENSE), nn.ReLU()]
        layers += [nn.Dropout(works.DROPOUT[1]), nn.Linear(works.DENSE, works.CLASSES)]
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, images, labels) -> float:
    """Mean loss on the checked images, without dropout."""
    model.eval()
    images, labels = images[: works.CHECKED], labels[: works.CHECKED]
    loss = functional.cross_entropy(model(images), labels).item()
    model.train()
    return loss
