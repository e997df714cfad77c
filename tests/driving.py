"""Runs a coordinator on toy trials, for the tests of the spine."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from optuna.storages import BaseStorage

from searchfm import tuning
from searchfm.coordinator import Coordinator
from searchfm.engines import Engine, EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.errors import StudyError
from searchfm.events import SearchEvent
from searchfm.home import Home
from searchfm.pool import WorkerPool
from searchfm.records import StudyRecord
from searchfm.search.lock import study_lock
from searchfm.search.storage import create_study, load_study, open_storage
from searchfm.search.study import Study
from searchfm.tables import digest
from tests import rows

LIGHT = "tests.toys"  # what the forkserver imports instead of torch

TABLES: dict[str, Any] = {
    "search": {"trials": 8, "sampler": {"name": "random"}, "pruner": {"name": "none"}},
    "data": {"name": "digits"},
    "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 3}, "width": {"choice": [4, 8, 16]}}},
    "optimizer": {"lr": {"low": 1e-4, "high": 0.1, "log": True}},
    "train": {"epochs": 3},
}


def toy(name: str = "toy", **tables: Any) -> Study:
    """A study of toy trials: `search` is merged into that of TABLES, other tables replace theirs."""
    merged = copy.deepcopy(TABLES) | {key: copy.copy(table) for key, table in tables.items() if key != "search"}
    merged["search"] |= tables.get("search", {})
    return Study(name, merged)


def local_engine(workers: int) -> Callable[[], LocalEngine]:
    """Makes a local engine that trains on so many CPU workers."""
    return partial(LocalEngine, options=EngineOptions.from_table({"device": "cpu", "workers": workers}))


def search(
    home: Home,
    study: Study,
    *,
    workers: int = 1,
    engine: Engine | None = None,
    trials: int | None = None,
    payload: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    data: Mapping[str, Any] | None = None,
    watch: Callable[[SearchEvent, Any], bool | None] = lambda *_: None,
) -> StudyRecord:
    """Starts or resumes the study, up to `trials`; returns its record. engine: in place of local workers; stays open.
    data: of `Prepared`, where it differs from that of `rows.header`.

    `watch` receives all progress, and stops the search, as a signal would, by returning True.
    """
    stopping = False
    with study_lock(home, study.name, lambda: stopping) as lock:
        storage = open_storage(home, create=True, stopping=lambda: stopping, check_lock=lock.check)
        try:
            stored = load_study(storage, home, study.name)
        except StudyError:
            about = {"fingerprint": "toy", **(data or {})}
            header = rows.header(
                study.resolved, uuid_="u", digest=digest(study.resolved), planned=study.trials, **about
            )
            create_study(storage, study.name, header)
            stored = load_study(storage, home, study.name)
        lock.claim(storage, stored.number)
        used = engine or LocalEngine(["cpu"] * workers, warm=LIGHT)
        pool = WorkerPool(used, retries=study.search.retries, stopping=lambda: stopping, check_lock=lock.check)
        try:
            coordinator = Coordinator(
                study,
                stored,
                storage,
                pool,
                trials=study.trials if trials is None else trials,
                payload=lambda config, identity: {"config": config, "identity": identity, **(payload or {})},
                entry="tests.toys:trial",
                retry_failed=retry_failed,
            )
            for progress in coordinator.run():
                stopping = bool(watch(progress, used)) or stopping
            return load_study(storage, home, study.name)
        finally:
            if engine is None:
                used.close()
            let_go(storage)


@contextmanager
def without_following() -> Iterator[None]:
    """Searches of this process are not followed into MLflow, which takes 4 to 5 s of CPU each, most of it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "Tuning", partial(tuning.Tuning, follow=False))
        yield


def let_go(storage: BaseStorage) -> None:
    """Closes the connections, which otherwise the end of the process does."""
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


def facts(study: StudyRecord) -> list[tuple[Any, ...]]:
    """What must not depend on the clock, or on how often the search was interrupted, of all trials."""
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


def check(study: StudyRecord, trials: int) -> None:
    """Checks what must hold after every search, whatever interrupted it."""
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
        assert left <= {"config.toml", "epochs.csv", "log.txt", "done", "wrote", "weights.safetensors", "model.json"}


def stored(home: Home, name: str) -> StudyRecord:
    """The study's record."""
    storage = open_storage(home)
    try:
        return load_study(storage, home, name)
    finally:
        let_go(storage)
