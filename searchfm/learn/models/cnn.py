"""Plain convolutional nets: stages of convolutions and pooling, then dense layers."""

from typing import assert_never

from torch import nn

from searchfm.config import Cnn, Pool, Shape
from searchfm.learn.models.mlp import dense


def build(config: Cnn, shape: Shape, classes: int) -> nn.Sequential:
    """(N, C, H, W) float32 -> (N, classes) float32 logits. `config.fit_images(shape)` must hold."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for filters, pool in zip(config.filters, config.pool, strict=True):
        for i in range(config.convs):
            layers += _conv(channels, filters, config, pool if i == config.convs - 1 else "none")
            channels = filters
        if config.conv_dropout:
            layers.append(nn.Dropout2d(config.conv_dropout))
        if pool in ("max", "average"):
            height, width = height // 2, width // 2
    if config.head == "average":
        layers.append(nn.AdaptiveAvgPool2d(1))
        height = width = 1
    layers.append(nn.Flatten())
    units = channels * height * width
    for i, dense_width in enumerate(config.dense_width):
        if config.dropout and i > 0:
            layers.append(nn.Dropout(config.dropout))
        layers += dense(units, dense_width)
        units = dense_width
    if config.dropout:
        layers.append(nn.Dropout(config.dropout))
    layers.append(nn.Linear(units, classes))
    return nn.Sequential(*layers)


def _conv(channels: int, filters: int, config: Cnn, pool: Pool) -> list[nn.Module]:
    """A convolution that keeps the image's size, optional batch norm, ReLU, and the pooling."""
    conv = nn.Conv2d(channels, filters, config.kernel, padding=config.kernel // 2, bias=not config.batch_norm)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: list[nn.Module] = [conv, *([nn.BatchNorm2d(filters)] if config.batch_norm else [])]
    relu = nn.ReLU(inplace=True)
    match pool:
        # ReLU of the largest of four is the largest ReLU of four: the same function on a quarter of the units.
        case "max":
            return [*layers, nn.MaxPool2d(2), relu]
        case "max-same":
            return [*layers, relu, nn.MaxPool2d(3, stride=1, padding=1)]
        case "average":
            return [*layers, relu, nn.AvgPool2d(2)]
        case "none":
            return [*layers, relu]
        case _:
            assert_never(pool)
