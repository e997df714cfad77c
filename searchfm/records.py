"""What is kept, typed: frozen dataclasses with one way to plain values (what JSON holds) and back.

Kept records carry a format number; none means 1. A reader upgrades an older record in memory; the first command that
holds the study's lock writes it (`search.storage.locked_study`). A newer record is refused.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from searchfm.errors import NewerError, StorageError, one_line
from searchfm.home import write_whole
from searchfm.stats import Accuracy

FORMAT = 2  # of the records that this version writes
NUMERICS = 2  # of training: equal ones give bitwise equal results. 1: torch's dropout, float32 on CPUs, timm's heads
ORIGIN, DEFAULT = "from", "study file"  # key of a stored table of `[[first]]`: where it comes from; of the file's own
WEIGHTS, SPEC, PREDICTIONS, EPOCHS = "weights.safetensors", "model.json", "predictions.npz", "epochs.csv"
PICTURES = {"curves.png": EPOCHS, "confusion.png": PREDICTIONS}  # of a trial, and the file that each is drawn from
FINAL, EXAMPLE = "final", "example.npy"  # the folder of a final model, and a file in it: two training images
PROGRAM = "model.pt2"  # a file in that folder until the model is registered: its torch.export program
READS = "test-reads.json"  # of a home
TRAINED, FITTED, TESTED, EXPORTED = "result.json", "fit.json", "test.json", "export.json"  # of jobs, in their folders
NO_BFLOAT16 = "has no bfloat16 (avx512_bf16 or amx_bf16)"  # a refused CPU
State = Literal["running", "complete", "pruned", "failed"]


class Record:
    """A frozen dataclass that is kept, or crosses between processes, as plain values."""

    __test__ = False  # pytest collects classes whose names begin with Test
    upgrades: ClassVar[tuple[Callable[[dict[str, Any]], dict[str, Any]], ...]] = ()
    # Of a kept record: entry i turns the plain values of format i + 1 into those of format i + 2.

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """The record of plain values, upgraded where its format is older. Unknown keys are ignored.

        Raises StorageError, which begins with `where`, for a newer format, a missing key or a wrong type.
        """
        try:
            ready = dict(values)
            if cls.upgrades:
                number = ready.get("format", 1)
                if not isinstance(number, int) or not 1 <= number <= FORMAT:
                    raise NewerError(f"{where}: format {number}: this version of searchfm reads 1 to {FORMAT}")
                for upgrade in cls.upgrades[number - 1 :]:
                    ready = upgrade(ready)
                ready["format"] = FORMAT
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            raise StorageError(f"{where}: damaged, no {cls.__name__} ({text})") from None
        try:
            return msgspec.convert(ready, cls)
        except msgspec.ValidationError as error:
            raise StorageError(f"{where}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a file of JSON. Raises OSError; StorageError for a damaged one, and as `from_json`."""
        try:
            values = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{path}: damaged, no JSON ({one_line(error)})") from None
        return cls.from_json(values, str(path))


# --- a trial ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch(Record):
    """One pass over the training part, and the validation after it."""

    index: int  # from 1
    train_loss: float  # mean cross-entropy, on augmented images in training mode
    train_accuracy: float  # fraction correct, 0 to 1, on augmented images in training mode
    val_loss: float | None  # mean cross-entropy; None without a validation part
    val_accuracy: float | None  # fraction correct, 0 to 1
    lr: float  # learning rate of the last batch
    seconds: float  # wall time of the epoch, validation included
    samples_per_second: float  # training images over the time of training alone
    time: float  # when it ended, seconds since 1970


def read_epochs(path: Path) -> tuple[Epoch, ...]:
    """The epochs in a CSV file; none where there is no file. Raises StorageError for a damaged one."""
    try:
        rows = csv.reader(path.read_text().splitlines())
        names = next(rows, [])
        values = [{name: field or None for name, field in zip(names, row, strict=True)} for row in rows]
        return msgspec.convert(values, tuple[Epoch, ...], strict=False)
    except FileNotFoundError:
        return ()
    except (ValueError, csv.Error) as error:
        raise StorageError(f"{path}: damaged, no table of epochs ({one_line(error)})") from None


