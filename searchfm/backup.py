"""A backup of a home: a home of its own, consistent while searches write, whole or not there.

MLflow's database is copied first, then Optuna's, then the files: so MLflow may lack the latest trials, which `sync`
sends, and a trial that the copy has as running goes on from its checkpoint.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from searchfm.check import Checked, check
from searchfm.errors import UserError
from searchfm.home import Home, write_json
from searchfm.records import READS, SPEC, WEIGHTS
from searchfm.search.database import failures, read_sqlite
from searchfm.search.storage import copy_storage, open_storage
from searchfm.tracking import moved
from searchfm.tracking.rows import database
from searchfm.upkeep import size

# Of a home. Left out: locks and their owners, and the key of workers elsewhere, which a new search makes anew.
FOLDERS = ("studies", "mlartifacts", "optuna-artifacts", "slurm")
LEFT_OUT = (".lock", ".tracking.lock", ".stop", "owner")


class _Copy(Home):
    """A home with its own databases, whatever the environment names."""

    @property
    def optuna_url(self) -> str:
        return self._own("optuna.db")

    @property
    def tracking_uri(self) -> str:
        return self._own("mlflow.db")


@dataclass(frozen=True)
class BackedUp:
    """A backup that was written."""

    folder: str
    studies: int
    trials: int
    bytes: int
    mlflow: bool  # whether it has MLflow's database: not where that is a server's
    checked: Checked


def backup(home: Home, folder: Path) -> BackedUp:
    """Copies a home into a folder, which must not exist or be empty, and checks the copy.

    Raises UserError for a folder that cannot be used, StudyError for a home without studies, StorageError where a
    database or the disk fails; then nothing is left.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: must not exist, or be an empty folder")
    if any(folder.is_relative_to(home.path / name) for name in FOLDERS):
        raise UserError(f"{folder}: must be outside of what it copies, {home.path}")
    storage = open_storage(home)
    copy = _Copy(folder.with_name(f".{folder.name}.tmp"))
    with failures(f"{folder}"):
        shutil.rmtree(copy.path, ignore_errors=True)  # of a killed backup
        copy.path.mkdir(parents=True)
        try:
            # First, and once more below: better weights replace these meanwhile, which the database may still count.
            for path in _files(home.path / "studies"):
                if path.name in (WEIGHTS, SPEC):
                    _copy(path, copy.path / path.relative_to(home.path))
            mlflow = _copy_mlflow(home, copy, folder)
            copy_storage(storage, home, copy.path / "optuna.db")
            for name in FOLDERS:
                for path in _files(home.path / name):
                    _copy(path, copy.path / path.relative_to(home.path))
            _copy(home.path / READS, copy.path / READS)
            checked = _checked(copy)
            _flush(copy.path)
            copy.path.rename(folder)
            _flush(folder.parent)
        except BaseException:
            shutil.rmtree(copy.path, ignore_errors=True)
            raise
    return BackedUp(str(folder), checked.studies, checked.trials, size(folder), mlflow, checked)


def _copy_mlflow(home: Home, copy: Home, folder: Path) -> bool:
    """Copies MLflow's database, if it is a file, with the addresses of the artifacts in the folder."""
    path = database(home)
    if path is None or not path.is_file():
        return False
    target = copy.path / "mlflow.db"
    with closing(read_sqlite(path)) as source, closing(sqlite3.connect(target)) as connection:
        source.backup(connection)
    moved.move(target, moved.place(home), folder)
    _flush(target)
    write_json(copy.path / moved.PLACE, {"path": str(folder)})
    return True


def _checked(copy: Home) -> Checked:
    """Checks the copy, and deletes what attempts and better weights left in it while it was made."""
    checked = check(copy, repair=True)
    for path in [*copy.path.glob("*.lock"), *copy.path.glob("studies/*/.lock")]:
        path.unlink()
    checked.findings = [finding for finding in checked.findings if not finding.repaired]
    return checked


def _files(folder: Path) -> Iterator[Path]:
    """The files to copy below a folder. What a running search removes meanwhile is passed over."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            if name not in LEFT_OUT and not (name.startswith(".") and name.endswith(".tmp")):
                yield Path(parent, name)


def _copy(path: Path, target: Path) -> None:
    """Copies a file with its mode and times, flushed to the disk, unless it has gone or is there already."""
    with suppress(FileNotFoundError):
        before = path.stat()
        if target.exists() and (after := target.stat()).st_size == before.st_size and after.st_mtime == before.st_mtime:
            return
        if not path.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.tmp")
        shutil.copy2(path, partial)
        _flush(partial)
        partial.replace(target)


def _flush(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
