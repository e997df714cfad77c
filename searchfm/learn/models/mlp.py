"""Fully connected nets."""

import math

from torch import nn

from searchfm.config import Mlp, Shape


def build(config: Mlp, shape: Shape, classes: int) -> nn.Sequential:
    """(N, C, H, W) float32 -> (N, classes) float32 logits, through `config.layers` hidden layers.

    Weights before a ReLU are initialised as in He et al. (2015, arXiv 1502.01852, eq. 10): torch's smaller default
    shrinks the signal to a hundredth over nine layers.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    units = math.prod(shape)
    for width in config.width:
        layers += dense(units, width, batch_norm=config.batch_norm)
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        units = width
    layers.append(nn.Linear(units, classes))
    return nn.Sequential(*layers)


def dense(units: int, width: int, *, batch_norm: bool = False) -> list[nn.Module]:
    """A fully connected layer of `width` units, optional batch norm, and ReLU."""
    linear = nn.Linear(units, width, bias=not batch_norm)  # batch norm would remove the bias
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    if not batch_norm:
        nn.init.zeros_(linear.bias)
    # In place: ReLU needs only its output for its gradient.
    return [linear, *([nn.BatchNorm1d(width)] if batch_norm else []), nn.ReLU(inplace=True)]
