"""Storage and locks: a study is created once, one coordinator at a time, errors in one line."""

import dataclasses
import gc
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage

from searchfm.errors import LockedError, StorageError, StudyError, UserError
from searchfm.home import HOME, STORAGE, Home
from searchfm.records import Final, StudyHeader
from searchfm.search.database import failures, process_name
from searchfm.search.lock import request_stop, stop_requested, study_lock
from searchfm.search.storage import create_study, load_study, open_storage, study_names, write_record
from tests import rows
from tests.driving import let_go, stored
from tests.test_records import FINAL_1

HEADER = rows.header({"search": {"trials": 3}, "data": {"name": "digits"}}, uuid_="u", question="why?", planned=3)


@pytest.fixture
def storage(any_home: Home) -> Iterator[BaseStorage]:
    storage = open_storage(any_home, create=True)
    yield storage
    let_go(storage)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs the code, with HOME as its home."""
    head = (
        "import sys\nfrom pathlib import Path\nfrom searchfm.search.storage import *\nhome = Home(Path(sys.argv[1]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- every storage ----------------------------------------------------------------------------------------------------


def test_a_study_is_loaded_as_it_was_written(any_home: Home, storage: BaseStorage) -> None:
    create_study(storage, "toy", HEADER)
    study = load_study(storage, any_home, "toy")
    assert (study.name, study.uuid, study.question, study.digest) == ("toy", "u", "why?", "d" * 64)
    assert StudyHeader.from_json(storage.get_study_system_attrs(study.number)["searchfm"]) == HEADER
    assert (study.trials, study.best, study.folder) == ((), None, any_home.path / "studies" / "toy")
    write_record(storage, study.number, dataclasses.replace(HEADER, planned=5))
    assert load_study(storage, any_home, "toy").planned == 5
    assert study_names(storage) == ["toy"]


def test_another_connection_reads_a_recorded_result(any_home: Home, storage: BaseStorage) -> None:
    create_study(storage, "toy", HEADER)
    record = optuna.load_study(study_name="toy", storage=storage)
    trial = record.ask()
    trial.suggest_float("optimizer.lr", 0.1, 1.0, log=True)
    trial.report(0.5, 1)
    assert [row.state for row in stored(any_home, "toy").trials] == ["running"]
    record.tell(trial, 0.75)
    row = stored(any_home, "toy").trials[0]
    assert (row.state, row.value, row.reported, row.params) == ("complete", 0.75, {1: 0.5}, trial.params)


WRITE = """
storage = open_storage(home)
study = optuna.load_study(study_name="toy", storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
for number in range(12):
    trial = study.ask()
    trial.suggest_float("lr", 0.1, 1.0)
    trial.set_user_attr("config", {"number": number})
    for epoch in (1, 2, 3):
        trial.report(number + epoch / 10, epoch)
    study.tell(trial, number + 0.3)
"""


@pytest.mark.slow
def test_a_reader_sees_trials_grow_in_order_while_another_process_writes(any_home: Home, storage: BaseStorage) -> None:
    create_study(storage, "toy", HEADER)
    seen = load_study(storage, any_home, "toy")
    reads = 0
    with python(WRITE, any_home.path) as writer:
        while len(seen.of("complete")) < 12:
            assert writer.poll() in (None, 0)
            before, seen = seen, load_study(storage, any_home, "toy")
            reads += seen.trials != before.trials
            assert [row.number for row in seen.trials] == list(range(len(seen.trials)))
            assert len(seen.trials) >= len(before.trials)
            assert len(seen.of("running")) <= 1
            for row in seen.of("complete"):
                number, reported = row.number, {1: row.number + 0.1, 2: row.number + 0.2, 3: row.number + 0.3}
                assert (row.value, row.config, row.reported) == (number + 0.3, {"number": number}, reported)
                assert set(row.params) == {"lr"}
        assert writer.communicate(timeout=60) == ("", "")
    assert reads > 3


def test_a_final_model_is_kept_beside_the_header_and_replaced(any_home: Home, storage: BaseStorage) -> None:
    number = create_study(storage, "toy", HEADER)
    assert load_study(storage, any_home, "toy").final is None
    for seconds in (1.5, 2.5):
        final = dataclasses.replace(Final.from_json(json.loads(json.dumps(FINAL_1))), seconds=seconds)
        write_record(storage, number, final)
        study = load_study(storage, any_home, "toy")
        assert (study.final, study.uuid) == (final, "u")


def test_an_unknown_study_is_refused_naming_the_existing_ones(any_home: Home, storage: BaseStorage) -> None:
    with pytest.raises(StudyError, match=r"study 'toy' is not in .*; there is none yet"):
        load_study(storage, any_home, "toy")
    create_study(storage, "one", HEADER)
    create_study(storage, "two", HEADER)
    with pytest.raises(StudyError, match=r"study 'toy' is not in .*; there are one, two"):
        load_study(storage, any_home, "toy")


def test_a_foreign_study_is_neither_listed_nor_overwritten(any_home: Home, storage: BaseStorage) -> None:
    foreign = optuna.create_study(study_name="toy", storage=storage)
    foreign.set_user_attr("theirs", 1)
    assert study_names(storage) == []
    with pytest.raises(StudyError, match="study 'toy' is not in"):
        load_study(storage, any_home, "toy")
    with pytest.raises(StudyError, match="study 'toy' is in this database already; try again, or use --name"):
        create_study(storage, "toy", HEADER)


def test_a_study_whose_creator_died_between_its_writes_is_begun_by_the_next(
    any_home: Home, storage: BaseStorage
) -> None:
    storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "toy")  # and then a power cut
    create_study(storage, "toy", HEADER)
    assert load_study(storage, any_home, "toy").uuid == "u"
    with pytest.raises(StudyError, match="is in this database already"):
        create_study(storage, "toy", HEADER)


def test_a_storage_that_is_not_there_is_not_made_by_reading(any_home: Home) -> None:
    for _ in range(2):
        with pytest.raises(StudyError, match=r"home: holds no study yet; begin one with `searchfm tune`"):
            open_storage(any_home)
    assert not any_home.path.exists()


HOLD = """
with study_lock(home, "toy") as lock:
    print("held", flush=True)
    __import__("time").sleep(60)
"""


def test_a_held_study_is_refused_naming_process_and_host_and_others_are_free(any_home: Home) -> None:
    with python(HOLD, any_home.path) as holder, ExitStack() as stack:
        stack.callback(holder.kill)
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                LockedError, match=f"study 'toy' is held by process {holder.pid} on {socket.gethostname()}; "
            ),
            study_lock(any_home, "toy"),
        ):
            pass
        with study_lock(any_home, "other"):
            pass
    until = time.monotonic() + 10
    while True:  # the operating system releases it after the process has ended
        try:
            with study_lock(any_home, "toy"):
                break
        except LockedError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_the_holder_of_a_study_is_asked_to_stop_once(any_home: Home) -> None:
    with pytest.raises(StudyError, match="study 'a': no search or final training of it is running"):
        request_stop(any_home, "a")
    with study_lock(any_home, "a"):
        assert not stop_requested(any_home, "a")
        assert request_stop(any_home, "a") == process_name()
        assert stop_requested(any_home, "a")
        assert not stop_requested(any_home, "a")
        (any_home.study("a") / ".stop").write_text("process 1 on another host")
        assert not stop_requested(any_home, "a"), "an old request"


def test_a_claimed_lock_stays_held_through_its_checks(any_home: Home, storage: BaseStorage) -> None:
    number = create_study(storage, "toy", HEADER)
    with study_lock(any_home, "toy") as lock:
        lock.claim(storage, number)
        for _ in range(3):
            lock.check()
        with pytest.raises(LockedError), study_lock(any_home, "toy"):
            pass
    with study_lock(any_home, "toy") as lock:  # the next holder claims it anew
        lock.claim(storage, number)
        lock.check()


def test_a_released_lock_is_free_also_after_an_error(any_home: Home) -> None:
    with pytest.raises(ZeroDivisionError), study_lock(any_home, "toy"):
        1 / 0  # noqa: B018
    with study_lock(any_home, "toy"), pytest.raises(LockedError), study_lock(any_home, "toy"):
        pass
    with study_lock(any_home, "toy"):
        pass


FIRST = """
import json, os, traceback
from searchfm.records import Final, StudyHeader
def begin(name):
    home.probe()
    with study_lock(home, name):
        storage = open_storage(home, create=True)
        create_study(storage, name, StudyHeader.from_json(json.loads(sys.argv[2])))
        optuna.load_study(study_name=name, storage=storage).ask()
        return load_study(storage, home, name).trials[0].state == "running"
for i in range(20):
    if not os.fork():
        try:
            os._exit(not begin(f"toy-{i}"))
        except BaseException:
            traceback.print_exc()
            os._exit(2)
print([os.wait()[1] for i in range(20)])
"""


@pytest.mark.slow
def test_many_processes_begin_in_a_fresh_home_at_once(any_home: Home) -> None:
    with python(FIRST, any_home.path, json.dumps(HEADER.to_json())) as process:
        assert process.communicate(timeout=120) == (f"{[0] * 20}\n", "")
    storage = open_storage(any_home)
    assert sorted(study_names(storage)) == sorted(f"toy-{i}" for i in range(20))
    let_go(storage)


def test_tables_of_another_version_are_refused_and_kept(any_home: Home, storage: BaseStorage) -> None:
    create_study(storage, "toy", HEADER)
    with storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v2.4.0.a'")
        connection.exec_driver_sql("UPDATE version_info SET library_version = '2.4.0'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Optuna leaves the connection open that it refuses to use
        with pytest.raises(StorageError, match=r"no longer compatible with the table schema .* optuna storage upgrade"):
            open_storage(any_home)
        gc.collect()
    with storage._backend.engine.begin() as connection:  # type: ignore[attr-defined]
        assert connection.exec_driver_sql("SELECT count(*) FROM studies").scalar() == 1


# --- SQLite -----------------------------------------------------------------------------------------------------------


def test_a_reader_of_tables_that_this_optuna_made_has_all_of_its_storage_but_the_version_manager(home: Home) -> None:
    made, read = open_storage(home, create=True), open_storage(home)
    names = [vars(storage._backend).keys() for storage in (made, read)]  # type: ignore[attr-defined]
    assert names[0] - names[1] == {"_version_manager"}
    assert not names[1] - names[0]
    let_go(made)
    let_go(read)


def test_the_homes_own_database_is_a_file_in_wal_mode_whatever_the_homes_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "a home? #1 %20 ü")
    let_go(open_storage(home, create=True))
    assert (home.path / "optuna.db").is_file()
    with closing(sqlite3.connect(home.path / "optuna.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert sorted(path.name for path in tmp_path.iterdir()) == [home.path.name]


def test_every_commit_to_the_file_is_flushed_to_the_disk(home: Home) -> None:
    """With WAL and less than FULL, a power cut can lose a recorded trial: no test can cut the power."""
    opened = open_storage(home, create=True)
    with opened._backend.engine.connect() as connection:  # type: ignore[attr-defined]
        full = 2
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == full
    let_go(opened)


def test_the_lock_belongs_to_the_database_whatever_home_it_is_used_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, f"sqlite:///{tmp_path}/shared.db")
    with (
        study_lock(Home(tmp_path / "a"), "toy"),
        pytest.raises(LockedError, match=f"held by process {os.getpid()}"),
        study_lock(Home(tmp_path / "b"), "toy"),
    ):
        pass


def test_a_database_that_disappears_is_noticed(home: Home) -> None:
    let_go(open_storage(home, create=True))
    with study_lock(home, "toy") as lock:
        lock.check()
        (home.path / "optuna.db").unlink()
        with pytest.raises(StorageError, match=r"optuna.db: the database is gone"):
            lock.check()


def test_a_file_that_is_no_database_is_named(home: Home) -> None:
    home.path.mkdir()
    (home.path / "optuna.db").write_text("this is no database, but it is long enough to look like one" * 20)
    with pytest.raises(StorageError, match=r"optuna.db: the database cannot be opened: file is not a database"):
        open_storage(home)
    (home.path / "optuna.db").unlink()
    (home.path / "optuna.db").mkdir()
    with pytest.raises(StorageError, match="the database cannot be opened: unable to open database file"):
        open_storage(home, create=True)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def test_the_same_study_in_another_database_of_the_server_is_another(
    home: Home, postgres: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, database)
    with study_lock(home, "toy"):
        monkeypatch.setenv(STORAGE, postgres + "postgres")
        with study_lock(home, "toy") as lock:
            lock.check()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_usual_name_of_postgresql_is_understood(
    home: Home, database: str, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv(STORAGE, database.replace("postgresql", scheme, 1))
    let_go(open_storage(home, create=True))


def test_a_server_that_is_not_there_is_one_line_without_the_password(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE, "postgresql://somebody:secret@127.0.0.1:1/studies?application_name=secret")
    for attempt in (lambda: open_storage(home), lambda: study_lock(home, "toy").__enter__()):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert "127.0.0.1" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not home.path.exists()


@pytest.mark.parametrize(
    "query",
    [
        *("sslmode=secret", "channel_binding=secret", "target_session_attrs=secret", "load_balance_hosts=secret"),
        *("sslrootcert=secret&sslmode=verify-ca", "sslmode=require&sslmode=secret", "service=secret", "port=secret"),
        *("host=secret.invalid", "options=-c%20secret", "user=nobody&password=secret&sslmode=require"),
    ],
)
def test_no_value_of_the_query_is_shown(home: Home, database: str, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    """But its keys, and what the driver says of them."""
    monkeypatch.setenv(STORAGE, f"{database}?{query}")
    with pytest.raises(StorageError) as caught:
        open_storage(home, create=True)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_that_is_not_encoded_is_one_line_without_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for password in ("pass@secret", "pass@secret:word", "pass@1/secret"):
        monkeypatch.setenv(STORAGE, f"postgresql://somebody:{password}@127.0.0.1:1/studies")
        with pytest.raises(UserError) as caught:
            open_storage(home)
        assert str(caught.value).startswith(f"{STORAGE}: ")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["nonsense", "secret", "mysql://a:secret@b/c", "sqlite://", "sqlite:///:memory:", "redis://:secret@x", "http://x"],
)
def test_other_storages_are_refused_with_the_possible_ones(home: Home, monkeypatch: Any, url: str) -> None:
    monkeypatch.setenv(STORAGE, url)
    with pytest.raises(
        UserError, match=f"^{STORAGE}: must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST"
    ) as caught:
        open_storage(home, create=True)
    assert "secret" not in str(caught.value)
    assert not home.path.exists()


# --- homes ------------------------------------------------------------------------------------------------------------


def test_the_home_is_that_of_the_option_else_of_the_environment_else_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home.find().path == tmp_path / "runs"
    monkeypatch.setenv(HOME, "elsewhere")
    assert Home.find().path == tmp_path / "elsewhere"
    assert Home.find(Path("given")).path == tmp_path / "given"
    assert Home.find(Path("~/x")).path == Path.home() / "x"


def test_a_home_that_can_be_written_is_probed_without_leaving_a_trace(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    Home(tmp_path / "a" / "b").probe()
    Home(tmp_path).probe()
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["below a file", "a file", "too long", "a loop"])
def test_a_home_that_cannot_be_written_is_refused_and_nothing_is_created(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    path = {
        "below a file": tmp_path / "file" / "home",
        "a file": tmp_path / "file",
        "too long": tmp_path / ("x" * 300),
        "a loop": tmp_path / "loop" / "home",
    }[kind]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        UserError, match=r"cannot write the home folder \(.+\); name another with --home or SEARCHFM_HOME"
    ):
        Home(path).probe()
    with pytest.raises(UserError, match="cannot write the home folder"), study_lock(Home(path), "toy"):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_home_without_permission_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shut = Path(folder, "shut")
        shut.mkdir(mode=0o555)
        Path(folder).chmod(0o755)
        user = os.getresuid()
        if user[0] == 0:  # root may write anywhere
            os.setresuid(65534, 65534, 0)
        try:
            for path in (shut, shut / "home"):
                with pytest.raises(UserError, match=r"cannot write the home folder \(Permission denied\)"):
                    Home(path).probe()
                with pytest.raises(UserError, match=r"cannot write the home folder \(Permission denied\)"):
                    study_lock(Home(path), "toy").__enter__()
        finally:
            os.setresuid(*user)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_failures_of_disk_and_database_become_one_line_and_others_pass() -> None:
    with pytest.raises(StorageError, match=r"^here: \[Errno 28\] No space left on device$"), failures("here"):
        raise OSError(28, "No space left on device")
    with pytest.raises(StorageError, match=r"^here: database is locked$"), failures("here"):
        raise sqlite3.OperationalError("database is locked")
    with pytest.raises(StudyError, match=r"^mine$"), failures("here"):
        raise StudyError("mine")
    with pytest.raises(ZeroDivisionError), failures("here"):
        1 / 0  # noqa: B018


@pytest.mark.slow
def test_a_database_that_turns_read_only_is_one_line(home: Home) -> None:
    storage = open_storage(home, create=True)
    create_study(storage, "toy", HEADER)
    record = optuna.load_study(study_name="toy", storage=storage)
    engine = storage._backend.engine  # type: ignore[attr-defined]
    sqlalchemy.event.listen(engine, "checkout", lambda connection, *_: connection.execute("PRAGMA query_only = true"))
    expected = r"^study 'toy': attempt to write a readonly database$"
    with pytest.raises(StorageError, match=expected), failures("study 'toy'"):
        record.ask()
    let_go(storage)
    assert stored(home, "toy").trials == ()


def test_trials_are_read_as_optuna_reads_them(any_home: Home, storage: BaseStorage) -> None:
    rows.four(any_home)
    running = rows.ask(any_home)

    running.report(float("nan"), 1)
    running.report(float("inf"), 2)
    backend = storage._backend  # type: ignore[attr-defined]
    trials = backend._get_trials(1, None, set(), -1)
    expected = RDBStorage._get_trials(backend, 1, None, set(), -1)
    assert repr(trials) == repr(expected)  # also the order of params; NaN is unequal to itself
    assert len(trials) == 5
    assert repr(backend._get_trials(1, None, {2}, 3)) == repr([expected[1], *expected[3:]])
    assert repr(backend.get_trial(5)) == repr(expected[4])
    for unknown in (lambda: backend.get_trial(9), lambda: backend._get_trials(9, None, set(), -1)):
        with pytest.raises(KeyError):
            unknown()
    rows.forget(any_home)
