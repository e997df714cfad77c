"""Damaged and lost databases are one line in every command; `check` finds what is wrong, and repairs what it can."""

import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from searchfm.home import OWNER_FILE, STORAGE, Home, file_sha256, write_json
from searchfm.records import EPOCHS, FITTED, PREDICTIONS, SPEC, TESTED, WEIGHTS, JobRecord, TrainResult
from searchfm.search.lock import study_lock
from searchfm.search.storage import open_storage, read_studies, write_record
from tests import rows
from tests.commands import Done, searchfm_here

pytestmark = pytest.mark.slow(seconds=1)

READERS = (
    *("status", "status toy", "status toy --all", "trial toy 0", "report toy", "compare toy", "predict toy x.png"),
    *("export toy", "sync toy", "clean", "clean toy", "backup COPY", "dashboard toy"),
)
WRITERS = (
    *("tune toy --trials 9", "retrain toy", "sync toy --apply", "stop toy", "remove toy --yes"),
    *("clean --apply", "clean toy --apply"),
)


@pytest.fixture(scope="module")
def made(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a study of four trials and the files of their results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STORAGE, raising=False)
        home = new_home(tmp_path_factory.mktemp("made") / "home")
        rows.begin(home)
        for number, state in enumerate([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]):
            trial, folder = rows.ask(home), home.trial("toy", number)
            rows.record(home, trial, rows.epochs(number, 4))
            if state is TrialState.COMPLETE:
                (folder / WEIGHTS).write_bytes(bytes(2000))
                (folder / SPEC).write_text("{}")
                rows.predictions(seed=number).write(folder)
                files = {name: file_sha256(folder / name) for name in (WEIGHTS, SPEC, PREDICTIONS)}
                trial.set_user_attr("result", TrainResult(0.5, files=files).to_json())
                trial.study.tell(trial, 0.5 + number / 10)
            else:
                rows.tell(home, trial, state, reason="so")
        rows.forget(home)
    return home.path


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Home:
    return Home(shutil.copytree(made, tmp_path / "home"))


def run(home: Home, command: str) -> Done:
    """COPY stands for a folder beside the home."""
    return searchfm_here(*command.replace("COPY", f"{home.path}-copy").split(), "--home", str(home.path))


def content(home: Home) -> dict[str, str]:
    """All files by their hashes, but locks and those that SQLite keeps beside a database that is open."""
    left_out = ("-shm", "-wal", ".lock")
    files = [path for path in home.path.rglob("*") if path.is_file() and not path.name.endswith(left_out)]
    return {str(path.relative_to(home.path)): file_sha256(path) for path in files}


def execute(home: Home, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(home.path / "optuna.db")) as connection, connection:
        connection.execute(statement, values)


# --- damaged databases ------------------------------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(3000))


def scatter(path: Path) -> None:
    chance, content = random.Random(2), bytearray(path.read_bytes())
    for _ in range(len(content) // 40):
        content[chance.randrange(100, len(content))] = chance.randrange(256)
    path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "3000 random bytes": overwrite,
    "random bytes all over": scatter,
    "text": lambda path: path.write_text("no database\n" * 500),
    "a folder": make_folder,
}


def check_refused(home: Home, command: str, *words: str) -> None:
    before = content(home)
    done = run(home, command)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1, command
    assert line.startswith("searchfm: "), command
    for word in words:
        assert word in line, command
    assert content(home) == before, command
    assert not list(home.path.parent.glob("*home-copy*")), command


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_one_line_in_every_command(home: Home, damage: str) -> None:
    DAMAGES[damage](home.path / "optuna.db")
    for command in (*READERS, *WRITERS):
        check_refused(home, command, "optuna.db", "`searchfm backup`")
    done = run(home, "check")
    assert (done.returncode, done.stderr) == (1, "")
    assert "optuna.db is damaged" in done.stdout
    assert "1 problem" in done.stdout


