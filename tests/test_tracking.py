import contextlib
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rows
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from searchfm.home import STORAGE, TRACKING, Home
from searchfm.job import Epoch
from searchfm.search.history import StudyRow
from searchfm.search.notes import Notes, artifact_folder, escape, web_address
from searchfm.search.storage import open_storage
from searchfm.tracking import Tracker, apply, differences, make_schema, record, run_links, shown
from searchfm.tracking.follower import Follower
from searchfm.tracking.mirror import Mirror
from tests.serving import Server

# MLflow 3.17 asks SQLAlchemy 2.1 for a way of loading that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

TABLES = ("experiments", "experiment_tags", "runs", "params", "tags", "metrics", "latest_metrics", "inputs", "datasets")


@pytest.fixture
def home(new_home: Callable[[Path], Home], tmp_path: Path) -> Home:
    return new_home(tmp_path / "home with ä space")


@pytest.fixture(scope="module")
def told(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose study of four trials is in MLflow; tests that do damage to it have it repaired."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STORAGE, raising=False)
        patch.delenv(TRACKING, raising=False)
        home = new_home(tmp_path_factory.mktemp("told") / "home with ä space")
        follow(home, rows.four(home))
    return home


def follow(home: Home, study: StudyRow) -> None:
    """Brings a whole study into MLflow."""
    follower = Follower(home, study)
    follower.reconcile(study)
    follower.keep(study.kept)
    assert follower.close(study, 60) == 0


def client(home: Home) -> MlflowClient:
    return MlflowClient(tracking_uri=home.tracking_uri)


def runs(home: Home, study: StudyRow) -> dict[str, Any]:
    """The active runs by name."""
    experiment = run_links(home, study).experiment
    found = client(home).search_runs([experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def dump(home: Home) -> dict[str, list[Any]]:
    """Everything that MLflow's database says of runs."""
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection:
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in TABLES}


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- what a study looks like in MLflow --------------------------------------------------------------------------------


def test_a_search_is_written_as_it_goes(home: Home) -> None:
    study = rows.begin(home)
    tracker = Tracker(home, study)
    tracker.reconcile(study)
    trial = rows.ask(home)
    trained = rows.epochs(0, 4)
    tracker.started(rows.study(home).trials[0])
    for epoch in trained[:2]:
        tracker.epoch(0, epoch)
    until(lambda: (home.path / "mlflow.db").exists() and bool(run_links(home, study).runs))
    run_id = run_links(home, study).runs[0]
    until(lambda: len(client(home).get_metric_history(run_id, "val/loss")) == 2)
    assert client(home).get_run(run_id).info.status == "RUNNING"

    rows.record(home, trial, trained)
    rows.tell(home, trial, TrialState.COMPLETE)
    for epoch in trained[2:]:
        tracker.epoch(0, epoch)
    study = rows.study(home)
    tracker.ended(study.trials[0])
    tracker.keep(study.ranked())
    assert tracker.close(study, 60) == 0

    run = client(home).get_run(run_id)
    assert run.info.status == "FINISHED"
    history = client(home).get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (epoch.index, epoch.train_loss, round(1000 * epoch.time)) for epoch in trained
    ]
    assert differences(home, study) == []


def test_what_a_person_finds_in_a_run(told: Home) -> None:
    study = rows.study(told)
    found = runs(told, study)
    assert {name: run.info.status for name, run in found.items()} == {
        "toy": "FINISHED",
        "toy-0000": "FINISHED",
        "toy-0001 (pruned)": "FINISHED",
        "toy-0002 (failed)": "FAILED",
        "toy-0003": "FINISHED",
    }
    run, row = found["toy-0003"], study.trials[3]
    assert float(run.data.params["optimizer.lr"]) == pytest.approx(row.params["optimizer.lr"])
    assert len(run.data.params["optimizer.lr"]) < 14  # digits that a person reads
    assert run.data.params["model.mlp.width"] == "[200" + ", 200" * (row.params["model.mlp.layers"] - 1) + "]"
    assert run.data.metrics["value"] == row.value
    assert run.data.metrics["total_seconds"] == 3.5
    assert run.data.metrics["seconds"] == row.epochs[-1].seconds
    assert run.info.start_time == round(row.started * 1000)
    tags = run.data.tags
    assert tags["study"] == "toy"
    assert (tags["study_uuid"], tags["trial"], tags["state"]) == (study.uuid, "3", "complete")
    assert (tags["config_digest"], tags["mlflow.parentRunId"]) == (row.digest, found["toy"].info.run_id)
    assert tags["mlflow.source.git.commit"] == record.git_commit(Path(__file__).parents[1])
    assert {"hardware", "python", "torch", "optuna", "mlflow", "searchfm"} <= set(tags)
    assert found["toy-0002 (failed)"].data.tags["reason"] == "loss is nan in epoch 2"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("fashion-mnist", "f" * 16)

    def artifacts(name: str) -> set[str]:
        return {info.path for info in client(told).list_artifacts(found[name].info.run_id)}

    always = {"config.toml", "epochs.csv", "log.txt", "curves.png"}
    whole = {"confusion.png", "predictions.csv", "weights.safetensors", "model.json"}
    assert artifacts("toy-0001 (pruned)") == always
    assert artifacts("toy-0000") == artifacts("toy-0003") == always | whole
    assert artifacts("toy") == {"study.toml", "environment.json"}
    assert found["toy"].data.metrics == {"value": study.best.value, "complete": 2.0, "pruned": 1.0, "failed": 1.0}


def test_the_table_opens_with_what_was_searched(told: Home) -> None:
    study = rows.study(told)
    links = run_links(told, study)
    tags = client(told).get_experiment(links.experiment).tags
    view = tags["mlflow.sharedViewState.searchfm"]
    assert links.table().endswith("viewStateShareKey=searchfm")
    assert record.searched(study.resolved) == ["model.mlp.layers", "optimizer.name", "optimizer.lr"]
    assert all(f"params.`{key}`" in view for key in record.searched(study.resolved))
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_predictions_are_a_readable_table(told: Home) -> None:
    study = rows.study(told)
    run_id = run_links(told, study).runs[0]
    table = Path(client(told).download_artifacts(run_id, "predictions.csv")).read_text().splitlines()
    assert table[0] == "image,true,predicted,right,probability"
    assert len(table) == 901
    assert table[1].split(",")[3] == "false"  # the surest mistake comes first
    assert table[1].split(",")[1] in rows.CLASSES


def test_a_twin_names_whose_end_it_took(home: Home) -> None:
    rows.begin(home)
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(0, 4))
    rows.tell(home, trial, TrialState.COMPLETE)
    twin = rows.ask(home)
    rows.record(home, twin, rows.epochs(0, 4))
    rows.tell(home, twin, TrialState.COMPLETE, twin=0)
    study = rows.study(home)
    follow(home, study)
    assert runs(home, study)["toy-0001"].data.tags["twin_of"] == "0"
    assert differences(home, study) == []


