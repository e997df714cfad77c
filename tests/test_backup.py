"""A backup is a home: whole, consistent while a search writes, and of use when the original is gone."""

import gc
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from searchfm import backup as backing
from searchfm.check import check
from searchfm.disk import clean
from searchfm.errors import StorageError, UserError
from searchfm.home import STORAGE, TRACKING, Home
from searchfm.records import SPEC, WEIGHTS
from searchfm.retraining import RetrainOptions, retrain
from searchfm.search.storage import copy_storage, delete_study, open_storage, read_studies, write_record
from tests import rows
from tests.commands import Done, searchfm_here
from tests.crashing import Inline, never
from tests.driving import search, stored, toy, without_following

# mlflow's own use of SQLAlchemy.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
TINY = ("--dataset", "digits", "--epochs", "2", "--workers", "1")


def run(home: Path, *arguments: str) -> Done:
    return searchfm_here(*arguments, "--home", str(home))


def values(home: Path, *arguments: str) -> Any:
    done = run(home, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_backup_has_the_studies_and_files_of_either_database_as_a_home(
    any_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.four(any_home)
    rows.begin(any_home, "second")
    (any_home.path / "worker.key").write_text("secret")
    (any_home.study("toy") / ".report.html.tmp").write_text("half")
    (any_home.trial("toy", 0) / WEIGHTS).chmod(0o600)
    expected = stored(any_home, "toy")
    folder = tmp_path / "copies" / "a copy%3F?x#"  # letters that mean something in a URL
    done = values(any_home.path, "backup", str(folder))
    assert (done["folder"], done["studies"], done["trials"], done["mlflow"]) == (str(folder), 2, 4, False)
    assert run(any_home.path, "backup", str(folder)).stderr == (
        f"searchfm: {folder}: must not exist, or be an empty folder\n"
    )
    inside = any_home.path / "studies" / "copy"
    assert run(any_home.path, "backup", str(inside)).returncode == 2
    rows.forget(any_home)
    monkeypatch.delenv(STORAGE, raising=False)
    copy = Home(folder)
    study = stored(copy, "toy")
    for mine, theirs in zip(study.trials, expected.trials, strict=True):
        assert mine.folder == copy.trial("toy", mine.number)
        assert {**vars(mine), "folder": None} == {**vars(theirs), "folder": None}
        assert list(mine.epochs) == list(theirs.epochs)
        assert mine.files() == theirs.files()
    assert (study.uuid, study.question, study.resolved) == (expected.uuid, expected.question, expected.resolved)
    assert stat.S_IMODE((copy.trial("toy", 0) / WEIGHTS).stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["optuna.db", "optuna.lock", "studies"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert stored(copy, "second").trials == ()
    trial = rows.ask(copy)  # a search may go on in it
    assert trial.number == 4
    rows.forget(copy)


def test_studies_of_another_home_on_the_same_server_are_left_alone(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_forkserver: None
) -> None:
    monkeypatch.setenv(STORAGE, database)
    home, other = Home(tmp_path / "home"), Home(tmp_path / "other")
    for each, name in ((home, "one"), (other, "two")):
        search(each, toy(name), trials=2)
    checked = check(home)
    assert (checked.studies, checked.trials, checked.findings) == (1, 2, [])
    with warnings.catch_warnings():  # the end of a command closes its connections
        warnings.simplefilter("ignore", ResourceWarning)
        assert clean(home, apply=True, keep=0).held == {}
        gc.collect()
    assert home.studies() == ["one"]
    done = backing.backup(home, tmp_path / "copy")
    assert (done.studies, done.trials, done.checked.findings) == (1, 2, [])
    monkeypatch.delenv(STORAGE)
    assert [study.name for study in read_studies(Home(tmp_path / "copy"))] == ["one"]


def after_the_database(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """Does something in a backup's course: after it has copied the database, before the files."""

    def copied(*arguments: Any) -> None:
        copy_storage(*arguments)
        meanwhile()

    monkeypatch.setattr(backing, "copy_storage", copied)


@pytest.mark.parametrize("change", ["retrained", "removed"])
def test_a_backup_in_whose_course_a_study_is_retrained_or_removed_is_refused(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    study = rows.begin(home)
    final = rows.final((1.0, 9))
    changes = {
        "retrained": lambda: write_record(open_storage(home), study.number, final),
        "removed": lambda: delete_study(open_storage(home), study.number),
    }
    after_the_database(monkeypatch, changes[change])
    with pytest.raises(StorageError, match="'toy': was retrained or removed meanwhile; run the same command again"):
        backing.backup(home, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_trials_and_studies_that_begin_in_the_course_of_a_backup_are_not_in_it(
    any_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.four(any_home)

    def begin() -> None:
        rows.ask(any_home)
        rows.four(any_home, "second")
        (any_home.study("second") / "report.html").write_text("a report")

    after_the_database(monkeypatch, begin)
    (any_home.study("toy") / "0009").mkdir()
    (any_home.study("toy") / "0009" / "config.toml").write_text("")
    done = backing.backup(any_home, tmp_path / "copy")
    copy = Home(tmp_path / "copy")
    assert (done.studies, done.trials, copy.studies()) == (1, 4, ["toy"])
    assert [finding.trial for finding in done.checked.findings] == [9], "that no trial of the home has"
    assert sorted(path.name for path in copy.study("toy").iterdir()) == ["0000", "0001", "0002", "0003", "0009"]
    rows.forget(any_home)


def test_a_backup_that_fails_leaves_nothing_and_the_next_one_succeeds(
    new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = new_home(tmp_path / "home"), tmp_path / "copy"
    rows.four(home)
    rows.forget(home)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        done = run(home.path, "backup", str(folder))
    assert (done.returncode, done.stderr) == (1, f"searchfm: {folder}: [Errno 28] No space left on device\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    (tmp_path / ".copy.tmp" / "studies" / "dead").mkdir(parents=True)  # of a backup that was killed
    folder.mkdir()
    assert values(home.path, "backup", str(folder))["mlflow"] is True
    assert not (folder / "studies" / "dead").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "home"]
    assert "holds no study yet" in run(tmp_path / "none", "backup", str(tmp_path / "other")).stderr
    (home.trial("toy", 1) / "epochs.csv").unlink()
    done = run(home.path, "backup", str(tmp_path / "other"))
    assert (done.returncode, done.stderr.startswith("searchfm: 1 problem in the copy")) == (0, True)


def test_a_link_to_an_empty_folder_is_filled_and_the_home_itself_is_refused_by_any_path(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home")
    rows.begin(home)
    rows.forget(home)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    before = sorted(home.path.rglob("*"))
    for place, folder in (
        (home, tmp_path / "other" / ".." / "home" / "studies" / "copy"),
        (home, tmp_path / "link" / "copy"),
        (Home(tmp_path / "link"), home.path / "copy"),
    ):
        with pytest.raises(UserError, match="must be outside of the home"):
            backing.backup(place, folder)
    assert sorted(home.path.rglob("*")) == before
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run(home.path, "backup", str(tmp_path / "loop")).stderr.startswith(f"searchfm: {tmp_path / 'loop'}: ")
    assert run(tmp_path / "loop", "backup", str(tmp_path / "other")).returncode == 2
    (tmp_path / "loop").unlink()
    (tmp_path / "empty").symlink_to(tmp_path / "other")
    assert backing.backup(home, tmp_path / "empty").folder == str(tmp_path / "other")
    assert [study.name for study in read_studies(Home(tmp_path / "empty"))] == ["toy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "home", "link", "other"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_backup_that_a_signal_stops_leaves_nothing(
    new_home: Callable[[Path], Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],  # the outputs are no terminal, which SIGHUP would close
    number: signal.Signals,
) -> None:
    home = new_home(tmp_path / "home")
    rows.four(home)
    rows.forget(home)
    copied, remove = list[Path](), shutil.rmtree

    def copy(path: Path, target: Path) -> None:
        copied.append(path)
        signal.raise_signal(number)

    def closing_terminal(*arguments: Any, **options: Any) -> None:
        if copied:
            signal.raise_signal(signal.SIGHUP)  # by the kernel, after the shell's
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "copy2", copy)
    monkeypatch.setattr(shutil, "rmtree", closing_terminal)
    handlers = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        done = run(home.path, "backup", str(tmp_path / "copy"))
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert (done.returncode, done.stdout, done.stderr, len(copied)) == (128 + number, "", "", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_the_commands_that_follow_read_the_databases_of_the_copy(
    new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, home, folder = new_home(tmp_path / "server"), Home(tmp_path / "home"), tmp_path / "a copy"
    monkeypatch.setenv(STORAGE, server.optuna_url)
    rows.four(home)
    rows.forget(home)
    (home.trial("toy", 1) / "epochs.csv").unlink()
    for tracking, unset in (
        (server.tracking_uri, f"-u {STORAGE} -u {TRACKING}"),
        ("http://127.0.0.1:1", f"-u {STORAGE}"),  # whose data are not in the copy
    ):
        monkeypatch.setenv(TRACKING, tracking)
        done = run(home.path, "backup", str(folder))
        command = f"env {unset} searchfm"
        assert done.stdout.splitlines()[-1] == f"next  {command} status --home '{folder}'"
        problem = "1 problem in the copy, which the home may have too"
        assert done.stderr.endswith(f"searchfm: {problem}: {command} check --home '{folder}'\n")
        shutil.rmtree(folder)


def retrain_here(home: Path, trial: int) -> None:
    """`retrain`, whose jobs run in this process; the model's program, which takes a worker 8 s, is a dummy."""
    for _ in retrain(RetrainOptions(Home(home), "mlp", trial=trial), never, Inline):
        pass


# Names of folders with letters that mean something in a URL.
@pytest.mark.slow(seconds=20)
def test_a_backup_goes_on_where_the_original_is_gone_and_where_it_is_moved(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "a home%20?x#üñ").path
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    digit = str(tmp_path / "digit.png")
    with without_following():
        values(home, "tune", "mlp", "--trials", "2", *TINY)
    retrain_here(home, 0)
    values(home, "sync", "mlp", "--apply")
    predicted = values(home, "predict", "models:/searchfm-mlp/1", digit)
    # Not put in the place of the original: MLflow's client keeps a database open in this process, by its path.
    for place, written in (
        (tmp_path / "a copy%3F?#", tmp_path / "a copy%3F?#"),
        (tmp_path / "moved", tmp_path / "second"),
    ):
        values(home, "backup", str(written))
        home.rename(tmp_path / "gone")
        written.rename(place)
        assert run(place, "check").stdout == "1 study, 2 trials, 10 hashed files: no problems found\n"
        assert values(place, "status", "mlp")[0]["trials"]["complete"] == 2
        assert values(place, "sync", "mlp") == []
        assert values(place, "predict", "models:/searchfm-mlp/1", digit) == predicted
        assert [row["class"] for row in values(place, "predict", "mlp", digit)] == [row["class"] for row in predicted]
        with without_following() if place == written else nullcontext():  # a tracking process takes 5 s
            assert values(place, "tune", "mlp", "--trials", "3", *TINY)["trials"]["total"] == 3
        if place == written:
            assert "trial 2: has no run" in [row["problem"] for row in values(place, "sync", "mlp", "--apply")]
        assert values(place, "sync", "mlp") == []
        if place == written:
            retrain_here(place, 1)
            final = stored(Home(place), "mlp").final
            assert final is not None
            assert final.winner == 1
        else:
            assert values(place, "retrain", "mlp", "--trial", "1", "--workers", "1")["winner"] == 1
        assert [row["version"] for row in values(place, "models")] == [2, 1]
        assert values(place, "predict", "models:/searchfm-mlp/2", digit)
        assert run(place, "report", "mlp").returncode == 0
        assert values(place, "check") == []
        assert not home.exists(), "nothing is written at the other place"
        assert written == place or not written.exists()
        (tmp_path / "gone").rename(home)


@pytest.mark.slow(seconds=15)
def test_backups_of_a_running_search_are_whole_and_go_on(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    command = ["tune", "mlp", "--trials", "10", "--set", "search.keep=1", *TINY]
    with subprocess.Popen(
        [sys.executable, "-m", "searchfm", *command, "--home", str(home.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    ) as search:
        while search.poll() is None and not home.trial("mlp", 1).exists():
            time.sleep(0.02)
        done = []
        while search.poll() is None:
            folder = tmp_path / f"copy-{len(done)}"
            done.append(backing.backup(home, folder))
            assert done[-1].checked.findings == []
    assert search.returncode == 0
    assert len(done) > 2
    assert sorted(each.trials for each in done) == [each.trials for each in done]
    begun = [each for each in done if each.trials < 10]
    assert begun, "every backup came after the last trial"
    copy = Path(begun[len(begun) // 2].folder)
    assert values(copy, "check") == []
    with without_following():
        tuned = values(copy, *command)
    assert (tuned["trials"]["total"], tuned["trials"]["failed"]) == (10, 0)
    values(copy, "sync", "mlp", "--apply")
    assert values(copy, "sync", "mlp") == []
    study = stored(Home(copy), "mlp")
    assert [(trial.folder / SPEC).exists() for trial in study.kept] == [True]
    assert values(copy, "check") == []
