"""Files of a home and of the cache that can be deleted, by kind: weights that are not kept, leftovers of crashes, and
what can be made again. Deletes them.

Keeps final models, registered models, predictions, records, and what running and paused trials need. Skips a study that
another process holds. Deletes local files before MLflow's copies: so a crash in between leaves no difference for
`sync`, and the same call resumes.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from searchfm.check import leftovers
from searchfm.errors import LockedError, StorageError, StudyError
from searchfm.home import FileKind, Home, cache_folder
from searchfm.records import PICTURES, SPEC, WEIGHTS, StudyRecord
from searchfm.search.database import failures
from searchfm.search.lock import holder
from searchfm.search.notes import picture_copy
from searchfm.search.storage import is_elsewhere, locked_study, open_storage, read_study, study_names
from searchfm.tracking.mirror import trial_copies, writer
from searchfm.upkeep import bytes_in

PATTERNS: dict[FileKind, Sequence[str]] = {  # patterns in the cache folder, hidden files included; no locks
    "features": ("features-*/*",),
    "parsed data": ("data/parsed-*/*/*", "data/pictures/*"),
    "costs and tables": ("costs/*.json", "tables/*.db"),
    "downloads": ("data/files/*",),
}
DOWNLOADED: FileKind = "downloads"  # in the cache, with a flag of its own


@dataclass
class Deletable:
    """Files of one kind."""

    kind: FileKind
    chosen: bool  # whether they are to be deleted
    files: int = 0
    bytes: int = 0


@dataclass
class Cleaned:
    """The files of each kind, and what `clean` skipped."""

    study: str | None  # whose files; None: those of the home and the cache
    total: int  # bytes of all files in the home, before; or of the study
    applied: bool  # whether the chosen kinds were deleted
    kinds: list[Deletable] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)  # studies that were skipped -> the process that holds each
    problem: str = ""  # why MLflow's copies were skipped; empty if they were not

    @property
    def freed(self) -> int:
        """Bytes that were deleted, or would be."""
        return sum(each.bytes for each in self.kinds if each.chosen)


def clean(
    home: Home,
    name: str | None = None,
    *,
    keep: int | None = None,
    pictures: bool = False,
    cache: bool = False,
    downloads: bool = False,
    apply: bool = False,
) -> Cleaned:
    """Counts weights that are not kept and leftovers of crashes, of a study or of all; with flags, more. Deletes them
    if `apply`.

    keep: trials of a study whose weights stay; None, or more than that: the study's own number. Without a name the
    cache is counted too; nothing of it is deleted while a study of the home is held. Raises StudyError for an unknown
    study, StorageError where a database fails.
    """
    chosen = {"pictures": pictures, **dict.fromkeys(PATTERNS, cache), DOWNLOADED: downloads}
    kinds = {kind: Deletable(kind, chosen.get(kind, True)) for kind in get_args(FileKind)}
    cleaned = Cleaned(name, bytes_in(home.path if name is None else home.study(name)), apply)
    for each in _studies(home) if name is None else [name]:
        try:
            with failures(f"study {each!r}"), _unheld(home, each, apply) as study:
                if name is not None:
                    cleaned.total += bytes_in(home.artifacts / study.uuid)
                kept = {trial.number for trial in study.kept[:keep]}
                _count_files(home, study, kept, kinds, apply)
                if not cleaned.problem:  # each further study would wait for MLflow too
                    cleaned.problem = _count_copies(home, study, kept, kinds, apply)
        except LockedError as error:
            cleaned.held[each] = error.holder
    if name is None:
        for kind, patterns in PATTERNS.items():
            kinds[kind].chosen = kinds[kind].chosen and not cleaned.held
            for path in (path for pattern in patterns for path in cache_folder().glob(pattern)):
                with failures(str(path)):  # a search of another home may use it
                    _count(path, kinds[kind], apply)
    cleaned.kinds = [each for each in kinds.values() if name is None or each.kind not in PATTERNS]
    return cleaned


def _studies(home: Home) -> list[str]:
    """The names of the studies of a home; none where there is no database yet."""
    try:
        return [name for name in study_names(open_storage(home)) if not is_elsewhere(home, name)]
    except StudyError:
        return []


@contextmanager
def _unheld(home: Home, name: str, apply: bool) -> Iterator[StudyRecord]:
    """A study that no other process holds; if `apply`, held by this one, as its only writer into MLflow. Raises
    LockedError, StudyError.
    """
    if apply:
        with locked_study(home, name) as (study, _), writer(home, name):
            yield study
        return
    study = read_study(home, name)
    if (process := holder(home, name)) is not None:
        raise LockedError(f"study {name!r} is held by {process}", process)
    yield study


def _count_files(
    home: Home, study: StudyRecord, kept: Collection[int], kinds: dict[FileKind, Deletable], apply: bool
) -> None:
    """Counts the files of a study that are in the home, and deletes the chosen ones."""
    for trial in (trial for trial in study.trials if trial.state != "running"):
        for name in (WEIGHTS, SPEC) if trial.number not in kept else ():
            _count(trial.folder / name, kinds["weights"], apply)
        for name, drawn in trial.drawable.items():
            if drawn:
                _count(trial.folder / name, kinds["pictures"], apply)
            _count(picture_copy(home, study.uuid, trial.number, name), kinds["pictures"], apply)
    for path, _, _ in list(leftovers(study)):
        _count(path, kinds["leftovers"], apply)


def _count_copies(
    home: Home, study: StudyRecord, kept: Collection[int], kinds: dict[FileKind, Deletable], apply: bool
) -> str:
    """Counts the copies in MLflow's runs, and deletes the chosen ones. Returns why that could not be done, if so."""
    weights = (WEIGHTS, SPEC)
    by_name = {**dict.fromkeys(weights, kinds["weights"]), **dict.fromkeys(PICTURES, kinds["pictures"])}
    ended = [trial for trial in study.trials if trial.state != "running"]
    names = {t.number: [*(() if t.number in kept else weights), *t.drawable] for t in ended}
    try:
        for name, taken in trial_copies(
            home, study, names, [name for name in by_name if apply and by_name[name].chosen]
        ):
            by_name[name].files += 1
            by_name[name].bytes += taken
    except StorageError as error:
        return str(error)
    return ""


def _count(path: Path, kind: Deletable, apply: bool) -> None:
    """Counts a file, or all files in a folder, if it is there; deletes it if its kind is chosen and `apply`. Raises
    OSError where it cannot be deleted.
    """
    if path.is_dir():
        kind.files += sum(file.is_file() for file in path.rglob("*"))
        kind.bytes += bytes_in(path)
        if apply and kind.chosen:
            shutil.rmtree(path)
    elif path.is_file():
        with suppress(FileNotFoundError):  # another process, such as a search of another home, has deleted it
            size = path.stat().st_size
            if apply and kind.chosen:
                path.unlink()
            kind.files += 1
            kind.bytes += size
