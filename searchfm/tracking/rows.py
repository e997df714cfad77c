"""MLflow's database of a home, read as rows without MLflow, whose import takes 1.8 s of CPU (Xeon at 2.5 GHz).

What is found here is what MLflow's client would return. Nothing is found where the tables are not the ones known here:
on a server, in another database than SQLite, of another version of MLflow, with workspaces. So a caller that gets
nothing asks MLflow's client, which also has the errors.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import sqlalchemy

from searchfm.home import Home
from searchfm.search.database import RESTORE, read_sqlite
from searchfm.tracking.moved import has_moved

REVISIONS = ("dc11669786a5",)  # of MLflow's tables that these queries were written for: since MLflow 3.17
RESTORE_RUNS = f"{RESTORE}, or move it away: `searchfm sync STUDY --apply` writes the runs again"
DELETED = "Deleted_Internal"  # the stage that MLflow gives a deleted version


@dataclass(frozen=True)
class Registered:
    """A version in MLflow's registry."""

    name: str
    version: int
    source: str  # address of the folder of its files
    created: float  # seconds since 1970
    tags: Mapping[str, str]
    aliases: frozenset[str]


@dataclass(frozen=True)
class StoredRun:
    """A run that is not deleted."""

    id: str
    artifacts: str  # address of the folder of its files
    tags: Mapping[str, str]


def database(home: Home) -> Path | None:
    """The file of MLflow's database, if it is one."""
    uri = home.tracking_uri
    return Path(sqlalchemy.make_url(uri).database or "") if uri.startswith("sqlite:") else None


def folder(address: str) -> Path | None:
    """The folder of an address of MLflow's, if it is one of this machine."""
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" and not parts.netloc else None


@contextmanager
def _connection(home: Home) -> Iterator[sqlite3.Connection | None]:
    """A connection whose queries see one state of the known tables; else None."""
    path = database(home)
    if path is None or not path.is_file():
        yield None
        return
    if path.parent == home.path and has_moved(home):  # MLflow's client corrects the paths first
        yield None
        return
    with closing(read_sqlite(path)) as connection:
        connection.isolation_level = None
        connection.execute("BEGIN")
        known = connection.execute("SELECT version_num FROM alembic_version").fetchall() in [[(r,)] for r in REVISIONS]
        alone = known and connection.execute("SELECT name FROM workspaces").fetchall() == [("default",)]
        yield connection if alone else None


def registered(home: Home) -> list[Registered]:
    """All versions in the registry."""
    with suppress(sqlite3.Error), _connection(home) as connection:
        if connection is not None:
            tags: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
            for name, version, key, value in connection.execute(
                "SELECT name, version, key, value FROM model_version_tags"
            ):
                tags[name, version][key] = value
            aliases: dict[tuple[str, int], set[str]] = defaultdict(set)
            for name, version, alias in connection.execute("SELECT name, version, alias FROM registered_model_aliases"):
                aliases[name, version].add(alias)
            query = """
                SELECT name, version, coalesce(nullif(storage_location, ''), source), creation_time
                FROM model_versions WHERE current_stage != ?
            """
            return [
                Registered(
                    name, version, source, created / 1000, tags[name, version], frozenset(aliases[name, version])
                )
                for name, version, source, created in connection.execute(query, (DELETED,))
            ]
    return []


def study_run(home: Home, uuid: str) -> StoredRun | None:
    """A study's own run: the same as `Mirror` takes, were there several."""
    query = """
        SELECT runs.run_uuid, artifact_uri FROM runs
        JOIN tags AS study ON study.run_uuid = runs.run_uuid AND study.key = 'study_uuid' AND study.value = :uuid
        JOIN tags AS role ON role.run_uuid = runs.run_uuid AND role.key = 'role' AND role.value = 'study'
        WHERE lifecycle_stage = 'active' AND experiment_id = (
            SELECT min(experiment_id) FROM experiment_tags WHERE key = 'study_uuid' AND value = :uuid)
        ORDER BY (SELECT count(*) FROM latest_metrics WHERE run_uuid = runs.run_uuid) DESC, start_time, runs.run_uuid
    """
    with suppress(sqlite3.Error), _connection(home) as connection:
        if connection is not None and (row := connection.execute(query, {"uuid": uuid}).fetchone()):
            run, artifacts = row
            return StoredRun(
                run, artifacts, dict(connection.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)))
            )
    return None


def experiment_with(home: Home, name: str, digest: str) -> str | None:
    """The id of the experiment of this name, if it has a run with the tag `digest`; both not deleted."""
    query = """
        SELECT runs.experiment_id FROM tags
        JOIN runs ON runs.run_uuid = tags.run_uuid AND runs.lifecycle_stage = 'active'
        JOIN experiments ON experiments.experiment_id = runs.experiment_id AND experiments.lifecycle_stage = 'active'
        WHERE tags.key = 'digest' AND tags.value = ? AND experiments.name = ?
    """
    with suppress(sqlite3.Error), _connection(home) as connection:
        if connection is not None and (row := connection.execute(query, (digest, name)).fetchone()):
            return str(row[0])
    return None
