"""Drives a coordinator on toy trials: what the tests of the spine have in common."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage

from searchfm.coordinator import Coordinator, News
from searchfm.engines.local import LocalEngine
from searchfm.errors import StudyError
from searchfm.home import Home
from searchfm.job import Epoch
from searchfm.search.history import StudyRow, TrialRow
from searchfm.search.storage import create_study, load_study, open_storage, study_lock
from searchfm.search.study import Study

LIGHT = "tests.toys"  # what the forkserver imports instead of torch

TABLES: dict[str, Any] = {
    "search": {"trials": 8, "sampler": {"name": "random"}, "pruner": {"name": "none"}},
    "data": {"name": "digits"},
    "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 3}, "width": {"choice": [4, 8, 16]}}},
    "optimizer": {"lr": {"low": 1e-4, "high": 0.1, "log": True}},
    "train": {"epochs": 3},
}


def toy(name: str = "toy", **tables: Mapping[str, Any]) -> Study:
    """A study of toys: `search` is merged into the usual one, other tables replace theirs."""
    merged = copy.deepcopy(TABLES) | {key: dict(table) for key, table in tables.items() if key != "search"}
    merged["search"] |= tables.get("search", {})
    return Study(name, merged)


@dataclass
class Recorder:
    """A tracker that writes down what it is told."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def started(self, row: TrialRow) -> None:
        self.calls.append(("started", row.number))

    def epoch(self, number: int, epoch: Epoch) -> None:
        self.calls.append(("epoch", number, epoch.index))

    def ended(self, row: TrialRow) -> None:
        self.calls.append(("ended", row.number, row.state))

    def reconcile(self, study: StudyRow) -> None:
        self.calls.append(("reconcile", len(study.trials)))

    def keep(self, rows: Sequence[TrialRow]) -> None:
        self.calls.append(("keep", [row.number for row in rows]))

    def close(self, study: StudyRow, timeout: float) -> int:
        self.calls.append(("close", len(study.trials), timeout))
        return 0


def search(
    home: Home,
    study: Study,
    *,
    workers: int = 1,
    trials: int | None = None,
    payload: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    tracker: Recorder | None = None,
    watch: Callable[[News, LocalEngine], bool | None] = lambda *_: None,
) -> StudyRow:
    """Begins the study, or goes on with it, to so many trials; returns it as it is then.

    `watch` sees all news, and stops the search, as a signal would, by answering True.
    """
    stopping = False
    with study_lock(home, study.name) as check:
        storage = open_storage(home, create=True)
        try:
            stored = load_study(storage, home, study.name)
        except StudyError:
            resolved = study.resolved
            kept = {"uuid": "u", "resolved": resolved, "file": resolved, "question": "", "digest": study.digest}
            create_study(storage, study.name, {**kept, "trials": study.trials, "data": {"fingerprint": "toy"}})
            stored = load_study(storage, home, study.name)
        engine = LocalEngine(["cpu"] * workers, warm=LIGHT)
        try:
            coordinator = Coordinator(
                study,
                stored,
                storage,
                engine,
                tracker or Recorder(),
                trials=study.trials if trials is None else trials,
                retry_failed=retry_failed,
                entry="tests.toys:trial",
                payload=payload,
                stopping=lambda: stopping,
                check_lock=check,
            )
            for news in coordinator.run():
                stopping = bool(watch(news, engine)) or stopping
            return load_study(storage, home, study.name)
        finally:
            engine.close()
            let_go(storage)


def let_go(storage: BaseStorage) -> None:
    """Closes its connections, which the end of a process does otherwise."""
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


def facts(study: StudyRow) -> list[tuple[Any, ...]]:
    """All of a study's trials that must not depend on the clock, or on how often the search was interrupted."""
    return [
        (
            row.number,
            row.state,
            row.value,
            json.dumps(row.params, sort_keys=True),
            json.dumps(row.config, sort_keys=True),
            row.digest,
            row.twin,
            row.reason,
            row.reported,
            [(epoch.index, epoch.val_accuracy, epoch.lr) for epoch in row.epochs],
        )
        for row in study.trials
    ]


def check(study: StudyRow, trials: int) -> None:
    """What must hold after every search, whatever happened on the way."""
    assert [row.number for row in study.trials] == list(range(trials))
    assert not study.of("running")
    for row in study.trials:
        assert [epoch.index for epoch in row.epochs] == list(range(1, len(row.epochs) + 1)), row
        assert {epoch.index: epoch.val_accuracy for epoch in row.epochs} == dict(row.reported), row
        if row.state == "complete":
            assert len(row.epochs) == row.config["train"]["epochs"]
            assert row.value == row.epochs[-1].val_accuracy
        if row.state == "pruned":
            assert len(row.epochs) < row.config["train"]["epochs"], "trained to its end, it has a value"
        left = {path.name for path in row.folder.rglob("*")}
        assert left <= {"config.toml", "epochs.csv", "log.txt", "done", "weights.safetensors", "model.json"}


def stored(home: Home, name: str) -> StudyRow:
    """The study as it stands."""
    storage = open_storage(home)
    try:
        return load_study(storage, home, name)
    finally:
        let_go(storage)