def test_a_younger_study_of_the_same_name_gets_an_experiment_of_its_own(home: Home) -> None:
    follow(home, rows.four(home))
    rows.forget(home)
    shutil.rmtree(home.path / "studies")
    for path in home.path.glob("optuna.db*"):
        path.unlink()
    study = rows.four(home)
    follow(home, study)
    names = {each.name for each in client(home).search_experiments()}
    assert names == {"Default", "toy", f"toy-{study.uuid[:8]}"}
    assert len(runs(home, study)) == 5


# --- nothing is lost, nothing is doubled ------------------------------------------------------------------------------


def test_sending_again_changes_nothing(told: Home) -> None:
    study = rows.study(told)
    before = dump(told)
    follow(told, study)
    mirror = Mirror(told, study)
    mirror.open()
    for row in study.trials:
        mirror.align(row)  # even if asked outright
    assert dump(told) == before


def test_a_search_that_was_stopped_goes_on_in_the_same_runs(home: Home) -> None:
    rows.begin(home)
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(0, 2))
    study = rows.study(home)
    follow(home, study)
    first = runs(home, study)
    assert {name: run.info.status for name, run in first.items()} == {"toy": "KILLED", "toy-0000": "RUNNING"}
    assert differences(home, study) == []

    follower = Follower(home, study)
    follower.reconcile(study)
    follower.started(study.trials[0])
    for epoch in rows.epochs(0, 4)[2:]:
        follower.epoch(0, epoch)
    rows.record(home, trial, rows.epochs(0, 4))
    rows.tell(home, trial, TrialState.COMPLETE)
    study = rows.study(home)
    follower.ended(study.trials[0])
    assert follower.close(study, 60) == 0
    second = runs(home, study)
    assert {name: run.info.run_id for name, run in second.items()} == {
        name: run.info.run_id for name, run in first.items()
    }
    assert {run.info.status for run in second.values()} == {"FINISHED"}
    history = client(home).get_metric_history(second["toy-0000"].info.run_id, "seconds")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def double(home: Home, study: StudyRow) -> None:
    run = client(home).get_run(run_links(home, study).runs[0])
    tags = {**run.data.tags, "mlflow.runName": "copy"}
    client(home).create_run(run.info.experiment_id, run_name="copy", tags=tags)


