"""The home folder: its paths, its database URLs, how files in it are written; the cache folder; and the folder of the
built-in studies. Only platformdirs besides the standard library.
"""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs

from searchfm.errors import StorageError, UserError

HOME = "SEARCHFM_HOME"
DATA = "SEARCHFM_DATA"
STORAGE = "SEARCHFM_STORAGE"
TRACKING = "MLFLOW_TRACKING_URI"
CACHE = "SEARCHFM_CACHE"
# In the folder of a study: locks of its coordinator and of its writer into MLflow, the holder of the first one, and the
# coordinator that is asked to stop.
LOCK_FILE, TRACKING_LOCK_FILE, OWNER_FILE, STOP_FILE = ".lock", ".tracking.lock", "owner", ".stop"
TRIAL_FOLDER = re.compile(r"\d{4,}")  # the name of a trial's folder
# Files in the home and the cache that can be deleted.
FileKind = Literal["weights", "leftovers", "pictures", "features", "parsed data", "costs and tables", "downloads"]


@dataclass(frozen=True)
class Home:
    """The folder that holds everything a search writes; `./runs` by default.

    Storage URLs come from the environment, never from the command line, where `ps` would show their passwords.
    """

    path: Path

    @classmethod
    def find(cls, option: Path | None = None) -> "Home":
        """`--home`, else SEARCHFM_HOME, else `./runs`."""
        return cls((option or Path(os.environ.get(HOME) or "runs")).expanduser().absolute())

    @property
    def free_space(self) -> int:
        """Free bytes of its file system; if the folder does not exist, of the one in which it would be made."""
        return shutil.disk_usage(next(path for path in (self.path, *self.path.parents) if path.exists())).free

    def probe(self) -> None:
        """Raises UserError if the folder cannot be written or created. Creates nothing itself."""
        try:
            existing = next(path for path in (self.path, *self.path.parents) if path.exists() or path.is_symlink())
            if not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(existing, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise unwritable(self.path, error) from None

    @property
    def optuna_url(self) -> str:
        """Optuna's database: SEARCHFM_STORAGE, or a SQLite file of the home."""
        return os.environ.get(STORAGE) or self._own("optuna.db")

    @property
    def tracking_uri(self) -> str:
        """MLflow's database or server: MLFLOW_TRACKING_URI, or a SQLite file of the home (never Optuna's own)."""
        return os.environ.get(TRACKING) or self._own("mlflow.db")

    def _own(self, name: str) -> str:
        """The URL of a SQLite file of the home."""
        return sqlite_url(self.path / name)

    @property
    def artifacts(self) -> Path:
        """Where MLflow keeps artifacts, unless a server keeps its own."""
        return self.path / "mlartifacts"

    def study(self, name: str) -> Path:
        """The folder of a study, whose name was checked."""
        return self.path / "studies" / name

    def studies(self) -> list[str]:
        """The names of the studies that have a folder, sorted."""
        folder = self.path / "studies"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def has_trials(self, name: str) -> bool:
        """Whether a study's folder holds folders of trials."""
        folder = self.study(name)
        return folder.is_dir() and any(TRIAL_FOLDER.fullmatch(path.name) for path in folder.iterdir())

    def trial(self, name: str, number: int) -> Path:
        """The folder of a trial."""
        return self.study(name) / f"{number:04d}"


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file. Encoded is what SQLAlchemy would take for more than a path, and nothing else, since
    MLflow makes the folder of the name that stands in the URL.
    """
    text = str(path)
    for letter in "%?#":  # the first one first: the others bring it in
        text = text.replace(letter, f"%{ord(letter):X}")
    return f"sqlite:///{text}"


def data_folder(option: Path | None = None) -> Path | None:
    """Where data sets are looked for first: `--data-dir`, else SEARCHFM_DATA, else nowhere."""
    folder = option or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    return folder.expanduser().absolute() if folder else None


def cache_folder() -> Path:
    """The folder of what can be made or downloaded again: SEARCHFM_CACHE, or the user's own."""
    return Path(os.environ.get(CACHE) or platformdirs.user_cache_dir("searchfm"))


def shipped_folder() -> Path:
    """The folder of the built-in study files, in the checkout or in the wheel."""
    package = Path(__file__).parent
    checkout = package.parent / "studies"
    return checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "_studies"


def shipped() -> list[str]:
    """The names of the built-in study files, as `tune` accepts them; those in folders last."""
    root = shipped_folder()
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml")]
    return sorted(names, key=lambda name: ("/" in name, name))


# Scheme; user and password; host, port and path; query and fragment. A reserved letter that is not encoded, such as "@"
# in a password, fits nowhere.
_ADDRESS = re.compile(
    r"((?:[\w+.-]+://)?)(?:[^@/?#]*@)?((?:\[[^]@/?#]*]|[\w.-]*)(?::\d*)?(?:/[^@?#]*)?)(?:[?#][^@]*)?", re.DOTALL
)


def shown(uri: str) -> str:
    """The address of a database or server for messages: without user, password, query and fragment. Of one where these
    cannot be told apart only the scheme.
    """
    if re.match(r"(sqlite|file)[\w+]*:", uri):  # a path, which may have any letters
        return uri.partition("?")[0]
    if match := _ADDRESS.fullmatch(uri):
        return match[1] + match[2]
    return f"{uri.partition('://')[0]}://..." if "://" in uri else "..."


def without_passwords(text: str) -> str:
    """The text with every address in it as `shown`: up to the next space or quotation mark after the last @ of its
    line, since a password may have them.
    """
    return re.sub(r"\b[a-zA-Z][\w+.-]*://(?:.*@)?[^\s'\"]*", lambda match: shown(match[0]), text)


def command_line() -> str:
    """The command that this process runs, for the record: `searchfm tune ...`, addresses as `shown`. Of
    another program only its file's name, since its arguments may hold anything; empty without a file.
    """
    program = Path(sys.argv[0] if sys.argv else "")
    if program.stem == "searchfm" or program.parts[-2:] == ("searchfm", "__main__.py"):
        return shlex.join(["searchfm", *map(without_passwords, sys.argv[1:])])
    return program.name if program.suffix == ".py" else ""


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a home folder that cannot be written."""
    return UserError(f"{path}: cannot write the home folder ({error.strerror}); name another with --home or {HOME}")


def write_whole(path: Path, content: bytes | Callable[[Path], object]) -> str:
    """Writes a file so that a crash, or a full disk, leaves the old one or the new one. Returns its sha256.

    content: or what writes it into the path that it gets, and raises OSError where it cannot.
    Makes the folder where it is missing. One writer of a path at a time: the temporary file has one name, so that the
    next write replaces what a killed process left. Raises StorageError.
    """
    partial = path.with_name(f".{path.name[:100]}.tmp")
    try:
        make_folder(path.parent)
        try:
            if isinstance(content, bytes):
                partial.write_bytes(content)
            else:
                content(partial)
            flush(partial)
            sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        flush(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
    return sha256


def make_folder(path: Path) -> None:
    """Makes a folder where it is missing, and those above it; a loss of power leaves them. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk: only then a loss of power leaves what was written, created
    or renamed. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(root: Path) -> None:
    """Flushes all files and folders below a folder to the disk. Raises OSError."""
    for folder, _, files in os.walk(root):
        for name in files:
            flush(Path(folder, name))
        flush(Path(folder))


def write_json(path: Path, values: Any) -> str:
    """Writes plain values as JSON, whole or not at all; returns the file's sha256. Raises StorageError."""
    return write_whole(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
