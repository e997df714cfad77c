"""Finished searches on digits that nobody trained: answers as the test says, everything else as a search leaves it."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState

from searchfm.config import Config, DataConfig
from searchfm.home import Home
from searchfm.job import Epoch
from searchfm.learn import datasets
from searchfm.learn.data import split
from searchfm.search.history import StudyRow, write_epochs
from searchfm.search.storage import create_study, load_study, open_storage, write_final
from searchfm.search.study import Study
from tests.programs import chromium

DIGITS = [str(digit) for digit in range(10)]
TABLES: dict[str, Any] = {
    "search": {"trials": 20, "pruner": {"name": "median"}},
    "data": {"name": "digits"},
    "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 3}, "dropout": {"choice": [0.0, 0.25]}}},
    "optimizer": {
        "name": {"choice": ["sgd", "adamw"]},
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "sgd": {"momentum": {"low": 0.0, "high": 0.99}},
    },
    "train": {"epochs": 4},
}


@dataclass(frozen=True)
class Told:
    """How a trial is to end."""

    wrong: Sequence[int] = ()  # places of the validation images it gets wrong
    state: TrialState = TrialState.COMPLETE
    epochs: int = 4
    twin: int | None = None
    kept: bool = True  # its predictions
    params: Mapping[str, Any] | None = None  # instead of what the sampler says


@cache
def validation() -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """Fingerprint, and indices and labels (N,) of digits' validation part."""
    from safetensors.numpy import load_file

    config = DataConfig(name="digits")
    (part,) = datasets.training_parts(config)
    labels = load_file(part.path)["labels"]
    _, held = split(labels, DIGITS, config)
    return part.fingerprint, held, labels[held]


def answer(path: Path, wrong: Sequence[int], indices: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Predictions that are right but at some places, where the next class is taken; surer the later the place."""
    chosen = labels.copy()
    chosen[list(wrong)] = (labels[list(wrong)] + 1) % 10
    sure = np.linspace(0.6, 0.9, len(labels), dtype=np.float32)
    probabilities = np.repeat(((1 - sure) / 9)[:, None], 10, axis=1)
    probabilities[np.arange(len(labels)), chosen] = sure
    np.savez(path, indices=indices, labels=labels, probabilities=probabilities)


def search(
    home: Home,
    trials: Sequence[Told],
    name: str = "toy",
    *,
    question: str = "How deep?",
    classes: Sequence[str] = DIGITS,
    fingerprint: str | None = None,
    tables: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> StudyRow:
    """A study whose trials ended as told, in a real database, with the files that trials leave."""
    study = Study(name, {**TABLES, **(tables or {})}, question=question)
    found, indices, labels = validation()
    data = {"fingerprint": fingerprint or found, "shape": [1, 8, 8], "classes": list(classes)}
    kept = {
        "uuid": f"uuid-{name}",
        "resolved": study.resolved,
        "file": study.resolved,
        "question": question,
        "digest": study.digest,
        "trials": len(trials),
        "data": data | {"train": 1201, "validation": len(labels)},
    }
    storage = open_storage(home, create=True)
    create_study(storage, name, kept)
    opened = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed))
    for number, told in enumerate(trials):
        if told.params is not None:
            opened.enqueue_trial(dict(told.params))
        trial = opened.ask()
        config = study.sample(trial)
        trial.set_user_attr("config", config.to_table())
        trial.set_user_attr("digest", config.digest())
        _end(home, study, trial, config, told, number, indices, labels)
        value = round(1 - len(told.wrong) / len(labels), 6) if told.state is TrialState.COMPLETE else None
        opened.tell(trial, value, told.state)
    return load_study(storage, home, name)


def _end(
    home: Home,
    study: Study,
    trial: optuna.Trial,
    config: Config,
    told: Told,
    number: int,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> None:
    folder = home.trial(study.name, number)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(study.replay(number, config.to_table()))
    accuracy = 1 - len(told.wrong) / len(labels)
    trained = [
        Epoch(i, 2.0 / i, accuracy, 2.1 / i, round(accuracy * (1 - 0.5**i), 6), 1e-3, 2.0 + number, 500.0, 1.79e9 + i)
        for i in range(1, told.epochs + 1)
    ]
    write_epochs(folder / "epochs.csv", trained)
    for epoch in trained:
        assert epoch.val_accuracy is not None
        trial.report(epoch.val_accuracy, epoch.index)
    if told.twin is not None:
        trial.set_user_attr("twin", told.twin)
    if told.state is TrialState.FAIL:
        trial.set_user_attr("reason", "loss is nan in epoch 2")
    if told.state is TrialState.COMPLETE:
        result = {"parameters": 1000 + number, "flops": 2_000_000, "seconds": 9.0, "device": "cpu", "versions": {}}
        trial.set_user_attr("result", result)
        if told.kept:
            answer(folder / "predictions.npz", told.wrong, indices, labels)


def retrained(home: Home, study: StudyRow, wrong: Sequence[int], *, winner: int = 0, reads: int = 1) -> StudyRow:
    """The study with a final model that gets these places of a test part of 300 images wrong."""
    folder = study.folder / "final"
    folder.mkdir()
    labels = np.arange(300) % 10
    answer(folder / "predictions.npz", wrong, np.arange(300), labels)
    write_epochs(folder / "epochs.csv", [Epoch(1, 1.0, 0.9, None, None, 1e-3, 5.0, 400.0, 1.79e9)])
    accuracy = 1 - len(wrong) / 300
    final = {
        "study": study.name,
        "finalists": [],
        "tie": [0, 1],
        "winner": winner,
        "optimism": 0.01,
        "validation": {"accuracy": 0.9, "low": 0.88, "high": 0.92, "spread": 0.01, "n": 212},
        "test": {"accuracy": accuracy, "low": 0.5, "high": 0.99, "n": 300, "reads": reads, "fingerprint": "t"},
        "per_class": [],
        "seconds_per_epoch": 5.0,
        "training_seconds": 5.0,
        "parameters": 777,
        "flops": 3_000_000,
        "epochs": 1,
        "fingerprint": study.data["fingerprint"],
    }
    storage = open_storage(home)
    write_final(storage, study.number, final)
    return load_study(storage, home, study.name)


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The page as headless Chromium, without a network, leaves it: its DOM, and what the console was told.

    The whole page is also drawn, into `page`.png, for a person to see.
    """
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps"]
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{feature}" for feature in quiet),
            "--proxy-server=127.0.0.1:9",  # nobody listens there
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1120,5000",
            "--virtual-time-budget=5000",
            "--enable-logging=stderr",
            "--v=0",
            f"--screenshot={folder / (page.stem + '.png')}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)
