"""What `--json` and `--csv` print: one class for each object, with the meaning and unit of each key.

`.github/JSON.md` and `.github/json-schema.json` are made from these classes (`python -m tests.json_page`). A key keeps
its name and meaning within a version of the schema; new keys may be added.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from searchfm.format import csv_text
from searchfm.home import FileKind
from searchfm.records import Forecast as ForecastRecord
from searchfm.records import State, StudyRecord, searched_keys
from searchfm.records import Trial as TrialRecord
from searchfm.search import space
from searchfm.search.study import Study as Plan

if TYPE_CHECKING:
    from pathlib import Path

    from searchfm.home import Home
    from searchfm.learn.datasets import Described
    from searchfm.learn.export import Exported as ExportedFile
    from searchfm.learn.export import Prediction as PredictedImage
    from searchfm.learn.overview import Overview
    from searchfm.show.keys import Section
    from searchfm.tracking.mirror import Difference

SCHEMA: Literal[2] = 2
Costs = Mapping[str, tuple[int, int]]  # minimum and maximum of a trial's `parameters` and `flops`
Params = Annotated[Mapping[str, Any], Meta(description="what the search chose, by dotted key")]
LOG_LINES = 20  # of a trial's log


def about(text: str) -> Meta:
    """The meaning of a key."""
    return Meta(description=text)


class Part(Struct, kw_only=True):
    """An object within another."""


class Printed(Part, kw_only=True):
    """An object that a command prints, alone or as a row of a list."""

    schema: Annotated[Literal[2], about("version of these keys")] = SCHEMA


P = TypeVar("P", bound=Part)


def describe(kind: type[P], record: Any) -> P:
    """An object whose keys are attributes of the record."""
    return msgspec.convert(record, kind, from_attributes=True)


# --- studies and trials -----------------------------------------------------------------------------------------------


class Counts(Part, kw_only=True):
    """How many trials a study has. Running ones are in `total` alone."""

    complete: Annotated[int, about("trials that trained to their end, or are twins of such")]
    pruned: Annotated[int, about("trials that were stopped early")]
    failed: Annotated[int, about("trials that failed")]
    total: Annotated[int, about("trials that there are, running ones included")]


class Best(Part, kw_only=True):
    """The best trial of a study."""

    trial: Annotated[int, about("its number")]
    value: Annotated[float, about("validation accuracy after the last epoch, 0 to 1")]
    params: Params


class Data(Part, kw_only=True):
    """The data of a study."""

    name: Annotated[str, about("a data set by name, or the path of user images")]
    shape: Annotated[tuple[int, int, int], about("channels, height and width of an image, in pixels")]
    classes: Annotated[int, about("number of classes")]
    subset: Annotated[float, about("fraction of the training part that is searched on, 0 to 1")]
    train: Annotated[int, about("images that each trial is trained on")]
    validation: Annotated[int, about("images that trials are compared on")]
    available: Annotated[int | None, about("images to train on before `subset`; null in studies begun before 0.4")]
    test: Annotated[int | None, about("images of the test part; null in studies begun before 0.4")]
    largest: Annotated[
        float | None, about("validation accuracy of always answering the largest class, 0 to 1; null if unknown")
    ]
    fingerprint: Annotated[str, about("hash of the data; equal ones are the same data")]
    bfloat16: Annotated[Sequence[str], about('architectures that `precision = "auto"` trains in bfloat16 on a CPU')]


class Trial(Part, kw_only=True):
    """A trial of a study."""

    number: Annotated[int, about("Optuna's number")]
    state: Annotated[State, about("how it ended, or that it runs")]
    value: Annotated[
        float | None,
        about("validation accuracy after the last epoch, 0 to 1, which the study maximises; null unless complete"),
    ]
    accuracy: Annotated[float | None, about("validation accuracy after the latest epoch, 0 to 1, in any state")]
    params: Params
    epochs: Annotated[int, about("epochs that were trained")]
    planned_epochs: Annotated[int, about("epochs of its config")]
    seconds: Annotated[float, about("training time of all epochs, validation included, in s")]
    seconds_per_epoch: Annotated[float, about("mean of an epoch, in s; 0 without one")]
    parameters: Annotated[int | None, about("parameters of its model; null unless complete")]
    flops: Annotated[int | None, about("floating-point operations of one image's forward pass; null unless complete")]
    twin: Annotated[int | None, about("an earlier trial of the same config, whose end this one copied")]
    reason: Annotated[str | None, about("why it failed, or what pruned it")]
    first: Annotated[
        str | None, about("where its config comes from, if it was tried before the sampler proposed: `study file` ...")
    ]
    attempts: Annotated[
        int, about("attempts to train it: more than one after a worker died or was stopped, or after a pause")
    ]
    paused: Annotated[
        int | None, about("epoch after which a running trial is paused (`promote = true`); null unless it is")
    ]
    numerics: Annotated[
        Sequence[int] | None,
        about("numbers of the numerics it was trained under, two if another version began it; null unless complete"),
    ]
    precision: Annotated[
        str | None, about("float32 or bfloat16, that it was trained in; null unless complete, and in trials before 0.4")
    ]
    started: Annotated[float | None, about("seconds since 1970")]
    ended: Annotated[float | None, about("seconds since 1970; null while it runs")]
    folder: Annotated[str, about("path of its files")]


class Forecast(Part, kw_only=True):
    """What a search was forecast to take, from configs that were timed for a few batches."""

    trials: Annotated[int, about("trials of the search")]
    workers: Annotated[int, about("workers that share them")]
    seconds: Annotated[float, about("time of the search without pruning, in s")]
    pruned: Annotated[float, about("time with the pruning that is assumed, in s")]
    retrain: Annotated[float, about("time of `retrain` with its defaults, in s")]
    memory: Annotated[int, about("bytes of a worker at most: of its GPU, else of the host")]
    disk: Annotated[int, about("bytes of the home folder at the end, the final model included")]
    checkpoints: Annotated[int, about("bytes of checkpoints at most, in the home folder while it searches")]


class Study(Printed, kw_only=True):
    """A study, as it stands."""

    study: Annotated[str, about("its name")]
    question: Annotated[str, about("first comment of the study file")]
    trials: Annotated[Counts, about("how many there are")]
    running: Annotated[int, about("trials that run, are paused, or wait for the same command to resume them")]
    paused: Annotated[int, about("of these, trials that are paused (`promote = true`)")]
    planned: Annotated[int, about("trials that were asked for in total, such as by `--trials`")]
    best: Annotated[Best | None, about("the complete trial with the highest value, the earliest of equal ones")]
    seconds: Annotated[float, about("from the first trial's start to the last one's end, in s")]
    elapsed: Annotated[float | UnsetType, about("`tune` alone: wall time of the command, in s")] = UNSET
    ended_by: Annotated[
        Literal["target", "stop_after"] | UnsetType | None,
        about("`tune` alone: the rule of `[search]` that ended the search; null if none did"),
    ] = UNSET
    final: Annotated[
        "Retrained | UnsetType | None",
        about("`tune --retrain` alone: the final model, as `retrain` prints it; null without a complete trial"),
    ] = UNSET
    home: Annotated[str, about("path of the home folder")]
    folder: Annotated[str, about("path of the study's files")]
    data: Annotated[
        Data | None, about("what is searched on; null where the timeout of `tune` ended before the study was opened")
    ]
    forecast: Annotated[Forecast | None, about("made before its first trial; null if nothing could be timed")]
    numerics: Annotated[
        Sequence[int],
        about("numbers of the numerics of its trainings: equal configs give bitwise equal results within one"),
    ]
    coordinator: Annotated[
        str | UnsetType | None, about("`status` alone: the process and host that search or retrain it; null if none")
    ] = UNSET
    undrawn: Annotated[
        int | UnsetType,
        about("`status NAME` alone: trials whose pictures are not drawn yet; `sync --apply` draws them"),
    ] = UNSET
    trial_list: Annotated[list[Trial] | UnsetType, about("`tune` and `status NAME` alone: all trials, by number")] = (
        UNSET
    )


class Epoch(Part, kw_only=True):
    """An epoch of a trial."""

    index: Annotated[int, about("from 1")]
    train_loss: Annotated[float | None, about("mean cross-entropy on augmented images, in training mode")]
    train_accuracy: Annotated[float, about("fraction correct on augmented images, in training mode, 0 to 1")]
    val_loss: Annotated[float | None, about("mean cross-entropy on the validation part")]
    val_accuracy: Annotated[float | None, about("fraction correct on the validation part, 0 to 1")]
    lr: Annotated[float, about("learning rate of the last batch")]
    seconds: Annotated[float, about("wall time, validation included, in s")]
    samples_per_second: Annotated[float, about("training images over the time of training alone")]
    time: Annotated[float, about("when it ended, in seconds since 1970")]


class TrialPage(Printed, kw_only=True):
    """A trial with its curves and files."""

    study: Annotated[str, about("name of its study")]
    trial: Annotated[Trial, about("the trial, as in `trial_list`")]
    config: Annotated[Mapping[str, Any], about("the whole config, as in its config.toml")]
    curve: Annotated[list[Epoch], about("its epochs, by index")]
    log: Annotated[list[str], about(f"the last {LOG_LINES} lines of its log")]
    files: Annotated[list[str], about("names of the files in its folder")]


def describe_trial(trial: TrialRecord) -> Trial:
    """A trial in a list of trials. Reads its epochs."""
    return Trial(
        number=trial.number,
        state=trial.state,
        value=trial.value,
        accuracy=trial.accuracy,
        params=trial.params,
        epochs=len(trial.epochs),
        planned_epochs=trial.planned_epochs,
        seconds=round(trial.seconds, 3),
        seconds_per_epoch=round(trial.seconds_per_epoch, 4),
        parameters=trial.result.parameters if trial.result else None,
        flops=trial.result.flops if trial.result else None,
        twin=trial.twin,
        reason=trial.reason,
        first=trial.first,
        attempts=trial.attempts,
        paused=trial.paused,
        numerics=trial.result.numerics if trial.result else None,
        precision=(trial.result.precision or None) if trial.result else None,
        started=trial.started,
        ended=trial.ended,
        folder=str(trial.folder),
    )


def describe_page(study: StudyRecord, trial: TrialRecord) -> TrialPage:
    """A trial with its curves and files."""
    return TrialPage(
        study=study.name,
        trial=describe_trial(trial),
        config=trial.config,
        curve=[describe(Epoch, epoch) for epoch in trial.epochs],
        log=trial.log(LOG_LINES),
        files=trial.files(),
    )


def describe_study(study: StudyRecord, home: "Home", *, listed: bool = False, **more: Any) -> Study:
    """A study; listed: with all its trials; more: keys that not every command prints."""
    data, best = study.data, study.best
    return Study(
        study=study.name,
        question=study.question,
        trials=Counts(
            complete=len(study.of("complete")),
            pruned=len(study.of("pruned")),
            failed=len(study.of("failed")),
            total=len(study.trials),
        ),
        running=len(study.of("running")),
        paused=len(study.paused),
        planned=study.planned,
        best=Best(trial=best.number, value=best.value or 0.0, params=best.params) if best else None,
        seconds=round(study.seconds, 3),
        home=str(home.path),
        folder=str(study.folder),
        data=Data(
            name=str(study.resolved["data"]["name"]),
            shape=data.shape,
            classes=len(data.classes),
            subset=study.subset,
            train=data.train,
            validation=data.validation,
            available=data.available,
            test=data.test,
            largest=data.largest,
            fingerprint=data.fingerprint,
            bfloat16=data.bfloat16,
        ),
        forecast=describe_forecast(study.forecast),
        numerics=study.numerics,
        trial_list=[describe_trial(trial) for trial in study.trials] if listed else UNSET,
        **more,
    )


def describe_unopened(study: Plan, home: "Home", **more: Any) -> Study:
    """A study whose search ended before it was opened: it has no trials, and its data were not read."""
    return Study(
        study=study.name,
        question=study.question,
        trials=Counts(complete=0, pruned=0, failed=0, total=0),
        running=0,
        paused=0,
        planned=study.trials,
        best=None,
        seconds=0.0,
        home=str(home.path),
        folder=str(home.study(study.name)),
        data=None,
        forecast=None,
        numerics=(),
        trial_list=[],
        **more,
    )


def describe_forecast(forecast: ForecastRecord | None) -> Forecast | None:
    """A forecast, if there is one."""
    if forecast is None:
        return None
    return Forecast(
        trials=forecast.trials,
        workers=forecast.workers,
        seconds=round(forecast.seconds, 1),
        pruned=round(forecast.pruned, 1),
        retrain=round(forecast.retrain, 1),
        memory=forecast.memory,
        disk=forecast.disk,
        checkpoints=forecast.checkpoints,
    )


def trials_csv(study: StudyRecord, trials: Sequence[TrialRecord]) -> str:
    """A line per trial: the keys of a trial in `--json`, then a column for each key of the search space."""
    keys = searched_keys(study.trials)
    columns = [name for name in Trial.__struct_fields__ if name != "params"]
    rows: list[list[Any]] = [[*columns, *keys]]
    for trial in trials:
        row = describe_trial(trial)
        rows.append([*(getattr(row, name) for name in columns), *(trial.params.get(key) for key in keys)])
    return csv_text(rows)


# --- study files ------------------------------------------------------------------------------------------------------


class StudyFile(Printed, kw_only=True):
    """A built-in study file."""

    study: Annotated[str, about("its name, for `tune`")]
    question: Annotated[str, about("its first comment")]
    group: Annotated[str | None, about("its folder: `reports` holds those of earlier reports; null for the others")]


class Leaf(Part, kw_only=True):
    """Values of a key: a range has `low`, `high`, `log` and `step`, a choice has `choice`."""

    low: Annotated[float | UnsetType, about("lowest value of a range")] = UNSET
    high: Annotated[float | UnsetType, about("highest value of a range")] = UNSET
    log: Annotated[bool | UnsetType, about("whether proposals are even on a logarithmic scale")] = UNSET
    step: Annotated[float | UnsetType | None, about("between two values; null: any number from low to high")] = UNSET
    choice: Annotated[list[Any] | UnsetType, about("the values of a choice")] = UNSET


class SearchPlan(Printed, kw_only=True):
    """What a study would search."""

    study: Annotated[str, about("its name")]
    question: Annotated[str, about("first comment of the study file")]
    data: Annotated[Mapping[str, Any], about("the table `[data]`")]
    epochs: Annotated[int, about("maximum epochs of a trial")]
    sampler: Annotated[str, about("its name")]
    pruner: Annotated[str, about("its name")]
    trials: Annotated[int, about("trials in total")]
    existing: Annotated[int, about("trials of a study of this name that exist already")]
    points: Annotated[int | None, about("points of the space; null for an infinite one, or more than 100,000")]
    space: Annotated[Mapping[str, Leaf], about("what is searched, by dotted key")]
    first: Annotated[
        Sequence[Params],
        about("known configurations that are tried first, by dotted key; those of the study file first"),
    ]
    parameters: Annotated[
        tuple[int, int] | None, about("minimum and maximum of a model, over 16 configs; null if not computed")
    ]
    flops: Annotated[
        tuple[int, int] | None,
        about("minimum and maximum floating-point operations of one image's forward pass; null if not computed"),
    ]
    forecast: Annotated[
        Forecast | UnsetType | None,
        about("`tune --dry-run` alone: of the trials to come; null if nothing could be timed"),
    ] = UNSET


def describe_plan(study: Plan, stored: StudyRecord | None = None, cost: Costs | None = None, **more: Any) -> SearchPlan:
    """A study file; stored: the study of this name that exists; more: keys that not every command prints."""
    return SearchPlan(
        study=study.name,
        question=study.question,
        data=study.data,
        epochs=study.epochs,
        sampler=study.search.sampler.tag,
        pruner=study.search.pruner.tag,
        trials=study.trials,
        existing=len(stored.trials) if stored else 0,
        points=None if study.points is None else len(study.points),
        space={name: _leaf(leaf) for name, leaf in space.leaves(study.tree)},
        first=[known.params for known in study.known],
        parameters=cost["parameters"] if cost else None,
        flops=cost["flops"] if cost else None,
        **more,
    )


def _leaf(leaf: space.Leaf) -> Leaf:
    if isinstance(leaf, space.Choice):
        return Leaf(choice=list(leaf.options))
    return Leaf(low=leaf.low, high=leaf.high, log=leaf.log, step=leaf.step)


# --- the final model --------------------------------------------------------------------------------------------------


class Finalist(Part, kw_only=True):
    """A trial that was trained again with fresh seeds."""

    trial: Annotated[int, about("its number")]
    value: Annotated[
        float | None, about("validation accuracy in the search, 0 to 1; null for a default that did not complete")
    ]
    values: Annotated[Sequence[float], about("validation accuracy with each fresh seed, 0 to 1")]
    mean: Annotated[float, about("of `values`")]
    seconds: Annotated[float, about("of a training, on average, in s")]
    seeds: Annotated[Sequence[int], about("the fresh seeds")]
    parameters: Annotated[int, about("parameters of its model")]
    flops: Annotated[int, about("floating-point operations of one image's forward pass")]


class ValidationPart(Part, kw_only=True):
    """The winner on the validation part."""

    accuracy: Annotated[float, about("mean over fresh seeds, 0 to 1; without fresh seeds, of the search")]
    low: Annotated[float | None, about("lower end of the 95% prediction interval for one further seed")]
    high: Annotated[float | None, about("its upper end")]
    spread: Annotated[float | None, about("standard deviation of a training over seeds")]
    n: Annotated[int, about("images")]


class TestPart(Part, kw_only=True):
    """The final model on the test part."""

    accuracy: Annotated[float, about("fraction correct, 0 to 1")]
    low: Annotated[float, about("lower end of the 95% interval (Wilson) of this one model")]
    high: Annotated[float, about("its upper end")]
    n: Annotated[int, about("images")]
    reads: Annotated[int, about("readings of this test part by studies of this home so far, this one included")]
    fingerprint: Annotated[str, about("hash of the test part")]


class Model(Part, kw_only=True):
    """A version in MLflow's registry."""

    name: Annotated[str, about("of the registered model")]
    version: Annotated[int, about("its version")]
    uri: Annotated[str, about("`models:/NAME/VERSION`")]
    champion: Annotated[bool, about("whether it has the alias `champion`")]


