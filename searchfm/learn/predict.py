"""Predictions for user images of any size and mode, which are read as training reads them. No torch."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from searchfm.config import Shape
from searchfm.errors import DataError, ModelError
from searchfm.learn.images import SUFFIXES, Pixels, decode, image_files, in_channels, resized

Probabilities: TypeAlias = NDArray[np.float32]

BATCH = 64  # images that are held at once


@dataclass(frozen=True)
class Predictor:
    """A model that can predict, whatever file it came from."""

    classes: tuple[str, ...]
    shape: Shape  # of one image: channels, height, width
    answer: Callable[[Pixels], Probabilities]  # (N, *shape) uint8 -> (N, K), each row adding up to 1


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file."""

    image: str
    top: tuple[tuple[str, float], ...] = ()  # classes with their probabilities, the most probable first
    error: str = ""  # why there is none


def predict(model: Predictor, arguments: Iterable[Path], *, top: int = 1) -> Iterator[Prediction]:
    """The `top` most probable classes of every image file, in order; a folder stands for the images in it.

    A file that cannot be read has an error instead. Raises ModelError where the model does not return probabilities.
    """
    paths = [path for argument in arguments for path in _files(argument)]
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = list(pool.map(lambda path: _read(path, model.shape), batch))
            rows = iter(_answers(model, [image for image in images if not isinstance(image, str)]))
            for path, image in zip(batch, images, strict=True):
                name = os.fsencode(path).decode("utf-8", "replace")  # a file's name may be any bytes
                if isinstance(image, str):
                    yield Prediction(name, error=image)
                else:
                    yield Prediction(name, _top(next(rows), model.classes, top))


def check_any(predictions: Sequence[Prediction]) -> None:
    """Raises DataError if no image could be read."""
    errors = [f"{each.image}: {each.error}" for each in predictions if each.error]
    if len(errors) == len(predictions):
        some = "; ".join(errors[:3]) or "none was given"
        raise DataError(f"no image could be read: {some}{'; ...' if len(errors) > 3 else ''}")


def read(path: Path, shape: Shape) -> Pixels:
    """An image file as training reads it for images of `shape` (C, H, W). Raises ValueError."""
    return np.ascontiguousarray(in_channels(resized(decode(path), shape[1:]), shape[0]))


def _files(path: Path) -> list[Path]:
    """The files of an argument: for a folder the images in it, at any depth, by name."""
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
        raise ModelError(f"the model returns {rows.shape} numbers that are no probabilities of {len(model.classes)}")
    return rows


def _top(row: Probabilities, classes: Sequence[str], count: int) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-row, kind="stable")[:count]
    return tuple((classes[i], float(row[i])) for i in best)