class StoredEpochs(Sequence[Epoch]):
    """The epochs in the folder of a trial that has ended, up to `last`: read when they are first used, since a study
    may have thousands of such files.
    """

    def __init__(self, folder: Path, last: int) -> None:
        self._folder, self._last = folder, last

    @cached_property
    def _epochs(self) -> tuple[Epoch, ...]:
        return tuple(epoch for epoch in read_epochs(self._folder / EPOCHS) if epoch.index <= self._last)

    def __len__(self) -> int:
        return len(self._epochs)

    def __getitem__(self, index: Any) -> Any:
        return self._epochs[index]

    def __eq__(self, other: object) -> bool:
        return self._epochs == (other._epochs if isinstance(other, StoredEpochs) else other)

    def __hash__(self) -> int:
        return hash(self._epochs)


def write_epochs(path: Path, epochs: Sequence[Epoch]) -> None:
    """Writes all epochs of a trial as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [item.name for item in fields(Epoch)])
    writer.writeheader()
    writer.writerows(epoch.to_json() for epoch in epochs)
    write_whole(path, text.getvalue().encode())


@dataclass(frozen=True)
class TrainResult(Record):
    """The result of a training job. `value` is None where nothing is held out."""

    value: float | None  # validation accuracy after the last epoch, 0 to 1
    best_epoch: int | None = None  # that with the highest validation accuracy, from 1
    parameters: int = 0
    trainable: int = 0  # parameters that are trained
    flops: int = 0  # of one image's forward pass
    seconds: float = 0.0  # of all epochs
    epochs: int = 0  # that were trained
    device: str = ""  # its name, and that of the worker: "NVIDIA H100 (cuda:1)"
    memory: float | None = None  # fraction of the GPU's memory that the worker took at most
    versions: Mapping[str, str] = field(default_factory=dict)  # of torch and others, by name
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 by name
    numerics: list[int] = field(default_factory=lambda: [1])  # more than one if another version began the training
    precision: str = ""  # of the training: float32 or bfloat16; empty in trials trained before 0.4
    frozen_seconds: float = 0.0  # that cached features of the training images took, once for all trials; not in seconds


@dataclass(frozen=True)
class Trial:
    """One trial of a study: Optuna's record, and `epochs.csv` in its folder."""

    number: int  # Optuna's
    state: State  # "running", "complete", "pruned" or "failed"
    value: float | None  # validation accuracy after the last epoch, 0 to 1; None unless complete
    params: Mapping[str, Any]  # what the search chose, by dotted key
    config: Mapping[str, Any]  # the whole config as a table, seed included
    digest: str  # of the config without its seed
    twin: int | None  # the earlier trial whose end this one copied
    reason: str | None  # why it failed, or what pruned it
    attempts: int  # to train it: more than one after a worker died or was stopped, or after a pause
    reported: Mapping[int, float]  # validation accuracy by epoch, as Optuna has it
    epochs: Sequence[Epoch]  # by index; those of a twin are copied
    result: TrainResult | None  # None unless complete
    started: float | None  # seconds since 1970
    ended: float | None  # seconds since 1970; None while it runs
    folder: Path  # of its files: config, epochs, pictures, log, weights of the best
    first: str | None = None  # where the known configuration comes from that it tried before the sampler proposed
    paused: int | None = None  # epoch after which a running trial waits for promotion; None unless it waits

    @property
    def seconds(self) -> float:
        """Training time, all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def seconds_per_epoch(self) -> float:
        """Mean wall time of an epoch, validation included; 0 without epochs."""
        return self.seconds / max(len(self.epochs), 1)

    @property
    def accuracy(self) -> float | None:
        """The value, else the last reported validation accuracy."""
        return self.value if self.value is not None else next(reversed(list(self.reported.values())), None)

    @property
    def planned_epochs(self) -> int:
        """Epochs that its config asks for; 0 without a config."""
        return int(self.config.get("train", {}).get("epochs", 0))

    @property
    def drawable(self) -> dict[str, bool]:
        """Its pictures that can be drawn from the files in its folder, and whether each is drawn; none before its
        end.
        """
        expected = ["curves.png"] * bool(self.reported) + ["confusion.png"] * (self.state == "complete")
        if self.state == "running" or not expected:
            return {}
        try:
            files = os.listdir(self.folder)  # noqa: PTH208  # 8 ms for 1,000 trials; `is_file` of each name takes 46
        except OSError:
            return {}
        return {name: name in files for name in expected if PICTURES[name] in files}

    @property
    def undrawn(self) -> list[str]:
        """Names of its pictures that are not drawn yet; none before its end."""
        return [name for name, drawn in self.drawable.items() if not drawn]

    def log(self, count: int) -> list[str]:
        """The last lines of its log; while it runs, of its latest attempt's."""
        attempts = sorted(self.folder.glob("attempt-*/log.txt"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in [*attempts, self.folder / "log.txt"]:
            try:
                lines = path.read_text(errors="replace").splitlines()
            except OSError:  # moved, or not there yet
                continue
            if lines:
                return lines[-count:]
        return []

    def files(self) -> list[str]:
        """The names of the files in its folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else []


@dataclass(frozen=True)
class ClassFigures(Record):
    """Precision and recall of one class; 0 where it was never predicted, or has no image."""

    name: str
    precision: float  # correct ones among the images that were predicted as it, 0 to 1
    recall: float  # correct ones among its images, 0 to 1
    n: int  # its images


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's predictions on one part of the data, kept as `predictions.npz`."""

    indices: NDArray[np.int64]  # (N,) of the images in the part of the data set
    labels: NDArray[np.int64]  # (N,)
    probabilities: NDArray[np.float32]  # (N, K); float16 would make ties of near values

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The predictions in a trial's or a final model's folder; None where there are none."""
        path = folder / PREDICTIONS
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return cls(file["indices"], file["labels"], file["probabilities"])

    def write(self, folder: Path) -> str:
        """Writes them into a folder, whole or not at all; returns the file's sha256. Raises StorageError."""
        content = io.BytesIO()
        np.savez(content, indices=self.indices, labels=self.labels, probabilities=self.probabilities)
        return write_whole(folder / PREDICTIONS, content.getvalue())

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) the most probable class."""
        predicted: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return predicted

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether that is the true class."""
        correct: NDArray[np.bool_] = self.predicted == self.labels
        return correct

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K) counts: row = true class, column = predicted class."""
        classes = self.probabilities.shape[1]
        return np.bincount(self.labels * classes + self.predicted, minlength=classes**2).reshape(classes, classes)

    def per_class(self, names: Sequence[str]) -> tuple[ClassFigures, ...]:
        """Precision and recall of each class."""
        matrix = self.confusion
        columns = (matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1))
        return tuple(
            ClassFigures(name, hits / max(predicted, 1), hits / max(n, 1), n)
            for name, hits, predicted, n in zip(names, *(column.tolist() for column in columns), strict=True)
        )


# --- a study ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared(Record):
    """What `prepare` found of a study's data."""

    fingerprint: str  # hash of the data; equal ones are the same data
    shape: tuple[int, int, int]  # channels, height, width
    classes: tuple[str, ...]  # their names, in the order of the labels
    train: int  # images to train on
    validation: int  # images to compare trials with
    validation_classes: tuple[int, ...] = ()  # validation images of each class; empty in studies begun before 0.4
    code: str = ""  # sha256 of the user's code that makes the models; empty without such code
    available: int | None = None  # images to train on before `data.subset`; None as above
    test: int | None = None  # images of the test part, counted without opening it; None as above
    sides: tuple[int, int] | None = None  # shortest and longest side of user images before `data.size`; None as above
    bfloat16: tuple[str, ...] = ()  # architectures that `precision = "auto"` trains in bfloat16 on a CPU

    @property
    def largest(self) -> float | None:
        """Validation accuracy of always answering the largest class; None where the counts are not known."""
        return max(self.validation_classes) / self.validation if self.validation_classes else None


