import contextlib
import json
import logging
import os
import random
import re
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import rows
import sqlalchemy
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from searchfm.errors import StorageError
from searchfm.format import escape
from searchfm.home import STORAGE, TRACKING, Home, shown, without_passwords, write_json
from searchfm.records import EPOCHS, PICTURES, WEIGHTS, Epoch, StudyHeader, StudyRecord
from searchfm.search.lock import study_lock
from searchfm.search.notes import Notes, artifact_folder, web_address
from searchfm.search.storage import open_storage, write_record
from searchfm.show.dashboard import draw_pictures
from searchfm.tracking import mirror
from searchfm.tracking.follow import Follower, Passes, Tracking, draw_missing, sync
from searchfm.tracking.mirror import Mirror, make_schema, run_links
from searchfm.tracking.moved import PLACE, has_moved
from tests.programs import worker_port
from tests.serving import Server

# MLflow 3.17 asks SQLAlchemy 2.1 for a way of loading that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

TABLES = ("experiments", "experiment_tags", "runs", "params", "tags", "metrics", "latest_metrics", "inputs", "datasets")


@pytest.fixture
def home(new_home: Callable[[Path], Home], tmp_path: Path) -> Home:
    """A fresh one, its databases with their tables."""
    return new_home(tmp_path / "home with ä space")


@pytest.fixture(scope="module")
def synced(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose study of four trials is in MLflow; tests that do damage to it have it repaired."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STORAGE, raising=False)
        patch.delenv(TRACKING, raising=False)
        home = new_home(tmp_path_factory.mktemp("synced") / "home with ä space")
        follow(home, rows.four(home))
    return home


def follow(home: Home, study: StudyRecord) -> None:
    """Brings a whole study into MLflow, as the last pass of the tracking process does."""
    passes = Passes(home, study)
    passes.run(study, "KILLED" if study.of("running") else "FINISHED", last=True)
    assert passes.left == 0


def client(home: Home) -> MlflowClient:
    return MlflowClient(tracking_uri=home.tracking_uri)


def runs(home: Home, study: StudyRecord) -> dict[str, Any]:
    """The active runs by name."""
    experiment = run_links(home, study).experiment
    active = client(home).search_runs([experiment])
    assert len({run.info.run_name for run in active}) == len(active)
    return {run.info.run_name: run for run in active}


def dump(home: Home) -> dict[str, list[Any]]:
    """Everything that MLflow's database says of runs."""
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection:
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in TABLES}


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- what a study looks like in MLflow --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_is_written_as_it_goes(home: Home) -> None:
    rows.begin(home)
    tracking = Tracking(home, "toy")
    tracking.begin()
    trial, trained = rows.ask(home), rows.epochs(0, 4)
    rows.record(home, trial, trained[:2])
    until(lambda: bool(run_links(home, rows.study(home)).runs))
    run_id = run_links(home, rows.study(home)).runs[0]

    def losses() -> list[tuple[int, float, int]]:
        return [(m.step, m.value, m.timestamp) for m in client(home).get_metric_history(run_id, "train/loss")]

    until(lambda: len(losses()) == 2)
    assert client(home).get_run(run_id).info.status == "RUNNING"
    rows.record(home, trial, trained)
    reported = time.monotonic()
    until(lambda: len(losses()) == 4)
    assert time.monotonic() - reported < 5, "an epoch arrives about a second after its report"

    rows.tell(home, trial, TrialState.COMPLETE)
    assert tracking.close(60) == 0
    assert client(home).get_run(run_id).info.status == "FINISHED"
    assert losses() == [(epoch.index, epoch.train_loss, round(1000 * epoch.time)) for epoch in trained]
    assert sync(home, rows.study(home)) == []


def test_the_content_of_a_run(synced: Home) -> None:
    study = rows.study(synced)
    active = runs(synced, study)
    assert {name: run.info.status for name, run in active.items()} == {
        "toy": "FINISHED",
        "toy-0000": "FINISHED",
        "toy-0001 (pruned)": "FINISHED",
        "toy-0002 (failed)": "FAILED",
        "toy-0003": "FINISHED",
    }
    run, row = active["toy-0003"], study.trials[3]
    assert float(run.data.params["optimizer.lr"]) == pytest.approx(row.params["optimizer.lr"])
    assert len(run.data.params["optimizer.lr"]) < 14  # rounded for reading
    assert run.data.params["model.mlp.width"] == "[200" + ", 200" * (row.params["model.mlp.layers"] - 1) + "]"
    assert run.data.metrics["value"] == run.data.metrics["accuracy"] == row.value
    assert run.data.tags["split"] == "validation"
    assert run.data.metrics["total_seconds"] == 3.5
    assert run.data.metrics["seconds"] == row.epochs[-1].seconds
    assert run.info.start_time == round(row.started * 1000)
    tags = run.data.tags
    assert tags["study"] == "toy"
    assert (tags["study_uuid"], tags["trial"], tags["state"]) == (study.uuid, "3", "complete")
    assert (tags["config_digest"], tags["mlflow.parentRunId"]) == (row.digest, active["toy"].info.run_id)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert {"hardware", "python", "torch", "optuna", "mlflow", "searchfm"} <= set(tags)
    assert active["toy-0002 (failed)"].data.tags["reason"] == "loss is nan in epoch 2"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("fashion-mnist", "f" * 16)

    def artifacts(name: str) -> set[str]:
        return {info.path for info in client(synced).list_artifacts(active[name].info.run_id)}

    always = {"config.toml", "epochs.csv", "log.txt", "curves.png"}
    whole = {"confusion.png", "predictions.csv", "weights.safetensors", "model.json"}
    assert artifacts("toy-0001 (pruned)") == always
    assert artifacts("toy-0000") == artifacts("toy-0003") == always | whole
    assert artifacts("toy") == {"study.toml", "environment.json"}
    assert active["toy"].data.metrics == {"value": study.best.value, "complete": 2.0, "pruned": 1.0, "failed": 1.0}