class Retrained(Printed, kw_only=True):
    """The final model of a study."""

    study: Annotated[str, about("its name")]
    finalists: Annotated[Sequence[Finalist], about("trials that were trained with fresh seeds")]
    tie: Annotated[Sequence[int], about("trials that cannot be distinguished from the best mean; empty if all can")]
    winner: Annotated[int, about("number of the trial whose config the final model has")]
    optimism: Annotated[float | None, about("the winner's value in the search, less its mean over fresh seeds")]
    default: Annotated[int | None, about("number of the trial of the study's default, if it is a finalist")]
    validation: Annotated[ValidationPart, about("the winner on the validation part")]
    test: Annotated[TestPart, about("the final model on the test part")]
    balanced: Annotated[float | None, about("mean recall of the classes on the test part, 0 to 1")]
    largest: Annotated[float | None, about("accuracy of always answering the largest class of the test part")]
    model: Annotated[Model | None, about("where it is registered")]
    seconds: Annotated[float | None, about("of the whole command, when it trained, in s")]


class Registered(Printed, kw_only=True):
    """A version in MLflow's registry, as `models` lists it."""

    name: Annotated[str, about("of the registered model")]
    version: Annotated[int, about("its version")]
    uri: Annotated[str, about("`models:/NAME/VERSION`")]
    champion: Annotated[bool, about("whether it has the alias `champion`")]
    study: Annotated[str, about("name of the study that it is from")]
    trial: Annotated[int | None, about("number of the trial whose config it has")]
    test_accuracy: Annotated[float | None, about("fraction correct on the test part, 0 to 1")]
    created: Annotated[float, about("when it was registered, in seconds since 1970")]


