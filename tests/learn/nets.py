"""Factories of models, as users write them: one that is right, and others that each break a point of the contract."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from searchfm.config import Shape


def small(
    shape: Shape, classes: int, *, width: int = 8, sizes: Sequence[int] = (3,), dropout: float = 0.0
) -> nn.Module:
    layers: list[nn.Module] = []
    channels, height, wide = shape
    for size in sizes:
        layers += [nn.Conv2d(channels, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels * height * wide, classes))


def no_module(shape: Shape, classes: int) -> str:
    return "a net"


def wrong_shape(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes + 1))


def raises(shape: Shape, classes: int) -> nn.Module:
    raise KeyError("depth\nof the net")


class _Linear(nn.Module):
    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


class Infinite(_Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0


class OwnSeed(_Linear):
    """Weights from the clock, as it were."""

    made = 0

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__(shape, classes)
        OwnSeed.made += 1
        nn.init.constant_(self.head.bias, OwnSeed.made)


class Untrained(_Linear):
    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__(shape, classes)
        self.requires_grad_(False)


class Unused(_Linear):
    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__(shape, classes)
        self.spare = nn.Linear(2, 2)


class Mixing(_Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - images.mean(0, keepdim=True))


class Noisy(_Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 1e-7 * torch.rand(())


class Hidden(_Linear):
    """A weight outside of the state."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__(shape, classes)
        self.scale = [torch.rand(())]

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale[0]


class Branching(_Linear):
    """What torch.export cannot write down."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if float(images.sum()) > 0 else super().forward(images) * 2
