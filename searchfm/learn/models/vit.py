"""Vision transformers from scratch: timm's class with our keys."""

from typing import cast

from torch import nn

from searchfm.config import Shape, Vit


def build(config: Vit, shape: Shape, classes: int) -> nn.Module:
    """(N, C, H, W) float32 -> (N, classes) float32 logits. `config.fit_images(shape)` must hold."""
    from timm.models.vision_transformer import VisionTransformer  # only studies that need timm pay for its import

    channels, height, width = shape
    token = config.pooling == "token"
    model = VisionTransformer(
        img_size=(height, width),
        patch_size=config.patch_size,
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
