"""Optuna's storage of a home, and the records in it."""

import importlib
import logging
import sqlite3
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import BaseStorage, get_storage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searchfm.errors import DamagedError, StorageError, StudyError, UserError, one_line, one_of
from searchfm.format import sentence
from searchfm.home import STORAGE, Home, make_folder, sqlite_url, write_json
from searchfm.records import FORMAT, Final, State, StoredEpochs, StudyHeader, StudyRecord, TrainResult, Trial
from searchfm.search.database import (
    BUSY_SECONDS,
    RESTORE,
    advisory,
    can_write,
    database_url,
    failures,
    name_damage,
    never,
    postgres_engine,
    read_sqlite,
    retry,
    shown_url,
)
from searchfm.search.lock import Lock, study_lock
from searchfm.search.rdb import ReconnectingStorage, RowStorage, backend, no_collection

# Optuna's system attributes of a study that hold our records. Up to 0.3.0 they were user attributes, which
# optuna-dashboard shows: user attributes of these names are now a format that 0.3.0 refuses, and a sentence.
STUDY, FINAL = "searchfm", "final"
MOVED = 3
ROWS = 10_000  # of a table, copied at a time
STATES: Mapping[TrialState, State] = {  # the others are "running"
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def import_ahead() -> None:
    """Imports what `open_storage` needs, 0.15 of its first 0.34 s of CPU (Xeon at 2.5 GHz). Writes nothing."""
    importlib.import_module("alembic.command")


def open_storage(
    home: Home,
    *,
    create: bool = False,
    stopping: Callable[[], bool] = never,
    check_lock: Callable[[], None] | None = None,
) -> BaseStorage:
    """Optuna's storage of a home. Raises StudyError where there is none yet, StorageError where it fails or is lost.

    Its calls survive dropped connections to PostgreSQL; stopping, check_lock: see `database.retry`. A command that
    holds a lock waits for the database here too; any other fails at once if it does not answer.
    """
    url = database_url(home)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    hidden = shown_url(url)

    def opened(_repeated: bool = False) -> BaseStorage | None:
        if url.get_backend_name() == "sqlite":
            return _open_sqlite(url, create)
        return _open_postgres(url, create, stopping, check_lock or (lambda: None))

    with failures(f"{hidden}: the database cannot be opened"):
        try:
            storage = retry(opened, hidden, stopping, check_lock) if check_lock else opened()
        except ImportError as error:
            missing = f"{error.name}, which is not installed; install searchfm[postgres]"
            raise UserError(f"{STORAGE}: {hidden} needs {missing}") from None
        except RuntimeError as error:  # tables of another Optuna; its message names the command
            raise StorageError(f"{hidden}: {error}") from None
    if storage is None:
        raise _lost_database(home, url) or no_study(home)
    return storage


def no_study(home: Home) -> StudyError:
    """The error for a home without any study."""
    return StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")


def _lost_database(home: Home, url: sqlalchemy.URL) -> StorageError | None:
    """The error for a missing or emptied database of a home that has trials; None where there are none, or where the
    database is not the home's own file.
    """
    names = [name for name in home.studies() if home.has_trials(name)]
    path = Path(url.database or "")
    if not names or url.get_backend_name() != "sqlite" or path.absolute().parent != home.path:
        return None
    which = f"studies/{names[0]}" if len(names) == 1 else f"{len(names)} folders of studies/"
    state = "empty" if path.exists() else "missing"  # empty of studies too
    return StorageError(
        f"{path}: is {state}, but {which} in {home.path} has trials of it: {RESTORE}; "
        f"to begin again without them, move {home.path / 'studies'} away or name another --home"
    )


class _Sqlite(sqlite3.Connection):
    """Flushes every commit to the disk. With WAL and NORMAL, a power cut can lose a finished trial."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.execute("PRAGMA synchronous=FULL")


def _open_sqlite(url: sqlalchemy.URL, create: bool) -> BaseStorage | None:
    path = Path(url.database or "")
    if not create:
        # An emptied file is not opened: SQLite would delete its file -wal, which may still be of use.
        if not path.exists() or (path.is_file() and not path.stat().st_size):
            return None
        if path.is_dir():
            raise StorageError(f"{path}: is a folder, and must be a file; {RESTORE}")
        if not can_write(path):
            return _open_read_only(url, path)
    make_folder(path.parent)
    # Optuna raises if several processes create the tables at once.
    with FileLock(path.with_suffix(".lock")):
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            if not create and not _has_tables(connection):
                return None
            connection.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not block each other
            ours = not create and _made_by(connection) == optuna.__version__
        return _row_storage(url, ours, connect_args={"timeout": BUSY_SECONDS, "factory": _Sqlite})


def _open_read_only(url: sqlalchemy.URL, path: Path) -> BaseStorage | None:
    """That of a file which cannot be written. Each query has a connection of its own: see `read_sqlite`."""
    with closing(read_sqlite(path)) as connection:
        if not _has_tables(connection):
            return None
        ours = _made_by(connection) == optuna.__version__
    return _row_storage(url, ours, creator=partial(read_sqlite, path), poolclass=sqlalchemy.NullPool)


def _row_storage(url: sqlalchemy.URL, ours: bool, **engine_kwargs: Any) -> BaseStorage:
    storage = RowStorage(url.render_as_string(False), engine_kwargs, check=not ours)
    sqlalchemy.event.listen(storage.engine, "handle_error", name_damage)
    return get_storage(storage)


def _has_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchone() is not None


def _made_by(connection: sqlite3.Connection) -> str | None:
    """The version of Optuna that made the tables, or upgraded them last; None where it is unknown."""
    with suppress(sqlite3.Error):
        row = connection.execute("SELECT library_version FROM version_info").fetchone()
        return None if row is None else str(row[0])
    return None


def _open_postgres(
    url: sqlalchemy.URL, create: bool, stopping: Callable[[], bool], check_lock: Callable[[], None]
) -> BaseStorage | None:
    with closing(postgres_engine(url).connect()) as connection:
        advisory(connection, "SELECT pg_advisory_lock(:number)", "tables")
        if not create and not sqlalchemy.inspect(connection).has_table("studies"):
            return None
        return get_storage(ReconnectingStorage(url, stopping=stopping, check_lock=check_lock))


def copy_storage(storage: BaseStorage, home: Home, path: Path) -> None:
    """Copies Optuna's database of a home, as it is at one moment, into a SQLite file that does not exist. Processes may
    write it meanwhile. Of a server's, only the studies of this home. Raises sqlite3.Error, SQLAlchemyError, OSError.
    """
    url = database_url(home)
    if url.get_backend_name() == "sqlite":
        with closing(read_sqlite(Path(url.database or ""))) as source, closing(sqlite3.connect(path)) as copy:
            source.backup(copy)
        return
    target = RowStorage(sqlite_url(path), {})  # makes the tables, and the one row of `version_info`
    tables = [each for each in models.BaseModel.metadata.sorted_tables if each.name != "version_info"]
    engine = backend(storage).engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as source, target.engine.begin() as copy:
        for table in tables:
            rows = source.execution_options(yield_per=ROWS).execute(sqlalchemy.select(table))
            for part in rows.mappings().partitions():
                copy.execute(sqlalchemy.insert(table), [dict(row) for row in part])
    engine.dispose()
    stored = get_storage(target)
    for name in study_names(stored):
        if is_elsewhere(home, name):
            delete_study(stored, stored.get_study_id_from_name(name))
    target.engine.dispose()


def study_names(storage: BaseStorage) -> list[str]:
    """The names of all studies that searchfm began, by age. Raises StorageError."""
    with _reading(shown_url(backend(storage).engine.url)):
        return [study.study_name for study in storage.get_all_studies() if STUDY in study.user_attrs]


def is_elsewhere(home: Home, name: str) -> bool:
    """Whether a study in the database of a server is of another home: it has no folder in this one."""
    return database_url(home).get_backend_name() != "sqlite" and not home.study(name).is_dir()


def read_study(home: Home, name: str) -> StudyRecord:
    """A study of a home with all its trials. Raises StudyError, with the known names, for an unknown one."""
    return load_study(open_storage(home), home, name)


def read_studies(home: Home) -> list[StudyRecord]:
    """All studies of a home, by age; none where there is no database yet. Raises StorageError."""
    try:
        storage = open_storage(home)
    except StudyError:
        return []
    names = study_names(storage)
    if not names and (error := _lost_database(home, database_url(home))) is not None:
        raise error
    return [load_study(storage, home, name) for name in names]


def read_again(home: Home, name: str | None = None) -> Iterator[list[StudyRecord]]:
    """A study, or all of a home, as they stand at each step; a trial that has ended is read once. Raises StudyError for
    an unknown study.
    """
    storage: BaseStorage | None = None
    ended: dict[str, dict[int, Trial]] = {}
    while True:
        try:
            storage = storage or open_storage(home)
        except StudyError:  # no study yet
            if name is not None:
                raise
            yield []
            continue
        names = study_names(storage) if name is None else [name]
        studies = [load_study(storage, home, each, ended.get(each)) for each in names]
        ended = {study.name: {t.number: t for t in study.trials if t.state != "running"} for study in studies}
        yield studies


def load_study(storage: BaseStorage, home: Home, name: str, ended: Mapping[int, Trial] | None = None) -> StudyRecord:
    """`read_study` through an open storage. ended: trials that were read after their end, which are not read again."""
    has_trials = home.has_trials(name)  # first: a trial is in the database before it has a folder
    with _reading(f"study {name!r}"):
        try:
            number = storage.get_study_id_from_name(name)
            attrs = read_attrs(storage, number)
        except KeyError:
            attrs = {}
        if STUDY not in attrs:
            if has_trials:
                raise StorageError(
                    f"study {name!r}: {home.study(name)} has trials of it, but it is not in the database: "
                    f"{RESTORE}, move the folder away, or name another study"
                )
            names = one_of(name, study_names(storage))
            raise StudyError(
                f"study {name!r} is not in {home.path}; there {'are ' + names if names else 'is none yet'}"
            )
        header = StudyHeader.from_json(attrs[STUDY], f"study {name!r}")
        final = attrs.get(FINAL)
        folder, ended = home.study(name), ended or {}
        with no_collection():
            trials = storage.get_all_trials(number, deepcopy=False)
            records = tuple(ended.get(t.number) or read_trial(t, folder / f"{t.number:04d}") for t in trials)
        return StudyRecord(
            **vars(header),
            name=name,
            number=number,
            folder=folder,
            trials=records,
            final=None if final is None else Final.from_json(final, f"study {name!r}: final"),
        )


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Raises StorageError for what a database cannot return, and for rows that were damaged where SQLite keeps no
    checksum: JSON, times and states of any text.
    """
    with failures(where):
        try:
            yield
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            raise DamagedError(
                f"{where}: a record cannot be read ({text}); see `searchfm check`, and {RESTORE}"
            ) from error


def read_trial(trial: FrozenTrial, folder: Path) -> Trial:
    """One trial: Optuna's record, which the caller has read already, then `epochs.csv` in its folder.

    In this order, a running trial's epochs are those that Optuna holds: the coordinator writes the file first.
    """
    attrs, state = trial.user_attrs, STATES.get(trial.state, "running")
    last = max(trial.intermediate_values, default=0)
    result, epochs = attrs.get("result"), StoredEpochs(folder, last)
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
        epochs=epochs[:] if state == "running" else epochs,  # those of a running trial now
        result=TrainResult.from_json(result, f"{folder.parts[-2]}, trial {trial.number}") if result else None,
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        folder=folder,
        first=attrs.get("first"),
        paused=attrs.get("paused") if state == "running" else None,
    )


