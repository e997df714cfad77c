"""What is kept of the training of a row: `studies/reports/results/ROW.json`, one line a run."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from searchfm.home import write_whole
from searchfm.records import Final, Predictions, Prepared, Record, Trial
from tests.bench import _common as common
from tests.reports.rows import RESULTS

CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Run(Record):
    """One trial of a row's study."""

    study_seed: int
    params: dict[str, Any]  # its point of the grid, by dotted key; empty where the study has one point
    value: float  # validation accuracy after the last epoch, 0 to 1
    images: list[int]  # for training, for validation
    epochs: dict[str, list[float]]  # of each, by CURVES
    seconds_per_epoch: float  # wall time, validation included
    parameters: int
    flops: int  # of one image's forward pass
    precision: str
    date: str  # of its end
    hardware: str
    beside: int  # trainings on the machine at the same time, this one included
    versions: dict[str, str]
    config: dict[str, Any]
    confusion: list[list[int]] | None  # of the validation part: row = true class, column = predicted class
    classes: list[str]

    @property
    def key(self) -> tuple[int, str]:
        """What distinguishes it from other runs of its row."""
        return self.study_seed, json.dumps(self.params, sort_keys=True)


@dataclass(frozen=True)
class Retrained(Record):
    """`searchfm retrain` of the row's best point."""

    study_seed: int
    params: dict[str, Any]
    accuracy: float  # on the test part, 0 to 1
    low: float  # 95% interval (Wilson)
    high: float
    reads: int  # of the test part by studies of the home, this one included
    epochs: int
    confusion: list[list[int]]  # of the test part: row = true class, column = predicted class
    classes: list[str]
    date: str
    hardware: str


@dataclass(frozen=True)
class Result(Record):
    """All that is kept of a row."""

    row: str
    settings: dict[str, Any]  # that differ from the study file
    runs: list[Run]
    retrained: Retrained | None = None

    @classmethod
    def load(cls, row: str, folder: Path = RESULTS) -> "Result | None":
        """What the folder holds of a row; None where it holds nothing."""
        path = folder / f"{row}.json"
        return cls.read(path) if path.is_file() else None

    def with_runs(self, runs: list[Run]) -> "Result":
        """The result with further runs, in the order of seeds and points."""
        merged = {run.key: run for run in [*self.runs, *runs]}
        return replace(self, runs=sorted(merged.values(), key=lambda run: run.study_seed))

    def write(self, folder: Path = RESULTS) -> None:
        """Writes it whole, a run on a line, so that a difference of two versions shows which runs changed."""
        values = self.to_json()
        runs = ",\n".join("  " + json.dumps(run) for run in values.pop("runs"))
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in values.items())
        write_whole(folder / f"{self.row}.json", f'{{\n{head} "runs": [\n{runs}\n ]\n}}\n'.encode())


def run_of(trial: Trial, seed: int, data: Prepared, date: str, beside: int) -> Run:
    """What is kept of a complete trial."""
    assert trial.result is not None
    assert trial.value is not None
    predictions = Predictions.read(trial.folder)
    config = deepcopy(dict(trial.config))
    if transfer := config["model"].get("transfer"):
        transfer["weights"] = Path(transfer["weights"]).name  # its folder says nothing
    curves = {name: [round(getattr(epoch, name), 4) for epoch in trial.epochs] for name in CURVES}
    return Run(
        study_seed=seed,
        params=dict(trial.params),
        value=round(trial.value, 4),
        images=[data.train, data.validation],
        epochs=curves,
        seconds_per_epoch=round(trial.seconds_per_epoch, 2),
        parameters=trial.result.parameters,
        flops=trial.result.flops,
        precision=trial.result.precision,
        date=date,
        hardware=common.hardware(),
        beside=beside,
        versions=dict(trial.result.versions),
        config=config,
        confusion=predictions.confusion.tolist() if predictions else None,
        classes=list(data.classes),
    )


def retrained_of(final: Final, folder: Path, seed: int, classes: list[str], date: str) -> Retrained:
    """What is kept of a final model, whose files are in `folder`."""
    predictions = Predictions.read(folder)
    assert predictions is not None
    return Retrained(
        study_seed=seed,
        params=dict(final.params),
        accuracy=final.test.accuracy,
        low=round(final.test.low, 4),
        high=round(final.test.high, 4),
        reads=final.test.reads,
        epochs=final.epochs,
        confusion=predictions.confusion.tolist(),
        classes=classes,
        date=date,
        hardware=common.hardware(),
    )


def label(params: Mapping[str, Any]) -> str:
    """A point of a grid in words: the last part of each key, and its value."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in params.items())
