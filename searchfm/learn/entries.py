"""The job entries: `prepare` and `trial` for a search; `fit` and `test` for the final model.

`test` alone reads the test part; whoever submits it counts the read first.
"""

import gc
import io
import logging
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from searchfm.config import Config, DataConfig, Transfer
from searchfm.errors import DataError, ModelError, Stopped, WorldError
from searchfm.home import file_sha256, write_whole
from searchfm.job import Context, Epoch, Result
from searchfm.learn import checkpoint, data
from searchfm.learn.data import Part, Splits, load, load_full, load_test
from searchfm.learn.models import flops, parameters
from searchfm.learn.models.transfer import build as build_transfer
from searchfm.learn.train import Evaluation, Training, evaluate, train
from searchfm.tables import digest

log = logging.getLogger("searchfm")

PREDICTIONS, EXAMPLE = "predictions.npz", "example.npy"
Loader: TypeAlias = Callable[..., Splits]  # `load`, or `load_full` for a final training
_CACHED = 2  # data sets a worker keeps: the study's, and one of the study before


def prepare(payload: Mapping[str, Any], _context: Context) -> Generator[Epoch, None, Result]:
    """Makes a study's data and pretrained weights available, before the first trial.

    payload: `data` (table), `data_dir` (path or None), `models` (list of [transfer model, weights]).
    Returns `fingerprint`, `shape` (C, H, W), `classes` (names), `train` and `validation` (numbers of images),
    `devices` (numbers of accelerators: `cuda`, `mps`).
    Raises DataError, ModelError.
    """
    prepared = data.prepare(DataConfig.from_table(payload["data"]), _path(payload["data_dir"]))
    for model, weights in payload["models"]:  # built, not only located: a file of another model is refused here too
        build_transfer(Transfer.from_table({"model": model, "weights": weights}), prepared.shape, len(prepared.classes))
    yield from ()  # an entry is a generator, even one without epochs
    devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    return asdict(prepared) | {"shape": list(prepared.shape), "classes": list(prepared.classes), "devices": devices}


