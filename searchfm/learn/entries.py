"""The job entries: `prepare`, `forecast` and `trial` for a search; `fit`, `test` and `export` for the final model;
`devices` for a node.

`test` alone reads the test part; whoever submits it counts the read first.
"""

import gc
import io
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from searchfm.config import Config, Custom, DataConfig, Shape, Transfer
from searchfm.errors import DataError, ModelError, SearchfmError, Stopped, WorldError, model_errors, one_line
from searchfm.format import plural
from searchfm.home import file_sha256, write_whole
from searchfm.jobs import PAUSED, Context, Result
from searchfm.learn import checkpoint, graphs, precision
from searchfm.learn.data import Splits, load, load_full, load_test
from searchfm.learn.datasets import count_test, parsed, side
from searchfm.learn.export import program
from searchfm.learn.features import limit, trained_flops
from searchfm.learn.models import Classifier, build, custom, flops, parameters, served
from searchfm.learn.models.custom import Code
from searchfm.learn.models.transfer import build as build_transfer
from searchfm.learn.models.transfer import input_sides
from searchfm.learn.train import Training, epoch_seconds, evaluate
from searchfm.records import (
    EXAMPLE,
    NO_BFLOAT16,
    PREDICTIONS,
    PROGRAM,
    Epoch,
    ExportJob,
    ExportResult,
    ForecastJob,
    ForecastResult,
    Prepared,
    PrepareJob,
    PrepareResult,
    TestJob,
    TestResult,
    Timing,
    TrainJob,
    TrainResult,
)
from searchfm.tables import digest

log = logging.getLogger("searchfm")

# Of a process on a GPU beside its tensors: CUDA's context and loaded kernels (H100, CUDA 13: 830 to 880 MB).
CONTEXT_BYTES = 850_000_000
Loader: TypeAlias = Callable[..., Splits]  # `load`, or `load_full` for a final training