class RemovedStudy(Printed, kw_only=True):
    """A study that was removed."""

    study: Annotated[str, about("its name")]
    trials: Annotated[int, about("trials that it had")]
    bytes: Annotated[int, about("of its files in the home")]
    models: Annotated[Sequence[str], about("versions that were removed from the registry, as URIs")]
    kept: Annotated[Sequence[str], about("versions of it that stay in the registry, as URIs")]


class Compared(Printed, kw_only=True):
    """A study in a comparison. Seconds, parameters and FLOPs are of the model with that accuracy."""

    study: Annotated[str, about("its name")]
    accuracy: Annotated[float, about("fraction correct on `split`, 0 to 1")]
    low: Annotated[float, about("lower end of the 95% interval (Wilson) of this one model")]
    high: Annotated[float, about("its upper end")]
    split: Annotated[Literal["test", "validation"], about("what the accuracy was measured on")]
    difference: Annotated[
        float | None, about("to the best study on the same images; 0 for that one, null where none is comparable")
    ]
    p: Annotated[float | None, about("of McNemar's test that there is no difference, Holm-corrected")]
    seconds_per_epoch: Annotated[float, about("in s")]
    parameters: Annotated[int, about("parameters of the model")]
    flops: Annotated[int, about("floating-point operations of one image's forward pass")]
    trials: Annotated[int, about("trials of the study")]
    training_seconds: Annotated[float, about("over all epochs, in s")]
    epochs: Annotated[int, about("epochs of the model's training")]
    n: Annotated[int, about("images that the accuracy was measured on")]
    reads: Annotated[int | None, about("readings of that test part by then; null for validation")]
    search_seconds: Annotated[float, about("training of all trials, in s")]
    data: Annotated[str, about("name of the data set")]
    classes: Annotated[int, about("number of its classes")]
    largest: Annotated[
        float | None, about("accuracy on `split` of always answering the largest class; null where that is not known")
    ]
    balanced: Annotated[float | None, about("mean recall of the classes on the test part; null for validation")]