def test_every_name_in_mlflow_and_in_optuna_is_documented(synced: Home) -> None:
    study, names = rows.study(synced), rows.documented_names()
    for run in runs(synced, study).values():
        artifacts = {info.path for info in client(synced).list_artifacts(run.info.run_id)}
        tags = {name for name in run.data.tags if not name.startswith("mlflow.")}
        assert tags | run.data.metrics.keys() | artifacts <= names
    storage = open_storage(synced)
    attrs = {**storage.get_study_user_attrs(study.number), **storage.get_study_system_attrs(study.number)}
    for trial in storage.get_all_trials(study.number):
        attrs |= trial.user_attrs | trial.system_attrs
    assert {name for name in attrs if not name.startswith(("dashboard:", "study:"))} <= names  # these are Optuna's own


def test_the_table_opens_with_what_was_searched(synced: Home) -> None:
    study = rows.study(synced)
    links = run_links(synced, study)
    tags = client(synced).get_experiment(links.experiment).tags
    view = tags["mlflow.sharedViewState.searchfm"]
    assert links.table().endswith("viewStateShareKey=searchfm")
    assert json.loads(view)["searchFilter"] == "tags.role != 'study'", "the study's own run is no trial"
    shown = client(synced).search_runs([links.experiment], json.loads(view)["searchFilter"])
    assert len(shown) == 4
    first = ["metrics.`accuracy`", "tags.`split`", "tags.`state`", "metrics.`seconds`", "metrics.`parameters`"]
    assert json.loads(view)["selectedColumns"][:5] == first
    assert mirror.searched(study.resolved) == ["model.mlp.layers", "optimizer.name", "optimizer.lr"]
    assert all(f"params.`{key}`" in view for key in mirror.searched(study.resolved))
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_page_of_a_run_has_its_sentence_and_its_pictures(synced: Home) -> None:
    active = runs(synced, rows.study(synced))
    run = active["toy-0003"]
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**complete**: ")
    assert "optimizer=" in note.replace("\\", "")
    for name in ("curves", "confusion"):
        assert f"![{name}](get-artifact?path={name}.png&run_uuid={run.info.run_id})" in note
    failed = active["toy-0002 (failed)"].data.tags["mlflow.note.content"]
    assert "loss is nan in epoch 2" in failed
    assert "confusion.png" not in failed


def test_a_description_that_a_user_edited_stays_and_one_of_0_3_0_is_written_anew(synced: Home) -> None:
    study = rows.study(synced)
    failed, complete = run_links(synced, study).runs[2], run_links(synced, study).runs[3]
    before = client(synced).get_run(failed).data.tags["mlflow.note.content"]
    client(synced).set_tag(failed, "mlflow.note.content", "failed: loss is nan in epoch 2")
    client(synced).set_tag(complete, "mlflow.note.content", "mine")
    (listed,) = sync(synced, study)
    assert str(listed) == "trial 2: tags differ: mlflow.note.content"
    sync(synced, study, apply=True)
    assert client(synced).get_run(failed).data.tags["mlflow.note.content"] == before
    assert client(synced).get_run(complete).data.tags["mlflow.note.content"] == "mine"
    client(synced).set_tag(complete, "mlflow.note.content", "")
    sync(synced, study, apply=True)


def test_the_source_of_a_run_is_the_command_line_and_of_the_study_the_last_one(home: Home) -> None:
    study = rows.begin(home)
    header = StudyHeader.from_json(open_storage(home).get_study_system_attrs(study.number)["searchfm"])
    for command in ("searchfm tune toy --trials 1", "searchfm tune toy --trials 2"):
        write_record(open_storage(home), study.number, replace(header, command=command))
        rows.tell(home, rows.ask(home), TrialState.FAIL, reason="out of memory")
        follow(home, rows.study(home))
    sources = {name: run.data.tags["mlflow.source.name"] for name, run in runs(home, rows.study(home)).items()}
    assert sources == {
        "toy": "searchfm tune toy --trials 2",
        "toy-0000 (failed)": "searchfm tune toy --trials 1",
        "toy-0001 (failed)": "searchfm tune toy --trials 2",
    }
    assert sync(home, rows.study(home)) == []


