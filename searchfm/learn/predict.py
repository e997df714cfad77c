"""User images through a model: read as training reads them, whatever their size and mode. No torch."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from searchfm.config import Shape
from searchfm.errors import ModelError
from searchfm.learn.images import SUFFIXES, Pixels, decode, image_files, in_channels, resized

Probabilities: TypeAlias = NDArray[np.float32]

BATCH = 64  # images that are held at once


@dataclass(frozen=True)
class Predictor:
    """A model ready to answer, whatever file it came from."""

    classes: tuple[str, ...]
    shape: Shape  # of one image: channels, height, width
    answer: Callable[[Pixels], Probabilities]  # (N, *shape) uint8 -> (N, K), each row adding up to 1


@dataclass(frozen=True)
class Prediction:
    """What a model says of one file."""

    image: str
    top: tuple[tuple[str, float], ...] = ()  # classes with their probabilities, the likeliest first
    error: str = ""  # why there are none


def predict(model: Predictor, given: Iterable[Path], *, top: int = 1) -> Iterator[Prediction]:
    """The `top` likeliest classes of every image file, one after another; a folder stands for the images in it.

    Files that are none, or cannot be read, come with the reason. Raises ModelError where the model's answers are no
    probabilities.
    """
    paths = [path for one in given for path in _files(one)]
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            found = list(pool.map(lambda path: _read(path, model.shape), batch))
            rows = iter(_answers(model, [item for item in found if not isinstance(item, str)]))
            for path, item in zip(batch, found, strict=True):
                name = os.fsencode(path).decode("utf-8", "replace")  # a file's name may be any bytes
                if isinstance(item, str):
                    yield Prediction(name, error=item)
                else:
                    yield Prediction(name, _top(next(rows), model.classes, top))


def read(path: Path, shape: Shape) -> Pixels:
    """An image file as training would have read it for images of `shape` (C, H, W). Raises ValueError."""
    return np.ascontiguousarray(in_channels(resized(decode(path), shape[1:]), shape[0]))


def _files(path: Path) -> list[Path]:
    """What an argument stands for: a folder for the images in it, at any depth, by name."""
    return (image_files(path, path) or [path]) if path.is_dir() else [path]


def _read(path: Path, shape: Shape) -> Pixels | str:
    if path.is_dir():
        return f"holds no image; may hold {', '.join(sorted(SUFFIXES))}"
    try:
        return read(path, shape)
    except ValueError as error:
        return str(error)


def _answers(model: Predictor, batch: Sequence[Pixels]) -> Probabilities:
    if not batch:
        return np.empty((0, len(model.classes)), np.float32)
    rows = model.answer(np.stack(batch))
    if rows.shape != (len(batch), len(model.classes)) or not np.allclose(rows.sum(1), 1, atol=1e-3):
        raise ModelError(f"the model answers {rows.shape} numbers that are no probabilities of {len(model.classes)}")
    return rows


def _top(row: Probabilities, classes: Sequence[str], count: int) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-row, kind="stable")[:count]
    return tuple((classes[i], float(row[i])) for i in best)
