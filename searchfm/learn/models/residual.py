"""Residual networks for small images, with basic and bottleneck blocks (timm's) in any order of stages."""

from typing import Any

from torch import nn

from searchfm.config import Residual, Shape


def build(config: Residual, shape: Shape, classes: int) -> nn.Sequential:
    """(N, C, H, W) float32 -> (N, classes) float32 logits.

    He et al. 2016 (arXiv 1512.03385), section 4.2: a 3x3 stem, stages that halve the image and double the filters, the
    mean of each map, one dense layer. Where a block changes the shape, its shortcut is a 1x1 convolution (their option
    B). Bottlenecks give four times their stage's filters. Convolutions are initialised as in He et al. (2015).
    `config.fit_images(shape)` must hold.
    """
    from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv

    kinds: dict[str, Any] = {"basic": BasicBlock, "bottleneck": Bottleneck}
    channels = config.width
    stem = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    for stage, name in enumerate(config.block):
        kind, planes = kinds[name], config.width << stage
        out = planes * kind.expansion
        for i in range(config.blocks):
            stride = 2 if stage and i == 0 else 1
            shortcut = downsample_conv(channels, out, 1, stride) if stride > 1 or channels != out else None
            layers.append(kind(channels, planes, stride, shortcut))
            channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if config.dropout:
        layers.append(nn.Dropout(config.dropout))
    net = nn.Sequential(*layers, nn.Linear(channels, classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