# --- data sets, models, predictions -----------------------------------------------------------------------------------


class DataSet(Printed, kw_only=True):
    """A data set."""

    name: Annotated[str, about("for `--dataset`")]
    shape: Annotated[tuple[int, int, int] | None, about("channels, height and width; null for user images")]
    classes: Annotated[int, about("number of classes")]
    train: Annotated[int, about("images, those for validation included")]
    test: Annotated[int | None, about("images; null where the test part will be carved out of `train`")]
    origin: Annotated[str, about("where it comes from")]
    found: Annotated[str | None, about("path on this machine; null if it is not here")]
    counts: Annotated[
        Mapping[str, Mapping[str, int]] | UnsetType, about("images by part and class; absent in the list of data sets")
    ] = UNSET
    heights: Annotated[tuple[int, float, int] | UnsetType, about("minimum, median and maximum, in pixels")] = UNSET
    widths: Annotated[tuple[int, float, int] | UnsetType, about("minimum, median and maximum, in pixels")] = UNSET
    modes: Annotated[Mapping[str, int] | UnsetType, about("images by file format and Pillow's mode")] = UNSET
    size: Annotated[
        int | UnsetType,
        about("side that a new study gives to images that differ in size or exceed 224 pixels; 0: they keep theirs"),
    ] = UNSET
    repeated: Annotated[int | UnsetType, about("images that equal an earlier one of their class, test aside")] = UNSET
    shared: Annotated[Mapping[str, int] | UnsetType, about("images that two parts have in common")] = UNSET
    contradicting: Annotated[int | UnsetType, about("images that are in two classes, test aside")] = UNSET
    unreadable: Annotated[Sequence[str] | UnsetType, about("images that cannot be read, and why")] = UNSET
    problem: Annotated[str | UnsetType, about("why the data cannot be divided; empty if they can")] = UNSET
    picture: Annotated[str | UnsetType, about("path of a picture of samples")] = UNSET


