"""Data sets as tensors on the device: training, validation and test parts, and batches of them.

The test part stands apart: `load_test` alone reads it. `sources` says where data come from, and `splits` which part an
image belongs to.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from searchfm.config import DataConfig
from searchfm.learn import parsed
from searchfm.learn.splits import split

RESIDENT = 0.5  # share of a device's free memory that data may take; models, and other workers, need the rest


@dataclass(frozen=True)
class Part:
    """A share of a data set."""

    images: Tensor  # (N, C, H, W) uint8, on `device`, or in host memory where they do not fit there
    labels: Tensor  # (N,) int64, in the same place
    indices: Tensor  # (N,) int64 on the CPU: place in the data set's own training (or test) part; see `load`
    device: torch.device  # where batches are wanted
    fingerprint: str = ""  # sha256 of the whole part that this is a share of; two tests on equal ones are comparable

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """What a model is trained and validated on."""

    train: Part
    val: Part | None
    classes: tuple[str, ...]
    mean: Tensor  # (C,) float32 on the CPU: of the training share, pixels scaled to 0..1
    std: Tensor  # (C,) float32 on the CPU; at least 1/255, so that one may divide by it
    fingerprint: str  # sha256 of all training and validation data: pixels, labels, class names; not of seeds and shares


def load(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Splits:
    """The training share and the validation part. The test part is not opened.

    A folder's own val/ is the validation part, and `config.validation` then means nothing; its indices go on where
    those of the training part end. `data_dir` is searched first for data sets known by name.

    Raises DataError for data that are unknown, unreachable or unreadable, or a class too small to be split.
    """
    whole, given, classes, fingerprint = _training(config, data_dir)
    places, held = split(whole.labels.numpy(), classes, config, validated=given is not None)
    train = _share(whole, torch.from_numpy(places))
    val = _share(whole, torch.from_numpy(held)) if given is None else given
    mean, std = moments(train.images)
    train, val = _place([train, val], torch.device(device))
    return Splits(train, val, classes, mean, std, fingerprint)


def load_full(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Splits:
    """All training and validation data as one training part, for final training; nothing is held out.

    Raises DataError as `load` does.
    """
    whole, given, classes, fingerprint = _training(config, data_dir)
    if given is not None:
        images, labels, indices = (
            torch.cat([getattr(part, field) for part in (whole, given)]) for field in ("images", "labels", "indices")
        )
        whole = Part(images, labels, indices, whole.device, fingerprint)
    mean, std = moments(whole.images)
    (train,) = _place([whole], torch.device(device))
    return Splits(train, None, classes, mean, std, fingerprint)


def load_test(config: DataConfig, *, device: str | torch.device = "cpu", data_dir: Path | None = None) -> Part:
    """The test part, with its fingerprint. Final testing alone calls this, once a model.

    Raises DataError as `load` does, and for a test part without images.
    """
    part, _ = _open(parsed.parsed(config, "test", data_dir))
    (part,) = _place([part], torch.device(device))
    return part


def batches(part: Part, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) uint8 and labels (B,) int64 on `part.device`, `size` at a time, the last batch maybe smaller.

    `order` (M,) int64 names the images wanted, one by one; without it they come as they stand, as views that must not
    be written to. Nothing here waits for the device.
    """
    home = part.images.device
    order = order if order is None else order.to(home)
    for start in range(0, len(part) if order is None else len(order), size):
        if order is None:
            images, labels = part.images[start : start + size], part.labels[start : start + size]
        else:
            wanted = order[start : start + size]
            # index_select copies image by image: five times as fast as images[wanted].
            images, labels = part.images.index_select(0, wanted), part.labels.index_select(0, wanted)
        if part.device.type == "cuda" and home.type == "cpu":  # only from pinned memory does a copy not wait
            images, labels = images.pin_memory(), labels.pin_memory()
        yield images.to(part.device, non_blocking=True), labels.to(part.device, non_blocking=True)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of images (N, C, H, W) uint8 scaled to 0..1; std is at least 1/255.

    From the counts of the 256 values, so exact, and the same however the images are ordered.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(images[:, c].reshape(-1), minlength=256).double() for c in range(images.shape[1])]
    shares = torch.stack([count / count.sum() for count in counts])
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp_min(1 / 255).float()


def _training(config: DataConfig, data_dir: Path | None) -> tuple[Part, Part | None, tuple[str, ...], str]:
    """All training data; the validation part, if the data bring one; class names; fingerprint of both."""
    files = parsed.training_files(config, data_dir)
    fingerprint = parsed.fingerprint(files)
    whole, classes = _open(files[0])
    given = _open(files[1])[0] if len(files) == 2 else None
    if given is not None:
        given = Part(given.images, given.labels, given.indices + len(whole), given.device, fingerprint)
    return Part(whole.images, whole.labels, whole.indices, whole.device, fingerprint), given, classes, fingerprint


def _open(path: Path) -> tuple[Part, tuple[str, ...]]:
    """A parsed file; its pages are read when they are touched, and shared by all processes that do."""
    with safe_open(path, "pt") as opened:
        images, labels, metadata = opened.get_tensor("images"), opened.get_tensor("labels"), opened.metadata()
    part = Part(images, labels, torch.arange(len(labels)), torch.device("cpu"), metadata["fingerprint"])
    return part, tuple(json.loads(metadata["classes"]))


def _share(part: Part, places: Tensor) -> Part:
    images, labels, indices = (tensor.index_select(0, places) for tensor in (part.images, part.labels, part.indices))
    return Part(images, labels, indices, part.device, part.fingerprint)


def _place(parts: list[Part], device: torch.device) -> list[Part]:
    """The parts on the device if all fit there, else where they are, to be streamed."""
    size = sum(part.images.nbytes + part.labels.nbytes for part in parts)
    fits = device.type != "cuda" or size <= RESIDENT * torch.cuda.mem_get_info(device)[0]
    home = device if fits else torch.device("cpu")
    return [Part(part.images.to(home), part.labels.to(home), part.indices, device, part.fingerprint) for part in parts]