def erase(home: Home, study: StudyRow) -> None:
    """As `mlflow gc` does it."""
    run_id = run_links(home, study).runs[1]
    client(home).delete_run(run_id)
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        for name in ("params", "tags", "metrics", "latest_metrics", "runs"):
            connection.execute(f"DELETE FROM {name} WHERE run_uuid = ?", (run_id,))


def forget_epoch(home: Home, study: StudyRow) -> None:
    run_id = run_links(home, study).runs[0]
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        connection.execute("DELETE FROM metrics WHERE run_uuid = ? AND step = 2", (run_id,))


def forge_param(home: Home, study: StudyRow) -> None:
    run_id = run_links(home, study).runs[3]
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE params SET value = '7' WHERE run_uuid = ? AND key = 'optimizer.lr'", (run_id,))


DAMAGE: dict[str, tuple[Callable[[MlflowClient, Any, Any], object] | None, str]] = {
    "deleted": (lambda c, links, home: c.delete_run(links.runs[0]), "trial 0: its run was deleted"),
    "state": (
        lambda c, links, home: c.update_run(links.runs[2], "FINISHED"),
        "trial 2: is failed, its run failed (FINISHED)",
    ),
    "tags": (lambda c, links, home: c.delete_tag(links.runs[1], "reason"), "trial 1: tags differ: reason"),
    "artifacts": (
        lambda c, links, home: next(home.artifacts.rglob(f"{links.runs[1]}/artifacts/curves.png")).unlink(),
        "trial 1: its run lacks curves.png",
    ),
    "weights": (lambda c, links, home: c.delete_tag(links.runs[0], "weights"), "trial 0: its weights are not kept"),
    "extra": (
        lambda c, links, home: c.log_metric(links.runs[3], "seconds", 1.0, timestamp=1, step=9),
        "trial 3: metrics differ: seconds",
    ),
    "study": (lambda c, links, home: c.delete_run(links.parent), "study: its own run is not there"),
    "experiment": (lambda c, links, home: c.delete_experiment(links.experiment), "study: its own run is not there"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_sync_repairs(told: Home, name: str) -> None:
    damage, said = DAMAGE[name]
    study = rows.study(told)
    damage(client(told), run_links(told, study), told)
    before = dump(told)
    found = differences(told, study)
    assert said in [str(each) for each in found]
    assert dump(told) == before  # looking writes nothing
    apply(told, study, found)
    assert differences(told, study) == []
    assert len(runs(told, study)) == 5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (double, "trial 0: has 2 runs"),
        (erase, "trial 1: has no run"),
        (forget_epoch, "trial 0: its run holds other epochs"),
        (forge_param, "trial 3: params differ: optimizer.lr"),
    ],
)
def test_sync_repairs_what_a_client_cannot_do(told: Home, damage: Callable[[Home, StudyRow], None], said: str) -> None:
    study = rows.study(told)
    damage(told, study)
    found = differences(told, study)
    assert [str(each) for each in found] == [said]
    apply(told, study, found)
    assert differences(told, study) == []
    assert len(runs(told, study)) == 5