def describe_data(row: "Described", seen: "Overview | None" = None, picture: "Path | None" = None) -> DataSet:
    """A data set, and what an overview of it found."""
    values = asdict(row)
    where: Path | None = values.pop("location")
    more: dict[str, Any] = {}
    if seen is not None:
        keys = ["heights", "widths", "modes", "size", "unreadable", "problem"]
        keys += ["repeated", "shared", "contradicting"] if seen.compared else []
        more = {key: getattr(seen, key) for key in keys}
        more["counts"] = {part: dict(zip(seen.classes, counts, strict=True)) for part, counts in seen.counts.items()}
    if picture is not None:
        more["picture"] = str(picture)
    return DataSet(**values, found=None if where is None else str(where), **more)


class Ranked(Part, kw_only=True):
    """A class, and how probable it is."""

    name: Annotated[str, about("the class")] = field(name="class")
    probability: Annotated[float, about("0 to 1")]


class Prediction(Printed, kw_only=True):
    """The prediction for an image, or why there is none."""

    image: Annotated[str, about("path of the file")]
    name: Annotated[str | UnsetType, about("the most probable class; absent with `error`")] = field(
        name="class", default=UNSET
    )
    probability: Annotated[float | UnsetType, about("of that class, 0 to 1; absent with `error`")] = UNSET
    top: Annotated[list[Ranked] | UnsetType, about("with `--top`: the most probable classes, in order")] = UNSET
    error: Annotated[str | UnsetType, about("why the file cannot be read; absent for an image")] = UNSET


