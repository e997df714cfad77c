"""Parsed parts of data sets, kept in the cache so that they load in milliseconds: each part in a file of its own, so
that who trains never opens the test part. No torch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from searchfm.config import DATASETS, DataConfig, Shape
from searchfm.errors import DataError
from searchfm.learn import folder, sources
from searchfm.learn.download import whole
from searchfm.learn.formats import Arrays, PartName, resized
from searchfm.learn.splits import split

FORMAT = 1  # of parsed files; those of another format are left alone


@dataclass(frozen=True)
class Prepared:
    """What there is to know of data before a search begins."""

    shape: Shape  # channels, height, width, after `config.size`
    classes: tuple[str, ...]
    train: int  # images, after validation and subset
    validation: int
    fingerprint: str  # as in `data.Splits`


def prepare(config: DataConfig, data_dir: Path | None = None) -> Prepared:
    """Makes a search's data available, downloading and decoding where need be, and says what they are; the test part is
    left alone. Raises DataError for whatever `data.load` would.
    """
    files = training_files(config, data_dir)
    with safe_open(files[0], "np") as opened:
        labels, classes = opened.get_tensor("labels"), tuple(json.loads(opened.metadata()["classes"]))
    train, val = split(labels, classes, config, validated=len(files) == 2)
    held = len(val)
    if len(files) == 2:
        with safe_open(files[1], "np") as opened:
            held = opened.get_slice("labels").get_shape()[0]
    return Prepared(shape(files[0]), classes, len(train), held, fingerprint(files))


def training_files(config: DataConfig, data_dir: Path | None = None) -> tuple[Path, ...]:
    """The parsed files that training and validation come from: one, or two where a folder brings its own val/."""
    root = sources.folder_of(config.name)
    train = parsed(config, "train", data_dir)
    return (train, parsed(config, "val", data_dir)) if root and folder.has_validation(root) else (train,)


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of the content of parsed parts: pixels at their own size, labels and class names."""
    prints = [metadata(path)["fingerprint"] for path in files]
    return prints[0] if len(prints) == 1 else sha256("".join(prints).encode()).hexdigest()


def parsed(config: DataConfig, part: PartName, data_dir: Path | None = None) -> Path:
    """The parsed file of one part at `config.size`, made now if need be, by one process however many ask.

    A safetensors file: `images` (N, C, H, W) uint8, `labels` (N,) int64, and as metadata `classes` (JSON) and
    `fingerprint`. Raises DataError for data that are unknown, unreachable or unreadable.
    """
    root, size = sources.folder_of(config.name), config.size
    make: Callable[[], Arrays]
    if root is None:
        size = 0 if DATASETS[config.name][0][1:] == (size, size) else size
        name, stem, key = config.name, f"{part}-{size}", ""
        make = partial(_known, name, part, size, data_dir)
    else:
        # The training part alone decides between grey and colour.
        channels = None if part == "train" else shape(parsed(config, "train"))[0]
        listing = folder.listing(root, part)
        name, stem = f"folder-{sha256(str(root).encode()).hexdigest()[:16]}", f"{part}-{size}"
        key = f"-{channels or 0}-{listing.key()[:32]}"
        make = partial(folder.read, listing, size, channels)
    path = sources.cache_dir() / f"parsed-{FORMAT}" / name / f"{stem}{key}.safetensors"
    if not _is_whole(path):
        with sources.lock(name):
            if not _is_whole(path):
                _write(path, make(), f"{stem}-*" if key else path.name)
    return path


def metadata(path: Path) -> dict[str, str]:
    """`classes` (JSON) and `fingerprint` of a parsed file."""
    with safe_open(path, "np") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def shape(path: Path) -> Shape:
    """Channels, height and width of a parsed file's images."""
    with safe_open(path, "np") as opened:
        _, channels, height, width = opened.get_slice("images").get_shape()
    return channels, height, width


def _known(name: str, part: PartName, size: int, data_dir: Path | None) -> Arrays:
    found = sources.read(name, part, data_dir)
    return replace(found, images=np.stack([resized(image, size) for image in found.images])) if size else found


def _is_whole(path: Path) -> bool:
    try:
        return path.is_file() and bool(metadata(path))
    except (OSError, SafetensorError):  # cut off by a full disk, say: make it again
        return False


def _write(path: Path, made: Arrays, replaced: str) -> None:
    """Writes a parsed file and removes those that it stands in for: what a folder held before it changed."""
    tensors: dict[str, Any] = {"images": np.ascontiguousarray(made.images), "labels": made.labels}
    try:
        with whole(path) as temporary:
            save_file(tensors, temporary, {"classes": json.dumps(made.classes), "fingerprint": made.fingerprint})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path.parent}: {error}; SEARCHFM_CACHE may name another folder") from None
    for old in path.parent.glob(replaced):
        if old != path:
            old.unlink()
