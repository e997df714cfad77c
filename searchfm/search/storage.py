"""Optuna's storage of a home, the records in it, and the lock of a study."""

import hashlib
import logging
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searchfm.errors import LockedError, StorageError, StudyError, UserError
from searchfm.home import STORAGE, Home, unwritable, write_json
from searchfm.records import EPOCHS, FORMAT, Final, State, StudyHeader, StudyRecord, TrainResult, Trial, read_epochs

STUDY, FINAL = "searchfm", "final"  # Optuna's study attributes that hold our records
STATES: Mapping[TrialState, State] = {  # the others are "running"
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
BUSY_SECONDS = 60.0  # timeout of a locked SQLite file
CONNECT_SECONDS = 10  # timeout of a connection to PostgreSQL


@contextmanager
def failures(where: str) -> Iterator[None]:
    """Raises StorageError for an error of a database or a disk, in one line that begins with `where`."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, OSError) as error:
        # Optuna's own text only guesses; SQLAlchemy's, with the statement, can be a page.
        wrapped = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
        cause = getattr(wrapped or error, "orig", None) or wrapped or error
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise StorageError(f"{where}: {line}") from error


def open_storage(home: Home, *, create: bool = False) -> BaseStorage:
    """Optuna's storage of a home. Raises StudyError where there is none yet, StorageError where it fails."""
    url = _url(home)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    opened = _open_sqlite if url.get_backend_name() == "sqlite" else _open_postgres
    hidden = url.render_as_string(hide_password=True)
    with failures(f"{hidden}: the database cannot be opened"):
        try:
            storage = opened(url, create)
        except ImportError as error:
            missing = f"{error.name}, which is not installed; install searchfm[postgres]"
            raise UserError(f"{STORAGE}: {hidden} needs {missing}") from None
        except RuntimeError as error:  # tables of another Optuna; its message names the command
            raise StorageError(f"{hidden}: {error}") from None
    if storage is None:
        raise StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")
    return storage


def _url(home: Home) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(home.optuna_url)
    except sqlalchemy.exc.ArgumentError:
        url = sqlalchemy.URL.create("nothing")  # the text may contain a password: do not show it
    if url.get_backend_name() in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise UserError(f"{STORAGE}: must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
    return url


class _Sqlite(sqlite3.Connection):
    """Flushes every commit to the disk. With WAL and NORMAL, a power cut can lose a finished trial."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.execute("PRAGMA synchronous=FULL")


def _open_sqlite(url: sqlalchemy.URL, create: bool) -> BaseStorage | None:
    path = Path(url.database or "")
    if not create and not path.is_file():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    # Optuna raises if several processes create the tables at once.
    with FileLock(path.with_suffix(".lock")):
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not block each other
        engine_kwargs: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS, "factory": _Sqlite}}
        return get_storage(RDBStorage(url.render_as_string(False), engine_kwargs=engine_kwargs))


def _open_postgres(url: sqlalchemy.URL, create: bool) -> BaseStorage | None:
    with _postgres(url) as connection:
        _advisory(connection, "SELECT pg_advisory_lock(:number)", "tables")
        if not create and not sqlalchemy.inspect(connection).has_table("studies"):
            return None
        engine_kwargs = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
        return get_storage(RDBStorage(url.render_as_string(False), engine_kwargs=engine_kwargs))


def study_names(storage: BaseStorage) -> list[str]:
    """The names of all studies that searchfm began, by age."""
    return [study.study_name for study in storage.get_all_studies() if STUDY in study.user_attrs]


def read_study(home: Home, name: str) -> StudyRecord:
    """A study of a home with all its trials. Raises StudyError, with the known names, for an unknown one."""
    return load_study(open_storage(home), home, name)


def read_studies(home: Home) -> list[StudyRecord]:
    """All studies of a home, by age; none where there is no database yet."""
    try:
        storage = open_storage(home)
    except StudyError:
        return []
    return [load_study(storage, home, name) for name in study_names(storage)]


def load_study(storage: BaseStorage, home: Home, name: str, ended: Mapping[int, Trial] | None = None) -> StudyRecord:
    """`read_study` through an open storage. ended: trials that were read after their end, which are not read again."""
    try:
        number = storage.get_study_id_from_name(name)
        attrs = storage.get_study_user_attrs(number)
    except KeyError:
        attrs = {}
    if STUDY not in attrs:
        names = ", ".join(study_names(storage))
        raise StudyError(f"study {name!r} is not in {home.path}; there {'are ' + names if names else 'is none yet'}")
    header = StudyHeader.from_json(attrs[STUDY], f"study {name!r}")
    final = attrs.get(FINAL)
    trials = storage.get_all_trials(number, deepcopy=False)
    return StudyRecord(
        **vars(header),
        name=name,
        number=number,
        folder=home.study(name),
        trials=tuple((ended or {}).get(t.number) or read_trial(t, home.trial(name, t.number)) for t in trials),
        final=None if final is None else Final.from_json(final, f"study {name!r}: final"),
    )


def read_trial(trial: FrozenTrial, folder: Path) -> Trial:
    """One trial: Optuna's record, which the caller has read already, then `epochs.csv` in its folder.

    In this order, a running trial's epochs are those that Optuna holds: the coordinator writes the file first.
    """
    attrs, state = trial.user_attrs, STATES.get(trial.state, "running")
    last = max(trial.intermediate_values, default=0)
    result = attrs.get("result")
    return Trial(
        number=trial.number,
        state=state,
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        params=dict(trial.params),
        config=attrs.get("config", {}),
        digest=attrs.get("digest", ""),
        twin=attrs.get("twin"),
        # An attempt that failed may have left one before its coordinator died: a later attempt's end counts.
        reason=attrs.get("reason") if state in ("pruned", "failed") else None,
        attempts=attrs.get("attempt", 1),
        reported=dict(sorted(trial.intermediate_values.items())),
        epochs=tuple(epoch for epoch in read_epochs(folder / EPOCHS) if epoch.index <= last),
        result=TrainResult.from_json(result, f"{folder.parent.name}, trial {trial.number}") if result else None,
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        folder=folder,
    )


def create_study(storage: BaseStorage, name: str, header: StudyHeader) -> None:
    """Creates a study with its header. Raises StudyError if the name is taken."""
    try:
        number = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    except optuna.exceptions.DuplicatedStudyError:
        number = storage.get_study_id_from_name(name)
        if storage.get_n_trials(number) or storage.get_study_user_attrs(number):
            raise StudyError(f"study {name!r} is in this database already; try again, or use --name") from None
        # Another coordinator died between the two writes below; this one begins its study.
    storage.set_study_system_attr(number, "study:metric_names", ["validation accuracy"])
    write_record(storage, number, header)  # last: without it, the study does not exist


def write_record(storage: BaseStorage, number: int, record: StudyHeader | Final) -> None:
    """Writes the header or the final model of a study, in place of an earlier one."""
    storage.set_study_user_attr(number, FINAL if isinstance(record, Final) else STUDY, record.to_json())


@contextmanager
def locked_study(home: Home, name: str) -> Iterator[tuple[StudyRecord, Callable[[], None]]]:
    """Holds the lock of a study that exists; yields it, and the lock's check (see `study_lock`).

    Upgrades records of an older format and keeps a copy of each in the study's folder. Raises StudyError for an
    unknown study, before its lock makes a folder.
    """
    storage = open_storage(home)
    load_study(storage, home, name)
    with failures(f"study {name!r}"), study_lock(home, name) as check:
        study = load_study(storage, home, name)
        attrs = storage.get_study_user_attrs(study.number)
        for key, kind in ((STUDY, StudyHeader), (FINAL, Final)):
            number = attrs.get(key, {}).get("format", 1)
            if key in attrs and number < FORMAT:
                write_json(study.folder / f"{key}-format-{number}.json", attrs[key])
                write_record(storage, study.number, kind.from_json(attrs[key]))
        yield study, check


def study_lock(home: Home, name: str) -> AbstractContextManager[Callable[[], None]]:
    """The lock of a study: one coordinator at a time. Yields a check, which raises StorageError after the lock is lost.

    Raises LockedError, with host and pid, if another process has it; UserError if the home cannot be written.
    """
    url = _url(home)
    return (_file_lock if url.get_backend_name() == "sqlite" else _postgres_lock)(url, name)


@contextmanager
def _file_lock(url: sqlalchemy.URL, name: str) -> Iterator[Callable[[], None]]:
    database = Path(url.database or "").absolute()
    folder = database.parent / "studies" / name  # beside the database, whatever home it is used from
    owner = folder / "owner"  # beside the lock: in some versions an attempt to lock empties the lock's own file
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(_process())
    except Timeout:
        holder = ""
        with suppress(OSError):  # the other process has not written it yet, or has just unlocked
            holder = owner.read_text()
        raise _locked(name, holder) from None
    except OSError as error:
        lock.release()
        raise unwritable(folder, error) from None

    def check() -> None:
        # SQLite continues to write into a deleted file, which no process will ever read.
        if not database.exists():
            raise StorageError(f"{database}: the database is gone")

    try:
        yield check
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _postgres_lock(url: sqlalchemy.URL, name: str) -> Iterator[Callable[[], None]]:
    """An advisory lock lives as long as its connection, so `check` uses the connection."""
    where = f"study {name!r}: the lock on the database"
    holder = (
        "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE a.datname = current_database() AND l.locktype = 'advisory' AND l.granted"
        " AND ((CAST(l.classid AS bigint) << 32) | CAST(l.objid AS bigint)) = :number"
    )
    with ExitStack() as stack:
        with failures(where):
            connection = stack.enter_context(_postgres(url))
            if not _advisory(connection, "SELECT pg_try_advisory_lock(:number)", f"study/{name}"):
                raise _locked(name, str(_advisory(connection, holder, f"study/{name}") or "").removeprefix("searchfm "))

        def check() -> None:
            with failures(f"{where} was lost"):
                connection.scalar(sqlalchemy.text("SELECT 1"))

        yield check


@contextmanager
def _postgres(url: sqlalchemy.URL) -> Iterator[sqlalchemy.Connection]:
    """A separate connection; its application name has the pid and host that `LockedError` names."""
    arguments = {"application_name": f"searchfm {_process()}", "connect_timeout": CONNECT_SECONDS}
    engine = sqlalchemy.create_engine(
        url, connect_args=arguments, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as connection:
        yield connection


def _advisory(connection: sqlalchemy.Connection, query: str, name: str) -> Any:
    """The result of a query about an advisory lock, whose number is a hash of its name."""
    sha256 = hashlib.sha256(f"searchfm/{name}".encode()).digest()
    return connection.scalar(sqlalchemy.text(query), {"number": int.from_bytes(sha256[:8], "big", signed=True)})


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()[:30]}"  # PostgreSQL cuts a name to 63 characters


def _locked(name: str, holder: str) -> LockedError:
    holder = holder or "another process"
    return LockedError(f"study {name!r} is held by {holder}; wait for it, stop it, or begin another with --name")
