"""Dropped connections to PostgreSQL: calls are repeated, every write counts once, and other errors pass at once."""

import gc
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing

import optuna
import psycopg
import pytest
import sqlalchemy
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from searchfm.errors import LockedError, StorageError
from searchfm.home import STORAGE, Home
from searchfm.search import database as database_module
from searchfm.search.database import advisory, is_lost, postgres_engine
from searchfm.search.lock import OWNER, Lock, study_lock
from searchfm.search.memory import MemoryStudy
from searchfm.search.rdb import NONCE, backend
from searchfm.search.storage import create_study, load_study, locked_study, open_storage
from tests import rows
from tests.cutting import Cut, Proxy, drop_all
from tests.driving import let_go

HEADER = rows.header({"search": {"trials": 3}, "data": {"name": "digits"}}, uuid_="u", planned=3)


@pytest.fixture
def proxy(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(database) as proxy:
        monkeypatch.setenv(STORAGE, proxy.url)
        yield proxy


@pytest.fixture
def storage(home: Home, proxy: Proxy) -> Iterator[BaseStorage]:
    """With the study "toy" and its running trial 0."""
    storage = open_storage(home, create=True)
    create_study(storage, "toy", HEADER)
    rows_of(storage).ask()
    yield storage
    let_go(storage)


def rows_of(storage: BaseStorage) -> optuna.Study:
    return optuna.load_study(study_name="toy", storage=storage)


# --- every write counts once ------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[optuna.Study, optuna.Trial], object]] = {
    "ask": lambda study, _: study.ask(),
    "tell": lambda study, trial: study.tell(trial, 0.5),
    "prune": lambda study, trial: study.tell(trial, state=TrialState.PRUNED),
    "param": lambda _, trial: trial.suggest_float("lr", 0.1, 1.0),
    "report": lambda _, trial: trial.report(0.5, 1),
    "attribute": lambda _, trial: trial.set_user_attr("digest", "d"),
    "study's attribute": lambda study, _: study.set_user_attr("final", {"a": 1}),
    "waiting trial": lambda study, _: (study.enqueue_trial({"lr": 0.2}), study.ask()),
}


def content(study: optuna.Study) -> list[tuple[object, ...]]:
    trials = study.get_trials()
    return [(t.number, t.state, t.values, t.params, t.user_attrs, t.intermediate_values) for t in trials]


@pytest.mark.slow
@pytest.mark.parametrize("cut", Cut)
def test_a_write_counts_once_though_each_of_its_transactions_is_cut(
    storage: BaseStorage, proxy: Proxy, cut: Cut
) -> None:
    undisturbed, disturbed = [], []
    for name, write in WRITES.items():
        for place, contents in ((None, undisturbed), (storage, disturbed)):
            study = optuna.create_study(storage=place, study_name=name, sampler=optuna.samplers.RandomSampler(seed=1))
            trial, first = study.ask(), proxy.commits + 1
            proxy.cut = lambda commit, first=first: cut if (commit - first) % 2 == 0 else None
            write(study, trial)
            proxy.cut = lambda commit: None
            contents.append((name, content(study)))
        assert proxy.commits >= first, f"{name}: nothing was cut"
    assert disturbed == undisturbed


# --- studies in memory ------------------------------------------------------------------------------------------------

TABLES = {  # of a trial
    "trial_params": "param_name, param_value, distribution_json",
    "trial_values": "objective, value, value_type",
    "trial_intermediate_values": "step, intermediate_value, intermediate_value_type",
    "trial_user_attributes": "key, value_json",
    "trial_system_attributes": "key, value_json",
}


def tables_of(storage: BaseStorage, study: int) -> list[list[tuple[object, ...]]]:
    """All rows of a study, without ids and nonces."""
    with backend(storage).engine.connect() as connection:

        def rows(query: str) -> list[tuple[object, ...]]:
            return [tuple(row) for row in connection.exec_driver_sql(query) if NONCE not in row]

        chosen = f"JOIN trials USING (trial_id) WHERE study_id = {study} ORDER BY number"
        return [
            rows(f"SELECT number, state FROM trials WHERE study_id = {study} ORDER BY number"),
            rows(f"SELECT key, value_json FROM study_system_attributes WHERE study_id = {study} ORDER BY key"),
            *(rows(f"SELECT number, {names} FROM {table} {chosen}, 2") for table, names in TABLES.items()),
        ]


def trials_of(study: optuna.Study, write: Callable[[optuna.Trial], object], tell: Callable[..., object]) -> None:
    """A complete, a pruned, a failed and a running trial; `write` after each step."""
    for number, reports in enumerate([(0.1, 0.2), (float("nan"), float("inf")), (), (0.5,)]):
        study.sampler = optuna.samplers.QMCSampler(seed=0)
        trial = study.ask()
        trial.suggest_float("lr", 1e-4, 0.1, log=True)
        trial.suggest_categorical("name", ["adam", "sgd"])
        trial.suggest_int("layers", 1, 3)
        trial.set_user_attr("config", {"a": [1, 2.5, None], "é": True})
        write(trial)
        for step, value in enumerate(reports, 1):
            trial.report(value, step)
            trial.should_prune()
            trial.set_user_attr("attempt", step)
            write(trial)
        if number < 3:
            trial.set_user_attr("reason", "r")
            value, state = ((0.3, TrialState.COMPLETE), (None, TrialState.PRUNED), (None, TrialState.FAIL))[number]
            tell(trial, value, state)