def describe_prediction(row: "PredictedImage", top: int) -> Prediction:
    """The prediction for an image; top: classes."""
    if row.error:
        return Prediction(image=row.image, error=row.error)
    ranked = [Ranked(name=name, probability=round(probability, 6)) for name, probability in row.top]
    first = ranked[0]
    more: list[Ranked] | UnsetType = ranked if top > 1 else UNSET
    return Prediction(image=row.image, name=first.name, probability=first.probability, top=more)


def prediction_csv(rows: "Sequence[PredictedImage]", top: int) -> str:
    """A line per image: the most probable classes, each with its probability, or the error."""
    suffixes = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("class", "probability")]
    lines = [["image", *columns, "error"]]
    for row in rows:
        cells = [cell for name, probability in row.top for cell in (name, f"{probability:.6f}")]
        lines.append([row.image, *cells, *[""] * (2 * top - len(cells)), row.error])
    return csv_text(lines)


class Exported(Printed, kw_only=True):
    """A model in a file of another format."""

    model: Annotated[str, about("the argument MODEL")]
    format: Annotated[str, about("onnx, pt2 or safetensors")]
    path: Annotated[str, about("of the file")]
    bytes: Annotated[int, about("its size")]
    difference: Annotated[float, about("largest difference of a probability to the model's own, over random images")]