def trial(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains one config, from its newest checkpoint if there is one, whose epochs it yields again first.

    payload: `config` (table), `data_dir` (path or None), `fingerprint` (of the data, as `prepare` gave it),
    `identity` (of the trial), `checkpoint_seconds` (least time between two checkpoints).
    Leaves in the context's folder the weights with their spec and the validation part's predictions, and returns
    `value` (accuracy on validation after the last epoch), what the model costs, and `files` with their sha256.
    Raises DataError, ConfigError, ModelError, DivergedError, StorageError; WorldError if memory runs out.
    """
    return (yield from _trained(payload, context, load))


def fit(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains on training and validation data together, no subset taken; nothing is held out.

    payload, result, files and errors as those of `trial`, except that there are no predictions, `value` is None, and on
    a CPU it takes `threads` of the payload, since nothing else runs. Two training images (2, C, H, W) uint8 are left as
    an example of what the model takes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(payload["threads"])
    try:
        result = yield from _trained(payload, context, load_full)
    finally:
        torch.set_num_threads(threads)
    if context.folder is None:
        return result
    config = Config.from_table(payload["config"]).data
    images = _cached_data(config, _path(payload["data_dir"]), context, load_full).train.images[:2]
    content = io.BytesIO()
    np.save(content, images.cpu().numpy())
    sha256 = write_whole(context.folder / EXAMPLE, content.getvalue())
    return {**result, "files": {**result["files"], EXAMPLE: sha256}}


def test(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Evaluates the model that `fit` left on the test part.

    payload: `model` (its folder), `files` (sha256 of its files by name), `data_dir` (path or None).
    Leaves the test part's predictions in the context's folder. Returns `accuracy`, `loss` (mean cross-entropy), `right`
    and `n` (images), `per_class` (a list of `class`, `precision`, `recall`, `n`), `fingerprint` (of the test part),
    `seconds`, and `files` with their sha256.
    Raises ModelError where the weights are not those that were trained, DataError as `load_test` does.
    """
    folder = Path(payload["model"])
    for name, expected in payload["files"].items():
        try:
            actual = file_sha256(folder / name)
        except OSError as error:
            raise ModelError(f"{folder / name}: cannot be read ({error.strerror})") from None
        if actual != expected:
            raise ModelError(f"{folder / name}: damaged, its sha256 is not the one it was written with")
    model, spec = checkpoint.load_classifier(folder)
    config = Config.from_table(spec["config"])
    part = load_test(config.data, device=context.device, data_dir=_path(payload["data_dir"]))
    yield from ()  # an entry is a generator, even one without epochs
    began = time.perf_counter()
    evaluation = evaluate(model.to(context.device), part, config.train, tick=context.tick)
    files = {PREDICTIONS: _write_predictions(context.folder / PREDICTIONS, part, evaluation)} if context.folder else {}
    return {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "right": round(evaluation.accuracy * len(part)),
        "n": len(part),
        "per_class": _per_class(evaluation, part, spec["classes"]),
        "fingerprint": part.fingerprint,
        "seconds": time.perf_counter() - began,
        "files": files,
    }


def _trained(payload: Mapping[str, Any], context: Context, load: Loader) -> Generator[Epoch, None, Result]:
    """Trains a config on the data that `load` gives; without a validation part `value` is None."""
    try:
        return (yield from _training(payload, context, load))
    except (MemoryError, RuntimeError) as error:
        reason = _out_of_memory(error)
        if reason is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    gc.collect()
    if context.device.startswith("cuda"):
        torch.cuda.empty_cache()
    raise WorldError(f"out of memory on {context.device}: {reason}")


def _training(payload: Mapping[str, Any], context: Context, load: Loader) -> Generator[Epoch, None, Result]:
    config = Config.from_table(payload["config"])
    data = _cached_data(config.data, _path(payload["data_dir"]), context, load)
    if data.fingerprint != payload["fingerprint"]:
        raise DataError(
            f'data.name = "{config.data.name}": the data changed since the study began '
            f"(fingerprint {data.fingerprint[:12]}, was {payload['fingerprint'][:12]})"
        )
    owner = {"trial": payload["identity"], "config": digest(config.to_table()), "data": data.fingerprint}
    folders = [*([context.folder] if context.folder else []), *context.earlier]
    resume = checkpoint.newest(folders, owner)
    training = train(config, data, device=context.device, resume=resume, tick=context.tick)
    if resume is not None:
        log.info("goes on after epoch %d", len(resume.epochs))
        yield from resume.epochs
    written, last = time.monotonic(), training.checkpoint()
    try:
        for epoch in training:
            last = training.checkpoint()  # in memory: the next epoch may be stopped in its middle
            if context.folder and time.monotonic() - written >= payload["checkpoint_seconds"]:
                checkpoint.write(context.folder, last, owner)
                written = time.monotonic()
            log.info("epoch %d: %s", epoch.index, _line(epoch))
            yield epoch
        validation = training.validation or training.validate()
    except (Stopped, GeneratorExit):  # in the middle of an epoch, or between two
        if context.folder and last.epochs:
            checkpoint.write(context.folder, last, owner)
        raise
    result = _result(training, validation)
    if context.folder:
        files = checkpoint.save_weights(context.folder, training.classifier, _spec(training))
        if validation is not None and data.val is not None:
            files[PREDICTIONS] = _write_predictions(context.folder / PREDICTIONS, data.val, validation)
        checkpoint.remove(folders)
        result["files"] = files
    return result


def _cached_data(config: DataConfig, data_dir: Path | None, context: Context, load: Loader) -> Splits:
    """The data, from the worker's cache if an earlier job had the same."""
    key = ("data", load.__name__, digest(config.to_table()), str(data_dir), context.device)
    splits: Splits | None = context.cache.pop(key, None)
    if splits is None:
        splits = load(config, device=context.device, data_dir=data_dir)
    context.cache[key] = splits  # the latest used is last
    for old in [name for name in context.cache if isinstance(name, tuple) and name[:1] == ("data",)][:-_CACHED]:
        del context.cache[old]
    return splits


def _path(path: str | None) -> Path | None:
    return Path(path) if path else None


def _result(training: Training, validation: Evaluation | None) -> dict[str, Any]:
    total, trainable = parameters(training.model)
    best = max(training.epochs, key=lambda epoch: (epoch.val_accuracy or 0.0, -epoch.index))
    return {
        "value": None if validation is None else training.epochs[-1].val_accuracy,
        "best_epoch": best.index if validation is not None else None,
        "parameters": total,
        "trainable": trainable,
        "flops": flops(training.classifier, training.shape),
        "seconds": sum(epoch.seconds for epoch in training.epochs),
        "epochs": len(training.epochs),
        "classes": list(training.data.classes),
        "device": _device(training.device),
        "versions": _versions(),
        "files": {},
    }


def _spec(training: Training) -> dict[str, Any]:
    return {
        "config": training.config.to_table(),
        "classes": list(training.data.classes),
        "shape": list(training.shape),
        "fingerprint": training.data.fingerprint,
        "versions": _versions(),
    }


def _write_predictions(path: Path, part: Part, evaluation: Evaluation) -> str:
    """Writes an evaluation of a part, and returns the file's sha256.

    indices (N,) int64, labels (N,) int64, probabilities (N, K) float32: halves would make ties of near answers.
    """
    content = io.BytesIO()
    np.savez(
        content,
        indices=part.indices.numpy(),
        labels=part.labels.cpu().numpy(),
        probabilities=evaluation.probabilities.cpu().numpy(),
    )
    return write_whole(path, content.getvalue())


def _per_class(evaluation: Evaluation, part: Part, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision and recall of each class and the number of its images; 0 where a class was never predicted, or is in
    no image. scikit-learn counts the same, but to import it takes longer than most tests.
    """
    confusion = np.zeros((len(classes), len(classes)), np.int64)  # row: true, column: predicted
    np.add.at(confusion, (part.labels.cpu().numpy(), evaluation.probabilities.argmax(1).cpu().numpy()), 1)
    rows = zip(
        classes, confusion.diagonal().tolist(), confusion.sum(0).tolist(), confusion.sum(1).tolist(), strict=True
    )
    return [
        {"class": name, "precision": correct / max(predicted, 1), "recall": correct / max(n, 1), "n": n}
        for name, correct, predicted, n in rows
    ]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "timm")}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def _out_of_memory(error: BaseException) -> str | None:
    """One line if the error is out-of-memory; None for any other. torch has no class for that of a CPU, only words."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return " ".join(text.split())[:200] or type(error).__name__
    return None


def _line(epoch: Epoch) -> str:
    held = "" if epoch.val_loss is None else f", val_loss {epoch.val_loss:.4f}, val_accuracy {epoch.val_accuracy:.4f}"
    return (
        f"train_loss {epoch.train_loss:.4f}, train_accuracy {epoch.train_accuracy:.4f}{held}, lr {epoch.lr:.3g}, "
        f"{epoch.seconds:.1f} s"
    )
