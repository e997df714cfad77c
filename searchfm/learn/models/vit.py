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
    size, embed = config.patch_size, PatchEmbed
    if config.stem_convs:
        size, embed = _convolutions(channels, config)
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
        class_token=config.pooling == "token",
        global_pool={"token": "token", "average": "avg", "flatten": ""}[config.pooling],
        pos_drop_rate=config.dropout,
        proj_drop_rate=config.dropout,
    )
    if config.pooling == "flatten":  # timm's class has no such pooling: its "" gives the head (N, tokens, hidden_dim)
        tokens = cast(int, model.patch_embed.num_patches)
        model.head = nn.Sequential(nn.Flatten(), nn.Linear(tokens * config.hidden_dim, classes))
    return cast(nn.Module, model)


def _convolutions(channels: int, config: Vit) -> tuple[int, Callable[..., nn.Module]]:
    """3x3 convolutions with batch norm in place of a patch's projection, as Xiao et al. (2021, arXiv 2106.14881).

    Each group of `stem_convs` doubles the filters and halves the image, both in its last convolution: as many groups as
    the patch allows halvings; if it allows none, one group that keeps the size. Returns the side of the patches of its
    feature maps, and the embedding that timm's class takes.
    """
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    halvings = (config.patch_size & -config.patch_size).bit_length() - 1  # how often 2 divides it
    depth = max(halvings, 1)
    filters: list[int] = []
    for left in reversed(range(depth)):
        before, last = (max(config.hidden_dim >> i, 1) for i in (left + 1, left))
        filters += [before] * (config.stem_convs - 1) + [last]
    strides = ([1] * (config.stem_convs - 1) + [2 if halvings else 1]) * depth
    stem = ConvStem(channels, len(filters), tuple(filters), stride=tuple(strides))
    return config.patch_size >> halvings, partial(HybridEmbed, backbone=stem)
