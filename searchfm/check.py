"""Checks a home: its databases, the files of its trials against their records, leftovers. Repairs what it can without
loss: it deletes only files that no record needs.
"""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from optuna.storages import BaseStorage

from searchfm.errors import DamagedError, LockedError, NewerError, SearchfmError, StorageError, UserError
from searchfm.home import TRIAL_FOLDER, Home, file_sha256, write_json
from searchfm.records import (
    EPOCHS,
    FINAL,
    FITTED,
    PROGRAM,
    SPEC,
    TESTED,
    WEIGHTS,
    Final,
    JobRecord,
    StudyRecord,
    Trial,
)
from searchfm.search.database import RESTORE, database_url, is_damaged, read_sqlite
from searchfm.search.lock import holder, study_lock
from searchfm.search.rdb import backend
from searchfm.search.storage import is_elsewhere, load_study, open_storage, study_names
from searchfm.tracking.rows import RESTORE_RUNS, database

ATTEMPT = "attempt-*"
ROUNDING = 1e-6  # of the accuracies that are reported
STALE_SECONDS = 600.0  # after which a temporary file is of a process that was killed
SHOWN = 3  # of SQLite's findings in a database


@dataclass(frozen=True)
class Finding:
    """A problem in a home."""

    study: str | None  # None: of the home
    trial: int | None  # None: of the study
    path: str
    problem: str
    todo: str  # how to repair it
    repaired: bool = False
    repair: Callable[[], object] | None = field(default=None, compare=False, repr=False)  # None: the user must


@dataclass
class Checked:
    """What was checked, and the problems."""

    studies: int = 0
    trials: int = 0
    files: int = 0  # whose sha256 was compared
    held: dict[str, str] = field(default_factory=dict)  # studies that another process holds -> that process
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem remains."""
        return all(finding.repaired for finding in self.findings)


def check(home: Home, name: str | None = None, *, repair: bool = False) -> Checked:
    """Checks a home, or one study of it and the databases; repair: also repairs what can be.

    The lock of each study is held meanwhile. A study that another process holds is checked without what that process
    may be writing. Raises UserError for an unknown study, StorageError for a database that does not answer.
    """
    result, studies = Checked(), list[Finding]()
    if not home.path.is_dir():
        raise UserError(f"{home.path}: no such folder; name another --home")
    if repair:
        home.probe()
    temporary = [_leftover(path, None, None, "half-written") for path in _stale(home.path.glob(".*.tmp"))]
    findings = [*_databases(home), *temporary]
    try:
        storage = open_storage(home)
        names = study_names(storage)
    except StorageError as error:
        path = str(Path(database_url(home).database or ""))
        if isinstance(error, DamagedError):
            findings.append(Finding(None, None, path, str(error), RESTORE))
        elif all(finding.path != path for finding in findings):
            raise  # it is missing, locked, of a newer version, or on a server that does not answer
        result.findings = _repaired(findings, repair)
        return result
    try:
        if name is not None and name not in names and not home.has_trials(name):
            load_study(storage, home, name)  # raises with the known names
        for each in [name] if name is not None else sorted({*names, *home.studies()}):
            studies += _study(home, storage, each, each in names, result, repair)
    finally:
        backend(storage).engine.dispose()
    result.findings = [*_repaired(findings, repair), *studies]
    return result


def _repaired(findings: Iterable[Finding], repair: bool) -> list[Finding]:
    """The findings, repaired as far as they can be."""
    repaired = []
    for finding in findings:
        if repair and finding.repair is not None:
            try:
                finding.repair()
            except (OSError, StorageError) as error:
                reason = getattr(error, "strerror", None) or error
                repaired.append(replace(finding, todo=f"it could not be repaired: {reason}"))
                continue
            finding = replace(finding, repaired=True)
        repaired.append(finding)
    return repaired


# --- databases --------------------------------------------------------------------------------------------------------


def _databases(home: Home) -> Iterator[Finding]:
    """SQLite's own checks of both files; those of a server are its own."""
    url = database_url(home)
    own = Path(url.database or "") if url.get_backend_name() == "sqlite" else None
    for path, todo in ((own, RESTORE), (database(home), RESTORE_RUNS)):
        if path is None or not path.exists():
            continue
        if path.is_dir() or not path.stat().st_size:
            text = "is damaged: it is a folder" if path.is_dir() else "is empty"
            yield Finding(None, None, str(path), text, todo)
            continue
        try:
            with closing(read_sqlite(path)) as connection:
                rows = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({SHOWN})")]
                problems = [] if rows == ["ok"] else rows
                problems += [
                    f"row {row} of table {table} belongs to no row of {parent}"
                    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check").fetchmany(SHOWN)
                ]
        except sqlite3.Error as error:
            if not is_damaged(error):
                raise StorageError(f"{path}: cannot be read: {error}") from error
            problems = [str(error)]
        if problems:
            yield Finding(None, None, str(path), f"is damaged: {'; '.join(problems)}", todo)


