"""Where a search lives: the home folder, Optuna's storage in it or elsewhere, and the lock of a study."""

import hashlib
import json
import logging
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection

from searchfm.errors import LockedError, StorageError, StudyError, UserError
from searchfm.home import STORAGE, Home, unwritable
from searchfm.search.history import StudyRow, trial_row

BUSY_SECONDS = 60.0  # how long a locked SQLite file is waited for
CONNECT_SECONDS = 10  # how long a PostgreSQL server is waited for


@contextmanager
def failures(where: str) -> Iterator[None]:
    """What a database or a disk raises within becomes StorageError, in one line that begins with `where`."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, OSError) as error:
        raise StorageError(f"{where}: {_line(error)}") from error


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
            raise UserError(
                f"{STORAGE}: {hidden} needs {error.name}, which is not installed; install searchfm[postgres]"
            ) from None
        except RuntimeError as error:  # tables of another version of Optuna, which says so and what to type
            raise StorageError(f"{hidden}: {error}") from None
    if storage is None:
        raise StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")
    return storage


def _url(home: Home) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(home.optuna_url)
    except sqlalchemy.exc.ArgumentError:
        url = sqlalchemy.URL.create("nothing")  # what came may hold a password, and is not shown
    if url.get_backend_name() in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise UserError(f"{STORAGE}: must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
    return url


class _Sqlite(sqlite3.Connection):
    """Flushes every commit to the disk. With WAL and NORMAL, a power cut can lose a trial that was told already."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.execute("PRAGMA synchronous=FULL")


def _open_sqlite(url: sqlalchemy.URL, create: bool) -> BaseStorage | None:
    path = Path(url.database or "")
    if not create and not path.is_file():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that create the tables at once trip over each other.
    with FileLock(path.with_suffix(".lock")):
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not block each other
        engine_kwargs: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS, "factory": _Sqlite}}
        return get_storage(RDBStorage(url.render_as_string(False), engine_kwargs=engine_kwargs))


def _open_postgres(url: sqlalchemy.URL, create: bool) -> BaseStorage | None:
    with _postgres(url) as connection:
        connection.scalar(sqlalchemy.text("SELECT pg_advisory_lock(:number)"), {"number": _number("tables")})
        if not create and not sqlalchemy.inspect(connection).has_table("studies"):
            return None
        engine_kwargs = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
        return get_storage(RDBStorage(url.render_as_string(False), engine_kwargs=engine_kwargs))


def study_names(storage: BaseStorage) -> list[str]:
    """The names of all studies that searchfm began, by age."""
    return [study.study_name for study in storage.get_all_studies() if "searchfm" in study.user_attrs]


def load_study(storage: BaseStorage, home: Home, name: str) -> StudyRow:
    """A study with all its trials, as rows. Raises StudyError for one that is not there, naming those that are."""
    try:
        study_id = storage.get_study_id_from_name(name)
        attrs = storage.get_study_user_attrs(study_id)
    except KeyError:
        attrs = {}
    if "searchfm" not in attrs:
        names = study_names(storage)
        raise StudyError(f"study {name!r} is not in {home.path}; there {_are(names)}")
    kept: dict[str, Any] = attrs["searchfm"]
    return StudyRow(
        name=name,
        uuid=kept["uuid"],
        number=study_id,
        resolved=kept["resolved"],
        file=kept["file"],
        question=kept["question"],
        digest=kept["digest"],
        planned=kept["trials"],
        data=kept["data"],
        folder=home.study(name),
        trials=tuple(
            trial_row(trial, home.trial(name, trial.number))
            for trial in storage.get_all_trials(study_id, deepcopy=False)
        ),
        final=attrs.get("final"),
    )


def create_study(storage: BaseStorage, name: str, kept: dict[str, Any]) -> None:
    """Writes a study down with all that identifies it (see `StudyRow`), in one step."""
    try:
        study_id = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    except optuna.exceptions.DuplicatedStudyError:
        study_id = storage.get_study_id_from_name(name)
        if storage.get_n_trials(study_id) or storage.get_study_user_attrs(study_id):
            raise StudyError(f"study {name!r} is in this database already; try again, or use --name") from None
        # A coordinator died between the two writes below: its study is ours to begin.
    storage.set_study_system_attr(study_id, "study:metric_names", ["validation accuracy"])
    update_study(storage, study_id, kept)  # last: without it, the study is not there