def create_study(storage: BaseStorage, name: str, header: StudyHeader) -> int:
    """Creates a study with its header; returns its number. Raises StudyError if the name is taken."""
    try:
        number = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    except optuna.exceptions.DuplicatedStudyError:
        number = storage.get_study_id_from_name(name)
        if storage.get_n_trials(number) or storage.get_study_user_attrs(number):
            raise StudyError(f"study {name!r} is in this database already; try again, or use --name") from None
        # Another coordinator died between the writes below; this one begins its study.
    storage.set_study_system_attr(number, "study:metric_names", ["validation accuracy"])
    write_record(storage, number, header)  # last: without it, the study does not exist
    return number


def delete_study(storage: BaseStorage, number: int) -> None:
    """Deletes a study with its trials. A repeated call, after a lost connection, deletes nothing more."""
    with suppress(KeyError):
        storage.delete_study(number)


def write_record(storage: BaseStorage, number: int, record: StudyHeader | Final) -> None:
    """Writes the header or the final model of a study, in place of an earlier one, and what optuna-dashboard shows."""
    if isinstance(record, Final):
        storage.set_study_system_attr(number, FINAL, record.to_json())
        storage.set_study_user_attr(number, FINAL, sentence(record))
        return
    storage.set_study_system_attr(number, STUDY, record.to_json())
    marker = {"format": MOVED, "version": record.version}
    storage.set_study_user_attr(number, STUDY, marker)  # see `study_names`
    data, name = record.data, record.resolved["data"]["name"]
    counts = f"{data.train:,} images to train on, {data.validation:,} to validate, {len(data.classes)} classes"
    table = {
        "question": record.question,
        "data": f"{name}: {counts}",
        "command": textwrap.shorten(record.command, 200, placeholder=" ..."),
    }
    for key, text in table.items():
        if text:
            storage.set_study_user_attr(number, key, text)