def test_a_search_repairs_at_its_start_what_it_finds(told: Home) -> None:
    study = rows.study(told)
    double(told, study)
    client(told).delete_run(run_links(told, study).runs[1])
    follow(told, study)
    assert differences(told, study) == []


def test_sync_starts_from_nothing(home: Home) -> None:
    study = rows.four(home)
    found = differences(home, study)
    assert [each.kind for each in found] == ["missing"] * 5
    apply(home, study, found)
    assert differences(home, study) == []


def test_exactly_the_best_weights_stay(told: Home) -> None:
    study = rows.study(told)
    mirror = Mirror(told, study)
    mirror.open()
    mirror.keep(study.ranked()[:1])

    def there(name: str) -> bool:
        run = runs(told, study)[name]
        return "weights.safetensors" in {info.path for info in client(told).list_artifacts(run.info.run_id)}

    best, other = (f"toy-{row.number:04d}" for row in study.ranked())
    assert there(best)
    assert not there(other)


# --- MLflow away ------------------------------------------------------------------------------------------------------


def test_without_mlflow_nobody_waits_and_one_line_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TRACKING, "http://anna:secret@127.0.0.1:9")
    study = rows.four(home)
    with caplog.at_level(logging.INFO):
        began = time.perf_counter()
        follower = Follower(home, study)
        follower.reconcile(study)
        for row in study.trials:
            follower.ended(row)
        assert time.perf_counter() - began < 0.2
        assert follower.close(study, 3.0) == 4
    said = [entry.getMessage() for entry in caplog.records if entry.name.startswith("searchfm")]
    assert len(said) == 1
    assert said[0].startswith("MLflow at http://127.0.0.1:9 does not answer")
    assert "secret" not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_sync_says_in_one_line_that_mlflow_is_away(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING, "http://anna:secret@127.0.0.1:9")
    study = rows.four(home)
    from searchfm.errors import StorageError

    with pytest.raises(StorageError) as caught:
        differences(home, study)
    assert str(caught.value).startswith("MLflow at http://127.0.0.1:9: ")
    assert "secret" not in str(caught.value)


def test_the_process_ends_with_its_coordinator(home: Home) -> None:
    rows.begin(home)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); import rows; from pathlib import Path\n"
        "from searchfm.search.storage import Home; from searchfm.tracking import Tracker\n"
        "home = Home(Path(sys.argv[1])); Tracker(home, rows.study(home)); print(flush=True); time.sleep(60)"
    )
    coordinator = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert coordinator.stdout is not None
    coordinator.stdout.readline()

    def children() -> list[str]:
        found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        return [line.split()[0] for line in found.splitlines() if line.split()[1] == str(coordinator.pid)]

    until(lambda: len(children()) == 1)
    (child,) = children()
    until(lambda: (home.study("toy") / ".tracking.lock").exists())  # it is well under way
    coordinator.send_signal(signal.SIGKILL)
    coordinator.wait()
    coordinator.stdout.close()
    until(lambda: not _alive(int(child)))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_left_out() -> None:
    epoch = Epoch(1, float("nan"), 0.5, float("inf"), None, 0.1, 1.0, 2.0, 3.0)
    assert {point.key for point in record.epoch_points(epoch)} == {
        "train/accuracy",
        "lr",
        "seconds",
        "samples_per_second",
    }


def test_a_study_shows_its_best_so_far(told: Home) -> None:
    study = rows.study(told)
    best = [(point.step, point.value) for point in record.study_points(study.trials) if point.key == "value"]
    values = [study.trials[0].value, study.trials[3].value]
    assert best == [(1, values[0])] + ([(4, values[1])] if values[1] > values[0] else [])


