"""Any timm model, with or without pretrained weights, of which the head and the last stages are trained."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchfm.config import Shape, Transfer
from searchfm.errors import ConfigError, ModelError
from searchfm.learn.models.hub import check_name, weights_file


class Pretrained(nn.Module):
    """A timm model with frozen stages: no gradient, no dropout, batch norm's statistics kept.

    `stages` are the names of its parameters by stage, the stem first, the head last; only the last `trained` are
    trained. mean, std: (C,) that the weights were trained with, pixels from 0 to 1; None for random weights.
    """

    def __init__(
        self,
        model: Any,  # timm's: nn.Module has too few types
        stages: list[list[str]],
        trained: int,
        layer_decay: float,
        mean: Tensor | None,
        std: Tensor | None,
    ) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std
        self._stages, self._layer_decay = stages, layer_decay
        frozen = {name for stage in stages[: len(stages) - trained] for name in stage}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        modules = (
            (module, [parameter.requires_grad for parameter in module.parameters()]) for module in model.modules()
        )
        self._frozen = [module for module, trains in modules if trains and not any(trains)]

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32, normalised -> (N, K) logits."""
        logits: Tensor = self.model(images)
        return logits

    def train(self, mode: bool = True) -> "Pretrained":
        """Frozen stages stay in evaluation mode: their batch norm must keep its statistics of ImageNet."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def lr_scales(self) -> dict[str, float]:
        """Each parameter's learning rate over the head's: `layer_decay` to the power of the stages between them."""
        top = len(self._stages) - 1
        return {f"model.{n}": self._layer_decay ** (top - i) for i, stage in enumerate(self._stages) for n in stage}

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm excludes from weight decay, by name."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}


def build(config: Transfer, shape: Shape, classes: int) -> Pretrained:
    """(N, C, H, W) float32 -> (N, classes) float32 logits; the first convolution, the embeddings of position and the
    head are adapted to the images as timm does it. Raises ModelError, ConfigError.
    """
    from timm.models import group_parameters  # only studies that need timm pay for its import

    settings = _settings(config, shape, classes)
    if config.weights == "none":
        model = _create(config, shape, settings)
        mean = std = None
    else:
        path = weights_file(config.model, config.weights)
        model = _load(config, shape, settings, path)
        mean, std = (_channels(model.pretrained_cfg[key], shape[0]) for key in ("mean", "std"))
    _try_out(model, config, shape, classes)
    # The last group is the head, with whatever timm counts to it (a final norm, a last 1x1 convolution).
    groups = group_parameters(model, model.group_matcher(coarse=True))
    stages = [groups[i] for i in sorted(groups)]
    below = len(stages) - 1
    if config.tuned_blocks != "all" and config.tuned_blocks > below:
        raise ConfigError(
            "model.transfer.tuned_blocks",
            f'= {config.tuned_blocks}: {config.model} has {below} stages below its head; may be 0 to {below}, or "all"',
        )
    trained = len(stages) if config.tuned_blocks == "all" else 1 + int(config.tuned_blocks)
    return Pretrained(model, stages, trained, config.layer_decay, mean, std)


def _settings(config: Transfer, shape: Shape, classes: int) -> dict[str, Any]:
    import timm

    check_name(config.model)
    settings: dict[str, Any] = {"in_chans": shape[0], "num_classes": classes}
    if config.dropout:
        settings["drop_rate"] = config.dropout
    source = timm.models.get_pretrained_cfg(config.model)
    if source is not None and source.fixed_input_size:
        settings["img_size"] = shape[1:]
    return settings


def _create(config: Transfer, shape: Shape, settings: Mapping[str, Any]) -> Any:
    import timm

    with _named(config, shape):
        return timm.create_model(config.model, pretrained=False, **settings)


def _load(config: Transfer, shape: Shape, settings: Mapping[str, Any], path: Path) -> Any:
    """The model with the file's weights.

    timm loads leniently as soon as the head differs, so a file of another model could leave random weights in place
    without an error. Hence the comparison with a model of the same seed without a file. timm has no better way:
    load_checkpoint returns the missing keys, but adapts neither channels nor head; create_model adapts, and only logs.
    """
    import timm
    from timm.models import group_parameters

    state = torch.random.get_rng_state()
    plain = _create(config, shape, settings)
    torch.random.set_rng_state(state)
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of the head's keys, which it leaves out as intended
    with _named(config, shape, str(path)):
        model: Any = timm.create_model(
            config.model, pretrained=True, pretrained_cfg_overlay={"file": str(path), "custom_load": False}, **settings
        )
    groups = group_parameters(model, model.group_matcher(coarse=True))
    head = set(groups[max(groups)])
    before = dict(plain.named_parameters())
    missing = [
        name
        for name, after in model.named_parameters()
        # Biases and scales may be what they start as: zeros and ones.
        if name not in head and after.ndim > 1 and torch.equal(after, before[name])
    ]
    if missing:
        raise ModelError(f'model.transfer.weights = "{path}": not of {config.model}, has no {missing[0]}')
    return model


def _try_out(model: Any, config: Transfer, shape: Shape, classes: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and any(side % size for side, size in zip(shape[1:], patch, strict=True)):
        raise ModelError(
            f'model.transfer.model = "{config.model}": its patches of {patch[0]}x{patch[1]} pixels do not cover images'
            f" of {shape[1]}x{shape[2]}; set data.size to a multiple of {patch[0]}"
        )
    with _named(config, shape), torch.no_grad():
        logits = model.eval()(torch.zeros(1, *shape))
    if tuple(logits.shape) != (1, classes):
        raise ModelError(f'model.transfer.model = "{config.model}": gives {tuple(logits.shape)}, not (1, {classes})')
    model.train()


@contextlib.contextmanager
def _named(config: Transfer, shape: Shape, path: str = "") -> Iterator[None]:
    """Turns what timm and torch raise into one line that names the model or the file."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if path:
            raise ModelError(
                f'model.transfer.weights = "{path}": does not load into {config.model}: {reason}'
            ) from None
        size = "x".join(map(str, shape))
        raise ModelError(f'model.transfer.model = "{config.model}": does not take images of {size}: {reason}') from None


def _channels(values: tuple[float, ...], channels: int) -> Tensor:
    """Means or deviations; where the images have another number of channels than the weights, their mean for each."""
    own = torch.tensor(values, dtype=torch.float32)
    return own if len(own) == channels else own.mean().expand(channels).clone()
