"""Real studies in a real home, without training: asked of Optuna, told to Optuna, with the files that trials leave."""

import functools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import tomli_w
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from searchfm.config import Config
from searchfm.home import Home
from searchfm.job import Epoch
from searchfm.search.history import StudyRow, write_epochs
from searchfm.search.storage import create_study, load_study, open_storage

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
RESOLVED: dict[str, Any] = {
    "search": {"trials": 4, "seed": 0, "keep": 2},
    "data": {"name": "fashion-mnist", "subset": 0.1},
    "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 4}}},
    "optimizer": {"name": {"choice": ["sgd", "adamw"]}, "lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    "train": {"epochs": 4},
}
STARTED = 1_790_000_000.0  # a moment in 2026


def forget(home: Home) -> None:
    """Closes the connections to a home's database, which a server counts."""
    _open(home)._backend.engine.dispose()  # type: ignore[attr-defined]
    _open.cache_clear()


@functools.cache
def _open(home: Home) -> BaseStorage:
    return open_storage(home, create=True)


def begin(
    home: Home, name: str = "toy", *, question: str = "How deep?", uuid_: str | None = None, data: str = "f" * 64
) -> StudyRow:
    """A study without trials; data: their fingerprint."""
    kept = {
        "uuid": uuid_ or uuid.uuid4().hex,
        "resolved": RESOLVED,
        "file": RESOLVED,
        "question": question,
        "digest": "d" * 64,
        "trials": 4,
        "data": {"fingerprint": data, "shape": [1, 28, 28], "classes": CLASSES, "train": 5100, "validation": 900},
    }
    create_study(_open(home), name, kept)
    return study(home, name)


def study(home: Home, name: str = "toy") -> StudyRow:
    """The study as it stands."""
    return load_study(_open(home), home, name)


def epochs(number: int, count: int, *, offset: float = 0.0) -> list[Epoch]:
    """Plausible curves; every trial's are different."""
    rng = np.random.default_rng(number)
    top = 0.7 + 0.2 * rng.random()
    return [
        Epoch(
            index=i,
            train_loss=1.8 / i + 0.05 * float(rng.random()),
            train_accuracy=min(1.0, top + 0.03 * i),
            val_loss=1.9 / i + 0.08 * i,
            val_accuracy=round(top * (1 - 0.6**i), 6),
            lr=1e-3,
            seconds=0.5 + float(rng.random()),
            samples_per_second=10_000.0 + 100 * float(rng.random()),
            time=STARTED + 60 * number + i + offset,
        )
        for i in range(1, count + 1)
    ]


def ask(home: Home, name: str = "toy") -> optuna.Trial:
    """A trial that has begun."""
    trial = optuna.load_study(study_name=name, storage=_open(home)).ask()
    params = {
        "model.mlp.layers": trial.suggest_int("model.mlp.layers", 1, 4),
        "optimizer.name": trial.suggest_categorical("optimizer.name", ["sgd", "adamw"]),
        "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True),
    }
    config = Config.from_table(
        {
            "data": RESOLVED["data"],
            "model": {"name": "mlp", "mlp": {"layers": params["model.mlp.layers"]}},
            "optimizer": {"name": params["optimizer.name"], "lr": params["optimizer.lr"]},
            "train": {"epochs": 4, "seed": trial.number},
        }
    )
    trial.set_user_attr("config", config.to_table())
    trial.set_user_attr("digest", config.digest())
    folder = home.trial(name, trial.number)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(config.to_table()))
    return trial


def record(home: Home, trial: optuna.Trial, trained: Sequence[Epoch], name: str = "toy") -> None:
    """Epochs, as the coordinator writes them down."""
    write_epochs(home.trial(name, trial.number) / "epochs.csv", trained)
    known = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for epoch in trained:
        assert epoch.val_accuracy is not None
        if epoch.index not in known:
            trial.report(epoch.val_accuracy, epoch.index)


def tell(home: Home, trial: optuna.Trial, state: TrialState, name: str = "toy", **attrs: Any) -> None:
    """The trial's end, with the files that a worker leaves for a complete one."""
    folder = home.trial(name, trial.number)
    (folder / "log.txt").write_text(f"trial {trial.number}\n")
    reported = list(optuna.load_study(study_name=name, storage=_open(home)).trials)[trial.number]
    value = None
    if state is TrialState.COMPLETE:
        value = max(reported.intermediate_values.items())[1]
        attrs["result"] = {"best_epoch": 3, "parameters": 12345, "flops": 2e6, "seconds": 3.5, "device": "cpu"}
        write_predictions(folder / "predictions.npz", seed=trial.number)
        (folder / "weights.safetensors").write_bytes(bytes(2000))
        (folder / "model.json").write_text("{}")
    for key, attr in attrs.items():
        trial.set_user_attr(key, attr)
    optuna.load_study(study_name=name, storage=_open(home)).tell(trial, value, state)


def write_predictions(path: Path, *, seed: int = 0, count: int = 900, classes: int = 10) -> None:
    """Predictions right in most cases, in the workers' format."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    probabilities = rng.random((count, classes), dtype=np.float32)
    probabilities[np.arange(count), labels] += 0.6
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.savez(path, indices=np.arange(count), labels=labels, probabilities=probabilities)


def four(home: Home, name: str = "toy", **kwargs: Any) -> StudyRow:
    """A study of four trials: two complete, one pruned, one failed."""
    begin(home, name, **kwargs)
    ends = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    for state in ends:
        trial = ask(home, name)
        count = {TrialState.COMPLETE: 4, TrialState.PRUNED: 2, TrialState.FAIL: 1}[state]
        record(home, trial, epochs(trial.number, count), name)
        reason = {TrialState.PRUNED: "pruned after epoch 2", TrialState.FAIL: "loss is nan in epoch 2"}.get(state)
        tell(home, trial, state, name, **({"reason": reason} if reason else {}))
    return study(home, name)
