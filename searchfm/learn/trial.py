"""The job entries a study is made of: `prepare` sees that all is at hand, `trial` trains one configuration."""

import gc
import io
import logging
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from searchfm.config import Config, DataConfig, Transfer
from searchfm.errors import DataError, Stopped, WorldError
from searchfm.home import write_whole
from searchfm.job import Context, Epoch, Result
from searchfm.learn import checkpoint, data
from searchfm.learn.data import Part, Splits, load
from searchfm.learn.models import flops, parameters
from searchfm.learn.models.transfer import build as build_transfer
from searchfm.learn.train import Evaluation, Training, train
from searchfm.tables import digest

log = logging.getLogger("searchfm")

PREDICTIONS = "predictions.npz"
Loader: TypeAlias = Callable[..., Splits]  # `data.load`, or `data.load_full` for a final training
_CACHED = 2  # data sets a worker keeps: the study's, and one of the study before


def prepare(payload: Mapping[str, Any], _context: Context) -> Generator[Epoch, None, Result]:
    """Makes a study's data and pretrained weights available, before anything is asked for.

    payload: `data` (table), `data_dir` (path or None), `models` (list of [transfer model, weights]).
    Returns `fingerprint`, `shape` (C, H, W), `classes` (names), `train` and `validation` (numbers of images),
    `devices` (numbers of accelerators: `cuda`, `mps`).
    Raises DataError, ModelError.
    """
    found = data.prepare(DataConfig.from_table(payload["data"]), _path(payload["data_dir"]))
    for model, weights in payload["models"]:  # built, not only found: a file of another model is refused here too
        build_transfer(Transfer.from_table({"model": model, "weights": weights}), found.shape, len(found.classes))
    yield from ()  # an entry is a generator, even one without epochs
    devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    return asdict(found) | {"shape": list(found.shape), "classes": list(found.classes), "devices": devices}


def trial(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains one configuration, from its newest checkpoint if there is one, whose epochs it yields again first.

    payload: `config` (table), `data_dir` (path or None), `fingerprint` (of the data, as `prepare` gave it),
    `identity` (of the trial), `checkpoint_seconds` (least time between two checkpoints).
    Leaves in the context's folder the weights with their spec and the validation part's predictions, and returns
    `value` (accuracy on validation after the last epoch), what the model costs, and `files` with their sha256.
    Raises DataError, ConfigError, ModelError, DivergedError, StorageError; WorldError if memory runs out.
    """
    return (yield from trained(payload, context, load))


def trained(payload: Mapping[str, Any], context: Context, load: Loader) -> Generator[Epoch, None, Result]:
    """What `trial` does, on the data that `load` gives; without a validation part `value` is None."""
    try:
        return (yield from _trained(payload, context, load))
    except (MemoryError, RuntimeError) as error:
        reason = _out_of_memory(error)
        if reason is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    gc.collect()
    if context.device.startswith("cuda"):
        torch.cuda.empty_cache()
    raise WorldError(f"out of memory on {context.device}: {reason}")


def _trained(payload: Mapping[str, Any], context: Context, load: Loader) -> Generator[Epoch, None, Result]:
    config = Config.from_table(payload["config"])
    data = cached_data(config.data, _path(payload["data_dir"]), context, load)
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
            last = training.checkpoint()  # in memory: the next epoch may be left in its middle
            if context.folder and time.monotonic() - written >= payload["checkpoint_seconds"]:
                checkpoint.write(context.folder, last, owner)
                written = time.monotonic()
            log.info("epoch %d: %s", epoch.index, _line(epoch))
            yield epoch
        validation = training.validation or training.validate()
    except (Stopped, GeneratorExit):  # told to leave in the middle of an epoch, or between two
        if context.folder and last.epochs:
            checkpoint.write(context.folder, last, owner)
        raise
    result = _result(training, validation)
    if context.folder:
        files = checkpoint.save_weights(context.folder, training.classifier, _spec(training))
        if validation is not None and data.val is not None:
            files[PREDICTIONS] = save_predictions(context.folder / PREDICTIONS, data.val, validation)
        checkpoint.remove(folders)
        result["files"] = files
    return result


def cached_data(config: DataConfig, data_dir: Path | None, context: Context, load: Loader) -> Splits:
    """The data, from the worker's cache if a job before this one had the same."""
    key = ("data", load.__name__, digest(config.to_table()), str(data_dir), context.device)
    held: Splits | None = context.cache.pop(key, None)
    if held is None:
        held = load(config, device=context.device, data_dir=data_dir)
    context.cache[key] = held  # the latest used stands last
    old = [name for name in context.cache if isinstance(name, tuple) and name[:1] == ("data",)][:-_CACHED]
    for name in old:
        del context.cache[name]
    return held


def _path(given: str | None) -> Path | None:
    return Path(given) if given else None


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


def save_predictions(path: Path, part: Part, validation: Evaluation) -> str:
    """Writes an evaluation of a part, and returns the file's sha256.

    indices (N,) int64, labels (N,) int64, probabilities (N, K) float32: halves would make ties of near answers.
    """
    content = io.BytesIO()
    np.savez(
        content,
        indices=part.indices.cpu().numpy(),
        labels=part.labels.cpu().numpy(),
        probabilities=validation.probabilities.cpu().numpy(),
    )
    return write_whole(path, content.getvalue())


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "timm")}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def _out_of_memory(error: BaseException) -> str | None:
    """One line on a failure for want of memory; None for any other. torch says it of a CPU in words only."""
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
