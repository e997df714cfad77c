"""Optuna's storage of a home, and the records in it."""

import importlib
import logging
import sqlite3
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import BaseStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searchfm.errors import StorageError, StudyError, UserError, one_of
from searchfm.format import sentence
from searchfm.home import STORAGE, Home, write_json
from searchfm.records import FORMAT, Final, State, StoredEpochs, StudyHeader, StudyRecord, TrainResult, Trial
from searchfm.search.database import advisory, database_url, failures, never, postgres_engine, retry
from searchfm.search.lock import Lock, study_lock
from searchfm.search.rdb import ReconnectingStorage, RowStorage, no_collection

# Optuna's system attributes of a study that hold our records. Up to 0.3.0 they were user attributes, which
# optuna-dashboard shows: user attributes of these names are now a format that 0.3.0 refuses, and a sentence.
STUDY, FINAL = "searchfm", "final"
MOVED = 3
STATES: Mapping[TrialState, State] = {  # the others are "running"
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
BUSY_SECONDS = 60.0  # timeout of a locked SQLite file


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
    """Optuna's storage of a home. Raises StudyError where there is none yet, StorageError where it fails.

    Its calls survive dropped connections to PostgreSQL; stopping, check_lock: see `database.retry`. A command that
    holds a lock waits for the database here too; any other fails at once if it does not answer.
    """
    url = database_url(home)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    hidden = url.render_as_string(hide_password=True)

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
        raise no_study(home)
    return storage


def no_study(home: Home) -> StudyError:
    """The error for a home without any study."""
    return StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")


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
            ours = not create and _made_by(connection) == optuna.__version__
        engine_kwargs: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS, "factory": _Sqlite}}
        return get_storage(RowStorage(url.render_as_string(False), engine_kwargs, check=not ours))


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
    try:
        number = storage.get_study_id_from_name(name)
        attrs = read_attrs(storage, number)
    except KeyError:
        attrs = {}
    if STUDY not in attrs:
        names = one_of(name, study_names(storage))
        raise StudyError(f"study {name!r} is not in {home.path}; there {'are ' + names if names else 'is none yet'}")
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
    them. Raises StudyError for an
    unknown study, before its lock makes a folder.
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