# --- studies ----------------------------------------------------------------------------------------------------------


def _study(
    home: Home, storage: BaseStorage, name: str, in_database: bool, result: Checked, repair: bool
) -> list[Finding]:
    """The findings of one study, repaired while its lock is held."""
    folder = home.study(name)
    if not in_database:
        if not home.has_trials(name):
            return []  # an earlier command was stopped before its study began, or after it was removed
        text = "has trials of a study that is not in the database"
        return [Finding(name, None, str(folder), text, f"{RESTORE}, or move the folder away")]
    if is_elsewhere(home, name):
        return []
    with ExitStack() as stack:
        held = None
        if locked := os.access(folder, os.W_OK):
            try:
                stack.enter_context(study_lock(home, name))
            except LockedError as error:
                held = error.holder or "another process"
        else:  # no lock can be taken
            held = holder(home, name)
        if held:
            result.held[name] = held
        try:
            study = load_study(storage, home, name)
        except NewerError:
            raise  # not damaged
        except SearchfmError as error:
            return [Finding(name, None, str(folder), str(error), RESTORE)]
        result.studies += 1
        result.trials += len(study.trials)
        # Of a held study the weights of the best, its running trials and its final model may be changing.
        kept = set() if held else {trial.number for trial in study.kept}
        findings: list[Finding] = []
        for trial in study.trials:
            if trial.state != "running":
                findings += _trial(study, trial, trial.number in kept, result)
            elif trial.reported and not held:
                findings += _epochs(study, trial)
        if held:
            return findings
        if study.final is not None:
            findings += _final(study, study.final, result)
        return _repaired([*findings, *_orphans(study), *_unneeded(study)], repair and locked)


def _trial(study: StudyRecord, trial: Trial, kept: bool, result: Checked) -> Iterator[Finding]:
    """The files of a trial that has ended."""
    again = f"{RESTORE}; nothing else needs it"
    yield from _epochs(study, trial)
    if trial.result is None:
        return
    # `clean --keep` deletes weights of trials that are among the best; it deletes both files.
    kept = kept and any((trial.folder / name).exists() for name in (WEIGHTS, SPEC))
    expected = {name: sha256 for name, sha256 in trial.result.files.items() if kept or name not in (WEIGHTS, SPEC)}
    yield from _hashes(study, trial.number, trial.folder, expected, result, again)


def _epochs(study: StudyRecord, trial: Trial) -> Iterator[Finding]:
    """Whether `epochs.csv` has what was reported to Optuna. A file may be ahead, never behind."""
    path = trial.folder / EPOCHS
    try:
        stored = {epoch.index: epoch.val_accuracy for epoch in trial.epochs}
    except (SearchfmError, OSError) as error:
        yield Finding(study.name, trial.number, str(path), str(error), RESTORE)
        return
    same = stored.keys() == trial.reported.keys()
    if not same or any(abs((stored[i] or 0.0) - trial.reported[i]) > ROUNDING for i in stored):
        text = "has other accuracies than were reported"
        if not same:
            text = f"has {len(stored)} epochs, where {len(trial.reported)} were reported"
        yield Finding(study.name, trial.number, str(path), text, f"{RESTORE}; the reports in the database count")


