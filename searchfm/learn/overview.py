"""What `searchfm data NAME` shows of a data set: classes, sizes, modes, the split, duplicates, and samples.

Of a test part of its own, images are read for their hashes alone: none is shown, and none decides anything.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
from safetensors import safe_open

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn.data import split
from searchfm.learn.datasets import parsed, path_of, side
from searchfm.learn.images import (
    Labels,
    Pixels,
    as_pixels,
    image_hash,
    in_channels,
    in_threads,
    is_test,
    opened,
    resized,
)
from searchfm.learn.sources import Source, open_source

SAMPLES, ROWS, SIDE = 8, 30, 64  # images of a class in the picture, classes, and the side of an image in pixels
NAMED = 3  # examples of what is wrong
PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Overview:
    """A data set as a study with the default split would have it."""

    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]  # images of each class by part
    heights: tuple[int, float, int]  # minimum, median, maximum, of training and validation images
    widths: tuple[int, float, int]
    modes: Mapping[str, int]  # images by format and mode: {"PNG RGBA": 12}
    size: int = 0  # side that a new study gives to images that differ in size or are large; 0: they keep theirs
    compared: bool = True  # whether duplicates were searched for
    carved: bool = False  # whether the test part is carved out by content
    repeated: int = 0  # training and validation images that equal an earlier one of the same class
    shared: Mapping[str, int] = field(default_factory=dict)  # images of the second part that are in the first too
    contradictions: tuple[str, ...] = ()  # equal images of different classes, the first few
    contradicting: int = 0  # how many there are
    unreadable: tuple[str, ...] = ()  # with the reason
    problem: str = ""  # why the data cannot be split
    samples: Mapping[str, Sequence[Pixels]] = field(default_factory=dict)  # (3, 64, 64) by class, of no test part


@dataclass(frozen=True)
class _Scanned:
    """An image of user data."""

    source: Source
    index: int
    label: int
    hash: bytes
    height: int
    width: int
    mode: str

    @property
    def name(self) -> str:
        return self.source.name(self.index)


def overview(name: str, data_dir: Path | None = None) -> Overview:
    """Reads a data set and describes it. Raises DataError for what is no data set."""
    root = path_of(name)
    return _built_in(name, data_dir) if root is None else _user_data(root)


def _built_in(name: str, data_dir: Path | None) -> Overview:
    file = parsed(DataConfig.from_table({"name": name}), "train", data_dir)
    with safe_open(file.path, "np") as opened_file:
        labels, images = opened_file.get_tensor("labels"), opened_file.get_slice("images")
        counts, _, problem = _split(labels, file.classes, 0)
        chosen = {name: np.flatnonzero(labels == label)[:SAMPLES] for label, name in enumerate(file.classes[:ROWS])}
        samples = {name: [_sample(images[int(i)]) for i in indices] for name, indices in chosen.items()}
    channels, height, width = file.shape
    mode = {"RGB" if channels == 3 else "L": len(labels)}
    return Overview(
        file.classes, counts, (height,) * 3, (width,) * 3, mode, compared=False, problem=problem, samples=samples
    )


def _user_data(root: Path) -> Overview:
    source = open_source(root, "train")
    train, unreadable = _scan(source)
    test = [image for image in train if source.carved and is_test(image.hash)]
    train = [image for image in train if not (source.carved and is_test(image.hash))]
    own: list[_Scanned] = []
    if source.val:
        own, broken = _scan(source.val)
        unreadable += broken
    if not source.carved:
        test, broken = _scan(open_source(root, "test"))
        unreadable += broken
    images = [*train, *own]
    if not images:
        raise DataError(f"{root}: none of {len(unreadable)} images can be read: {'; '.join(unreadable[:NAMED])}")
    labels = np.array([image.label for image in images], dtype=np.int64)
    counts, held, problem = _split(labels, source.classes, len(own))
    parts = {
        "training": [image for image, validates in zip(images, held, strict=True) if not validates],
        "validation": [image for image, validates in zip(images, held, strict=True) if validates],
        "test": test,
    }
    tested = Counter(image.label for image in test)
    repeated, contradictions = _repeated(images)
    return Overview(
        classes=source.classes,
        counts={**counts, "test": tuple(tested[label] for label in range(len(source.classes)))},
        heights=_spread([image.height for image in images]),
        widths=_spread([image.width for image in images]),
        modes=dict(Counter(image.mode for image in images).most_common()),
        size=side(DataConfig.from_table({"name": str(root)})),
        carved=source.carved,
        repeated=repeated,
        shared=_shared(parts),
        contradictions=tuple(contradictions[:NAMED]),
        contradicting=len(contradictions),
        unreadable=tuple(unreadable),
        problem=problem,
        samples=_samples(images, source.classes),
    )


def _scan(source: Source) -> tuple[list[_Scanned], list[str]]:
    """The images of a part, of both sides if it is carved; and those that cannot be read, with the reason."""
    labels = source.labels.tolist()

    def scan(index: int) -> _Scanned | str:
        try:
            with opened(source.raw(index)) as image:
                mode = f"{image.format} {image.mode}" if image.format else image.mode
                pixels = as_pixels(image)
        except ValueError as error:
            return f"{source.name(index)} ({error})"
        _, height, width = pixels.shape
        return _Scanned(source, index, labels[index], image_hash(pixels), height, width, mode)

    source.open()
    found = list(in_threads(scan, range(len(source))))
    return [item for item in found if isinstance(item, _Scanned)], [item for item in found if isinstance(item, str)]


def _split(labels: Labels, classes: Sequence[str], own: int) -> tuple[dict[str, tuple[int, ...]], list[bool], str]:
    """Images of each class by part, whether each image is for validation, and why they cannot be split."""
    held, problem = np.zeros(len(labels), dtype=np.bool_), ""
    try:
        _, indices = split(labels, classes, DataConfig.from_table({}), own=own)
        held[indices] = True
    except DataError as error:
        problem = str(error).partition(": ")[2]
    counts = {
        part: tuple(np.bincount(labels[mask], minlength=len(classes)).tolist())
        for part, mask in zip(PARTS, (~held, held), strict=False)
    }
    return counts, held.tolist(), problem


def _repeated(images: Sequence[_Scanned]) -> tuple[int, list[str]]:
    """How many images equal an earlier one of their class; and pairs of equal images of different classes."""
    groups: dict[bytes, list[_Scanned]] = defaultdict(list)
    for image in images:
        groups[image.hash].append(image)
    repeated, contradictions = 0, []
    for group in groups.values():
        first: dict[int, _Scanned] = {}
        for image in group:
            first.setdefault(image.label, image)
        repeated += len(group) - len(first)
        if len(first) > 1:
            contradictions.append(
                " = ".join(f"{image.name} ({image.source.classes[image.label]})" for image in first.values())
            )
    return repeated, contradictions


def _shared(parts: Mapping[str, Sequence[_Scanned]]) -> dict[str, int]:
    hashes = {part: {image.hash for image in images} for part, images in parts.items()}
    pairs = combinations(PARTS, 2)
    counts = {f"{a} and {b}": sum(image.hash in hashes[a] for image in parts[b]) for a, b in pairs}
    return {pair: count for pair, count in counts.items() if count}


def _samples(images: Sequence[_Scanned], classes: Sequence[str]) -> dict[str, list[Pixels]]:
    """A few images of each class at even distances."""
    samples = {}
    for label, name in enumerate(classes[:ROWS]):
        mine = [image for image in images if image.label == label]
        chosen = [mine[i * len(mine) // SAMPLES] for i in range(SAMPLES)] if len(mine) > SAMPLES else mine
        samples[name] = [_read_sample(image) for image in chosen]
    return samples


def _read_sample(scanned: _Scanned) -> Pixels:
    with opened(scanned.source.raw(scanned.index)) as image:
        return _sample(as_pixels(image))


def _sample(image: Pixels) -> Pixels:
    """An image (C, H, W) as (3, 64, 64), with its own proportions, on white."""
    _, height, width = image.shape
    scale = SIDE / max(height, width)
    small = resized(in_channels(image, 3), (max(round(height * scale), 1), max(round(width * scale), 1)))
    canvas = np.full((3, SIDE, SIDE), 255, dtype=np.uint8)
    top, left = ((SIDE - length) // 2 for length in small.shape[1:])
    canvas[:, top : top + small.shape[1], left : left + small.shape[2]] = small
    return canvas


def _spread(values: Iterable[int]) -> tuple[int, float, int]:
    values = sorted(values)
    return values[0], float(median(values)), values[-1]
