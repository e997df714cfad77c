"""The database of a home: its URL, its errors in one line, connections to PostgreSQL, and a call after a lost one."""

import functools
import hashlib
import logging
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy

from searchfm.errors import StorageError, UserError, first_line
from searchfm.home import STORAGE, Home, shown

T = TypeVar("T")

log = logging.getLogger("searchfm.database")

BUSY_SECONDS = 60.0  # timeout of a locked SQLite file
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
RESTORE = "restore a copy made by `searchfm backup`"
GIVE_UP_SECONDS = 60.0  # without an answer, until a call is given up
STOP_SECONDS = 5.0  # the same, once the command was asked to stop
FIRST_DELAY, MAX_DELAY = 0.05, 1.0  # seconds between two attempts
CONNECT_SECONDS = 10  # timeout of a connection to PostgreSQL
# Both ends notice within about ten seconds that the other is gone: here, else a call would wait for hours; there, else
# the connection that is gone would keep its locks.
IDLE, INTERVAL, COUNT, UNACKNOWLEDGED = 5, 2, 3, 10_000  # seconds, seconds, probes, milliseconds
CONNECT_ARGS = {
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": IDLE,
    "keepalives_interval": INTERVAL,
    "keepalives_count": COUNT,
    "tcp_user_timeout": UNACKNOWLEDGED,
}
SETTINGS = (
    f"SELECT set_config('tcp_keepalives_idle', '{IDLE}', false),"
    f" set_config('tcp_keepalives_interval', '{INTERVAL}', false),"
    f" set_config('tcp_keepalives_count', '{COUNT}', false),"
    f" set_config('tcp_user_timeout', '{UNACKNOWLEDGED}', false)"
)


def _set_keepalive(connection: Any, _record: object) -> None:
    before = connection.autocommit
    connection.autocommit = True  # a rollback would take the settings back
    connection.execute(SETTINGS)
    connection.autocommit = before


POOL_EVENTS = ((_set_keepalive, "connect"),)  # argument `pool_events` of `sqlalchemy.create_engine`


def is_lost(error: BaseException) -> bool:
    """Whether the connection was lost, or none could be made: not an error of the statement, or of a full disk."""
    return any(_is_lost(each) for each in _chain(error))


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        if error.connection_invalidated:
            return True
        # psycopg has no code for an error before or outside of a session; else that of PostgreSQL.
        code = getattr(error.orig, "sqlstate", None) or "08"
        return isinstance(error, sqlalchemy.exc.OperationalError) and code.startswith(("08", "57P0"))
    return isinstance(error, ConnectionError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it: Optuna and SQLAlchemy wrap it, or raise another while they handle it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retry(
    call: Callable[[bool], T], where: str, stopping: Callable[[], bool], check_lock: Callable[[], None] = lambda: None
) -> T:
    """Returns `call(repeated)`, repeated while the connection is lost.

    where: the database, for messages. stopping: whether the command was asked to stop. check_lock: called before each
    repetition. Raises StorageError if the database does not answer in time, and every other error of the call.
    """
    began, delay, repeated, reported = 0.0, FIRST_DELAY, False, False
    while True:
        try:
            result = call(repeated)
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ConnectionError) as error:
            if not is_lost(error):
                raise
            began = began or time.monotonic()
            seconds = STOP_SECONDS if stopping() else GIVE_UP_SECONDS
            if time.monotonic() >= began + seconds:
                cause = list(_chain(error))[-1]
                text = f"the database did not answer for {seconds:g} seconds: {_hidden(first_line(cause))}"
                raise StorageError(f"{where}: {text}") from error
            if repeated and not reported:  # not where the connection was only dropped
                log.warning("%s does not answer; waiting for it, up to %g seconds", where, seconds)
                reported = True
        else:
            if reported:
                log.info("%s answers again", where)
            return result
        time.sleep(delay)
        delay, repeated = min(2 * delay, MAX_DELAY), True
        check_lock()


def never() -> bool:
    """A command that nothing asks to stop."""
    return False


