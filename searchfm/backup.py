"""A backup of a home: a home of its own, consistent also while searches write. A backup that fails leaves nothing.

MLflow's database is copied first, then Optuna's, then the files: so MLflow may lack the latest trials, which `sync`
sends, and a trial that is running in the copy resumes from its checkpoint.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from searchfm.check import Checked, check
from searchfm.errors import StorageError, UserError
from searchfm.home import LOCK_FILE, STOP_FILE, STORAGE, TRACKING, Home, flush, flush_tree, make_folder, write_json
from searchfm.records import READS, SPEC, WEIGHTS
from searchfm.search.database import failures, read_sqlite
from searchfm.search.rdb import backend
from searchfm.search.storage import copy_storage, load_study, open_storage, study_names
from searchfm.tracking import moved
from searchfm.tracking.rows import database
from searchfm.upkeep import LOCKS, bytes_in

# Of a home. Not `worker.key`, a secret: a search makes a new one.
FOLDERS = ("studies", "mlartifacts", "optuna-artifacts", "slurm")
LEFT_OUT = (*LOCKS, STOP_FILE)


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

    @property
    def command(self) -> str:
        """The beginning of a command that reads the copy's databases: without the variables that name others."""
        variables = [name for name in (STORAGE, *([TRACKING] if self.mlflow else [])) if os.environ.get(name)]
        return " ".join(["env", *(f"-u {name}" for name in variables), "searchfm"]) if variables else "searchfm"


def backup(home: Home, folder: Path) -> BackedUp:
    """Copies a home into a folder, which must not exist or be empty, and checks the copy. A link to it is followed.

    Raises UserError for a folder that cannot be used, StudyError for a home without studies, StorageError where a
    database or the disk fails; then nothing is left.
    """
    # No folder can be renamed to a link. Path.resolve would raise RuntimeError for a link to itself.
    folder, origin = (Path(os.path.realpath(path)) for path in (folder, home.path))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: must not exist, or be an empty folder")
    if folder.is_mount():  # the copy would be made beside it, on another file system
        raise UserError(f"{folder}: is a mount point; name a new folder in it")
    if folder.is_relative_to(origin):
        raise UserError(f"{folder}: must be outside of the home, {home.path}")
    storage = open_storage(home)
    copy = _Copy(folder.with_name(f".{folder.name}.tmp"))
    with failures(f"{folder}"), _only_backup(folder):
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
            _match_database(home, copy)
            checked = _checked(copy)
            flush_tree(copy.path)
            copy.path.rename(folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(copy.path, ignore_errors=True)
            raise
        finally:
            backend(storage).engine.dispose()
    return BackedUp(str(folder), checked.studies, checked.trials, bytes_in(folder), mlflow, checked)


@contextmanager
def _only_backup(folder: Path) -> Iterator[None]:
    """Refuses a second backup into a folder. Raises UserError."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    make_folder(folder.parent)
    try:
        with lock.acquire(timeout=0):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"{folder}: another backup into it is being written") from None


def _match_database(home: Home, copy: Home) -> None:
    """Deletes folders of trials and studies that began after the database was copied. Raises StorageError if a final
    training ended, or a study was removed, meanwhile: record and files may not agree.
    """
    storage, copied = open_storage(home), open_storage(copy)
    try:
        names, copied_names = study_names(storage), study_names(copied)
        for name in copied_names:
            before, now = load_study(copied, copy, name), load_study(storage, home, name) if name in names else None
            if now is None or now.final != before.final:
                raise StorageError(f"study {name!r}: was retrained or removed meanwhile; run the same command again")
            for trial in now.trials[len(before.trials) :]:  # each is in the database before it has a folder
                shutil.rmtree(copy.trial(name, trial.number), ignore_errors=True)
        for name in set(names).difference(copied_names):
            shutil.rmtree(copy.study(name), ignore_errors=True)
    finally:
        backend(storage).engine.dispose()
        backend(copied).engine.dispose()


def _copy_mlflow(home: Home, copy: Home, folder: Path) -> bool:
    """Copies MLflow's database, if it is a file, with paths of artifacts in the folder."""
    path = database(home)
    if path is None or not path.is_file():
        return False
    target = copy.path / "mlflow.db"
    with closing(read_sqlite(path)) as source, closing(sqlite3.connect(target)) as connection:
        source.backup(connection)
    moved.change_paths(target, moved.recorded_folder(home), folder)
    write_json(copy.path / moved.PLACE, {"path": str(folder)})
    return True


def _checked(copy: Home) -> Checked:
    """Checks the copy, and deletes what attempts and better weights left in it while it was made."""
    checked = check(copy, repair=True)
    for path in [*copy.path.glob("*.lock"), *copy.path.glob(f"studies/*/{LOCK_FILE}")]:
        path.unlink()
    checked.findings = [finding for finding in checked.findings if not finding.repaired]
    return checked


def _files(folder: Path) -> Iterator[Path]:
    """The files to copy below a folder. What a running search removes meanwhile is passed over. Raises OSError for a
    folder that cannot be listed, StorageError for a link to one.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in folders:
            if Path(parent, name).is_symlink():
                raise StorageError(f"{Path(parent, name)}: is a link to a folder, which no backup copies")
        for name in sorted(names):
            if name not in LEFT_OUT and not (name.startswith(".") and name.endswith(".tmp")):
                yield Path(parent, name)


def _copy(path: Path, target: Path) -> None:
    """Copies a file with its mode and times, unless it has gone or is there already."""
    with suppress(FileNotFoundError):
        before = path.stat()
        if target.exists() and (after := target.stat()).st_size == before.st_size and after.st_mtime == before.st_mtime:
            return
        if not path.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