def test_predictions_are_a_readable_table(synced: Home) -> None:
    study = rows.study(synced)
    run_id = run_links(synced, study).runs[0]
    table = Path(client(synced).download_artifacts(run_id, "predictions.csv")).read_text().splitlines()
    assert table[0] == "image,true,predicted,correct,probability"
    assert len(table) == 901
    assert table[1].split(",")[3] == "false"  # the surest mistake comes first
    assert table[1].split(",")[1] in rows.CLASSES


@pytest.mark.slow
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
    assert sync(home, study) == []


@pytest.mark.slow
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


def test_sending_again_changes_nothing(synced: Home) -> None:
    study = rows.study(synced)
    before = dump(synced)
    follow(synced, study)
    assert sync(synced, study, apply=True) == []
    assert dump(synced) == before


def test_a_search_that_was_stopped_goes_on_in_the_same_runs(home: Home) -> None:
    rows.begin(home)
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(0, 2))
    study = rows.study(home)
    follow(home, study)
    first = runs(home, study)
    assert {name: run.info.status for name, run in first.items()} == {"toy": "KILLED", "toy-0000": "RUNNING"}
    assert sync(home, study) == []

    rows.record(home, trial, rows.epochs(0, 3))
    passes = Passes(home, study)
    passes.run(rows.study(home), "RUNNING")
    assert {run.info.status for run in runs(home, study).values()} == {"RUNNING"}
    rows.record(home, trial, rows.epochs(0, 4))
    rows.tell(home, trial, TrialState.COMPLETE)
    passes.run(rows.study(home), "FINISHED", last=True)
    second = runs(home, study)
    assert {name: run.info.run_id for name, run in second.items()} == {
        name: run.info.run_id for name, run in first.items()
    }
    assert {run.info.status for run in second.values()} == {"FINISHED"}
    history = client(home).get_metric_history(second["toy-0000"].info.run_id, "seconds")
    assert [metric.step for metric in history] == [1, 2, 3, 4]


def statements(database: str) -> tuple[list[str], Callable[..., None]]:
    """The statements that this process runs on a SQLite file of that name from now on, and the listener to remove."""
    texts: list[str] = []

    def listen(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if str(connection.engine.url).endswith(database):
            texts.append(statement)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", listen)
    return texts, listen


@pytest.mark.slow(seconds=2)
def test_what_is_aligned_costs_nothing_more(home: Home) -> None:
    """Neither MLflow nor a trial's folder is asked again about a trial that has ended and is aligned."""
    rows.four(home)
    follower = Follower(home, "toy")
    assert follower._pass(closing=False)
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(4, 1))
    for number in range(4):
        shutil.rmtree(home.trial("toy", number))
    texts, listener = statements("mlflow.db")
    try:
        assert follower._pass(closing=False)
        assert texts, "the new trial is sent"
        texts.clear()
        assert follower._pass(closing=False)
        assert texts == []
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", listener)
    assert len(runs(home, rows.study(home))["toy-0000"].data.metrics) > 7


@pytest.mark.slow(seconds=2)
def test_an_epoch_is_sent_once_optuna_holds_it(home: Home) -> None:
    """A coordinator that is killed between epochs.csv and the report trains that epoch again, with other values."""
    rows.begin(home)
    command = [sys.executable, str(Path(__file__).with_name("following.py")), str(home.path), "1"]
    coordinator = subprocess.run([*command, "--die-before-report", "2"], check=False, timeout=300)
    assert coordinator.returncode == -signal.SIGKILL
    lines = (home.trial("toy", 0) / EPOCHS).read_text().splitlines()
    assert len(lines) == 1 + 2
    follow(home, rows.study(home))
    run_id = run_links(home, rows.study(home)).runs[0]

    def steps() -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in client(home).get_metric_history(run_id, "train/loss")]

    first = rows.epochs(0, 3)
    assert steps() == [(1, first[0].train_loss)]
    again = [first[0], *(replace(epoch, train_loss=epoch.train_loss + 1) for epoch in first[1:])]
    trial = rows.resume(home, 0)
    rows.record(home, trial, again)
    rows.tell(home, trial, TrialState.COMPLETE)
    follow(home, rows.study(home))
    assert steps() == [(epoch.index, epoch.train_loss) for epoch in again]
    assert sync(home, rows.study(home)) == []
    assert run_links(home, rows.study(home)).runs == {0: run_id}


def double(home: Home, study: StudyRecord) -> None:
    run = client(home).get_run(run_links(home, study).runs[0])
    tags = {**run.data.tags, "mlflow.runName": "copy"}
    client(home).create_run(run.info.experiment_id, run_name="copy", tags=tags)


def erase(home: Home, study: StudyRecord) -> None:
    """As `mlflow gc` does it."""
    run_id = run_links(home, study).runs[1]
    client(home).delete_run(run_id)
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        for name in ("params", "tags", "metrics", "latest_metrics", "runs"):
            connection.execute(f"DELETE FROM {name} WHERE run_uuid = ?", (run_id,))


def forget_epoch(home: Home, study: StudyRecord) -> None:
    run_id = run_links(home, study).runs[0]
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        connection.execute("DELETE FROM metrics WHERE run_uuid = ? AND step = 2", (run_id,))


def forge_param(home: Home, study: StudyRecord) -> None:
    run_id = run_links(home, study).runs[3]
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE params SET value = '7' WHERE run_uuid = ? AND key = 'optimizer.lr'", (run_id,))