@pytest.mark.parametrize("damage", ["half of it", "text", "nothing is left"])
def test_a_damaged_database_of_mlflow_is_one_line_and_trials_are_read(home: Home, damage: str) -> None:
    (DAMAGES | {"nothing is left": lambda path: path.write_bytes(b"")})[damage](home.path / "mlflow.db")
    for command in ("sync toy", "models", "remove toy --yes"):
        check_refused(home, command, "mlflow.db", "`searchfm backup`", "`searchfm sync STUDY --apply`")
    assert run(home, "status").returncode == 0
    assert "mlflow.db is" in run(home, "check").stdout


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE study_system_attributes SET value_json = '{]' WHERE key = 'searchfm'",
        "UPDATE study_system_attributes SET value_json = json_remove(value_json, '$.file') WHERE key = 'searchfm'",
        "UPDATE trial_user_attributes SET value_json = '[1]' WHERE key = 'result'",
        "UPDATE trials SET datetime_start = 'yesterday'",
        "UPDATE trials SET state = 'GONE'",
        "UPDATE trial_params SET distribution_json = '{}'",
    ],
)
def test_a_damaged_row_is_one_line(home: Home, statement: str) -> None:
    execute(home, statement)
    for command in ("status", "trial toy 0", "tune toy --trials 9"):
        check_refused(home, command)
    assert "1 problem" in run(home, "check").stdout


# --- lost databases ---------------------------------------------------------------------------------------------------


def lose(home: Home, how: str) -> None:
    path = home.path / "optuna.db"
    if how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "without tables":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


@pytest.mark.parametrize("how", ["emptied", "missing", "without tables"])
def test_a_lost_database_beside_trials_is_refused_and_not_begun_anew(home: Home, how: str) -> None:
    lose(home, how)
    state = "missing" if how == "missing" else "empty"
    for command in (*READERS, *WRITERS, "tune mlp --name other --dataset digits --trials 1"):
        check_refused(home, command, f"optuna.db: is {state}", "studies/toy", "`searchfm backup`", "--home")
    assert run(home, "check").returncode == 1
    shutil.rmtree(home.path / "studies")
    assert run(home, "status").stdout == f"{home.path} holds no study yet; begin with: searchfm tune mlp\n"