def prepare(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Makes a study's data and pretrained weights available, before the first trial.

    payload: a PrepareJob. Returns a PrepareResult. Raises DataError, ModelError; CodeError for the user's code that may
    not run here, or differs; WorldError for a CPU without bfloat16 where the study needs it.
    """
    # Wrong environment variables are refused before the first trial.
    limit()
    graphs.wanted()
    job = PrepareJob.from_json(payload, "prepare")
    bfloat16 = precision.faster(precision.cpu_features(), job.architectures)
    if context.device == "cpu" and not set(job.bfloat16) <= set(bfloat16):
        raise WorldError(f"its CPU {NO_BFLOAT16}, in which the search trains {', '.join(job.bfloat16)}")
    config = DataConfig.from_table(job.data)
    size = side(config, input_sides(job.input_models)) if job.choose_size and not config.size else 0
    config = replace(config, size=size or config.size)
    splits = _data(load, config, job.data_dir, context.device)
    if job.fingerprint not in (None, splits.fingerprint):
        raise DataError(
            f'data.name = "{job.data["name"]}": the data differ from those of the node where the search began '
            f"(fingerprint {splits.fingerprint[:12]}, there {str(job.fingerprint)[:12]})"
        )
    prepared = _prepared(config, splits, Path(job.data_dir) if job.data_dir else None)
    for model, weights in job.models:  # built, not only located: a file of another model is refused here too
        build_transfer(Transfer.from_table({"model": model, "weights": weights}), prepared.shape, len(splits.classes))
    code = _try_out(job, prepared.shape, len(splits.classes), context)
    prepared = replace(prepared, code=code, bfloat16=bfloat16)
    yield from ()  # an entry is a generator, even one without epochs
    return PrepareResult(prepared, _accelerators(), size).to_json()


def _try_out(job: PrepareJob, shape: Shape, classes: int, context: Context) -> str:
    """Builds and runs the models of the user's code. Returns the sha256 of its source; empty without such models."""
    code = ""
    for table in job.custom:
        kind = Custom.from_table(table)
        code = custom.source_sha256(kind.factory)
        net = custom.build(kind, shape, classes, Code(context.allow_code, job.code or ""))
        custom.try_out(net, kind, shape, classes)
    return code


def devices(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Returns the numbers of this node's accelerators: {"cuda": 2, "mps": 0}."""
    yield from ()
    return _accelerators()


def forecast(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Times training and validation of configs on a few batches: those of minimum and maximum work, then others, as far
    as the job's seconds go.

    payload: a ForecastJob. Returns a ForecastResult, in the order of the configs. Raises DataError.
    """
    job = ForecastJob.from_json(payload, "forecast")
    configs, code = [Config.from_table(table) for table in job.configs], Code(context.allow_code, job.code)
    data = _data(load, configs[0].data, job.data_dir, context.device)
    began = time.perf_counter()  # a worker's first use of a GPU takes seconds
    timings: dict[int, Timing] = {}
    missing: set[str] = set()  # files of features that a config timed earlier lacks, too
    for index, config in enumerate(configs):
        with suppress(SearchfmError):  # a config that cannot be built fails as a trial, not before
            timings[index] = _work(config, data, code)
    order = sorted(timings, key=lambda index: timings[index].work)
    for index in [*order[:1], *order[:0:-1]]:
        left = began + job.seconds - time.perf_counter()
        if left > 0 or index in (order[0], order[-1]):
            seconds = epoch_seconds(
                configs[index],
                data,
                left,
                device=context.device,
                tick=context.tick,
                code=code,
                bfloat16=job.bfloat16,
            )
            if seconds is not None:
                train, validation, features = seconds
                frozen = sum(taken for key, taken in features.items() if key not in missing)
                timings[index] = replace(timings[index], train=train, validation=validation, frozen=frozen)
                missing |= features.keys()
    yield from ()  # an entry is a generator, even one without epochs
    return ForecastResult(tuple(timings[index] for index in sorted(timings)), _peak_bytes(context.device)).to_json()


def _work(config: Config, data: Splits, code: Code) -> Timing:
    """What an epoch of a config computes, cached features left out. A backward pass takes twice as many operations as
    a forward pass.
    """
    channels, height, width = data.train.images.shape[1:]
    shape = (int(channels), int(height), int(width))
    net = build(config.model, shape, len(data.classes), seed=0, pretrained=False, code=code)
    model = Classifier(net, data.mean, data.std)
    images = 3 * len(data.train) + (0 if data.val is None else len(data.val))
    cached = trained_flops(model, shape, config)
    work = float(flops(model, shape) if cached is None else cached) * images
    return Timing(config.train.epochs, work, parameters(model)[0], None, None)


def trial(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains one config, from its newest checkpoint if there is one, whose epochs it yields again first.

    payload: a TrainJob. Writes the weights and their spec, if its value is at least `weights_from`, and the predictions
    for the validation part into the context's folder. Returns a TrainResult. A job with `until` ends after that epoch
    with a checkpoint alone, and returns {PAUSED: epoch}.
    Raises DataError, ConfigError, ModelError, DivergedError, StorageError; WorldError if memory runs out.
    """
    job = TrainJob.from_json(payload, "trial")
    result = yield from _trained(job, context, load)
    return {PAUSED: job.until} if result is None else result.to_json()


def fit(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Trains on all training and validation data; nothing is held out.

    payload, result, files and errors as those of `trial`, but without predictions, and `value` is None. On a CPU it
    uses the job's `threads`, as far as the node has cores, since nothing else runs. Writes two training images
    (2, C, H, W) uint8 as an example.
    """
    job, threads = TrainJob.from_json(payload, "fit"), torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(job.threads, cores) if job.threads else threads)
    try:
        result = yield from _trained(job, context, load_full)
    finally:
        torch.set_num_threads(threads)
    assert context.folder is not None
    assert result is not None
    config = Config.from_table(job.config).data
    images = _data(load_full, config, job.data_dir, context.device).train.images[:2]
    content = io.BytesIO()
    np.save(content, images.cpu().numpy())
    sha256 = write_whole(context.folder / EXAMPLE, content.getvalue())
    return replace(result, files={**result.files, EXAMPLE: sha256}).to_json()


def test(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Evaluates the model of `fit` on the test part, in float32.

    payload: a TestJob. Writes the predictions into the context's folder. Returns a TestResult. Raises ModelError if the
    weights are not those that were trained, DataError as `load_test` does.
    """
    assert context.folder is not None
    job = TestJob.from_json(payload, "test")
    model, spec = _model(job.model, job.files, context)
    config = Config.from_table(spec["config"])
    part = load_test(config.data, device=context.device, data_dir=Path(job.data_dir) if job.data_dir else None)
    yield from ()  # an entry is a generator, even one without epochs
    began = time.perf_counter()
    loss, predictions = evaluate(model.to(context.device), part, config.train, context.tick)
    return TestResult(
        accuracy=float(predictions.correct.mean()),
        loss=loss,
        correct=int(predictions.correct.sum()),
        n=len(part),
        per_class=predictions.per_class(spec["classes"]),
        fingerprint=part.fingerprint,
        seconds=time.perf_counter() - began,
        files={PREDICTIONS: predictions.write(context.folder)},
    ).to_json()


def export(payload: Mapping[str, Any], context: Context) -> Generator[Epoch, None, Result]:
    """Writes the model of `fit` as a torch.export program: raw images (N, C, H, W) uint8 -> probabilities (N, K)
    float32, on the CPU.

    A job, since a worker has torch, and has to import only torch._dynamo (2 s of CPU).
    payload: an ExportJob. Writes PROGRAM into the context's folder. Returns an ExportResult. Raises CodeError, and
    ModelError also if the weights are not those that were trained.
    """
    assert context.folder is not None
    job = ExportJob.from_json(payload, "export")
    model, spec = _model(job.model, job.files, context)
    yield from ()  # an entry is a generator, even one without epochs
    with model_errors(f"{job.model}: torch cannot write this model as .pt2"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own insides
        content = program(served(model), tuple(spec["shape"]))
    return ExportResult(str(torch.__version__), {PROGRAM: write_whole(context.folder / PROGRAM, content)}).to_json()


def _model(path: str, files: Mapping[str, str], context: Context) -> tuple[Classifier, dict[str, Any]]:
    """The model of `fit`, with its spec. Raises ModelError unless its files have these hashes; CodeError."""
    folder = Path(path)
    for name, expected in files.items():
        try:
            actual = file_sha256(folder / name)
        except OSError as error:
            raise ModelError(f"{folder / name}: cannot be read ({error.strerror})") from None
        if actual != expected:
            raise ModelError(f"{folder / name}: damaged, its sha256 is not the one it was written with")
    return checkpoint.load_classifier(folder, allow_code=context.allow_code)


def _trained(job: TrainJob, context: Context, load: Loader) -> Generator[Epoch, None, TrainResult | None]:
    """Trains a config on the data that `load` gives; without a validation part `value` is None. Returns None where the
    job's `until` ends it.
    """
    try:
        return (yield from _training(job, context, load))
    except (MemoryError, RuntimeError) as error:
        # For a CPU, torch has no class, only a text.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = one_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    gc.collect()
    torch.cuda.empty_cache()
    raise WorldError(f"out of memory on {context.device}: {reason}")


def _training(job: TrainJob, context: Context, load: Loader) -> Generator[Epoch, None, TrainResult | None]:
    assert context.folder is not None
    config = Config.from_table(job.config)
    table, data = config.to_table(), _data(load, config.data, job.data_dir, context.device)
    if data.fingerprint != job.fingerprint:
        raise DataError(
            f'data.name = "{config.data.name}": the data changed since the study began '
            f"(fingerprint {data.fingerprint[:12]}, was {job.fingerprint[:12]})"
        )
    owner = {"trial": job.identity, "config": digest(table), "data": data.fingerprint}
    folders = [context.folder, *context.earlier]
    resume = checkpoint.newest(folders, owner)
    code = Code(context.allow_code, job.code)
    training = Training(
        config, data, device=context.device, resume=resume, tick=context.tick, code=code, bfloat16=job.bfloat16
    )
    if resume is not None:
        log.info("resumed after epoch %d", len(resume.epochs))
        yield from resume.epochs
    written, last = time.monotonic(), training.checkpoint()
    try:
        left = (job.until or config.train.epochs) - len(training.epochs)
        for epoch in islice(training, max(left, 0)):
            last = training.checkpoint()  # in memory: the next epoch may be stopped midway
            if epoch.index == job.until or time.monotonic() - written >= job.checkpoint_seconds:
                checkpoint.write(context.folder, last, owner)
                written = time.monotonic()
            if epoch.index == job.until:
                checkpoint.remove(context.earlier)  # a paused trial may wait for long: it keeps one
            log.info("epoch %d: %s", epoch.index, _line(epoch))
            yield epoch
        if job.until is not None:
            return None
        validation = training.validation or training.validate()
    except (Stopped, GeneratorExit):  # in the middle of an epoch, or between two
        if last.epochs:
            checkpoint.write(context.folder, last, owner)
        raise
    spec = {
        "config": table,
        "classes": list(data.classes),
        "shape": list(training.shape),
        "fingerprint": data.fingerprint,
        "versions": _versions(),
        **({"code": job.code} if job.code else {}),
    }
    value, files = training.epochs[-1].val_accuracy, {}
    if job.weights_from is not None and (value is None or round(value, 6) >= job.weights_from):
        files = checkpoint.save_weights(context.folder, training.classifier, spec)
    if validation is not None:
        files[PREDICTIONS] = validation[1].write(context.folder)
    checkpoint.remove(folders)
    return _result(training, files, job.code)


@lru_cache(maxsize=2)  # data sets a worker keeps: the study's, and one of the study before
def _data(load: Loader, config: DataConfig, data_dir: str | None, device: str) -> Splits:
    return load(config, device=device, data_dir=Path(data_dir) if data_dir else None)


def _result(training: Training, files: Mapping[str, str], code: str) -> TrainResult:
    total, trainable = parameters(training.model)
    best = max(training.epochs, key=lambda epoch: (epoch.val_accuracy or 0.0, -epoch.index))
    return TrainResult(
        value=training.epochs[-1].val_accuracy,
        best_epoch=None if best.val_accuracy is None else best.index,
        parameters=total,
        trainable=trainable,
        flops=_flops(training, code),
        seconds=sum(epoch.seconds for epoch in training.epochs),
        epochs=len(training.epochs),
        device=_device(training.device),
        memory=_memory(training.device),
        versions=_versions(),
        files=files,
        numerics=list(training.numerics),
        precision=training.precision,
        frozen_seconds=training.frozen_seconds,
    )


def _flops(training: Training, code: str) -> int:
    """`flops` of a training's model, counted once a process for each architecture. code: sha256 of the user's code."""
    kind = training.config.model.kind
    architecture = kind.model if isinstance(kind, Transfer) else digest(training.config.model.to_table())
    key = (architecture, training.shape, len(training.data.classes), code)
    if key not in _counted:
        _counted[key] = flops(training.classifier, training.shape)
    return _counted[key]


_counted: dict[tuple[str, Shape, int, str], int] = {}


def _prepared(config: DataConfig, splits: Splits, data_dir: Path | None) -> Prepared:
    images, held = splits.train.images, 0 if splits.val is None else len(splits.val)
    file = parsed(config, "train", data_dir)
    return Prepared(
        fingerprint=splits.fingerprint,
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        classes=splits.classes,
        train=len(images),
        validation=held,
        validation_classes=_counts(splits),
        available=file.images - held,
        test=count_test(config, data_dir),
        sides=file.sides,
    )


def _counts(splits: Splits) -> tuple[int, ...]:
    """Validation images of each class; empty without a validation part."""
    if splits.val is None:
        return ()
    return tuple(torch.bincount(splits.val.labels.cpu(), minlength=len(splits.classes)).tolist())


def _accelerators() -> dict[str, int]:
    return {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}


@cache
def _versions() -> Mapping[str, str]:
    return {name: version(name) for name in ("torch", "timm")}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {plural(torch.get_num_threads(), 'thread')})"


def _memory(device: torch.device) -> float | None:
    """The fraction of a GPU's memory that this process took at most, since its last trial."""
    if device.type != "cuda":
        return None
    taken = _peak_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(taken / torch.cuda.get_device_properties(device).total_memory)


def _peak_bytes(device: torch.device | str) -> int:
    """Memory that this process took at most: of a GPU since its last trial, else of the host."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB elsewhere


def _line(epoch: Epoch) -> str:
    held = "" if epoch.val_loss is None else f", val_loss {epoch.val_loss:.4f}, val_accuracy {epoch.val_accuracy:.4f}"
    return (
        f"train_loss {epoch.train_loss:.4f}, train_accuracy {epoch.train_accuracy:.4f}{held}, lr {epoch.lr:.3g}, "
        f"{epoch.seconds:.1f} s"
    )