def describe_export(model: str, done: "ExportedFile") -> Exported:
    """A file that was written."""
    return Exported(model=model, **{**asdict(done), "path": str(done.path)})


# --- pages, MLflow, a running search ----------------------------------------------------------------------------------


class Report(Printed, kw_only=True):
    """A report that was written."""

    study: Annotated[str, about("its name")]
    report: Annotated[str, about("path of the page")]


class Addresses(Printed, kw_only=True):
    """Pages that are served until the command is stopped; a token is left out unless a terminal shows it."""

    optuna: Annotated[str | None, about("address of optuna-dashboard; null if it is not served")]
    mlflow: Annotated[str | None, about("address of MLflow's pages; null if they are not served")]


class Problem(Printed, kw_only=True):
    """Something in which MLflow differs from Optuna's record."""

    trial: Annotated[int | None, about("its number; null for the study's own run")]
    problem: Annotated[str, about("what is missing, doubled or different")]
    mended: Annotated[bool, about("whether it was sent: with `--apply`")]


def describe_differences(differences: "Iterable[Difference]", *, applied: bool) -> list[Problem]:
    """What `sync` found."""
    return [Problem(trial=item.trial, problem=str(item), mended=applied) for item in differences]


class Deletable(Part, kw_only=True):
    """Files of one kind that can be deleted."""

    kind: Annotated[FileKind, about("what they are; weights: beyond the kept ones; leftovers: of crashes")]
    files: Annotated[int, about("their number, copies in MLflow and of optuna-dashboard included")]
    bytes: Annotated[int, about("their bytes")]
    chosen: Annotated[bool, about("whether the flags choose them for `--apply`")]