@dataclass(frozen=True)
class Forecast(Record):
    """What a search was forecast to take before its first trial. Times in seconds, sizes in bytes."""

    trials: int  # of the search
    workers: int  # that share them
    seconds: float  # of the search, where no trial is pruned
    pruned: float  # with the pruning that `searchfm.forecast` assumes
    retrain: float  # of `retrain` with its defaults
    memory: int  # of a worker at most: of its GPU, else of the host
    disk: int  # of the home at the end, the final model included
    configs: int  # that were timed
    checkpoints: int = 0  # of running and paused trials at most, in the home while it searches


def _study_2(values: dict[str, Any]) -> dict[str, Any]:
    """Format 2 renames `trials`, the planned number, which is not the trials that there are."""
    planned = values.pop("trials", 0)
    return {"file": values.get("resolved", {}), **values, "planned": planned}


@dataclass(frozen=True, kw_only=True)
class StudyHeader(Record):
    """What is written down of a study when it is opened: its system attribute `searchfm` in Optuna."""

    upgrades = (_study_2,)

    uuid: str  # of this study alone, whatever its name
    resolved: Mapping[str, Any]  # the resolved study: file, overrides and defaults
    file: Mapping[str, Any]  # the resolved study without overrides: the file as it was when the study was begun
    question: str  # the first comment of the study file
    digest: str  # of the resolved study
    planned: int  # trials in all
    data: Prepared  # its images: shape, classes, numbers
    forecast: Forecast | None = None  # None in studies begun before 0.4, and where nothing could be timed
    version: str = ""  # of searchfm, that wrote it last
    command: str = ""  # the command line that opened it last; empty: another program did
    numerics: tuple[int, ...] = (1,)  # of the searches that trained its trials, in their order
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class StudyRecord(StudyHeader):
    """A study as it is stored, with all its trials."""

    name: str
    number: int  # Optuna's study id, for links to its dashboard
    folder: Path
    trials: tuple[Trial, ...]
    final: "Final | None" = None  # None before `retrain`

    def of(self, state: State) -> list[Trial]:
        """The trials in one state, by number."""
        return [trial for trial in self.trials if trial.state == state]

    @property
    def paused(self) -> list[Trial]:
        """The running trials that wait to be promoted, without a worker."""
        return [trial for trial in self.trials if trial.paused is not None]

    @property
    def final_folder(self) -> Path:
        """The folder of the final model."""
        return self.folder / FINAL

    @property
    def subset(self) -> float:
        """Fraction of the training part that is searched on, 0 to 1."""
        return float(self.resolved["data"].get("subset", 1.0))

    @property
    def best(self) -> Trial | None:
        """The complete trial with the highest value; the earliest of equal ones."""
        return next(iter(self.ranked()), None)

    @property
    def default(self) -> int | None:
        """The trial of the study's default, or one that repeated it after a failure. None for a study whose file has no
        `[[first]]`, and before its first trial.
        """
        tables = self.resolved.get("first", ())
        if not self.trials or self.trials[0].number or not tables or tables[0].get(ORIGIN) != DEFAULT:
            return None
        digest = self.trials[0].digest
        return next((trial.number for trial in self.of("complete") if trial.digest == digest), 0)

    @property
    def seconds(self) -> float:
        """From the first trial's start to the last one's end, by the clocks of the coordinators' machines."""
        starts = [trial.started for trial in self.trials if trial.started is not None]
        ends = [trial.ended for trial in self.trials if trial.ended is not None]
        return max(ends) - min(starts) if starts and ends else 0.0

    def ranked(self, *, twins: bool = True) -> list[Trial]:
        """Complete trials, the best first; without twins only those that were trained."""
        return ranked(self.trials, twins=twins)

    @property
    def compared(self) -> list[Trial]:
        """Complete trials, and pruned ones that reported an accuracy; without twins."""
        ended = (trial for trial in self.trials if trial.twin is None)
        return [t for t in ended if t.state == "complete" or (t.state == "pruned" and t.reported)]

    def accuracy(self, trial: Trial) -> Accuracy:
        """The accuracy of a complete trial on the validation part."""
        assert trial.value is not None
        return Accuracy.of(trial.value, self.data.validation)

    @property
    def undrawn(self) -> list[Trial]:
        """The trials that ended and lack pictures."""
        return [trial for trial in self.trials if trial.undrawn]

    @property
    def kept(self) -> list[Trial]:
        """The trials whose weights are kept, the best first: a twin has none, and does not count."""
        return self.ranked(twins=False)[: self.resolved["search"]["keep"]]


