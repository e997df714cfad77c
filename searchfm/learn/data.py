"""Data sets as tensors on the device: training, validation and test parts, and batches of them.

Only `load_test` reads the test part.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn import datasets
from searchfm.learn.datasets import Parsed
from searchfm.learn.images import Labels
from searchfm.tables import show

RESIDENT = 0.5  # fraction of a device's free memory that data may take; models, and other workers, need the rest


@dataclass(frozen=True)
class Part:
    """Some of the images of a data set."""

    images: Tensor  # (N, C, H, W) uint8, on `device`, or in host memory where they do not fit there
    labels: Tensor  # (N,) int64, on the same device as the images
    indices: Tensor  # (N,) int64 on the CPU: among the data set's own training (or test) images; see `load`
    device: torch.device  # where batches go
    fingerprint: str = ""  # sha256 of the whole part that these images are from; two tests on equal ones are comparable

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """The training and the validation part."""

    train: Part
    val: Part | None
    classes: tuple[str, ...]
    mean: Tensor  # (C,) float32 on the CPU: of the training images, pixels scaled to 0..1
    std: Tensor  # (C,) float32 on the CPU; at least 1/255, so that dividing by it is safe
    fingerprint: str  # sha256 of all training and validation pixels, labels and class names; not of seeds and fractions


def load(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Splits:
    """The training images that `config` selects, and the validation part. The test part is not opened.

    A folder's own val/ is the validation part, and `config.validation` is then ignored; its indices follow those of the
    training part. `data_dir` is searched first for data sets known by name.

    Raises DataError for data that are unknown, unreachable or unreadable, or a class too small to be split.
    """
    file = datasets.parsed(config, "train", data_dir)
    whole = _open(file)
    rest, held = split(whole.labels.numpy(), file.classes, config, own=file.validation)
    return _splits(_select(whole, rest), _select(whole, held), file.classes, device)


def load_full(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Splits:
    """All training and validation data as one training part, for final training. Raises DataError as `load` does."""
    file = datasets.parsed(config, "train", data_dir)
    return _splits(_open(file), None, file.classes, device)


def load_test(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Part:
    """The test part, with its fingerprint. Only the final test calls this, once a model.

    Raises DataError as `load` does, and for a test part without images.
    """
    return to_device([_open(datasets.parsed(config, "test", data_dir))], torch.device(device))[0]


def split(labels: Labels, classes: Sequence[str], config: DataConfig, *, own: int = 0) -> tuple[Labels, Labels]:
    """Indices (ascending) of the training and of the validation images among `labels` (N,).

    Validation is the fraction `config.validation` of every class, or the last `own` images where there are any;
    training is the fraction `config.subset` of the rest. Both depend on `config.seed`, are exact to the nearest image,
    and have at least one image of each class. Of two subsets with one seed, the larger contains the smaller.
    Raises DataError for a class with too few images.
    """
    total, labels = len(labels), labels[: len(labels) - own]
    counts, least = np.bincount(labels, minlength=len(classes)), 1 if own else 2
    if counts.min() < least:
        few = int(counts.argmin())
        raise DataError(
            f"data.name = {show(config.name)}: class {show(classes[few])} has {counts[few]} images to "
            f"{'train' if own else 'train and validate'} on: must have at least {least}"
        )
    if own:
        rest, held = np.arange(len(labels)), np.arange(len(labels), total)
    else:
        chosen = _chosen(labels, config.validation, "validation", config.seed, spare=1)
        rest, held = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if config.subset < 1:
        rest = rest[_chosen(labels[rest], config.subset, "subset", config.seed, spare=0)]
    return rest, held


def _chosen(labels: Labels, fraction: float, purpose: str, seed: int, *, spare: int) -> NDArray[np.bool_]:
    """A mask (N,) of about `fraction` of each class: at least one image, and at most all except `spare`."""
    counts = np.bincount(labels)
    exact = counts * fraction
    number = np.floor(exact).astype(np.int64)
    # Largest remainder: the total is as near to `fraction` as each class.
    missing = max(0, round(len(labels) * fraction) - int(number.sum()))
    number[np.argsort(number - exact, kind="stable")[:missing]] += 1
    number = np.clip(number, 1, np.maximum(counts - spare, 1))
    # RandomState, because NumPy promises never to change its stream; the seed may be any whole number.
    rng = np.random.RandomState(np.frombuffer(hashlib.sha256(f"{purpose} {seed}".encode()).digest(), dtype="<u4"))
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label, count in enumerate(number):
        mask[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
    return mask


def batches(part: Part, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) uint8 and labels (B,) int64 on `part.device`, `size` or, in the last batch, fewer at a time.

    `order` (M,) int64 gives the images of the batches; without it they come in the part's order, as views that must not
    be written to. Nothing here waits for the device.
    """
    home = part.images.device
    order = order if order is None else order.to(home)
    for start in range(0, len(part) if order is None else len(order), size):
        if order is None:
            images, labels = part.images[start : start + size], part.labels[start : start + size]
        else:
            rows = order[start : start + size]
            # index_select copies image by image: five times as fast as images[rows].
            images, labels = part.images.index_select(0, rows), part.labels.index_select(0, rows)
        if part.device.type == "cuda" and home.type == "cpu":  # only a copy from pinned memory does not block
            images, labels = images.pin_memory(), labels.pin_memory()
        yield images.to(part.device, non_blocking=True), labels.to(part.device, non_blocking=True)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of images (N, C, H, W) uint8 scaled to 0..1; std is at least 1/255.

    Computed from the counts of the 256 values: exact, and independent of the order of the images.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(images[:, c].reshape(-1), minlength=256).double() for c in range(images.shape[1])]
    fractions = torch.stack([count / count.sum() for count in counts])
    mean = fractions @ values
    variance = (fractions * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp_min(1 / 255).float()


def _splits(train: Part, val: Part | None, classes: tuple[str, ...], device: str | torch.device) -> Splits:
    mean, std = moments(train.images)
    train, *held = to_device([train] if val is None else [train, val], torch.device(device))
    return Splits(train, held[0] if held else None, classes, mean, std, train.fingerprint)


def _open(file: Parsed) -> Part:
    """A parsed part, memory-mapped: pages are read on first access, and shared by all processes."""
    with safe_open(file.path, "pt") as opened:
        images, labels = opened.get_tensor("images"), opened.get_tensor("labels")
    return Part(images, labels, torch.arange(len(labels)), torch.device("cpu"), file.fingerprint)


def _select(part: Part, indices: Labels) -> Part:
    rows = torch.from_numpy(indices)
    images, labels, own = (tensor.index_select(0, rows) for tensor in (part.images, part.labels, part.indices))
    return replace(part, images=images, labels=labels, indices=own)


def to_device(parts: list[Part], device: torch.device) -> list[Part]:
    """The parts on the device if all fit there, else in host memory, to be streamed."""
    size = sum(part.images.nbytes + part.labels.nbytes for part in parts)
    fits = device.type != "cuda" or size <= RESIDENT * torch.cuda.mem_get_info(device)[0]
    home = device if fits else torch.device("cpu")
    return [replace(part, images=part.images.to(home), labels=part.labels.to(home), device=device) for part in parts]