def _hashes(
    study: StudyRecord, number: int | None, folder: Path, files: Mapping[str, str], result: Checked, todo: str
) -> Iterator[Finding]:
    for name, expected in files.items():
        path = folder / name
        try:
            problem = "" if file_sha256(path) == expected else "is damaged: its sha256 is not the recorded one"
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        result.files += 1
        if problem:
            yield Finding(study.name, number, str(path), problem, todo)


def _final(study: StudyRecord, final: Final, result: Checked) -> Iterator[Finding]:
    """The final model's files, against the study's record and those of its jobs."""
    folder, todo = study.final_folder, f"{RESTORE}, or `searchfm retrain {study.name} --again`"
    weights = list(_hashes(study, None, folder, {WEIGHTS: final.weights}, result, todo))
    yield from weights
    for name in (FITTED, TESTED):  # what each job wrote
        path = folder / name
        try:
            files = dict(JobRecord.read(path).result["files"])
        except (SearchfmError, OSError, LookupError, TypeError, ValueError):
            yield Finding(study.name, None, str(path), "is missing or damaged", todo)
            continue
        files.pop(WEIGHTS, None)
        yield from _hashes(study, None, folder, files, result, todo)
    path = folder / "final.json"
    try:
        same = Final.read(path) == final
    except (SearchfmError, OSError):
        same = False
    if not same and not weights:  # else the folder may be right, and the record behind it
        problem, todo = "is missing, damaged or older than the database's", "--repair writes it from the database"
        write = partial(write_json, path, final.to_json())
        yield Finding(study.name, None, str(path), problem, todo, repair=write)


# --- what was left over -----------------------------------------------------------------------------------------------


def _orphans(study: StudyRecord) -> Iterator[Finding]:
    """Folders of trials that the study does not have."""
    for path in sorted(study.folder.iterdir()) if study.folder.is_dir() else ():
        if TRIAL_FOLDER.fullmatch(path.name) and int(path.name) >= len(study.trials):
            text = "belongs to no trial of the study"
            yield Finding(study.name, int(path.name), str(path), text, f"{RESTORE}, or move the folder away")


def leftovers(study: StudyRecord) -> Iterator[tuple[Path, int | None, str]]:
    """What killed processes left in a study that no process holds: path, trial, and what it is of."""
    for trial in (trial for trial in study.trials if trial.state != "running"):
        yield from ((path, trial.number, "of a trial that has ended") for path in trial.folder.glob(ATTEMPT))
    if (study.final_folder / WEIGHTS).is_file():  # else a crash may have left the earlier model alone
        yield from ((path, None, "of an earlier final model") for path in study.folder.glob(f"{FINAL}-old"))
    if study.final is not None and study.final.model is not None and (study.final_folder / PROGRAM).is_file():
        yield study.final_folder / PROGRAM, None, "of a model that MLflow has"
    yield from ((path, None, "half-written") for path in _stale(study.folder.rglob(".*.tmp")))


def _unneeded(study: StudyRecord) -> Iterator[Finding]:
    """Leftovers, and weights that are not kept."""
    for path, number, text in leftovers(study):
        yield _leftover(path, study.name, number, text)
    for trial in study.trials:
        if trial.state != "running" and trial not in study.kept:
            for path in (trial.folder / name for name in (WEIGHTS, SPEC)):
                if path.exists():
                    yield _leftover(path, study.name, trial.number, "of a trial not among the best")


def _stale(paths: Iterable[Path]) -> Iterator[Path]:
    """Temporary files that no process is writing: some are written without the study's lock."""
    for path in sorted(paths):
        with suppress(FileNotFoundError):  # renamed meanwhile
            if path.is_file() and time.time() - path.stat().st_mtime > STALE_SECONDS:
                yield path


def _leftover(path: Path, study: str | None, trial: int | None, text: str) -> Finding:
    def remove() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return Finding(study, trial, str(path), f"is left over, {text}", "--repair deletes it", repair=remove)
