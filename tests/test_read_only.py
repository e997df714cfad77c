"""Commands that read a home work where it cannot be written: as another user, whatever files SQLite has left."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from searchfm import forkserver
from searchfm.config import Config
from searchfm.home import Home, file_sha256, write_json
from searchfm.learn.checkpoint import save_weights
from searchfm.learn.models import classifier
from searchfm.records import EPOCHS, EXAMPLE, FITTED, PROGRAM, TESTED, WEIGHTS, JobRecord, write_epochs
from searchfm.search.storage import open_storage, read_study, write_record
from searchfm.tracking import follow
from searchfm.tracking.registry import Program, publish
from tests import rows
from tests.commands import Done, searchfm_here
from tests.driving import let_go

pytestmark = [
    pytest.mark.slow(seconds=8),
    pytest.mark.usefixtures("own_forkserver"),  # another user may not read the environment of the process-wide one
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # mlflow's own use of SQLAlchemy
]
NOBODY = 65534


@contextmanager
def without_permission(home: Home) -> Iterator[None]:
    """This process may read the home, and write nothing in it."""
    for path in (home.path, *home.path.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.getresuid()
    if user[0] == 0:  # root may write anywhere
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(*user)
        for path in (home.path, *home.path.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def retrain(home: Home) -> None:
    """Gives the study a final model, untrained, and registers it."""
    study, gray = rows.study(home), torch.full((1,), 0.5)
    folder, config = study.final_folder, Config.from_table({"model": {"name": "mlp", "mlp": {"layers": 1, "width": 4}}})
    net = classifier(config.model, (1, 28, 28), 10, gray, gray, seed=0, device=torch.device("cpu"))
    spec = {"config": config.to_table(), "classes": rows.CLASSES, "shape": [1, 28, 28]}
    files = save_weights(folder, net.eval(), spec)
    for job in (FITTED, TESTED):
        write_json(folder / job, JobRecord("of this test", {"files": files}).to_json())
    np.save(folder / EXAMPLE, np.zeros((2, 1, 28, 28), np.uint8))
    rows.predictions().write(folder)
    write_epochs(folder / EPOCHS, rows.epochs(0, 3))
    (folder / PROGRAM).write_bytes(b"a program that nobody loads")
    final = rows.final((0.9, 900), weights=files[WEIGHTS])
    final = replace(final, model=publish(home, study, final, folder, lambda: Program(folder / PROGRAM, "2.13")))
    (folder / PROGRAM).unlink()
    write_json(folder / "final.json", final.to_json())
    write_record(open_storage(home), study.number, final)


@pytest.fixture(scope="module")
def made(new_home: Callable[[Path], Home]) -> Iterator[Home]:
    """A home with a study that MLflow has, and with its model, in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        home = new_home(Path(folder, "home, 100% #1"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(rows.RESOLVED["data"], "seed", 0)
            rows.four(home)
        retrain(home)
        follow.sync(home, read_study(home, "toy"), apply=True)
        rows.forget(home)
        yield home


WRITE = "UPDATE study_system_attributes SET value_json = replace(value_json, 'How deep?', 'Newest?')"


def leave(home: Home, kind: str) -> None:
    """The files of a database that a process has open, was killed with, or closed. The newest row is in -wal alone."""
    path, kept = home.path / "optuna.db", home.path / "kept"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        with connection:
            connection.execute(WRITE)
        kept.mkdir()
        for name in ("optuna.db", "optuna.db-wal", "optuna.db-shm"):
            shutil.copyfile(home.path / name, kept / name)
    for name in {"closed": [], "a -wal": ["", "-wal"], "-wal and -shm": ["", "-wal", "-shm"]}[kind]:
        shutil.copyfile(kept / f"optuna.db{name}", home.path / f"optuna.db{name}")
    shutil.rmtree(kept)


def content(home: Home) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in home.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["closed", "a -wal", "-wal and -shm"])
def test_readers_work_and_writers_are_refused_in_one_line(
    made: Home, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(dir=made.path.parent))
    home = Home(shutil.copytree(made.path, folder / "home"))
    folder.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # as /tmp, where every user may write
    monkeypatch.setitem(forkserver._config(), "tempdir", None)  # not that of this process, which was another user's
    leave(home, kind)
    before = content(home)

    def run(*arguments: str) -> Done:
        return searchfm_here(*arguments, "--home", str(home.path))

    with without_permission(home):
        assert "Newest?" in run("status", "toy").stdout
        assert len(open_storage(home).get_all_trials(read_study(home, "toy").number)) == 4
        for command in ("status", "trial toy 0", "models", "check", "status toy --csv"):
            done = run(*command.split())
            assert (done.returncode, done.stderr) == (0, ""), command
        image = folder / "image.png"
        Image.new("L", (28, 28)).save(image)
        for model in ("toy", "models:/searchfm-toy/1"):
            done = run("predict", model, str(image), "--json")
            assert (done.returncode, done.stderr) == (0, ""), model
        done = run("export", "toy", "--output", str(folder / "toy.safetensors"))
        assert (done.returncode, done.stderr) == (0, "")
        page = folder / "page.html"
        done = run("report", "toy", "--output", str(page))
        assert (done.returncode, done.stdout) == (0, f"{page}\n")
        assert done.stderr == f"searchfm: {home.path} cannot be written: the report is not logged to MLflow\n"
        assert "Newest?" in page.read_text("utf-8")
        done = run("compare", "toy", "--json")
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert "the comparison is not logged to MLflow" in done.stderr
        done = run("sync", "toy")  # the question that has changed is all that differs
        assert (done.returncode, done.stderr) == (0, "")
        assert "tags differ: mlflow.note.content" in done.stdout
        for command in ("sync toy --apply", "remove toy --yes", "stop toy", "check --repair"):
            done = run(*command.split())
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), command
            assert "cannot write the home folder" in done.stderr, command
        done = run("backup", str(folder / "copy"))
        assert (done.returncode, done.stderr) == (0, "")
    assert content(home) == before
    copy = Home(folder / "copy")
    assert read_study(copy, "toy").question == "Newest?"
    let_go(open_storage(copy))
