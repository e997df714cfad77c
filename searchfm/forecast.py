"""What a search and a final training take, forecast from timed configs or from trials: arithmetic alone.

A trial takes `TRIAL_SECONDS`, and its epochs; trials run side by side. What the forecast assumes of pruning is in
`trained_fraction`. Measured against what searches took: `.github/BENCHMARKS.md`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, assert_never

import numpy as np

from searchfm.config import Asha, Hyperband, Median, NoPruner, Patient, Percentile, SearchConfig, rungs
from searchfm.format import size
from searchfm.records import Forecast, Prepared, StudyRecord, Timing, TrainResult, Trial

CONFIGS = 8  # of the space, drawn at random, whose mean is that of all trials
TRIAL_SECONDS = 0.15  # of a trial beside its epochs: model, weights, figures, database
RETRAIN_SECONDS = 10.0  # of `retrain` beside its trainings: start, test, registration with MLflow
TOP, SEEDS = 3, 3  # finalists, and fresh seeds of each, by default
STUDY_BYTES, TRIAL_BYTES, EPOCH_BYTES = 3_000_000, 300_000, 2_000  # databases, pictures, curves; without predictions
CHECKPOINTS = 3  # of a running trial: the two newest, and one that is being written
MOMENTS = 2  # that Adam keeps of each weight
COPIES = 2  # of weights and predictions: in the study's folder, and as MLflow's artifacts
FINAL_COPIES = 3  # of the final model's: in its folder; in MLflow as a program, and once more as weights


def make_forecast(
    timings: Sequence[Timing],
    memory: int,
    *,
    search: SearchConfig,
    subset: float,
    data: Prepared,
    startup: int,
    trials: int,
    workers: int,
    finalists: int = TOP,
) -> Forecast | None:
    """The forecast of a study; None where nothing could be timed.

    timings: of random configs, some of them timed. memory: bytes of a worker. startup: trials before the first is
    pruned. trials: to come. finalists: of `retrain`.
    """
    filled = fill(timings)
    if not filled:
        return None
    epochs = float(np.mean([timing.epochs for timing in filled]))
    train, validation = (float(np.mean([_of(t, part) for t in filled])) for part in ("train", "validation"))
    whole = epochs * (train + validation)
    fraction = trained_fraction(search, round(epochs))
    stopped = [whole] * min(startup, trials) + [whole * fraction] * max(trials - startup, 0)
    parameters = max(timing.parameters for timing in filled)
    predictions = data.validation * (16 + 4 * len(data.classes))  # indices, labels and probabilities of images
    kept = COPIES * min(trials, search.keep) + FINAL_COPIES
    # A paused trial has one checkpoint: weights, and the moments of Adam.
    paused = trials if isinstance(search.pruner, Asha) and search.pruner.promote else 0
    running = min(workers, trials) * CHECKPOINTS * (1 + MOMENTS) * 4 * parameters
    mean = round(float(np.mean([timing.parameters for timing in filled])))
    every = all_images(data, subset)
    frozen = sum(timing.frozen for timing in timings)
    all_frozen = max(timing.frozen for timing in timings) * every / (data.train + data.validation)
    return Forecast(
        trials=trials,
        workers=workers,
        seconds=frozen + search_seconds([whole] * trials, workers),
        pruned=frozen + search_seconds(stopped, workers),
        retrain=retrain_seconds([whole] * finalists, SEEDS, epochs * train * every / data.train + all_frozen, workers),
        memory=memory,
        disk=STUDY_BYTES
        + trials * (TRIAL_BYTES + round(epochs) * EPOCH_BYTES)
        + (COPIES * trials + SEEDS * finalists) * predictions
        + kept * 4 * parameters,
        checkpoints=paused * (1 + MOMENTS) * 4 * mean + running,
        configs=sum(timing.train is not None for timing in timings),
    )


def space_note(forecast: Forecast, left: int, free: int, folder: str) -> str:
    """A warning if a file system has less free space than the trials to come are forecast to take; else empty.

    forecast: of the study. left: trials to come, which take their fraction of what stays. free: bytes. folder: of the
    home.
    """
    needed = round(forecast.disk * left / max(forecast.trials, 1)) + forecast.checkpoints
    if free >= needed:
        return ""
    return (
        f"{folder}: has {size(free)} of free disk space, and the search is forecast to take up to {size(needed)}: "
        "delete files (searchfm clean lists some), or name a home on another disk with --home"
    )


def fill(timings: Sequence[Timing]) -> list[Timing]:
    """The timings, with times of those that were not timed: interpolated in the logarithms of work and time, and beyond
    the timed ones those of the nearest. Empty where nothing was timed.
    """
    timed = sorted((timing for timing in timings if timing.train), key=lambda timing: timing.work)
    if not timed:
        return []
    work = np.log([timing.work for timing in timed])
    filled = []
    for timing in timings:
        if timing.train is None:
            here = [
                math.exp(np.interp(math.log(timing.work), work, np.log([max(_of(t, part), 1e-9) for t in timed])))
                for part in ("train", "validation")
            ]
            timing = Timing(timing.epochs, timing.work, timing.parameters, *here)
        filled.append(timing)
    return filled


def _of(timing: Timing, part: str) -> float:
    return float(getattr(timing, part) or 0.0)


def trained_fraction(search: SearchConfig, epochs: int) -> float:
    """The fraction of their epochs that trials are assumed to train once the pruner's start-up trials have ended.

    Median: half of the trials stop, after a third of their epochs; percentile: all but `keep` percent. Halving: one of
    `reduction` trials passes each rung, as in the synchronous algorithm. Patient and none: no trial stops.
    """
    match search.pruner:
        case Median(min_epochs=least):
            return _stopped(0.5, least, epochs)
        case Percentile(keep=keep, min_epochs=least):
            return _stopped(1 - keep / 100, least, epochs)
        case Asha(min_epochs=least, reduction=reduction):
            return _halved(least, reduction, epochs)
        case Hyperband(min_epochs=least, reduction=reduction):
            brackets = [least * reduction**k for k in range(epochs) if least * reduction**k <= epochs]
            return float(np.mean([_halved(first, reduction, epochs) for first in brackets or [epochs]]))
        case Patient() | NoPruner():
            return 1.0
        case _ as never:
            assert_never(never)


def assumption(search: SearchConfig) -> str:
    """What `trained_fraction` assumes, in words; nothing where no trial is pruned."""
    match search.pruner:
        case Median():
            return "half of the later trials stop after a third of their epochs"
        case Percentile(keep=keep):
            return f"{100 - keep:g}% of the later trials stop after a third of their epochs"
        case Asha(reduction=reduction) | Hyperband(reduction=reduction):
            return f"one of {reduction} trials passes each halving"
        case Patient() | NoPruner():
            return ""
        case _ as never:
            assert_never(never)


def _stopped(pruned: float, least: int, epochs: int) -> float:
    return 1 - pruned * (1 - min(epochs, max(least, math.ceil(epochs / 3))) / epochs)


def _halved(least: int, reduction: int, epochs: int) -> float:
    trained, alive, rung = 0.0, 1.0, 0
    for following in rungs(least, reduction, epochs):
        trained, rung = trained + alive * (following - rung), following
        alive /= reduction
    return (trained + alive * (epochs - rung)) / epochs


def search_seconds(trainings: Sequence[float], workers: int) -> float:
    """Time for trials side by side. trainings: seconds of each. At the end, workers wait half a trial for the last."""
    if not trainings:
        return 0.0
    seconds = [TRIAL_SECONDS + training for training in trainings]
    count = min(workers, len(seconds))
    return sum(seconds) / count + (count - 1) / count * seconds[-1] / 2


def retrain_seconds(finalists: Sequence[float], seeds: int, final: float, workers: int) -> float:
    """Time of `retrain`. finalists: seconds of a training of each; none: the best trial wins without fresh seeds.
    final: of the final training, as if on one core, since small models gain little from more.
    """
    trainings = [seconds for seconds in finalists for _ in range(seeds)]
    return RETRAIN_SECONDS + TRIAL_SECONDS + final + search_seconds(trainings, workers)


# --- from trials that have ended --------------------------------------------------------------------------------------

CONTESTS = ((TOP, SEEDS), (TOP, 2), (2, 2))  # finalists and fresh seeds, the most thorough first
# FLOP of a batch's forward pass from which a final training gains from several threads: see `final_threads`.
THREADED = {"float32": 500_000_000, "bfloat16": 2_000_000_000}
FINAL_GAIN = 1.4  # of a second thread, at least, for a net of convolutions in float32
CONVOLUTIONS = ("cnn", "residual")  # names of models
RESERVED = 1 / 3  # of a timeout at most, where the final training alone takes no longer
LATE = 1.1  # of the time that is left: what the final training of a trial that wins without a contest may take
END_SECONDS = 4.0  # of a search that is stopped: its workers end their batches, MLflow gets the last trials


class Cost(NamedTuple):
    """What a complete trial costs once more, in seconds."""

    trial: int  # its number
    training: float  # with a fresh seed, on the search's data
    final: float  # on all data; nothing is held out


def costs(study: StudyRecord, workers: int) -> list[Cost]:
    """The costs of the complete trials, the best first, from the times of their own epochs. workers: the final training
    has as many threads on a CPU.
    """
    images = all_images(study.data, study.subset)
    return [
        Cost(trial.number, trial.seconds, _final_seconds(trial, images, study.data.train, workers))
        for trial in study.ranked(twins=False)
    ]


def final_threads(result: TrainResult, batch_size: int, workers: int) -> int:
    """How many threads a final training has on a CPU: `workers`, since nothing else runs; or one, where threads that
    wait for each other would take longer. result: of the trial. workers: cores that it may use.

    Two threads instead of one, by the FLOP of a batch (Xeon with AMX, torch 2.15, threads that hardly spin). bfloat16:
    MLPs of 61 million 0.6, 306 million 0.8, 2.9 billion 1.4 times as fast; nets of convolutions of 125 to 250 million
    0.9 to 1.1, 500 million to 1 billion 0.6 to 1.7, 2.8 billion and more 1.1 to 1.5. float32: 500 million and more
    1.0 to 1.5, MLPs of 61 million 0.7. More than two were not measured.
    """
    threaded = batch_size * result.flops >= THREADED.get(result.precision, THREADED["float32"])
    return workers if threaded else 1


def _final_seconds(trial: Trial, images: float, trained: int, workers: int) -> float:
    """Seconds of a training like a trial's on so many images, with the features that the cache has for others only.

    A trial has one thread on a CPU. Two made the training of nets of convolutions in float32 1.5 to 1.9 times as fast
    (8 to 74 MFLOP an image, EPYC with AVX2), that of vision transformers 1.1 to 1.4 times.
    """
    seconds = sum(images / epoch.samples_per_second for epoch in trial.epochs)
    if (result := trial.result) is None:
        return seconds
    config, gain = trial.config, 1.0
    if config["model"]["name"] in CONVOLUTIONS and result.precision == "float32" and result.device.startswith("cpu"):
        several = final_threads(result, config["train"]["batch_size"], workers) > 1
        gain = FINAL_GAIN if several else 1.0
    return result.frozen_seconds * images / trained + seconds / gain


def all_images(data: Prepared, subset: float) -> float:
    """Images of the final training: both parts, and what `subset` leaves out."""
    return (data.available or data.train / subset) + data.validation


class Contest(NamedTuple):
    """How a winner is found among the best trials, and the time of that and its final training."""

    top: int  # finalists beside the default; 0: the winner is given, without a contest
    seeds: int  # fresh ones of each
    seconds: float
    winner: int | None = None  # number of the trial that wins without a contest


def fitting_contest(study: StudyRecord, workers: int, left: float, most: float = math.inf) -> Contest:
    """The most thorough contest of finalists that takes at most `left` seconds, and at most `most`. If none does, the
    best trial wins whose final training takes at most `LATE` times `left`; without such a trial, the best. study: with
    a complete trial. left: seconds to the end of the timeout.
    """
    found = costs(study, workers)
    finalists = found[:TOP]
    default = study.default
    if default is not None and all(cost.trial != default for cost in finalists):
        # Without a complete trial of the default, it is estimated by the maximum of the best.
        maximum = Cost(default, max(cost.training for cost in finalists), max(cost.final for cost in finalists))
        finalists.append(next((cost for cost in found if cost.trial == default), maximum))
    for top, seeds in CONTESTS:
        chosen = [cost for rank, cost in enumerate(finalists) if rank < top or cost.trial == default]
        # Any of them may win.
        final = max(cost.final for cost in chosen)
        expected = retrain_seconds([cost.training for cost in chosen], seeds, final, workers)
        if expected <= min(left, most):
            return Contest(top, seeds, expected)
    alone = [Contest(0, 0, retrain_seconds([], 0, cost.final, workers), cost.trial) for cost in found]
    return next((contest for contest in alone if contest.seconds <= LATE * left), alone[0])


def reserve(study: StudyRecord, workers: int, timeout: float, left: float) -> float:
    """Seconds of a timeout that the search leaves for what follows it: its own end, and the most thorough contest of
    finalists that fits into a third of the timeout, else a final training without one. 0 without a complete trial,
    since nothing could follow. left: seconds to the end of the timeout.
    """
    if study.best is None:
        return 0.0
    return END_SECONDS + fitting_contest(study, workers, left - END_SECONDS, RESERVED * timeout).seconds
