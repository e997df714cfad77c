"""Paths of artifacts in MLflow's database, which are absolute: changed in a copy of a home.

`searchfm backup` writes those of the copy, and the copy's folder into `place.json`. If the copy is moved, the next
command that opens MLflow's database corrects them.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from searchfm.errors import StorageError, one_line
from searchfm.home import Home, write_json
from searchfm.search.database import BUSY_SECONDS

PLACE = "place.json"
COLUMNS = (  # of MLflow's tables, with such paths, as URIs
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def has_moved(home: Home) -> bool:
    """Whether the paths in its MLflow's database are of another folder than the home's."""
    recorded = recorded_folder(home)
    if recorded == home.path:
        return False
    try:
        return not recorded.samefile(home.path)  # else by another path of the same folder, such as a link
    except OSError:  # it is gone
        return True


def recorded_folder(home: Home) -> Path:
    """The folder of the home for which the paths in its MLflow's database were written."""
    try:
        return Path(json.loads((home.path / PLACE).read_text("utf-8"))["path"])
    except FileNotFoundError:  # it is no copy
        return home.path
    except (ValueError, LookupError, TypeError) as error:
        must = '{"path": FOLDER}'
        raise StorageError(f"{home.path / PLACE}: is damaged ({one_line(error)}); must be {must}") from None


def correct_paths(home: Home, path: Path) -> None:
    """Changes the paths in MLflow's database of a copy that was moved. One process at a time. path: the database.

    Raises sqlite3.Error, StorageError.
    """
    if has_moved(home):
        change_paths(path, recorded_folder(home), home.path)
        write_json(home.path / PLACE, {"path": str(home.path)})


def change_paths(path: Path, old: Path, new: Path) -> None:
    """Changes paths below one home to those of another, in one transaction. path: the database."""
    before, after = (Home(folder).artifacts.as_uri() for folder in (old, new))
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection, connection:
        for table, column in COLUMNS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (after, len(before) + 1, len(before) + 1, f"{before}/"),
            )