def searched_keys(trials: Iterable[Trial]) -> list[str]:
    """The dotted keys of what the search chose for any of the trials."""
    return list(dict.fromkeys(key for trial in trials for key in trial.params))


def ranked(trials: Iterable[Trial], *, twins: bool = True) -> list[Trial]:
    """Complete trials, the best first, the earlier of equal ones; without twins only those that were trained."""
    complete = [trial for trial in trials if trial.state == "complete" and (twins or trial.twin is None)]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))


def trained(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that trained to their end or were pruned. Twins, which train nothing, and failed ones are left out."""
    return [t for t in trials if t.twin is None and t.epochs and t.state in ("complete", "pruned")]


# --- the final model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinalPlan(Record):
    """What was trained for a final model: equal plans give the same model."""

    trials: tuple[int, ...]  # the finalists; the winner alone where no fresh seed is trained
    top: int  # finalists, the default aside
    seeds: int  # fresh ones of each finalist
    trial: int | None  # named by --trial
    epochs: int | None  # of the final training; None: the trial's own
    round: int  # how many times `--again` was asked


@dataclass(frozen=True)
class FinalistFigures(Record):
    """A trial of the search, trained again with fresh seeds on the search's own data and epochs."""

    trial: int  # its number
    value: float | None  # as searched; None for a default that failed or was not run to its end
    values: tuple[float, ...]  # the accuracy with each seed
    mean: float  # of `values`
    seconds: float  # of a training, on average
    seeds: tuple[int, ...]  # the fresh seeds, one a value
    parameters: int
    flops: int  # of one image's forward pass


@dataclass(frozen=True)
class Validation(Record):
    """The winner on the validation part: mean over fresh seeds, and the interval for one further seed."""

    accuracy: float  # mean over fresh seeds, 0 to 1; without fresh seeds, as searched
    low: float | None  # 95% prediction interval; None where no seed or a single one was trained
    high: float | None  # its upper end
    spread: float | None  # standard deviation of a training over seeds
    n: int  # images


@dataclass(frozen=True)
class TestFigures(Record):
    """The final model on the test part."""

    accuracy: float  # fraction correct, 0 to 1
    low: float  # 95% interval (Wilson) of this one model
    high: float  # its upper end
    n: int  # images
    reads: int  # of this test part by studies of this home so far, this one included
    fingerprint: str  # of the test part

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval (Wilson) of the accuracy of this one model."""
        return self.low, self.high


@dataclass(frozen=True)
class RegisteredModel(Record):
    """A version in MLflow's registry."""

    name: str  # `searchfm-STUDY`
    version: int  # from 1
    uri: str  # `models:/NAME/VERSION`, for `load_model`
    champion: bool  # whether it has the alias `champion`


def _final_2(values: dict[str, Any]) -> dict[str, Any]:
    """Format 2 calls a class's name `name`."""
    rows = [{"name": row.get("class", ""), **row} for row in values.get("per_class", ())]
    return {"model": None, "seconds": None, **values, "per_class": rows}


@dataclass(frozen=True, kw_only=True)
class Final(Record):
    """What `retrain` keeps: the system attribute `final` of the study, and `final.json` in the model's folder."""

    upgrades = (_final_2,)

    study: str  # its name
    plan: FinalPlan  # what was asked for
    finalists: tuple[FinalistFigures, ...]  # trials that were trained with fresh seeds
    tie: tuple[int, ...]  # trials that cannot be distinguished from the best mean; empty if all can
    winner: int  # its trial's number
    optimism: float | None  # the winner's value as searched, less its mean over fresh seeds; None without one of these
    validation: Validation  # the winner's configuration on the validation part
    test: TestFigures  # the final model on the test part
    per_class: tuple[ClassFigures, ...]  # on the test part
    model: RegisteredModel | None  # None until it is registered
    seconds: float | None  # of the whole command; None until it ends
    seconds_per_epoch: float  # of the final training
    training_seconds: float  # of all its epochs
    parameters: int  # of the model
    flops: int  # of one image's forward pass
    epochs: int  # of the final training
    fingerprint: str  # of the training data
    time: float  # seconds since 1970
    params: Mapping[str, Any]  # of the winner, as the search chose them
    weights: str  # sha256 of weights.safetensors
    default: int | None = None  # the trial of the study's default, if it is among the finalists
    numerics: tuple[int, ...] = (1,)  # of the final training
    format: int = FORMAT

    @property
    def balanced(self) -> float | None:
        """Balanced accuracy on the test part: the mean recall of the classes with images. None without figures."""
        recalls = [item.recall for item in self.per_class if item.n]
        return sum(recalls) / len(recalls) if recalls else None

    @property
    def largest(self) -> float | None:
        """Test accuracy of always answering the largest class; None without figures of each class."""
        return max(item.n for item in self.per_class) / self.test.n if self.per_class else None


# --- job payloads and results -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareJob(Record):
    """Payload of `prepare`: fetch and read the data, look for pretrained weights."""

    data: Mapping[str, Any]  # the table of [data]
    models: tuple[tuple[str, str], ...]  # (transfer model, weights)
    data_dir: str | None
    fingerprint: str | None = None  # that the data must have; None: any
    custom: tuple[Mapping[str, Any], ...] = ()  # tables of [model.custom] to build
    code: str | None = None  # sha256 that their code must have; None: any
    choose_size: bool = False  # whether to choose `data.size` for user images that differ in size or are large
    input_models: tuple[str, ...] = ()  # timm models whose input size that is, where it is known
    architectures: tuple[str, ...] = ()  # whose precision is to be chosen, since it is "auto"
    bfloat16: tuple[str, ...] = ()  # those of them that the node's CPU must train faster in bfloat16


@dataclass(frozen=True)
class PrepareResult(Record):
    """Result of `prepare`."""

    data: Prepared
    devices: Mapping[str, int]  # numbers of accelerators: cuda, mps
    size: int = 0  # `data.size` that was chosen; 0: the job's own stands


@dataclass(frozen=True)
class ForecastJob(Record):
    """Payload of `forecast`: time a few batches of configs."""

    configs: tuple[Mapping[str, Any], ...]
    data_dir: str | None
    seconds: float  # after which only the configs of minimum and maximum work are timed
    code: str = ""  # as in `Prepared`
    bfloat16: tuple[str, ...] = ()  # as in `Prepared`


@dataclass(frozen=True)
class Timing(Record):
    """The cost of training one config, for a whole epoch."""

    epochs: int  # that the config asks for
    work: float  # floating-point operations of an epoch, validation included
    parameters: int
    train: float | None  # seconds of an epoch's training; None: not timed
    validation: float | None  # seconds of the validation after it
    frozen: float = 0.0  # seconds of frozen stages whose features are then cached for all configs; counted once


@dataclass(frozen=True)
class ForecastResult(Record):
    """Result of `forecast`."""

    timings: tuple[Timing, ...]
    memory: int  # bytes of the worker at most: of its GPU, else of the host


@dataclass(frozen=True)
class TrainJob(Record):
    """Payload of `trial` and `fit`."""

    config: Mapping[str, Any]
    identity: str  # equal identities are the same work
    data_dir: str | None
    fingerprint: str  # of the data, as `prepare` gave it
    checkpoint_seconds: float  # least time between two checkpoints
    threads: int | None = None  # of the final training on a CPU
    code: str = ""  # as in `Prepared`
    bfloat16: tuple[str, ...] = ()  # as in `Prepared`
    until: int | None = None  # epoch after which it is paused; None: it trains to its end
    weights_from: float | None = 0.0  # least value of a trial whose weights are written; None: they never are


@dataclass(frozen=True)
class TestJob(Record):
    """Payload of `test`."""

    model: str  # folder
    files: Mapping[str, str]  # sha256 of its files by name
    data_dir: str | None


@dataclass(frozen=True)
class ExportJob(Record):
    """Payload of `export`."""

    model: str  # folder
    files: Mapping[str, str]  # sha256 of its files by name


@dataclass(frozen=True)
class ExportResult(Record):
    """Result of `export`, which writes a model as a torch.export program."""

    torch: str  # version that wrote it, with what it was built for: "2.15.0+cu132"
    files: Mapping[str, str]  # sha256 by name


@dataclass(frozen=True)
class TestResult(Record):
    """Result of `test`, the one job that reads the test part."""

    accuracy: float
    loss: float  # mean cross-entropy
    correct: int  # images
    n: int
    per_class: tuple[ClassFigures, ...]
    fingerprint: str  # of the test part
    seconds: float
    files: Mapping[str, str]  # sha256 by name


def _job_2(values: dict[str, Any]) -> dict[str, Any]:
    """Format 2 renames, in the result of a test, `right` and each class's `class`."""
    result = dict(values["result"])
    if "right" in result:
        result["correct"] = result.pop("right")
        result["per_class"] = [{"name": row["class"], **row} for row in result["per_class"]]
    return {**values, "result": result}


@dataclass(frozen=True)
class JobRecord(Record):
    """The result of a job of `retrain`, kept in the job's folder once it has finished."""

    upgrades = (_job_2,)

    identity: str  # equal identities are the same work
    result: Mapping[str, Any]
    format: int = FORMAT


@dataclass(frozen=True)
class TestRead(Record):
    """One reading of a test part."""

    study: str
    winner: int
    model: str  # identity of the test job
    time: float  # seconds since 1970


@dataclass(frozen=True)
class TestReads(Record):
    """`test-reads.json` of a home: all readings of test parts, by the data's fingerprint."""

    upgrades = (lambda values: {"reads": {key: rows for key, rows in values.items() if key != "format"}},)

    reads: Mapping[str, tuple[TestRead, ...]] = field(default_factory=dict)
    format: int = FORMAT