@contextmanager
def failures(where: str) -> Iterator[None]:
    """Raises StorageError for an error of a database or a disk, in one line that begins with `where`."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, OSError) as error:
        # Optuna's own text only guesses; SQLAlchemy's, with the statement, can be a page.
        wrapped = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
        cause = getattr(wrapped or error, "orig", None) or wrapped or error
        todo = f"; see `searchfm check`, and {RESTORE}" if is_damaged(error) else ""
        raise StorageError(f"{where}: {_hidden(first_line(cause))}{todo}") from error


def is_damaged(error: BaseException) -> bool:
    """Whether SQLite found that its file is damaged, or no database."""
    codes = (getattr(each, "sqlite_errorcode", None) for each in _chain(error))
    return any(code is not None and code & 0xFF in DAMAGED for code in codes)


def name_damage(context: Any) -> None:
    """Listener of SQLAlchemy's `handle_error` for a SQLite file, which most calls of Optuna meet first while they read:
    raises StorageError if it is damaged. Other errors pass.
    """
    if is_damaged(context.original_exception):
        where, text = context.engine.url.database, first_line(context.original_exception)
        raise StorageError(f"{where}: {text}; see `searchfm check`, and {RESTORE}")


def read_sqlite(path: Path) -> sqlite3.Connection:
    """A connection to read a SQLite file in WAL mode, also where nothing can be written. Raises sqlite3.Error, OSError.

    SQLite needs the file -shm to read what stands in the file -wal. Without write permission it cannot make one. Then
    the database is read alone where there is no -wal; else from a copy of both: no process can have them open.
    """
    if can_write(path):
        return sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    wal, shm = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if wal.exists() and wal.stat().st_size and not shm.exists():
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.deserialize(_with_wal(path, wal))
        return connection
    option = "mode=ro" if shm.exists() else "immutable=1"
    uri = f"{path.absolute().as_uri()}?{option}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)


def can_write(path: Path) -> bool:
    """Whether this process may write a SQLite file that exists, and files beside it."""
    return os.access(path.parent, os.W_OK | os.X_OK) and os.access(path, os.W_OK)


@functools.cache  # each query has a connection of its own
def _with_wal(path: Path, wal: Path) -> bytes:
    """The content of a database with what stands in its file -wal."""
    with tempfile.TemporaryDirectory(prefix="searchfm-") as folder:
        copy = Path(folder, path.name)
        shutil.copyfile(path, copy)
        shutil.copyfile(wal, copy.with_name(wal.name))
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # a database in memory has no -wal
        return copy.read_bytes()


def _hidden(text: str) -> str:
    """A driver's text without the values of the query of SEARCHFM_STORAGE, which it may quote."""
    try:
        query = sqlalchemy.make_url(os.environ.get(STORAGE, "")).normalized_query
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return text
    for value in (value for values in query.values() for value in values if len(value) > 2):  # none of "on" and "10"
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "...", text)
    return text


def database_url(home: Home) -> sqlalchemy.URL:
    """The URL of Optuna's database. Raises UserError, without its text, for one that cannot be used."""
    try:
        url = sqlalchemy.make_url(home.optuna_url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # the latter for a port
        url = sqlalchemy.URL.create("nothing")  # the text may contain a password: do not show it
    if url.get_backend_name() in ("postgres", "postgresql"):
        if re.match("[^@]*@[^?]*@", home.optuna_url):  # SQLAlchemy takes what follows the first one for the host
            raise UserError(f"{STORAGE}: has more than one @; that of a name or a password must be %40")
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise UserError(f"{STORAGE}: must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
    return url


def shown_url(url: sqlalchemy.URL) -> str:
    """The URL for messages, as `home.shown`."""
    return shown(url.render_as_string(hide_password=True))


def postgres_engine(url: sqlalchemy.URL) -> sqlalchemy.Engine:
    """Makes separate connections; their application name has the pid and host that `LockedError` names."""
    return sqlalchemy.create_engine(
        url,
        connect_args={"application_name": f"searchfm {process_name()}", **CONNECT_ARGS},
        pool_events=POOL_EVENTS,
        isolation_level="AUTOCOMMIT",
        poolclass=sqlalchemy.NullPool,
    )


def advisory(connection: sqlalchemy.Connection, query: str, name: str) -> Any:
    """The result of a query about an advisory lock, whose number is a hash of its name."""
    sha256 = hashlib.sha256(f"searchfm/{name}".encode()).digest()
    return connection.scalar(sqlalchemy.text(query), {"number": int.from_bytes(sha256[:8], "big", signed=True)})


def process_name() -> str:
    """This process for messages of others, and as the application name of its connections."""
    return f"process {os.getpid()} on {socket.gethostname()[:30]}"  # PostgreSQL cuts a name to 63 characters