DAMAGE: dict[str, tuple[Callable[[MlflowClient, Any, Any], object], str]] = {
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
    "study": (lambda c, links, home: c.delete_run(links.parent), "study: its run was deleted"),
    "experiment": (lambda c, links, home: c.delete_experiment(links.experiment), "study: its experiment was deleted"),
}


def check_repair(home: Home, study: StudyRecord) -> list[str]:
    """What a dry run lists is what an applied one does, and it writes nothing. Returns the list."""
    before = dump(home)
    listed = sync(home, study)
    assert dump(home) == before
    applied = sync(home, study, apply=True)
    assert set(map(str, applied)) <= set(map(str, listed))
    assert sync(home, study) == []
    assert len(runs(home, study)) == 5
    return [str(each) for each in listed]


@pytest.mark.parametrize("name", DAMAGE)
def test_sync_repairs(synced: Home, name: str) -> None:
    damage, text = DAMAGE[name]
    study = rows.study(synced)
    damage(client(synced), run_links(synced, study), synced)
    listed = check_repair(synced, study)
    assert text in listed
    assert len(listed) == 1 or name == "experiment"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (double, "trial 0: has 2 runs"),
        (erase, "trial 1: has no run"),
        (forget_epoch, "trial 0: metrics differ: train/loss, train/accuracy, val/loss, val/accuracy, lr, seconds, "),
        (forge_param, "trial 3: params differ: optimizer.lr"),
    ],
)
def test_sync_repairs_what_a_client_cannot_do(
    synced: Home, damage: Callable[[Home, StudyRecord], None], text: str
) -> None:
    study = rows.study(synced)
    damage(synced, study)
    (listed,) = check_repair(synced, study)
    assert listed.startswith(text)


def test_five_faults_are_five_differences(synced: Home) -> None:
    """A run deleted, one doubled, one FAILED, a tag changed and a foreign step of a metric."""
    study = rows.study(synced)
    links = run_links(synced, study)
    double(synced, study)
    client(synced).delete_run(links.runs[1])
    client(synced).set_terminated(links.runs[3], "FAILED")
    client(synced).set_tag(links.runs[2], "reason", "another")
    client(synced).log_metric(links.runs[3], "val/accuracy", 0.5, timestamp=1, step=77)
    assert sorted(check_repair(synced, study)) == [
        "trial 0: has 2 runs",
        "trial 1: its run was deleted",
        "trial 2: tags differ: reason",
        "trial 3: is complete, its run complete (FAILED)",
        "trial 3: metrics differ: val/accuracy",
    ]


@pytest.mark.slow
def test_what_a_user_logs_in_the_studys_run_stays(home: Home) -> None:
    """The run is not replaced for it, and with it the report."""
    study = rows.four(home)
    follow(home, study)
    parent = run_links(home, study).parent
    client(home).log_metric(parent, "value", 1.0, timestamp=1, step=99)
    assert sync(home, study, apply=True) == []
    assert run_links(home, study).parent == parent


def test_a_search_repairs_at_its_start_what_it_finds(synced: Home) -> None:
    study = rows.study(synced)
    double(synced, study)
    client(synced).delete_run(run_links(synced, study).runs[1])
    follow(synced, study)
    assert sync(synced, study) == []


@pytest.mark.slow(seconds=2)
def test_sync_starts_from_nothing(home: Home) -> None:
    study = rows.four(home)
    listed = sync(home, study)
    assert [each.text for each in listed] == ["has no run"] * 5
    applied = sync(home, study, apply=True)
    assert {each.trial for each in applied} == {each.trial for each in listed}
    assert sync(home, study) == []


def test_exactly_the_best_weights_stay(synced: Home) -> None:
    study = rows.study(synced)
    aligned = Mirror(synced, study)
    aligned.open()
    aligned.align_weights(study.ranked()[:1])

    def has_weights(name: str) -> bool:
        run = runs(synced, study)[name]
        return WEIGHTS in {info.path for info in client(synced).list_artifacts(run.info.run_id)}

    best, other = (f"toy-{row.number:04d}" for row in study.ranked())
    assert has_weights(best)
    assert not has_weights(other)


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures_of(home: Home, run: Any) -> set[str]:
    """The pictures that a run has, after a look that its note shows these alone."""
    stored = {info.path for info in client(home).list_artifacts(run.info.run_id)}
    note = run.data.tags["mlflow.note.content"]
    assert set(re.findall(r"path=(\w+\.png)", note)) == stored & set(PICTURES)
    return stored & set(PICTURES)


def test_while_workers_have_all_cores_only_kept_trials_are_drawn_and_that_last(home: Home) -> None:
    study = rows.four(home)
    study = replace(study, resolved={**study.resolved, "search": {"keep": 1}})
    passes = Passes(home, study, draw=False)
    passes.run(study, "RUNNING")
    assert {name for run in runs(home, study).values() for name in pictures_of(home, run)} == set()
    passes.run(study, "FINISHED", last=True)
    assert passes.settled
    (kept,) = study.kept
    for number, run in enumerate(sorted(runs(home, study).items())[1:]):
        assert pictures_of(home, run[1]) == (set(PICTURES) if number == kept.number else set())
    assert [trial.number for trial in rows.study(home).undrawn] == [n for n in range(4) if n != kept.number]