def update_study(storage: BaseStorage, study_id: int, kept: dict[str, Any]) -> None:
    """Writes down what is known of a study."""
    storage.set_study_user_attr(study_id, "searchfm", kept)


def write_final(storage: BaseStorage, study_id: int, final: Mapping[str, Any]) -> None:
    """Writes down what the final training of a study gave (plain values), in place of an earlier one."""
    storage.set_study_user_attr(study_id, "final", dict(final))


@contextmanager
def study_lock(home: Home, name: str) -> Iterator[Callable[[], None]]:
    """Holds the study: one coordinator at a time. Yields a check to call now and then, which raises StorageError once
    the lock or the database is gone. Raises LockedError, naming the holder's host and pid, if another has it;
    UserError if the home cannot be written.
    """
    url = _url(home)
    lock = _file_lock if url.get_backend_name() == "sqlite" else _postgres_lock
    with lock(url, name) as check:
        yield check


@contextmanager
def _file_lock(url: sqlalchemy.URL, name: str) -> Iterator[Callable[[], None]]:
    database = Path(url.database or "").absolute()
    folder = database.parent / "studies" / name  # beside the database, whatever home it is used from
    owner = folder / "owner.json"  # beside the lock: in some versions an attempt to lock empties the lock's own file
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    except Timeout:
        try:
            holder = json.loads(owner.read_text())
        except (OSError, ValueError):
            holder = {}
        raise LockedError(_locked(name, holder.get("host", "?"), holder.get("pid", "?"))) from None
    except OSError as error:
        lock.release()
        raise unwritable(folder, error) from None

    def check() -> None:
        # SQLite goes on writing into a file that was deleted, and nobody would ever read it.
        if not database.exists():
            raise StorageError(f"{database}: the database is gone")

    try:
        yield check
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _postgres_lock(url: sqlalchemy.URL, name: str) -> Iterator[Callable[[], None]]:
    """An advisory lock lives as long as its connection, so the connection is what is watched."""
    where = f"study {name!r}: the lock on the database"
    number = _number(f"study/{name}")
    holder = sqlalchemy.text(
        "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_database d"
        " ON d.oid = l.database WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.granted"
        " AND l.classid = CAST(:high AS bigint) AND l.objid = CAST(:low AS bigint)"
    )
    with ExitStack() as stack:
        with failures(where):
            connection = stack.enter_context(_postgres(url))
            held = connection.scalar(sqlalchemy.text("SELECT pg_try_advisory_lock(:number)"), {"number": number})
            if not held:
                unsigned = number % 2**64
                found = connection.scalar(holder, {"high": unsigned >> 32, "low": unsigned % 2**32})
                _, host, pid = str(found or "searchfm ? ?").split()
                raise LockedError(_locked(name, host, pid))

        def check() -> None:
            with failures(f"{where} was lost"):
                connection.scalar(sqlalchemy.text("SELECT 1"))

        yield check


@contextmanager
def _postgres(url: sqlalchemy.URL) -> Iterator[sqlalchemy.Connection]:
    """A connection of its own, which carries our host and pid for those who ask who holds a lock."""
    me = f"searchfm {socket.gethostname()[:30]} {os.getpid()}"
    arguments = {"application_name": me, "connect_timeout": CONNECT_SECONDS}
    engine = sqlalchemy.create_engine(
        url, connect_args=arguments, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as connection:
        yield connection


def _number(name: str) -> int:
    """What an advisory lock is called: PostgreSQL knows them by number."""
    return int.from_bytes(hashlib.sha256(f"searchfm/{name}".encode()).digest()[:8], "big", signed=True)


def _locked(name: str, host: str, pid: object) -> str:
    return f"study {name!r} is held by process {pid} on {host}; wait for it, stop it, or begin another with --name"


def _are(names: list[str]) -> str:
    return f"are {', '.join(names)}" if names else "is none yet"


def _line(error: BaseException) -> str:
    """The first line of an error, which from a database can be a page."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__  # Optuna's own text only guesses
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__
