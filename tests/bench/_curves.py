"""Curves of trainings without pruning, as JSON files in the user's cache folder: collected once, and kept."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import platformdirs
import torch

from searchfm.errors import SearchfmError
from searchfm.home import shipped_folder, write_whole
from searchfm.jobs import Context
from searchfm.learn.data import load
from searchfm.learn.entries import prepare
from searchfm.learn.train import Training
from searchfm.records import Epoch, Prepared, PrepareJob, PrepareResult
from searchfm.search import files
from searchfm.search.study import Study
from searchfm.tables import digest
from tests.bench import _common as common

# A shipped study each, on so few images that its forty trainings take minutes. All have 3,000 images to validate on.
FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"data.subset": 0.1},
    "cnn": {"data.subset": 0.05, "data.size": 14},
    "vit": {"data.subset": 0.05, "data.size": 14, "train.epochs": 8},
}
FRESH = 2  # further seeds of a configuration that a search found best
KNOWN = 9000  # number of the first configuration that the study file names in `[[first]]`


@dataclass(frozen=True)
class Curve:
    """A training: its parameters in the space, its epochs, and the error that ended it, if one did."""

    params: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    error: str

    @property
    def value(self) -> float:
        """Validation accuracy after the last epoch; 0 where an error ended it."""
        return 0.0 if self.error or not self.epochs else self.epochs[-1].val_accuracy or 0.0


@dataclass(frozen=True)
class Family:
    """A family's study without pruning, without its known configurations and `whole`; and the folder of its curves."""

    name: str
    study: Study
    whole: Study
    folder: Path

    @classmethod
    def of(cls, name: str) -> "Family":
        file = files.read(shipped_folder() / f"{name}.toml")
        settings = {"data.validation": 0.05, "search.sampler": "random", "search.pruner": "none", **FAMILIES[name]}
        whole = file.study(settings)
        table = {key: value for key, value in whole.resolved.items() if key != "first"}
        key = digest({key: value for key, value in table.items() if key != "search"})[:12]
        folder = Path(platformdirs.user_cache_dir("searchfm-bench")) / "curves" / f"{name}-{key}"
        return cls(name, Study(name, table), whole, folder)

    @property
    def known(self) -> range:
        """The numbers of the configurations of `[[first]]`."""
        return range(KNOWN, KNOWN + len(self.whole.known))

    def params(self, number: int) -> dict[str, Any]:
        """The point of a configuration: that of a known one, else what the study's sampler draws as trial `number`."""
        source, trial_number = (self.whole, number - KNOWN) if number >= KNOWN else (self.study, number)
        trial = optuna.create_study(sampler=source.sampler(trial_number)).ask()
        source.sample(trial)
        return trial.params

    def path(self, number: int, seed: int) -> Path:
        """The file of a curve. seed: 0 is the search's, others are fresh ones."""
        return self.folder / f"{number:04d}-{seed}.json"

    def curve(self, number: int, seed: int = 0) -> Curve:
        values = json.loads(self.path(number, seed).read_text())
        epochs = tuple(Epoch.from_json(epoch) for epoch in values["epochs"])
        return Curve(values["params"], epochs, values["error"])

    def data(self) -> Prepared:
        """What `prepare` finds of the images."""
        entry = prepare(PrepareJob(self.study.data, (), None).to_json(), Context(None, (), "cpu", lambda: None))
        try:
            next(entry)
        except StopIteration as end:
            return PrepareResult.from_json(end.value).data
        raise AssertionError("prepare yields no epoch")

    def collect(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Trains what is missing of (number, seed), a training a core; each file is written when its training ends."""
        missing = [each for each in wanted if not self.path(*each).is_file()]
        with ProcessPoolExecutor(common.usable(), get_context("spawn"), initializer=use_one_thread) as pool:
            jobs = [pool.submit(train, self.name, number, seed, self.params(number)) for number, seed in missing]
            for index, (job, (number, seed)) in enumerate(zip(jobs, missing, strict=True), 1):
                job.result()
                common.progress(f"{self.name}: curve {index} of {len(jobs)}: configuration {number}, seed {seed}")

    def curves(self, numbers: Iterable[int]) -> dict[int, Curve]:
        return {number: self.curve(number) for number in numbers}


def use_one_thread() -> None:
    torch.set_num_threads(1)


def train(name: str, number: int, seed: int, params: Mapping[str, Any]) -> None:
    """Trains a configuration, and writes its curve."""
    family = Family.of(name)
    config = family.study.config(params)
    config = replace(
        config, train=replace(config.train, seed=family.study.seed(f"{number}/{seed}" if seed else number))
    )
    epochs, error = [], ""
    try:
        epochs.extend(Training(config, load(config.data)))
    except SearchfmError as problem:  # diverged
        error = str(problem)
    values = {"params": params, "epochs": [epoch.to_json() for epoch in epochs], "error": error}
    write_whole(family.path(number, seed), json.dumps(values).encode())