@pytest.mark.slow(seconds=2)
def test_missing_pictures_are_no_difference_and_sync_draws_and_sends_them(home: Home) -> None:
    study = rows.four(home)
    Passes(home, study, draw=False).run(study, "FINISHED")
    mine = run_links(home, study).runs[1]
    client(home).set_tag(mine, "mlflow.note.content", "mine")
    assert sync(home, study) == []
    assert sync(home, study, apply=True) == []
    active = runs(home, study)
    assert pictures_of(home, active["toy-0003"]) == set(PICTURES)
    assert active["toy-0001 (pruned)"].data.tags["mlflow.note.content"] == "mine"
    assert "curves.png" in {info.path for info in client(home).list_artifacts(mine)}
    assert "![confusion](/artifacts/" in attributes(home, study)["dashboard:1:note_str:0"]
    assert rows.study(home).undrawn == []
    assert sync(home, study) == []


@pytest.mark.slow
def test_the_dashboard_draws_what_is_missing_unless_a_search_runs(home: Home) -> None:
    study = rows.four(home)
    Passes(home, study, draw=False).run(study, "FINISHED")
    stop = threading.Event()
    with study_lock(home, "toy"):
        drawing = threading.Thread(target=draw_pictures, args=(home, stop))
        drawing.start()
        time.sleep(1)
        stop.set()
        drawing.join()
        assert len(rows.study(home).undrawn) == 4
    with mirror.writer(home, "toy"):  # of a tracking process that is about to end
        draw_missing(home, study)
        assert len(rows.study(home).undrawn) == 4
    stop.clear()
    drawing = threading.Thread(target=draw_pictures, args=(home, stop))
    drawing.start()
    until(lambda: not rows.study(home).undrawn)
    stop.set()
    drawing.join()
    assert pictures_of(home, runs(home, study)["toy-0003"]) == set(PICTURES)


# --- MLflow away ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_mlflow_a_search_does_not_block_and_one_line_says_so(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TRACKING, "http://anna:secret@127.0.0.1:9")
    rows.four(home)
    with caplog.at_level(logging.INFO):
        began = time.perf_counter()
        tracking = Tracking(home, "toy")
        tracking.begin()
        assert time.perf_counter() - began < 0.5
        until(lambda: bool(caplog.records))
        closing = time.perf_counter()
        assert tracking.close(3.0) == 4
        assert time.perf_counter() - closing < 10
    (entry,) = caplog.records
    assert entry.name == "searchfm"
    assert entry.getMessage().startswith("MLflow at http://127.0.0.1:9 does not answer")
    assert "secret" not in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_search_gives_up_at_its_end_on_an_mlflow_that_does_not_answer(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACKING, "http://127.0.0.1:9")
    monkeypatch.setattr("searchfm.tracking.follow.GIVE_UP_SECONDS", 2.0)
    rows.four(home)
    follower = Follower(home, "toy")
    follower.closing.set()
    began = time.monotonic()
    follower.run()
    assert 2 <= time.monotonic() - began < 15
    assert follower.passes.left == 4


