"""Real studies in a real home, without training: in Optuna's database, with the files that trials leave."""

import functools
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import tomli_w
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from searchfm.config import Config
from searchfm.home import Home
from searchfm.records import (
    EPOCHS,
    SPEC,
    WEIGHTS,
    ClassFigures,
    Epoch,
    Final,
    FinalPlan,
    Predictions,
    Prepared,
    StudyHeader,
    StudyRecord,
    TestFigures,
    TrainResult,
    Trial,
    Validation,
    write_epochs,
)
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


def documented_names() -> set[str]:
    """The names in MLflow and Optuna that `.github/ARCHITECTURE.md` lists."""
    page = (Path(__file__).parents[1] / ".github" / "ARCHITECTURE.md").read_text("utf-8")
    (section,) = re.findall(r"^## What MLflow and Optuna hold\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([^`]+)`", section))


def forget(home: Home) -> None:
    """Closes the connections to a home's database, which a server counts."""
    _open(home)._backend.engine.dispose()  # type: ignore[attr-defined]
    _open.cache_clear()


@functools.cache
def _open(home: Home) -> BaseStorage:
    return open_storage(home, create=True)


def header(
    resolved: Mapping[str, Any] = RESOLVED,
    *,
    uuid_: str | None = None,
    question: str = "How deep?",
    digest: str = "d" * 64,
    planned: int = 4,
    **data: Any,
) -> StudyHeader:
    """What identifies a study. data: of `Prepared`, where it differs from a tenth of Fashion-MNIST."""
    about = {"fingerprint": "f" * 64, "shape": (1, 28, 28), "classes": tuple(CLASSES), "train": 5100, "validation": 900}
    return StudyHeader(
        uuid=uuid_ or uuid.uuid4().hex,
        resolved=resolved,
        file=resolved,
        question=question,
        digest=digest,
        planned=planned,
        data=Prepared(**(about | data)),
    )


def begin(
    home: Home, name: str = "toy", *, question: str = "How deep?", uuid_: str | None = None, data: str = "f" * 64
) -> StudyRecord:
    """A study without trials; data: their fingerprint."""
    create_study(_open(home), name, header(uuid_=uuid_, question=question, fingerprint=data))
    home.study(name).mkdir(parents=True, exist_ok=True)  # as its lock does
    return study(home, name)


def study(home: Home, name: str = "toy") -> StudyRecord:
    """The study as it is stored."""
    return load_study(_open(home), home, name)


def trial(**values: Any) -> Trial:
    """A complete trial without a study."""
    defaults: dict[str, Any] = {
        "number": 0,
        "state": "complete",
        "value": None,
        "params": {},
        "config": {"train": {"epochs": 3}},
        "digest": "",
        "twin": None,
        "reason": None,
        "attempts": 1,
        "reported": {},
        "epochs": (),
        "result": None,
        "started": None,
        "ended": None,
        "folder": Path("nowhere"),
    }
    return Trial(**(defaults | values))


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


def resume(home: Home, number: int, name: str = "toy") -> optuna.Trial:
    """A trial that is running already, as a later coordinator adopts it."""
    study = optuna.load_study(study_name=name, storage=_open(home))
    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def record(home: Home, trial: optuna.Trial, trained: Sequence[Epoch], name: str = "toy") -> None:
    """Epochs, as the coordinator writes them down."""
    write_epochs(home.trial(name, trial.number) / EPOCHS, trained)
    reported_epochs = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for epoch in trained:
        assert epoch.val_accuracy is not None
        if epoch.index not in reported_epochs:
            trial.report(epoch.val_accuracy, epoch.index)


def tell(home: Home, trial: optuna.Trial, state: TrialState, name: str = "toy", **attrs: Any) -> None:
    """The trial's end, with the files that a worker leaves for a complete one."""
    folder = home.trial(name, trial.number)
    (folder / "log.txt").write_text(f"trial {trial.number}\n")
    reported = list(optuna.load_study(study_name=name, storage=_open(home)).trials)[trial.number]
    value = None
    if state is TrialState.COMPLETE:
        value = max(reported.intermediate_values.items())[1]
        result = TrainResult(value, best_epoch=3, parameters=12345, flops=2_000_000, seconds=3.5, device="cpu")
        attrs["result"] = result.to_json()
        predictions(seed=trial.number).write(folder)
        (folder / WEIGHTS).write_bytes(bytes(2000))
        (folder / SPEC).write_text("{}")
    for key, attr in attrs.items():
        trial.set_user_attr(key, attr)
    optuna.load_study(study_name=name, storage=_open(home)).tell(trial, value, state)


def final(*counts: tuple[float, int], **values: Any) -> Final:
    """A final model with these recalls and numbers of test images. values: of its record."""
    n = sum(count for _, count in counts)
    accuracy = sum(recall * count for recall, count in counts) / n
    model = Final(
        study="toy",
        plan=FinalPlan((0,), 1, 1, None, None, 0),
        finalists=(),
        tie=(),
        winner=0,
        optimism=None,
        validation=Validation(0.9, None, None, None, 100),
        test=TestFigures(accuracy, 0.0, 1.0, n, 1, "f"),
        per_class=tuple(ClassFigures(str(i), 1.0, recall, count) for i, (recall, count) in enumerate(counts)),
        model=None,
        seconds=None,
        seconds_per_epoch=1.0,
        training_seconds=1.0,
        parameters=1,
        flops=1,
        epochs=1,
        fingerprint="f",
        time=0.0,
        params={},
        weights="",
    )
    return replace(model, **values)


def predictions(*, seed: int = 0, count: int = 900, classes: int = 10) -> Predictions:
    """Predictions of which most are correct."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    probabilities = rng.random((count, classes), dtype=np.float32)
    probabilities[np.arange(count), labels] += 0.6
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(np.arange(count), labels, probabilities)


def four(home: Home, name: str = "toy", **kwargs: Any) -> StudyRecord:
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
