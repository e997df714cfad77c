"""Augmentation of training images, new in every batch: functions on whole batches, without a loop over images and
without waiting for the device.

Images are (B, C, H, W) raw pixels, 0 (black) to 255, uint8 or float32, before normalisation: mixing commutes with it,
and bytes move faster. All randomness comes from the generator, on the device of the images or on the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from searchfm.config import AugmentConfig

ERASED_AREA = (0.02, 0.4)  # of an erased rectangle over the image's (Zhong et al. 2020, section 4.1)
ERASED_ASPECT = (0.3, 1 / 0.3)  # of its height over its width


def augment(
    images: Tensor, labels: Tensor, classes: int, config: AugmentConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and their targets: `labels` (B,) int64 unchanged, or, where `config` mixes images, soft
    targets (B, classes) float32 that sum to 1, and images in float32.

    What `config` leaves out draws no random numbers: with its defaults the batch is returned unchanged.
    """
    if config.crop:
        images = crop(images, config.crop, generator)
    if config.flip:
        images = flip(images, config.flip, generator)
    if config.erase:
        images = erase(images, config.erase, generator)
    if not (config.mix and (config.mixup or config.cutmix)):
        return images, labels
    height, width = images.shape[2:]
    mixed, cut = _uniform((2,), generator)
    weights = mixup_weight(config.mixup, generator) if config.mixup else torch.ones((), device=generator.device)
    if config.cutmix:
        boxes = cutmix_weights(config.cutmix, height, width, generator)
        weights = torch.where(cut < 0.5, boxes, weights) if config.mixup else boxes
    weights = torch.where(mixed < config.mix, weights, 1.0)  # no `if`: it would wait for the device
    return mix(images, F.one_hot(labels, classes).float(), weights.to(images.device, non_blocking=True))


def flip(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Each image mirrored left to right with `probability`."""
    chosen = flips(len(images), probability, generator, images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def flips(count: int, probability: float, generator: Generator, device: torch.device) -> Tensor:
    """Which of `count` images `flip` mirrors: (count,) bool."""
    return _uniform((count,), generator, device) < probability


def crop(images: Tensor, shift: int, generator: Generator) -> Tensor:
    """Each image shifted by up to `shift` pixels each way, filled with black (He et al. 2016, section 4.2)."""
    count, _, height, width = images.shape
    offsets = torch.randint(2 * shift + 1, (2, count), generator=generator, device=generator.device)
    top, left = offsets.to(images.device, non_blocking=True)
    # A view of all windows, of which each image takes one.
    windows = F.pad(images, (shift, shift, shift, shift)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, top, left]


def erase(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """A rectangle of each image, with `probability`, filled with random pixels (Zhong et al. 2020, arXiv 1708.04896).

    Its area is drawn uniformly from ERASED_AREA, its aspect log-uniformly from ERASED_ASPECT. A side longer than the
    image is cut to the image; the paper draws again.
    """
    count, _, height, width = images.shape
    chosen, area, aspect, top, left = _uniform((5, count), generator, images.device)
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
    aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    inside = _between(height, (top * (height - tall + 1)).floor(), tall)[:, :, None]
    inside = inside & _between(width, (left * (width - wide + 1)).floor(), wide)[:, None, :]
    inside = inside & (chosen < probability)[:, None, None]
    noise = torch.randint(256, images.shape, generator=generator, device=generator.device, dtype=torch.uint8)
    return torch.where(inside[:, None], noise.to(images.device, images.dtype, non_blocking=True), images)


def mix(images: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each image mixed with the image before it, and its target (B, classes) float32 with the target before it.

    `weights`, (H, W) or a scalar, 0 to 1: what each pixel keeps of its own image; a target keeps their mean.
    """
    images, weight = images.float(), weights.mean()
    return torch.lerp(images.roll(1, 0), images, weights), torch.lerp(targets.roll(1, 0), targets, weight)


def mixup_weight(alpha: float, generator: Generator) -> Tensor:
    """MixUp's lambda, a scalar for the batch: Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)."""
    # torch.distributions draws the same, but from the global generator; so do torchvision's MixUp and CutMix.
    # Smaller alphas underflow to 0 / 0 even in float64, and give 1/2; at 0.01 lambda is almost always 0 or 1.
    both = torch.full((2,), max(alpha, 0.01), dtype=torch.float64, device=generator.device)
    return torch._sample_dirichlet(both, generator=generator)[0].float()


def cutmix_weights(alpha: float, height: int, width: int, generator: Generator) -> Tensor:
    """CutMix's mask (height, width): 0 in a box, 1 around it (Yun et al. 2019, arXiv 1905.04899, section 3.1).

    The box covers the fraction 1 - lambda of the image, less what is outside where its centre is near the border. The
    mask's mean is the fraction of pixels that stay.
    """
    side = (1 - mixup_weight(alpha, generator)).sqrt()
    inside = []
    for centre, length in zip(_uniform((2,), generator), (height, width), strict=True):
        cut = (side * length).floor()
        inside.append(_between(length, (centre * length).floor() - (cut / 2).floor(), cut))
    rows, columns = inside
    return 1 - (rows[:, None] & columns).float()


def _between(length: int, start: Tensor, count: Tensor) -> Tensor:
    """For each of `start` and `count` (...), which of `length` indices are in [start, start + count): (..., length)."""
    indices = torch.arange(length, device=start.device)
    return (indices >= start[..., None]) & (indices < (start + count)[..., None])


def _uniform(shape: tuple[int, ...], generator: Generator, device: torch.device | None = None) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return drawn if device is None else drawn.to(device, non_blocking=True)