class Cleaned(Printed, kw_only=True):
    """What can be deleted of a home and of the cache, or of a study."""

    total: Annotated[int, about("bytes of all files in the home, or of the study, before")]
    applied: Annotated[bool, about("whether the chosen kinds were deleted")]
    freed: Annotated[int, about("bytes that were deleted, or would be with `--apply`")]
    kinds: Annotated[Sequence[Deletable], about("files by kind; with a study those of the cache are left out")]
    held: Annotated[Mapping[str, str], about("studies that were skipped, and the process that holds each")]
    problem: Annotated[str, about("why copies in MLflow were skipped; empty if they were not")]


class BackedUp(Printed, kw_only=True):
    """A backup that was written."""

    folder: Annotated[str, about("its folder, a home")]
    studies: Annotated[int, about("studies in it")]
    trials: Annotated[int, about("their trials")]
    bytes: Annotated[int, about("bytes of its files")]
    mlflow: Annotated[bool, about("whether it has MLflow's database; false for a server's")]


class Finding(Printed, kw_only=True):
    """A problem in a home."""

    study: Annotated[str | None, about("its name; null for the home")]
    trial: Annotated[int | None, about("its number; null for the study or the home")]
    path: Annotated[str, about("file or folder")]
    problem: Annotated[str, about("what is wrong")]
    todo: Annotated[str, about("how to repair it")]
    repaired: Annotated[bool, about("whether it was repaired: with `--repair`")]


class StopRequested(Printed, kw_only=True):
    """A search or final training that was asked to stop."""

    study: Annotated[str, about("its name")]
    coordinator: Annotated[str, about("process and host that were asked")]


class KeyRow(Printed, kw_only=True):
    """A key of a study file or an engine file."""

    table: Annotated[str, about("its table, dotted; options of a sampler or pruner share one")]
    key: Annotated[str, about("its name in the table")]
    default: Annotated[str, about("its default, as TOML; empty for none")]
    values: Annotated[str, about("what it takes, in words")]
    meaning: Annotated[str, about("its meaning, with the unit")]
    fixed: Annotated[bool, about("whether it takes a value alone, never a range or a choice")]


def describe_keys(sections: "Iterable[Section]") -> list[KeyRow]:
    """What `keys --json` prints."""
    return [KeyRow(table=section.name, **vars(row)) for section in sections for row in section.rows]


# --- all of it --------------------------------------------------------------------------------------------------------

COMMANDS: Mapping[str, Any] = {
    "tune": Study,
    "tune --dry-run": SearchPlan,
    "status": list[Study],
    "status NAME": list[Study],
    "trial": TrialPage,
    "retrain": Retrained,
    "stop": StopRequested,
    "studies": list[StudyFile],
    "studies NAME": SearchPlan,
    "data": list[DataSet],
    "keys": list[KeyRow],
    "compare": list[Compared],
    "report": Report,
    "sync": list[Problem],
    "predict": list[Prediction],
    "export": Exported,
    "dashboard": Addresses,
    "models": list[Registered],
    "remove": RemovedStudy,
    "clean": Cleaned,
    "backup": BackedUp,
    "check": list[Finding],
}


def dump(values: Part | Sequence[Part]) -> str:
    """What a command prints."""
    return json.dumps(msgspec.to_builtins(values))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of all commands: `properties` by command, the objects in `$defs`."""
    properties, definitions = msgspec.json.schema_components(COMMANDS.values(), ref_template="#/$defs/{name}")
    for kind in definitions.values():
        if "schema" in kind["properties"]:  # it has a default, and is always printed
            kind["required"] = ["schema", *kind["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"What searchfm prints with --json, schema {SCHEMA}",
        "type": "object",
        "properties": dict(zip(COMMANDS, properties, strict=True)),
        "$defs": definitions,
    }
