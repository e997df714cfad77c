"""The final model: trained on all training data, tested once, and put into the form in which it is served.

`test` is the one reader of the test part; whoever submits it counts the read first.
"""

import hashlib
import io
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from searchfm.config import Config
from searchfm.errors import ModelError
from searchfm.home import write_whole
from searchfm.job import Context, Epoch, Result
from searchfm.learn import checkpoint
from searchfm.learn.data import Part, load_full, load_test
from searchfm.learn.models import Served
from searchfm.learn.train import Evaluation, evaluate
from searchfm.learn.trial import PREDICTIONS, cached_data, save_predictions, trained

EXAMPLE = "example.npy"


def fit(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains on training and validation data together, no subset taken; nothing is held out.

    payload, result, files and errors as those of `trial.trial`, but that there are no predictions and `value` is None,
    and that on a CPU it takes `threads` of the payload: nobody else needs the cores. Two training images (2, C, H, W)
    uint8 are left as an example of what the model takes.
    """
    with _threads(payload["threads"]):
        result = yield from trained(payload, context, load_full)
    if context.folder is None:
        return result
    config, data_dir = Config.from_table(payload["config"]), payload["data_dir"]
    data = cached_data(config.data, Path(data_dir) if data_dir else None, context, load_full)
    content = io.BytesIO()
    np.save(content, data.train.images[:2].cpu().numpy())
    sha256 = write_whole(context.folder / EXAMPLE, content.getvalue())
    return {**result, "files": {**result["files"], EXAMPLE: sha256}}


def test(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Reads the test part with the model that `fit` left.

    payload: `model` (its folder), `files` (sha256 of its files by name), `data_dir` (path or None).
    Leaves the test part's predictions in the context's folder. Returns `accuracy`, `loss` (mean cross-entropy), `right`
    and `n` (images), `per_class` (a list of `class`, `precision`, `recall`, `n`), `fingerprint` (of the test part),
    `seconds`, and `files` with their sha256.
    Raises ModelError where the weights are not those that were trained, DataError as `load_test` does.
    """
    folder, data_dir = Path(payload["model"]), payload["data_dir"]
    for name, expected in payload["files"].items():
        if _sha256(folder / name) != expected:
            raise ModelError(f"{folder / name}: damaged, its sha256 is not the one it was written with")
    model, spec = checkpoint.load_classifier(folder)
    config = Config.from_table(spec["config"])
    part = load_test(config.data, device=context.device, data_dir=Path(data_dir) if data_dir else None)
    yield from ()  # an entry is a generator, even one without epochs
    began = time.perf_counter()
    found = evaluate(model.to(context.device), part, config.train, tick=context.tick)
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "right": round(found.accuracy * len(part)),
        "n": len(part),
        "per_class": per_class(found, part, spec["classes"]),
        "fingerprint": part.fingerprint,
        "seconds": time.perf_counter() - began,
        "files": {PREDICTIONS: save_predictions(context.folder / PREDICTIONS, part, found)} if context.folder else {},
    }


def per_class(found: Evaluation, part: Part, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision and recall of each class and the number of its images; 0 where a class was never answered, or is in
    no image. scikit-learn counts the same, but to import it takes longer than most tests.
    """
    count = len(classes)
    pairs = part.labels.cpu() * count + found.probabilities.argmax(1).cpu()
    matrix = torch.bincount(pairs, minlength=count**2).view(count, count)  # row: true, column: answered
    right, answered, there = matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist()
    return [
        {"class": name, "precision": hit / max(said, 1), "recall": hit / max(n, 1), "n": n}
        for name, hit, said, n in zip(classes, right, answered, there, strict=True)
    ]


def served(folder: Path) -> tuple[Served, dict[str, Any]]:
    """The model that `fit` left in a folder, on the CPU in evaluation mode, and its spec. Raises ModelError."""
    model, spec = checkpoint.load_classifier(folder)
    return Served(model).eval(), spec


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
