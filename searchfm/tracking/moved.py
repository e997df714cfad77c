"""A copy of a home: MLflow's database holds addresses of artifacts from the root of the file system on.

`searchfm backup` writes them for the copy, and the folder that they are for into `place.json`. Where such a home is
moved, as to the place of the original, the next command that opens MLflow's database writes them anew.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from searchfm.errors import StorageError, one_line
from searchfm.home import Home, write_json

PLACE = "place.json"
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def has_moved(home: Home) -> bool:
    """Whether a copy of a home is elsewhere than MLflow's database of it says."""
    return place(home) != home.path


def place(home: Home) -> Path:
    """The folder of the home that the addresses in its MLflow's database are for."""
    try:
        return Path(json.loads((home.path / PLACE).read_text("utf-8"))["path"])
    except FileNotFoundError:  # it is no copy
        return home.path
    except (ValueError, LookupError, TypeError) as error:
        must = '{"path": FOLDER}'
        raise StorageError(f"{home.path / PLACE}: is damaged ({one_line(error)}); must be {must}") from None


def follow_move(home: Home, path: Path) -> None:
    """Changes the addresses in MLflow's database of a copy that was moved. One process at a time. path: the database.

    Raises sqlite3.Error, StorageError.
    """
    if has_moved(home):
        move(path, place(home), home.path)
        write_json(home.path / PLACE, {"path": str(home.path)})


def move(path: Path, old: Path, new: Path) -> None:
    """Changes addresses below one home to those of another, in one transaction. path: the database."""
    before, after = (Home(folder).artifacts.as_uri() for folder in (old, new))
    with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
        for table, column in ADDRESSES:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (after, len(before) + 1, len(before) + 1, f"{before}/"),
            )
