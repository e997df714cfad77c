"""Vision transformers from scratch: timm's class with our keys."""

from collections.abc import Callable
from functools import partial
from typing import cast

from torch import nn

from searchfm.config import Shape, Vit


def build(config: Vit, shape: Shape, classes: int) -> nn.Module:
    """(N, C, H, W) float32 -> (N, classes) float32 logits. `config.fit_images(shape)` must hold."""
    from timm.layers import PatchEmbed  # only studies that need timm pay for its import
    from timm.models.vision_transformer import VisionTransformer

    channels, height, width = shape
    token = config.pooling == "token"
    size, embed = config.patch_size, PatchEmbed
    if config.stem == "conv":
        size, embed = _convolutions(channels, config.patch_size, config.hidden_dim)
    model = VisionTransformer(
        img_size=(height, width),
        patch_size=size,
        embed_layer=embed,
        in_chans=channels,
        num_classes=classes,
        embed_dim=config.hidden_dim,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=token,
        global_pool="token" if token else "avg",
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
    )
    return cast(nn.Module, model)


def _convolutions(channels: int, patch_size: int, hidden_dim: int) -> tuple[int, Callable[..., nn.Module]]:
    """3x3 convolutions with batch norm in place of a patch's projection, as Xiao et al. (2021, arXiv 2106.14881): each
    halves the image, as often as the patch allows, at twice the filters; at least one, that keeps its size.

    Returns the side of the patches of their feature maps, and the embedding that timm's class takes.
    """
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    halvings = (patch_size & -patch_size).bit_length() - 1  # how often 2 divides it
    depth = max(halvings, 1)
    filters = tuple(max(hidden_dim >> i, 1) for i in reversed(range(depth)))
    stem = ConvStem(channels, depth, filters, stride=(2 if halvings else 1,) * depth)
    return patch_size >> halvings, partial(HybridEmbed, backbone=stem)
