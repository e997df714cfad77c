"""The coordinator on PostgreSQL while connections are dropped and the server restarts: the same study, only later."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from searchfm.engines.local import LocalEngine
from searchfm.errors import StorageError
from searchfm.events import SearchEvent
from searchfm.home import HOME, STORAGE, TRACKING, Home
from searchfm.search import database as database_module
from searchfm.search.lock import study_lock
from searchfm.search.storage import open_storage
from tests.commands import searchfm
from tests.cutting import Cut, Proxy, drop_all
from tests.driving import check, facts, let_go, search, stored, toy
from tests.programs import worker_port
from tests.serving import Postgres, Server

pytestmark = [pytest.mark.slow(seconds=8), pytest.mark.usefixtures("own_forkserver")]

# A sampler that reads all earlier trials, and a pruner that marks its rungs in Optuna's system attributes.
TABLES: dict[str, Any] = {"search": {"sampler": {"name": "tpe", "startup_trials": 3}, "pruner": {"name": "hyperband"}}}


@pytest.fixture
def proxy(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the search and its database."""
    with Proxy(database) as proxy:
        monkeypatch.setenv(STORAGE, proxy.url)
        yield proxy


def undisturbed(folder: Path, monkeypatch: pytest.MonkeyPatch, trials: int) -> list[Any]:
    """The facts of the same study on SQLite, with one worker."""
    with monkeypatch.context() as context:
        context.delenv(STORAGE)
        return facts(search(Home(folder / "undisturbed"), toy(**TABLES), trials=trials))


@contextmanager
def repeatedly(action: Callable[[], object], seconds: tuple[float, float], seed: int) -> Iterator[list[object]]:
    """Calls `action` at random moments, the pauses between these bounds; yields the list of its results."""
    moments, over, results = random.Random(seed), threading.Event(), []

    def run() -> None:
        while not over.wait(moments.uniform(*seconds)):
            results.append(action())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        over.set()
        thread.join()


def test_a_study_whose_commits_are_cut_is_bitwise_the_undisturbed_one(
    home: Home, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, cuts = random.Random(0), []

    def cut(_commit: int) -> Cut | None:
        cuts.append(choice.choice(list(Cut)) if choice.random() < 0.1 else None)
        return cuts[-1]

    def begin(*_: object) -> None:
        proxy.cut = cut

    study = search(home, toy(**TABLES), trials=30, watch=begin)
    check(study, 30)
    assert {*Cut} <= set(cuts)
    assert facts(study) == undisturbed(tmp_path, monkeypatch, 30)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_whose_connections_are_dropped_at_random_moments_goes_on(
    home: Home, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv(STORAGE, database)
    let_go(open_storage(home, create=True))
    with repeatedly(lambda: drop_all(database), (0.1, 0.8), seed=workers) as dropped:
        study = search(home, toy(**TABLES), workers=workers, trials=30, payload={"seconds": 0.02 * workers})
    check(study, 30)
    assert sum(map(int, dropped)) > 10
    if workers == 1:
        assert facts(study) == undisturbed(tmp_path, monkeypatch, 30)


def test_a_study_waits_for_a_server_that_restarts(
    home: Home, database: str, postgres_server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, database)
    back = threading.Timer(6.0, postgres_server.start)

    def restart(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "epoch" and (item.trial, item.epoch.index) == (2, 1):
            postgres_server.stop()
            back.start()

    began = time.monotonic()
    study = search(home, toy(**TABLES), trials=6, watch=restart)
    back.join()
    assert time.monotonic() - began > 6
    check(study, 6)
    assert facts(study) == undisturbed(tmp_path, monkeypatch, 6)


def test_a_study_that_another_coordinator_took_while_the_connection_was_lost_is_left_to_it(
    home: Home, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, database)

    def take(item: SearchEvent, _: LocalEngine) -> None:
        if (item.kind, item.trial) == ("ended", 1):
            drop_all(database)
            storage = open_storage(home)
            with study_lock(home, "toy") as lock:
                lock.claim(storage, storage.get_study_id_from_name("toy"))
            let_go(storage)

    with pytest.raises(StorageError, match="and another process has taken the study"):
        search(home, toy(), trials=8, watch=take)
    assert [row.state for row in stored(home, "toy").trials] == ["complete", "complete"]
    check(search(home, toy(), trials=8), 8)


def test_a_study_asked_to_stop_while_its_database_is_away_ends_soon_and_resumes(
    home: Home, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "STOP_SECONDS", 1.0)

    def stop(item: SearchEvent, _: LocalEngine) -> bool:
        if item.kind != "epoch" or (item.trial, item.epoch.index) != (2, 1):
            return False
        proxy.close()
        return True

    began = time.monotonic()
    with pytest.raises(StorageError, match="the database did not answer for 1 seconds"):
        search(home, toy(**TABLES), trials=4, watch=stop)
    assert time.monotonic() - began < 20
    proxy.open()
    study = search(home, toy(**TABLES), trials=4)
    check(study, 4)
    assert [row[:5] for row in facts(study)][:3] == [row[:5] for row in undisturbed(tmp_path, monkeypatch, 4)][:3]


TUNE = ("tune", "mlp", "--dataset", "digits", "--trials", "12", "--epochs", "3", "--workers", "2")
TUNE = (*TUNE, "--set", "search.pruner=none")  # every trial is complete


@pytest.mark.nightly
def test_the_command_fills_both_databases_of_a_server_that_drops_all_connections(
    database: str, postgres: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    name = f"mlflow_{abs(hash(tmp_path))}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    mlflow = postgres + name
    server = Server(tmp_path, worker_port(5400), database=mlflow.replace("postgresql:", "postgresql+psycopg:"))
    environment = {STORAGE: database, TRACKING: f"http://127.0.0.1:{server.port}", HOME: str(tmp_path / "home")}

    def read(query: str) -> list[Any]:
        with psycopg.connect(database) as connection:
            return [row[0] for row in connection.execute(query)]

    def drop() -> int:
        """Only once trials run: until a command holds the lock, it does not wait for a database."""
        return drop_all(database) + drop_all(mlflow) if read("SELECT to_regclass('trials')") != [None] else 0

    server.start()
    try:
        with repeatedly(drop, (1.0, 4.0), seed=0) as dropped:
            done = searchfm(*TUNE, **environment)
        assert done.returncode == 0, done.stderr
        assert sum(1 for count in dropped if count) >= 3
        assert read("SELECT number FROM trials ORDER BY number") == list(range(12))
        assert read("SELECT DISTINCT state::text FROM trials") == ["COMPLETE"]
        synced = searchfm("sync", "mlp", "--json", **environment)
        assert (synced.returncode, json.loads(synced.stdout)) == (0, []), synced.stderr
        record_property("figures", f"connections dropped {len(dropped)} times, 12 trials")
    finally:
        server.kill()