def test_addresses_are_shown_without_passwords() -> None:
    assert shown("postgresql://anna:secret@db:5432/mlflow?sslmode=require") == "postgresql://db:5432/mlflow"
    assert shown("sqlite:////home/a/mlflow.db") == "sqlite:////home/a/mlflow.db"
    assert web_address("https://anna:secret@host/mlflow/") == "https://host/mlflow"
    assert web_address("sqlite:////home/a/mlflow.db") is None


def test_a_home_may_have_any_path(tmp_path: Path) -> None:
    home = Home(tmp_path / "50% of a home? #1 %20 ü")
    make_schema(home)
    assert (home.path / "mlflow.db").stat().st_size > 0
    rows.begin(home)
    rows.tell(home, rows.ask(home), TrialState.FAIL, reason="out of memory")
    study = rows.study(home)
    apply(home, study, differences(home, study))
    assert not differences(home, study)


DIE = """
import os, signal, sys
import sqlalchemy
from pathlib import Path
from searchfm.home import Home
from searchfm.tracking import make_schema
left = int(sys.argv[2])
def statement(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", statement)
make_schema(Home(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("statement", [50, 900])  # MLflow makes its tables in some 1700, and opens no file of a half
def test_killed_while_mlflows_tables_are_made_the_next_makes_them(tmp_path: Path, statement: int) -> None:
    home = Home(tmp_path / "fresh")
    died = subprocess.run([sys.executable, "-c", DIE, str(home.path), str(statement)], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    make_schema(home)
    rows.begin(home)
    rows.tell(home, rows.ask(home), TrialState.FAIL, reason="out of memory")
    study = rows.study(home)
    apply(home, study, differences(home, study))
    assert not differences(home, study)
    assert not list(home.path.glob("*.new*"))


def test_an_installed_package_has_no_commit(tmp_path: Path) -> None:
    assert record.git_commit(tmp_path) is None


def test_hostile_texts_stay_texts(home: Home) -> None:
    """Nothing that a file or an error says becomes a path, a page or a failure."""
    rows.begin(home, question="<script>alert(1)</script> ../../x \x00")
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(0, 1))
    rows.tell(home, trial, TrialState.FAIL, reason="../../../etc/passwd <img src=x> " + "long " * 2000)
    study = rows.study(home)
    data = {**study.data, "classes": ["../../x", "<b>", "a\x00b"], "fingerprint": "/" * 64}
    study = replace(study, data=data, resolved={**study.resolved, "data": {"name": "../../etc"}})
    before = {path for path in home.path.parent.rglob("*") if home.path not in path.parents}
    follow(home, study)
    assert {path for path in home.path.parent.rglob("*") if home.path not in path.parents} == before
    assert differences(home, study) == []
    assert escape("<img> [a](b) `c` *d*") == r"\<img\> \[a\]\(b\) \`c\` \*d\*"


# --- optuna-dashboard -------------------------------------------------------------------------------------------------


def attributes(home: Home, study: StudyRow) -> dict[str, Any]:
    return dict(open_storage(home).get_study_system_attrs(study.number))


def test_trials_have_notes_and_pictures_in_the_dashboard(told: Home) -> None:
    study = rows.study(told)
    attrs = attributes(told, study)
    run_id = run_links(told, study).runs[1]
    assert f"(/mlflow/experiments/1/runs/{run_id}?workflowType=machine_learning)" in attrs["dashboard:2:note_str:0"]
    assert "pruned after epoch 2" in attrs["dashboard:2:note_str:0"]
    assert "How deep?" in attrs["dashboard:note_str:0"]
    pictures = [key for key in attrs if key.startswith("dashboard:artifacts:")]
    assert len(pictures) == 4 + 2  # curves of all, confusion matrices of the complete
    for key in pictures:
        content = (artifact_folder(told) / key.rpartition(":")[2]).read_bytes()
        assert content.startswith(b"\x89PNG")


def test_notes_that_a_person_edited_are_left_alone(home: Home) -> None:
    study = rows.four(home)
    follow(home, study)
    storage = open_storage(home)
    for prefix in ("", "1:"):
        storage.set_study_system_attr(study.number, f"dashboard:{prefix}note_ver", 2)
        storage.set_study_system_attr(study.number, f"dashboard:{prefix}note_str:0", "mine")
    before = attributes(home, study)
    notes = Notes(home, study)
    notes.study(replace(study, question="Another?"), run_links(home, study))
    notes.trial(replace(study.trials[0], reason="another"), run_links(home, study))
    assert attributes(home, study) == before
    assert notes.has(study.trials[0])


def test_notes_stop_where_the_dashboard_would_crawl(home: Home) -> None:
    study = rows.begin(home)
    row = replace(rows.four(Home(home.path / "other")).trials[0], number=500)
    notes = Notes(home, study)
    assert notes.has(row)
    before = attributes(home, study)
    notes.trial(row, run_links(home, study))
    assert attributes(home, study) == before


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    from searchfm.show.dashboard import free_port

    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder, free_port(5200))
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_misses_nothing(
    home: Home, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TRACKING, f"http://127.0.0.1:{server.port}")
    study = rows.begin(home)
    tracker = Tracker(home, study)
    tracker.reconcile(study)
    with caplog.at_level(logging.INFO):
        for number in range(6):
            trial = rows.ask(home)
            tracker.started(rows.study(home).trials[number])
            for epoch in rows.epochs(number, 4):
                tracker.epoch(number, epoch)
            rows.record(home, trial, rows.epochs(number, 4))
            rows.tell(home, trial, TrialState.COMPLETE)
            tracker.ended(rows.study(home).trials[number])
            if number == 1:
                until(lambda: bool(run_links(home, study).runs))
                server.kill()
        until(lambda: any("does not answer" in entry.getMessage() for entry in caplog.records), 30)
        server.start()
        study = rows.study(home)
        tracker.keep(study.ranked()[:2])
        assert tracker.close(study, 120) == 0
    said = [entry.getMessage() for entry in caplog.records if "MLflow" in entry.getMessage()]
    assert len(said) == 2  # one that it is away, one that it is back
    assert differences(home, study) == []
    assert len(runs(home, study)) == 7


@pytest.mark.slow
def test_a_database_locked_for_a_while_is_waited_for(home: Home) -> None:
    study = rows.four(home)
    follower = Follower(home, study)
    with closing(sqlite3.connect(home.path / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        follower.reconcile(study)
        closer: list[int] = []
        thread = threading.Thread(target=lambda: closer.append(follower.close(study, 60)))
        thread.start()
        time.sleep(12)
        assert thread.is_alive()
        holder.execute("ROLLBACK")
        thread.join()
    assert closer == [0]
    follow(home, study)
    assert differences(home, study) == []


@pytest.mark.slow
def test_killed_at_four_moments_every_trial_has_one_run(home: Home) -> None:
    rows.begin(home)
    command = [sys.executable, str(Path(__file__).with_name("following.py")), str(home.path), "30"]
    moments = random.Random(0)
    for _ in range(4):
        search = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            search.wait(moments.uniform(1.0, 8.0))
        search.kill()
        search.wait()
    subprocess.run(command, check=True)
    study = rows.study(home)
    assert [row.state for row in study.trials].count("running") == 0
    assert len(study.trials) == 30
    assert differences(home, study) == []
    assert len(runs(home, study)) == 31


@pytest.mark.slow
def test_sync_works_over_http(home: Home, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING, f"http://127.0.0.1:{server.port}")
    study = rows.four(home)
    apply(home, study, differences(home, study))
    assert differences(home, study) == []
    double(home, study)
    client(home).delete_run(run_links(home, study).runs[1])
    assert {each.kind for each in differences(home, study)} == {"doubled", "deleted"}
    apply(home, study, differences(home, study))
    assert differences(home, study) == []


@pytest.mark.slow
def test_many_may_open_a_fresh_home_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING, raising=False)
    code = (
        "import sys; from pathlib import Path; from searchfm.search.storage import Home\n"
        "from searchfm.tracking import make_schema; make_schema(Home(Path(sys.argv[1])))"
    )
    starters = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home")]) for _ in range(4)]
    assert [starter.wait() for starter in starters] == [0] * 4
    make_schema(Home(tmp_path / "home"))
