"""The lock of a study: one coordinator at a time. A file for SQLite, an advisory lock for PostgreSQL."""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage

from searchfm.errors import LockedError, StorageError, StudyError
from searchfm.home import LOCK_FILE, OWNER_FILE, STOP_FILE, Home, make_folder, unwritable, write_whole
from searchfm.search.database import (
    advisory,
    database_url,
    failures,
    never,
    postgres_engine,
    process_name,
    retry,
    shown_url,
)

OWNER = "searchfm:owner"  # Optuna's system attribute of a study: a uuid of the latest holding of its lock
# The application name of the connection that holds a lock.
HOLDER = (
    "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
    " WHERE a.datname = current_database() AND l.locktype = 'advisory' AND l.granted"
    " AND ((CAST(l.classid AS bigint) << 32) | CAST(l.objid AS bigint)) = :number"
)


@dataclass(frozen=True)
class Lock:
    """The lock of a study, held by this process.

    check: raises StorageError once it is lost, and takes it again where only its connection was.
    claim: writes the owner into the study (storage, number), before anything else is written there. The lock is taken
    again only while that is the owner.
    """

    check: Callable[[], None]
    claim: Callable[[BaseStorage, int], None] = lambda storage, number: None


def study_lock(home: Home, name: str, stopping: Callable[[], bool] = never) -> AbstractContextManager[Lock]:
    """Holds the lock of a study: one coordinator at a time. A new study is claimed once it exists.

    stopping: see `database.retry`. Raises LockedError, with host and pid, if another process has it; UserError if the
    home cannot be written.
    """
    url = database_url(home)
    return _file_lock(url, name) if url.get_backend_name() == "sqlite" else _postgres_lock(url, name, stopping)


def _lock_folder(url: sqlalchemy.URL, name: str) -> Path:
    """Beside the database, whatever home it is used from."""
    return Path(url.database or "").absolute().parent / "studies" / name


@contextmanager
def _file_lock(url: sqlalchemy.URL, name: str) -> Iterator[Lock]:
    database, folder = Path(url.database or "").absolute(), _lock_folder(url, name)
    owner = folder / OWNER_FILE  # beside the lock: in some versions an attempt to lock empties the lock's own file
    lock = FileLock(folder / LOCK_FILE)
    try:
        make_folder(folder)
        lock.acquire(timeout=0)
        owner.write_text(process_name())
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
        yield Lock(check)
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _postgres_lock(url: sqlalchemy.URL, name: str, stopping: Callable[[], bool]) -> Iterator[Lock]:
    lock = _AdvisoryLock(url, name, stopping)
    with failures(lock.where):
        holder = lock.acquire()
    if holder is not None:
        raise _locked(name, holder)
    try:
        yield Lock(lock.check, lock.claim)
    finally:
        lock.close()


class _AdvisoryLock:
    """An advisory lock of PostgreSQL, which lives as long as its connection. Any thread may check it."""

    def __init__(self, url: sqlalchemy.URL, name: str, stopping: Callable[[], bool]) -> None:
        self.where = f"study {name!r}: the lock on the database"
        self._database = shown_url(url)
        self._engine, self._key, self._stopping = postgres_engine(url), f"study/{name}", stopping
        self._connection: sqlalchemy.Connection | None = None
        self._checking = threading.Lock()  # a connection is for one thread at a time
        self._owner = uuid.uuid4().hex
        self._number: int | None = None  # of the study, once it is claimed

    def acquire(self) -> str | None:
        """Takes the lock on a new connection; returns None, or the process that holds it."""
        with ExitStack() as stack:
            connection = stack.enter_context(self._engine.connect())
            if not advisory(connection, "SELECT pg_try_advisory_lock(:number)", self._key):
                return str(advisory(connection, HOLDER, self._key) or "another process").removeprefix("searchfm ")
            if self._number is not None and self._stored_owner(connection) != self._owner:
                return "another process"  # which has released it again
            stack.pop_all()
            self._connection = connection
            return None

    def claim(self, storage: BaseStorage, number: int) -> None:
        """Writes the owner into the study."""
        storage.set_study_system_attr(number, OWNER, self._owner)
        self._number = number

    def check(self) -> None:
        """Raises StorageError once another process has, or had, the lock, or where the database does not answer."""
        with self._checking, failures(f"{self.where} was lost"):
            retry(self._check, self._database, self._stopping)

    def close(self) -> None:
        """Releases the lock."""
        if self._connection is not None:
            # The server ends a closed connection in its own time: without this call the lock is held until then.
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                self._connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock_all()"))
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _check(self, _repeated: bool) -> None:
        if self._connection is not None:
            try:
                self._connection.scalar(sqlalchemy.text("SELECT 1"))
                return
            except sqlalchemy.exc.SQLAlchemyError:
                self._drop()
        holder = self.acquire()
        if holder == process_name():
            raise ConnectionError("the server still holds the connection that was lost")
        if holder is not None:
            raise StorageError(f"{self.where} was lost: its connection was dropped, and {holder} has taken the study")

    def _stored_owner(self, connection: sqlalchemy.Connection) -> str | None:
        query = "SELECT value_json FROM study_system_attributes WHERE study_id = :number AND key = :key"
        text = connection.scalar(sqlalchemy.text(query), {"number": self._number, "key": OWNER})
        return None if text is None else str(json.loads(text))


def _locked(name: str, holder: str) -> LockedError:
    who = holder or "another process"
    text = f"study {name!r} is held by {who}; wait for it, stop it (searchfm stop), or begin another with --name"
    return LockedError(text, holder)


def holder(home: Home, name: str) -> str | None:
    """The process and host that hold the lock of a study; None if none does, as far as a reader can see: it takes no
    lock, since a search that starts meanwhile would find the study held.
    """
    url = database_url(home)
    if url.get_backend_name() != "sqlite":
        with failures(f"study {name!r}"), postgres_engine(url).connect() as connection:
            found = advisory(connection, HOLDER, f"study/{name}")
            return None if found is None else str(found).removeprefix("searchfm ")
    try:
        owner = (_lock_folder(url, name) / OWNER_FILE).read_text()
    except OSError:
        return None
    words = owner.split()
    if words[-1:] == process_name().split()[-1:]:  # of this host: a process that was killed leaves the file
        with suppress(IndexError, ValueError):
            if not psutil.pid_exists(int(words[1])):
                return None
    return owner or None


# --- stop requests ----------------------------------------------------------------------------------------------------


def request_stop(home: Home, name: str) -> str:
    """Asks the coordinator of a study to stop, from any host that shares the home; returns its process and host.

    Raises StudyError if the study has none.
    """
    try:
        with study_lock(home, name):
            pass
    except LockedError as error:
        write_whole(home.study(name) / STOP_FILE, error.holder.encode())
        return error.holder
    raise StudyError(f"study {name!r}: no search or final training of it is running")


def stop_requested(home: Home, name: str) -> bool:
    """Whether `request_stop` asked this process, once."""
    path = home.study(name) / STOP_FILE
    try:
        if path.read_text() != process_name():  # an old request, or for another coordinator
            return False
        path.unlink()
    except OSError:
        return False
    return True
