"""The net of airbench94 (Jordan 2024, arXiv 2404.00498, section 3), as a model of the user's own for `bench gpu`.

Its whitening layer has random weights here, and its training none of the paper's tricks: only the time of an epoch is
compared.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

WIDTHS = (64, 256, 256)
SCALE = 1 / 9  # of the logits


def group(inputs: int, outputs: int) -> Iterable[nn.Module]:
    yield from (nn.Conv2d(inputs, outputs, 3, padding="same", bias=False), nn.MaxPool2d(2))
    yield from (nn.BatchNorm2d(outputs), nn.GELU())
    yield from (nn.Conv2d(outputs, outputs, 3, padding="same", bias=False), nn.BatchNorm2d(outputs), nn.GELU())


class Net(nn.Module):
    """(N, C, 32, 32) -> (N, classes) logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        first = 2 * channels * 2**2
        layers: list[nn.Module] = [nn.Conv2d(channels, first, 2), nn.GELU()]
        for inputs, outputs in zip((first, *WIDTHS), WIDTHS, strict=False):
            layers += group(inputs, outputs)
        self.layers = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten())
        self.head = nn.Linear(WIDTHS[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images))
        return logits * SCALE


def net(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The factory."""
    torch.backends.cudnn.benchmark = True
    return Net(shape[0], classes)