def test_trials_that_another_database_knows_are_not_written_into(
    home: Home, new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = new_home(tmp_path / "other")
    rows.begin(other, "else")
    rows.forget(other)
    monkeypatch.setenv(STORAGE, f"sqlite:///{other.path / 'optuna.db'}")
    for command in ("tune mlp --name toy --dataset digits", "retrain toy", "trial toy 0"):
        check_refused(home, command, f"{home.study('toy')} has trials of it", "`searchfm backup`", "move the folder")
    assert "has trials of a study that is not in the database" in run(home, "check toy").stdout


def test_a_lost_database_is_an_error_whatever_else_is_found(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    half = home.path / ".test-reads.json.tmp"
    half.write_bytes(b"half")
    os.utime(half, (1.8e9, time.time() - 1000))
    lose(home, "missing")
    check_refused(home, "check", "optuna.db: is missing", "studies/toy")
    (home.path / "mlflow.db").write_bytes(b"")
    monkeypatch.setenv(STORAGE, "postgresql://anna@127.0.0.1:1/none")
    check_refused(home, "check", "postgresql+psycopg://127.0.0.1:1/none")


# --- check ------------------------------------------------------------------------------------------------------------


def findings(home: Home, *options: str) -> list[dict[str, Any]]:
    done = run(home, " ".join(["check", "--json", *options]))
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == int(any(not finding["repaired"] for finding in found))
    return found


def test_nothing_is_wrong_with_a_whole_home(home: Home) -> None:
    before = content(home)
    done = run(home, "check")
    assert (done.returncode, done.stdout) == (0, "1 study, 4 trials, 6 hashed files: no problems found\n")
    assert content(home) == before
    assert run(home, "check other").returncode == 2
    assert "no such folder" in searchfm_here("check", "--home", str(home.path / "nowhere")).stderr


def test_each_damage_to_files_is_found_by_its_file(home: Home) -> None:
    folder = home.study("toy")
    (folder / "0000" / WEIGHTS).write_bytes(bytes(1999))
    (folder / "0003" / PREDICTIONS).unlink()
    text = (folder / "0001" / EPOCHS).read_text()
    (folder / "0001" / EPOCHS).write_text("\n".join(text.splitlines()[:2]) + "\n")
    (folder / "0002" / EPOCHS).write_text("no table\n1\n")
    shutil.copytree(folder / "0000", folder / "0007")
    shutil.copytree(folder / "0000", home.study("lost") / "0000")
    found = {(item["study"], item["trial"], Path(item["path"]).name): item["problem"] for item in findings(home)}
    assert {key: text[:9] for key, text in found.items()} == {
        ("toy", 0, WEIGHTS): "is damage",
        ("toy", 3, PREDICTIONS): "is missin",
        ("toy", 1, EPOCHS): "has 1 epo",
        ("toy", 2, EPOCHS): found["toy", 2, EPOCHS][:9],
        ("toy", 7, "0007"): "belongs t",
        ("lost", None, "lost"): "has trial",
    }
    assert "no table of epochs" in found["toy", 2, EPOCHS]
    before = content(home)
    assert len(findings(home, "--repair")) == 6, "none of these can be repaired from what is left"
    assert content(home) == before


def test_what_was_left_over_is_deleted_by_repair_alone_and_not_while_the_study_is_held(home: Home) -> None:
    folder, whole = home.study("toy"), content(home)
    (folder / "0001" / "attempt-2").mkdir()
    (folder / "0001" / "attempt-2" / "checkpoint").write_bytes(bytes(10))
    (folder / ".report.html.tmp").write_bytes(b"half")
    (folder / "0001" / WEIGHTS).write_bytes(bytes(10))
    (home.path / ".test-reads.json.tmp").write_bytes(b"half")
    (folder / "0003" / ".new.png.tmp").write_bytes(b"being written")
    for path in (folder / ".report.html.tmp", home.path / ".test-reads.json.tmp"):
        os.utime(path, (1.8e9, time.time() - 1000))
    damaged = content(home)
    with study_lock(home, "toy"):
        assert [Path(item["path"]).name for item in findings(home, "--repair")] == [".test-reads.json.tmp"]
        assert "study 'toy' is held by process" in run(home, "check").stdout
    assert len(findings(home)) == 3
    assert damaged.keys() - content(home).keys() == {".test-reads.json.tmp"}
    repaired = findings(home, "--repair")
    assert [item["repaired"] for item in repaired] == [True] * 3
    assert content(home).keys() - whole.keys() == {"studies/toy/0003/.new.png.tmp"}
    assert whole.items() <= content(home).items()
    assert findings(home) == []


def test_the_owner_that_a_killed_process_of_another_host_left_holds_nothing(home: Home) -> None:
    (home.study("toy") / OWNER_FILE).write_text("process 1 on a-container-that-is-gone")
    (home.trial("toy", 1) / WEIGHTS).write_bytes(bytes(10))
    done = run(home, "check")
    assert done.stdout.startswith(f"toy: {home.trial('toy', 1) / WEIGHTS} is left over, of a trial not among the best")
    assert "is held by" not in done.stdout


def test_a_final_model_is_checked_whatever_its_jobs_wrote_and_what_cannot_be_repaired_is_listed(home: Home) -> None:
    study = rows.study(home)
    folder = study.final_folder
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes(2000))
    final = rows.final((1.0, 9), weights=file_sha256(folder / WEIGHTS))
    write_record(open_storage(home), study.number, final)
    rows.forget(home)
    write_json(folder / FITTED, JobRecord("of this test", {"files": None}).to_json())
    write_json(folder / TESTED, JobRecord("of this test", {"files": "text"}).to_json())
    (folder / ".final.json.tmp").mkdir()  # so that final.json cannot be written, as on a full disk
    damaged, lost = "is missing or damaged", "is missing, damaged or older than the database's"
    found = findings(home, "--repair")
    problems = {Path(item["path"]).name: item["problem"] for item in found}
    assert problems == {FITTED: damaged, TESTED: damaged, "final.json": lost}
    assert found[-1]["todo"] == f"it could not be repaired: {folder / 'final.json'}: cannot be written: Is a directory"
    (folder / ".final.json.tmp").rmdir()
    assert findings(home, "--repair")[-1]["repaired"]
    assert len(findings(home)) == 2


def test_an_empty_database_of_a_new_home_holds_no_study(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    home = new_home(tmp_path / "new")
    assert read_studies(home) == []
    assert run(home, "check").stdout == "0 studies, 0 trials, 0 hashed files: no problems found\n"
    assert open_storage(home)