def read_attrs(storage: BaseStorage, number: int) -> dict[str, Any]:
    """The records of a study as plain values, wherever this or an earlier version wrote them. Raises KeyError."""
    shown, attrs = storage.get_study_user_attrs(number), storage.get_study_system_attrs(number)
    old = {key: shown[key] for key in (STUDY, FINAL) if isinstance(shown.get(key), dict) and key not in attrs}
    return old | {key: attrs[key] for key in (STUDY, FINAL) if key in attrs}


@contextmanager
def locked_study(home: Home, name: str, stopping: Callable[[], bool] = never) -> Iterator[tuple[StudyRecord, Lock]]:
    """Holds the lock of a study that exists (see `study_lock`), and claims it.

    Upgrades records of an older format, with a copy of each in the study's folder, and moves them from where 0.3.0 kept
    them. Raises StudyError for an unknown study, before its lock makes a folder.
    """
    storage = open_storage(home, stopping=stopping)
    load_study(storage, home, name)
    with failures(f"study {name!r}"), study_lock(home, name, stopping) as lock:
        study = load_study(storage, home, name)
        lock.claim(storage, study.number)
        attrs, system = read_attrs(storage, study.number), storage.get_study_system_attrs(study.number)
        for key, kind in ((STUDY, StudyHeader), (FINAL, Final)):
            number = attrs.get(key, {}).get("format", 1)
            if key in attrs and number < FORMAT:
                write_json(study.folder / f"{key}-format-{number}.json", attrs[key])
            if key in attrs and (number < FORMAT or key not in system):
                write_record(storage, study.number, kind.from_json(attrs[key]))
        yield study, lock
