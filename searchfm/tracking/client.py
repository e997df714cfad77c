"""MLflow's client: quiet, impatient, and wrong in one line."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock

from searchfm.errors import SearchfmError, StorageError
from searchfm.home import Home

# MLflow must neither talk, nor phone, nor wait long in one call (we try again ourselves). What a user has set stands.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# Set whatever the user has set: the printed URL of a run holds the server's password, and it breaks --json.
FORCED = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


@contextmanager
def reaching(home: Home) -> Iterator[None]:
    """Whatever MLflow raises within becomes StorageError, in one line, without what MLflow says: that may hold an
    address with a password. Errors of our own pass through.
    """
    try:
        yield
    except SearchfmError:
        raise
    except Exception as error:
        code: Any = getattr(error, "error_code", None)
        what = f"{type(error).__name__}{f' ({code})' if code else ''}"
        raise StorageError(f"MLflow at {shown(home.tracking_uri)}: {what}") from error


def prepare() -> None:
    """Imports MLflow, quietly."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.update(FORCED)
    # urllib3 warns of every refused connection; one line a spell is ours to say.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.CRITICAL)
    import mlflow.tracking  # noqa: F401


def connect(home: Home) -> Any:
    """An MlflowClient for the home, its database made if it is a file that is not there. Raises what MLflow raises."""
    prepare()
    from mlflow.tracking import MlflowClient

    uri, path = home.tracking_uri, database(home)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that make the tables at once leave a file that none can open.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _make(uri, path)
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # pages are read while runs are written
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make(uri: str, path: Path) -> None:
    """Makes MLflow's tables in a file that takes its place when it is whole: they take some 1700 statements, and of a
    process that is killed in the middle remains what MLflow refuses to open ever after.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{partial.name}*"):
        left.unlink()
    place, _, query = uri.partition("?")
    store: Any = SqlAlchemyStore  # untyped
    made = store(f"{place}.new{'?' * bool(query)}{query}", (path.parent / "mlartifacts").as_uri())
    made.engine.dispose()
    partial.replace(path)


def database(home: Home) -> Path | None:
    """The file of MLflow's database, where it is one."""
    uri = home.tracking_uri
    return Path(sqlalchemy.make_url(uri).database or "") if uri.startswith("sqlite:") else None


def shown(uri: str) -> str:
    """A database's or server's address as it may be shown: without user, password and query."""
    return re.sub("//[^/]*@", "//", uri).partition("?")[0]
