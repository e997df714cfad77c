"""Removes a study from a home: its trials in Optuna, its experiment in MLflow, its folder.

Optuna's record goes last but for a folder with locks: after a crash the study is still there, and the same command
resumes.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from searchfm.home import LOCK_FILE, OWNER_FILE, TRACKING_LOCK_FILE, Home
from searchfm.search.database import failures
from searchfm.search.notes import artifact_files
from searchfm.search.storage import delete_study, locked_study, open_storage
from searchfm.tracking import registry
from searchfm.tracking.mirror import delete_artifacts, delete_experiment, writer

LOCKS = (LOCK_FILE, OWNER_FILE, TRACKING_LOCK_FILE)


@dataclass(frozen=True)
class Removed:
    """What `remove` deleted."""

    study: str
    trials: int
    bytes: int  # of files
    models: tuple[str, ...]  # versions of the registry
    kept: tuple[str, ...]  # versions of the registry that stay


def remove(home: Home, name: str, *, models: bool = False) -> Removed:
    """Removes a study. Its versions in MLflow's registry stay, with their files, unless `models`; the record of test
    reads stays too.

    Raises StudyError for an unknown study, LockedError while a search or a final training of it runs, StorageError
    where a database fails; then the same call goes on.
    """
    with locked_study(home, name) as (study, _), failures(f"study {name!r}"):
        versions = registry.versions(home, study.uuid)
        with writer(home, name):
            if models:
                registry.delete_versions(home, study.uuid)
            freed = delete_experiment(home, study, keep_models=bool(versions) and not models)
        storage = open_storage(home)
        files = artifact_files(home, storage, study)
        freed += bytes_in(study.folder) + sum(map(bytes_in, files))
        for file in files:
            file.unlink(missing_ok=True)
        for entry in list(study.folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)  # before the record: else no command knows what stays
            elif entry.name not in LOCKS:
                entry.unlink()
        delete_study(storage, study.number)
    shutil.rmtree(study.folder, ignore_errors=True)
    kept, deleted = ((), versions) if models else (versions, ())
    return Removed(name, len(study.trials), freed, deleted, kept)


def left_models(home: Home, name: str) -> tuple[str, ...]:
    """The versions in MLflow's registry of removed studies of this name. Raises StorageError."""
    return tuple(uri for uuid in registry.removed_studies(home, name) for uri in registry.versions(home, uuid))


def remove_models(home: Home, name: str) -> Removed:
    """Removes what `remove` left: the versions in MLflow's registry of removed studies of this name, and their files.
    Raises StorageError; then the same call goes on.
    """
    models, freed = left_models(home, name), 0
    for uuid in registry.removed_studies(home, name):
        freed += delete_artifacts(home, uuid)
        registry.delete_versions(home, uuid)  # the last: by it the files are found
    return Removed(name, 0, freed, models, ())


def bytes_in(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = 0
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total