@pytest.mark.slow
def test_a_run_that_mlflow_refuses_is_left_to_sync(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    rows.begin(home)
    for number in range(3):
        trial = rows.ask(home)
        if number == 0:
            trial.set_user_attr("config", {"no $ in params": 1})
        rows.record(home, trial, rows.epochs(number, 4))
        rows.tell(home, trial, TrialState.COMPLETE)
    follower = Follower(home, "toy")
    follower.closing.set()
    follower.run()
    assert follower.passes.left == 1
    assert [entry.getMessage() for entry in caplog.records if entry.name == "searchfm"] == [
        "trial 0: MLflow refuses its run (MlflowException); see searchfm sync"
    ]
    study = rows.study(home)
    assert {each.trial for each in sync(home, study)} == {0}
    with pytest.raises(StorageError, match="INVALID_PARAMETER_VALUE"):
        sync(home, study, apply=True)


def test_a_process_that_cannot_start_or_dies_is_one_line(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows.four(home)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(home.path / "missing"))
        tracking = Tracking(home, "toy")
        tracking.begin()
        assert tracking.close(5) == 4
    assert [entry.getMessage() for entry in caplog.records] == [
        "MLflow is not followed (No such file or directory); later: searchfm sync toy --apply"
    ]
    caplog.clear()
    tracking = Tracking(home, "toy")
    tracking.begin()
    first = tracking._process
    assert first is not None
    first.kill()
    until(lambda: tracking._process not in (first, None))
    assert tracking._process is not None
    tracking._process.kill()
    until(lambda: len(caplog.records) == 2)
    assert tracking.close(5) == 4
    assert [entry.getMessage() for entry in caplog.records] == [
        "the process that follows into MLflow has died; another one starts",
        "the process that follows into MLflow has died again; later: searchfm sync toy --apply",
    ]


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(home: Home) -> None:
    study = rows.four(home)
    tracking = Tracking(home, "toy")
    tracking.begin()
    until(lambda: bool(run_links(home, study).runs))  # it is under way
    assert tracking._process is not None
    tracking._process.kill()
    assert tracking.close(60) == 0
    assert len(runs(home, study)) == 5
    assert sync(home, study) == []


def test_sync_says_in_one_line_that_mlflow_is_away(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING, "http://anna:secret@127.0.0.1:9")
    study = rows.four(home)
    with pytest.raises(StorageError) as caught:
        sync(home, study)
    assert str(caught.value).startswith("MLflow at http://127.0.0.1:9: ")
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_there_is_never_a_second_writer(home: Home) -> None:
    """A process that is left over blocks the next one, until its coordinator's end ends it."""
    study = rows.four(home)
    with mirror.writer(home, "toy"):
        first, second = Tracking(home, "toy"), Tracking(home, "toy")
        first.begin()
        second.begin()
        time.sleep(6)  # both are under way
        assert not run_links(home, study).experiment
        assert second.close(1) == 4
    until(lambda: len(run_links(home, study).runs) == 4)
    assert first.close(60) == 0
    assert len(runs(home, study)) == 5


@pytest.mark.slow
def test_the_process_ends_with_its_coordinator(home: Home) -> None:
    rows.begin(home)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); import rows; from pathlib import Path\n"
        "from searchfm.home import Home; from searchfm.tracking.follow import Tracking\n"
        "home = Home(Path(sys.argv[1])); tracking = Tracking(home, 'toy'); tracking.begin()\n"
        "print(flush=True); time.sleep(60)"
    )
    coordinator = subprocess.Popen(
        [sys.executable, "-c", code, str(home.path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert coordinator.stdout is not None
    coordinator.stdout.readline()

    def children() -> list[str]:
        processes = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        return [line.split()[0] for line in processes.splitlines() if line.split()[1] == str(coordinator.pid)]

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


@pytest.mark.slow
def test_mlflow_has_its_settings_whichever_function_imports_it_first() -> None:
    program = (
        "import logging, os, sys, searchfm.tracking.mirror; assert 'mlflow' not in sys.modules; "
        "import mlflow.entities; "
        "print(logging.getLogger('mlflow').level, os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "7"  # a user's setting wins
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(logging.CRITICAL), "7"]


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_left_out() -> None:
    epoch = Epoch(1, float("nan"), 0.5, float("inf"), None, 0.1, 1.0, 2.0, 3.0)
    assert {point.key for point in mirror.epoch_points(epoch)} == {
        "train/accuracy",
        "lr",
        "seconds",
        "samples_per_second",
    }


def test_a_study_shows_its_best_so_far(synced: Home) -> None:
    study = rows.study(synced)
    best = [(point.step, point.value) for point in mirror.study_points(study.trials) if point.key == "value"]
    values = [study.trials[0].value, study.trials[3].value]
    assert best == [(1, values[0])] + ([(4, values[1])] if values[1] > values[0] else [])


def test_addresses_are_shown_without_passwords() -> None:
    assert shown("postgresql://anna:secret@db:5432/mlflow?sslmode=require") == "postgresql://db:5432/mlflow"
    assert shown("sqlite:////home/a/mlflow.db") == "sqlite:////home/a/mlflow.db"
    for typed, safe in (
        ("postgresql+psycopg://anna:secret@db/mlflow?password=secret&host=secret", "postgresql+psycopg://db/mlflow"),
        ("postgresql://anna:sec%40ret@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://anna:secret@[::1]:5432/mlflow", "postgresql://[::1]:5432/mlflow"),
        ("postgresql:///mlflow?host=/run/secret", "postgresql:///mlflow"),
        ("https://anna:secret@host:5000/a/b?token=secret#secret", "https://host:5000/a/b"),
        ("sqlite:////home/a@work/mlflow.db?key=secret", "sqlite:////home/a@work/mlflow.db"),
        ("./mlruns", "./mlruns"),
        # Not encoded, so that it is unknown where the password ends.
        ("postgresql://anna:pass@secret@db/mlflow", "postgresql://..."),
        ("postgresql://anna:1/secret@db/mlflow", "postgresql://..."),
        ("postgresql://anna:1?secret@db/mlflow", "postgresql://..."),
        ("postgresql://anna:1#secret@db/mlflow", "postgresql://..."),
        ("postgresql:///anna:secret@db/mlflow", "postgresql://..."),
        ("http://host:5000/?token=a@secret", "http://..."),
        ("anna:secret@host", "host"),
        ("anna:1/secret@host", "..."),
    ):
        assert shown(typed) == safe
    assert without_passwords("for 'http://a:secret@b:1/c?d=secret': no") == "for 'http://b:1/c': no"
    assert without_passwords("no 'postgresql://anna:1'2\" 3@db/mlflow': no") == "no 'postgresql://db/mlflow': no"
    for password in ("secret'secret", "1 secret", "1@secret", "1@1'secret", "1/1'secret", "1?1 secret", "1#1'secret"):
        for address in (f"http://anna:{password}@db/a", f"http://db/a?token={password}"):
            assert "secret" not in without_passwords(f"no '{address}' and no http://anna:{password}@db/a: no")
    assert web_address("https://anna:secret@host/mlflow/") == "https://host/mlflow"
    assert web_address("sqlite:////home/a/mlflow.db") is None


def test_a_copy_has_not_moved_where_it_is_reached_by_another_path(tmp_path: Path) -> None:
    copy, link = Home(tmp_path / "copy"), Home(tmp_path / "link")
    copy.path.mkdir()
    link.path.symlink_to(copy.path)
    for recorded in (copy, link):
        write_json(copy.path / PLACE, {"path": str(recorded.path)})
        assert not has_moved(copy)
        assert not has_moved(link)
    link.path.unlink()
    assert has_moved(copy), "the recorded path is gone"
    link.path.mkdir()
    assert has_moved(copy), "another folder is there"


@pytest.mark.slow
def test_a_home_may_have_any_path(tmp_path: Path) -> None:
    home = Home(tmp_path / "50% of a home? #1 %20 ü")
    make_schema(home)
    assert (home.path / "mlflow.db").stat().st_size > 0
    rows.begin(home)
    rows.tell(home, rows.ask(home), TrialState.FAIL, reason="out of memory")
    study = rows.study(home)
    assert sync(home, study, apply=True)
    assert not sync(home, study)


DIE = """
import os, signal, sys
import sqlalchemy
from pathlib import Path
from searchfm.home import Home
from searchfm.tracking.mirror import make_schema
left = int(sys.argv[2])
def statement(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", statement)
make_schema(Home(Path(sys.argv[1])))
"""


@pytest.fixture
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will keep MLflow's tables; there are none yet."""
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables" / f"mlflow-{version('mlflow')}.db"


@pytest.mark.slow
@pytest.mark.usefixtures("no_tables")
def test_killed_while_mlflows_tables_are_made_the_next_makes_them(tmp_path: Path) -> None:
    """MLflow makes its tables in some 1700 statements, and opens no file of a half."""
    home = Home(tmp_path / "fresh")
    died = subprocess.run([sys.executable, "-c", DIE, str(home.path), "900"], check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    make_schema(home)
    rows.begin(home)
    rows.tell(home, rows.ask(home), TrialState.FAIL, reason="out of memory")
    study = rows.study(home)
    assert sync(home, study, apply=True)
    assert not sync(home, study)
    assert not list(home.path.glob("*.new*"))


def test_an_installed_package_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchfm.__file__", str(tmp_path / "searchfm" / "__init__.py"))
    assert mirror.COMMIT not in mirror.environment.__wrapped__()


def test_hostile_texts_stay_texts(home: Home) -> None:
    """Nothing that a file or an error says becomes a path, a page or a failure."""
    rows.begin(home, question="<script>alert(1)</script> ../../x \x00")
    trial = rows.ask(home)
    rows.record(home, trial, rows.epochs(0, 1))
    rows.tell(home, trial, TrialState.FAIL, reason="../../../etc/passwd <img src=x> " + "long " * 2000)
    study = rows.study(home)
    data = replace(study.data, classes=("../../x", "<b>", "a\x00b"), fingerprint="/" * 64)
    study = replace(study, data=data, resolved={**study.resolved, "data": {"name": "../../etc"}})
    before = {path for path in home.path.parent.rglob("*") if home.path not in path.parents}
    follow(home, study)
    assert {path for path in home.path.parent.rglob("*") if home.path not in path.parents} == before
    assert sync(home, study) == []
    assert escape("<img> [a](b) `c` *d*") == r"\<img\> \[a\]\(b\) \`c\` \*d\*"


# --- optuna-dashboard -------------------------------------------------------------------------------------------------


def attributes(home: Home, study: StudyRecord) -> dict[str, Any]:
    return dict(open_storage(home).get_study_system_attrs(study.number))


def test_trials_have_notes_and_pictures_in_the_dashboard(synced: Home) -> None:
    study = rows.study(synced)
    attrs = attributes(synced, study)
    run_id = run_links(synced, study).runs[1]
    assert f"(/mlflow/experiments/1/runs/{run_id}?workflowType=machine_learning)" in attrs["dashboard:2:note_str:0"]
    assert "pruned after epoch 2" in attrs["dashboard:2:note_str:0"]
    assert "How deep?" in attrs["dashboard:note_str:0"]
    pictures = [key for key in attrs if key.startswith("dashboard:artifacts:")]
    assert len(pictures) == 4 + 2  # curves of all, confusion matrices of the complete
    for key in pictures:
        content = (artifact_folder(synced) / key.rpartition(":")[2]).read_bytes()
        assert content.startswith(b"\x89PNG")


@pytest.mark.slow(seconds=2)
def test_notes_that_a_user_edited_stay(home: Home) -> None:
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


def test_notes_go_on_after_an_error_of_the_database(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    rows.begin(home)
    trials = [rows.ask(home) for _ in range(3)]
    passes = Passes(home, rows.study(home))
    read_only = False

    def set_read_only(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA query_only = {read_only}")

    for trial in trials:
        rows.tell(home, trial, TrialState.FAIL, reason="out of memory")
        read_only = trial.number == 1
        passes.run(rows.study(home), "RUNNING")
        if trial.number == 0:
            assert passes._notes
            engine = passes._notes._storage._backend.engine  # type: ignore[attr-defined]
            sqlalchemy.event.listen(engine, "checkout", set_read_only)
    assert caplog.text.count("optuna-dashboard gets no notes for now") == 1
    notes = [key for key in attributes(home, rows.study(home)) if key.endswith("note_str:0")]
    assert [f"dashboard:{n}:note_str:0" in notes for n in (1, 2, 3)] == [True, False, True]


def test_notes_stop_where_the_dashboard_would_crawl(home: Home) -> None:
    study = rows.begin(home)
    row = replace(rows.four(Home(home.path / "other")).trials[0], number=500)
    notes = Notes(home, study)
    before = attributes(home, study)
    notes.trial(row, run_links(home, study))
    assert attributes(home, study) == before


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = new_home(tmp_path_factory.mktemp("server") / "home").path  # with MLflow's tables
    server = Server(folder, worker_port(5200))
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_misses_nothing(
    home: Home, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(TRACKING, f"http://127.0.0.1:{server.port}")
    study = rows.begin(home)
    tracking = Tracking(home, "toy")
    tracking.begin()
    with caplog.at_level(logging.INFO):
        for number in range(6):
            trial = rows.ask(home)
            rows.record(home, trial, rows.epochs(number, 4))
            rows.tell(home, trial, TrialState.COMPLETE)
            if number == 1:
                until(lambda: bool(run_links(home, study).runs))
                server.kill()
        until(lambda: any("does not answer" in entry.getMessage() for entry in caplog.records), 30)
        server.start()
        assert tracking.close(120) == 0
    texts = [entry.getMessage() for entry in caplog.records if "MLflow" in entry.getMessage()]
    assert len(texts) == 2  # one that it is away, one that it is back
    study = rows.study(home)
    assert sync(home, study) == []
    assert len(runs(home, study)) == 7


@pytest.mark.slow
def test_a_database_locked_for_a_while_is_waited_for(home: Home) -> None:
    study = rows.four(home)
    follower = Follower(home, "toy")
    with closing(sqlite3.connect(home.path / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        follower.closing.set()
        thread = threading.Thread(target=follower.run)
        thread.start()
        time.sleep(8)  # SQLite gives up after 5
        assert thread.is_alive()
        holder.execute("ROLLBACK")
        thread.join()
    assert follower.passes.left == 0
    assert sync(home, study) == []


@pytest.mark.nightly
def test_killed_at_any_moment_every_trial_has_one_run(
    home: Home, record_property: Callable[[str, object], None]
) -> None:
    rows.begin(home)
    command = [sys.executable, str(Path(__file__).with_name("following.py")), str(home.path), "30"]
    moments = random.Random(0)
    for _ in range(3):
        search = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            search.wait(moments.uniform(2.0, 8.0))
        search.kill()
        search.wait()
    subprocess.run(command, check=True)
    study = rows.study(home)
    assert [row.state for row in study.trials].count("running") == 0
    assert len(study.trials) == 30
    assert sync(home, study) == []
    assert len(runs(home, study)) == 31
    record_property("figures", "3 kills, 30 trials")


@pytest.mark.slow
def test_sync_works_over_http(home: Home, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING, f"http://127.0.0.1:{server.port}")
    study = rows.four(home)
    sync(home, study, apply=True)
    assert sync(home, study) == []
    double(home, study)
    client(home).delete_run(run_links(home, study).runs[1])
    assert [str(each) for each in sync(home, study)] == ["trial 0: has 2 runs", "trial 1: its run was deleted"]
    sync(home, study, apply=True)
    assert sync(home, study) == []


def schema(path: Path) -> set[tuple[Any, ...]]:
    """The statements that made a database's tables and indices."""
    with closing(sqlite3.connect(path)) as connection:
        return set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


@pytest.mark.slow
def test_the_second_home_gets_mlflows_tables_from_the_cache(tmp_path: Path, no_tables: Path) -> None:
    first, second, third = (Home(tmp_path / name) for name in ("first", "second", "third"))
    make_schema(first)
    kept = no_tables.read_bytes()
    make_schema(second)
    assert no_tables.read_bytes() == kept
    assert schema(second.path / "mlflow.db") == schema(first.path / "mlflow.db") == schema(no_tables)
    no_tables.write_bytes(kept[: len(kept) // 2])  # damaged: made anew
    make_schema(third)
    assert no_tables.read_bytes() != kept[: len(kept) // 2]
    for home in (first, second, third):
        [default] = client(home).search_experiments()
        assert default.artifact_location == (home.path / "mlartifacts" / "0").as_uri()
        assert sorted(path.name for path in home.path.iterdir() if ".new" in path.name) == []


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_keeps_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "file"))
    make_schema(Home(tmp_path / "home"))
    assert client(Home(tmp_path / "home")).search_experiments()


@pytest.mark.slow
@pytest.mark.usefixtures("no_tables")
def test_many_may_open_a_fresh_home_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING, raising=False)
    code = (
        "import sys; from pathlib import Path; from searchfm.home import Home\n"
        "from searchfm.tracking.mirror import make_schema; make_schema(Home(Path(sys.argv[1])))"
    )
    starters = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home")]) for _ in range(3)]
    assert [starter.wait() for starter in starters] == [0] * 3
    make_schema(Home(tmp_path / "home"))