def make_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.SuccessiveHalvingPruner(1, 2)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_tables_of_a_study_in_memory_are_those_that_optuna_writes(any_home: Home) -> None:
    storage = open_storage(any_home, create=True)
    study = optuna.create_study(storage=storage, study_name="direct", direction="maximize", pruner=make_pruner())
    trials_of(study, lambda _: None, study.tell)
    number = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "memory")
    memory = MemoryStudy(storage, number, "memory", make_pruner())
    trials_of(memory.optuna, lambda trial: memory.write(trial.number), memory.tell)
    tables = tables_of(storage, number)
    assert tables == tables_of(storage, study._study_id)
    assert all(tables)
    again = MemoryStudy(storage, number, "memory", make_pruner())
    assert str(content(again.optuna)[3]) == str(content(memory.optuna)[3])
    for read, known in zip(again.trials, memory.trials, strict=True):
        assert read.system_attrs.items() >= known.system_attrs.items()
        assert str(read.intermediate_values) == str(known.intermediate_values)
    let_go(storage)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("cut", Cut)
def test_a_study_in_memory_is_written_once_though_each_transaction_is_cut(
    storage: BaseStorage, proxy: Proxy, cut: Cut
) -> None:
    number = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "memory")
    memory, first = MemoryStudy(storage, number, "memory", make_pruner()), proxy.commits + 1
    proxy.cut = lambda commit: cut if (commit - first) % 2 == 0 else None
    trials_of(memory.optuna, lambda trial: memory.write(trial.number), memory.tell)
    proxy.cut = lambda commit: None
    assert proxy.commits > first + 10
    assert str(content(optuna.load_study(study_name="memory", storage=storage))) == str(content(memory.optuna))


def test_a_study_whose_creation_is_cut_is_created_once(home: Home, storage: BaseStorage, proxy: Proxy) -> None:
    first = proxy.commits + 1
    proxy.cut = lambda commit: Cut.AFTER if (commit - first) % 2 == 0 else None
    create_study(storage, "other", HEADER)
    proxy.cut = lambda commit: None
    assert [study.study_name for study in storage.get_all_studies()] == ["toy", "other"]
    assert load_study(storage, home, "other").uuid == "u"


def test_errors_of_a_statement_are_not_repeated(storage: BaseStorage, proxy: Proxy) -> None:
    """The codes are PostgreSQL's own: a full disk, too long a wait for a lock, a duplicate, a table that is missing."""
    engine = storage._backend.engine  # type: ignore[attr-defined]
    for code in ("53100", "55P03", "57014", "23505", "42P01"):
        with pytest.raises(sqlalchemy.exc.DBAPIError) as caught, engine.connect() as connection:
            connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
        assert not is_lost(caught.value), code
    with engine.connect() as connection:
        drop_all(proxy.url)
        with pytest.raises(sqlalchemy.exc.DBAPIError) as caught:
            connection.exec_driver_sql("SELECT 1")
    assert is_lost(caught.value)


# --- a database that does not answer ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_database_that_stays_away_is_given_up_in_one_line_and_sooner_once_stopped(
    home: Home, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "GIVE_UP_SECONDS", 1.5)
    monkeypatch.setattr(database_module, "STOP_SECONDS", 0.3)
    stopped = threading.Event()
    storage = open_storage(home, create=True, stopping=stopped.is_set)
    create_study(storage, "toy", HEADER)
    with study_lock(home, "toy") as lock:
        proxy.close()
        for call in (lambda: storage.get_all_trials(1), lock.check):
            began = time.monotonic()
            expected = r"^postgresql\+psycopg://127.0.0.1:\d+/\w+: the database did not answer for 1.5 seconds: .+$"
            with pytest.raises(StorageError, match=expected) as caught:
                call()
            assert "\n" not in str(caught.value)
            assert 1.5 <= time.monotonic() - began < 4
    stopped.set()
    with pytest.raises(StorageError, match=r"did not answer for 0\.3 seconds"):
        storage.get_all_trials(1)
    let_go(storage)


@pytest.mark.slow
def test_a_database_that_comes_back_is_waited_for_and_reported_twice(
    home: Home, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "searchfm")
    storage = open_storage(home, create=True)
    create_study(storage, "toy", HEADER)
    drop_all(proxy.url)
    assert storage.get_all_trials(1) == []
    assert caplog.messages == [], "a connection that is only dropped is not worth a line"
    proxy.close()
    back = threading.Timer(1.0, proxy.open)
    back.start()
    assert storage.get_all_trials(1) == []
    back.join()
    where = proxy.url.replace("postgresql://postgres@", "postgresql+psycopg://")
    assert caplog.messages == [
        f"{where} does not answer; waiting for it, up to 60 seconds",
        f"{where} answers again",
    ]
    let_go(storage)


# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(home: Home, storage: BaseStorage) -> Iterator[Lock]:
    with study_lock(home, "toy") as lock:
        lock.claim(storage, load_study(storage, home, "toy").number)
        yield lock


def other_process(url: str) -> sqlalchemy.Connection:
    """The connection of a coordinator on another host, which waits for its turn."""
    other = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
    connection = postgres_engine(other).connect()
    connection.exec_driver_sql("SET application_name = 'searchfm process 7 on elsewhere'")
    return connection


def test_a_lock_whose_connection_is_dropped_is_taken_again(home: Home, proxy: Proxy, lock: Lock) -> None:
    for _ in range(3):
        drop_all(proxy.url)
        lock.check()
        with pytest.raises(LockedError), study_lock(home, "toy"):
            pass


def test_a_lock_that_another_process_took_in_between_is_lost(proxy: Proxy, lock: Lock) -> None:
    with closing(other_process(proxy.url)) as other:
        pid = other.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        waiter = threading.Thread(target=advisory, args=(other, "SELECT pg_advisory_lock(:number)", "study/toy"))
        waiter.start()
        with psycopg.connect(proxy.url, autocommit=True) as admin:
            while not admin.execute("SELECT FROM pg_locks WHERE NOT granted AND pid = %s", [pid]).fetchall():
                time.sleep(0.01)
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
        waiter.join()
        expected = (
            "study 'toy': the lock on the database was lost: its connection was dropped, and process 7 on elsewhere"
        )
        with pytest.raises(StorageError, match=f"^{expected} has taken the study$"):
            lock.check()


def test_a_lock_that_another_process_took_and_released_in_between_is_lost(
    home: Home, proxy: Proxy, storage: BaseStorage, lock: Lock
) -> None:
    with psycopg.connect(proxy.url, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
    with study_lock(home, "toy") as other:
        other.claim(storage, load_study(storage, home, "toy").number)
    with pytest.raises(StorageError, match="its connection was dropped, and another process has taken the study"):
        lock.check()


@pytest.mark.slow(seconds=2)
def test_a_study_that_exists_is_claimed_with_its_lock(home: Home, proxy: Proxy, storage: BaseStorage) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its own storage ends with the process
        with locked_study(home, "toy") as (study, lock):
            drop_all(proxy.url)
            lock.check()
            storage.set_study_system_attr(study.number, OWNER, "another")
            drop_all(proxy.url)
            with pytest.raises(StorageError, match="another process has taken the study"):
                lock.check()
        gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("write", [lambda study: study.tell(0, 0.5), lambda study: study.ask()], ids=["tell", "ask"])
def test_no_call_is_repeated_once_another_process_has_taken_the_study(
    home: Home, proxy: Proxy, storage: BaseStorage, lock: Lock, write: Callable[[optuna.Study], object]
) -> None:
    mine = open_storage(home, check_lock=lock.check)
    study = rows_of(mine)
    storage.set_study_system_attr(study._study_id, OWNER, "another")
    drop_all(proxy.url)
    with pytest.raises(StorageError, match="another process has taken the study"):
        write(study)
    assert [trial.state.name for trial in rows_of(storage).get_trials()] == ["RUNNING"]
    let_go(mine)


def test_a_lock_that_the_server_has_not_released_yet_is_waited_for(
    home: Home, proxy: Proxy, storage: BaseStorage
) -> None:
    with study_lock(home, "toy") as lock:
        proxy.cut_clients(server_after=0.5)
        began = time.monotonic()
        lock.check()
        assert 0.3 < time.monotonic() - began < 5


def test_a_lock_dropped_without_a_check_is_released_in_silence(
    home: Home, proxy: Proxy, storage: BaseStorage, caplog: pytest.LogCaptureFixture
) -> None:
    with study_lock(home, "toy"):
        drop_all(proxy.url)
    with study_lock(home, "toy") as lock:
        lock.check()
    assert caplog.messages == []


def test_both_ends_of_a_connection_notice_within_seconds_that_the_other_is_gone(
    proxy: Proxy, storage: BaseStorage
) -> None:
    engines = (storage._backend.engine, postgres_engine(storage._backend.engine.url))  # type: ignore[attr-defined]
    for engine in engines:
        with engine.connect() as connection:
            connection.rollback()
            names = ("idle", "interval", "count")
            there = [connection.exec_driver_sql(f"SHOW tcp_keepalives_{name}").scalar() for name in names]
            assert [*there, connection.exec_driver_sql("SHOW tcp_user_timeout").scalar()] == ["5", "2", "3", "10000"]
            with socket.socket(fileno=os.dup(connection.connection.driver_connection.fileno())) as here:
                assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
                assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
