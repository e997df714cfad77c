"""What is read of MLflow's database as rows is what MLflow's own client returns."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from searchfm.home import TRACKING, Home
from searchfm.records import StudyRecord
from searchfm.tracking import follow, mirror, registry
from searchfm.tracking import rows as reading
from tests import rows

# mlflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture(scope="module")
def home(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Its path has letters that addresses encode."""
    return new_home(tmp_path_factory.mktemp("rows") / "a home, 100% #1")


@pytest.fixture(scope="module")
def study(home: Home) -> StudyRecord:
    """A study whose runs MLflow has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(TRACKING, raising=False)
        record = rows.four(home)
        follow.sync(home, record, apply=True)
        return record


@pytest.fixture(scope="module")
def client(home: Home, study: StudyRecord) -> Any:
    """MLflow's, of a registry with two models; of the first one version is deleted."""
    client = mirror.connect(home)
    for name, count in {"searchfm-toy": 3, "other": 1}.items():
        client.create_registered_model(name)
        for number in range(count):
            tags = {"weights": f"{number}", "study": "toy", "trial": "3", "test_accuracy": "0.9"}
            client.create_model_version(name, source=f"{home.artifacts.as_uri()}/{name}/{number}", tags=tags)
    client.delete_model_version("searchfm-toy", "1")
    client.set_registered_model_alias("searchfm-toy", "champion", "2")
    client.set_registered_model_alias("searchfm-toy", "first", "2")
    return client


def run_of_study(home: Home, study: StudyRecord) -> tuple[str, str, dict[str, str]] | None:
    """As MLflow's client finds it."""
    run = mirror.find(home, study, "study").active(None)
    return None if run is None else (run.id, run.artifacts, run.tags)


def run_in_rows(home: Home, study: StudyRecord) -> tuple[str, str, dict[str, str]] | None:
    run = reading.study_run(home, study.uuid)
    return None if run is None else (run.id, run.artifacts, dict(run.tags))


def execute(home: Home, statement: str) -> None:
    with closing(sqlite3.connect(home.path / "mlflow.db", timeout=60)) as connection, connection:
        connection.execute(statement)


def test_the_tables_of_the_installed_mlflow_are_known(home: Home, study: StudyRecord) -> None:
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection:
        ((revision,),) = connection.execute("SELECT version_num FROM alembic_version")
    assert revision in reading.REVISIONS, "check the queries of tracking/rows.py against these tables, then add it"


def test_versions_are_those_of_mlflows_client(home: Home, client: Any) -> None:
    found = reading.registered(home)
    assert sorted((each.name, each.version) for each in found) == [
        ("other", 1),
        ("searchfm-toy", 2),
        ("searchfm-toy", 3),
    ]
    for each in found:
        theirs = client.get_model_version(each.name, str(each.version))
        assert (each.tags, each.aliases) == (theirs.tags, set(theirs.aliases))
        assert each.source == client.get_model_version_download_uri(each.name, str(each.version))
        assert each.created == theirs.creation_timestamp / 1000
        assert reading.folder(each.source) == home.artifacts / each.name / str(int(each.tags["weights"]))
    champion = next(each for each in found if "champion" in each.aliases)
    assert str(champion.version) == str(client.get_model_version_by_alias("searchfm-toy", "champion").version)


def test_an_alias_that_was_moved_in_mlflow_is_followed(home: Home, client: Any) -> None:
    listed = registry.models(home)
    assert [(row.version, row.champion) for row in listed] == [(3, False), (2, True)]
    client.set_registered_model_alias("searchfm-toy", "champion", "3")
    assert [(row.version, row.champion) for row in registry.models(home)] == [(3, True), (2, False)]
    client.set_registered_model_alias("searchfm-toy", "champion", "2")
    assert registry.models(home) == listed


def test_the_run_of_a_study_is_that_of_mlflows_client(home: Home, study: StudyRecord, client: Any) -> None:
    found = run_in_rows(home, study)
    assert found is not None
    assert found == run_of_study(home, study)
    id_, address, tags = found
    assert (reading.folder(address) or Path()).is_relative_to(home.artifacts)
    experiment = client.get_run(id_).info.experiment_id
    doubles = [client.create_run(experiment, 1, tags).info.run_id for _ in range(2)]
    assert run_in_rows(home, study) == found == run_of_study(home, study), "the one with most metrics"
    client.delete_run(id_)
    second = run_in_rows(home, study)
    assert second is not None
    assert second == run_of_study(home, study)
    assert second[0] in doubles
    client.restore_run(id_)
    for double in doubles:
        client.delete_run(double)
    client.delete_experiment(experiment)
    assert run_in_rows(home, study) is run_of_study(home, study) is None
    client.restore_experiment(experiment)
    for double in doubles:
        client.set_tag(double, "role", "none")
    assert run_in_rows(home, study) == found == run_of_study(home, study)
    assert reading.study_run(home, "another") is None


def test_a_report_is_where_mlflows_client_finds_it(home: Home, study: StudyRecord, client: Any, tmp_path: Path) -> None:
    run = reading.study_run(home, study.uuid)
    assert run is not None
    for text in ("first", "<p>ä"):
        (tmp_path / "page.html").write_text(text, "utf-8")
        registry.log_report(home, study, tmp_path / "page.html")
        copy = client.download_artifacts(run.id, "report.html", str(tmp_path))
        assert Path(copy).read_text("utf-8") == text
    assert "report.html" in {info.path for info in client.list_artifacts(run.id)}


def test_a_comparison_is_found_until_it_is_deleted(home: Home, client: Any) -> None:
    experiment = client.create_experiment("compared")
    run = client.create_run(experiment, tags={"digest": "d"}).info.run_id
    assert reading.experiment_with(home, "compared", "d") == experiment
    assert reading.experiment_with(home, "compared", "e") is None
    assert reading.experiment_with(home, "Default", "d") is None
    client.delete_run(run)
    assert reading.experiment_with(home, "compared", "d") is None
    client.restore_run(run)
    assert reading.experiment_with(home, "compared", "d") == experiment
    client.delete_experiment(experiment)
    assert reading.experiment_with(home, "compared", "d") is None


@pytest.mark.parametrize(
    ("change", "back"),
    [
        ("UPDATE alembic_version SET version_num = 'new'", "UPDATE alembic_version SET version_num = '{}'"),
        ("INSERT INTO workspaces (name) VALUES ('team')", "DELETE FROM workspaces WHERE name = 'team'"),
        ("ALTER TABLE workspaces RENAME TO places", "ALTER TABLE places RENAME TO workspaces"),
    ],
    ids=["another version of MLflow", "workspaces", "a missing table"],
)
def test_other_tables_are_left_to_mlflows_client(
    home: Home, study: StudyRecord, client: Any, change: str, back: str
) -> None:
    execute(home, change)
    try:
        assert reading.registered(home) == []
        assert reading.study_run(home, study.uuid) is None
    finally:
        execute(home, back.format(reading.REVISIONS[0]))
    assert reading.registered(home)


def test_a_server_is_left_to_mlflows_client(home: Home, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING, "http://127.0.0.1:9")
    assert reading.database(home) is None
    assert reading.registered(home) == []
    assert reading.folder("mlflow-artifacts:/1/a") is reading.folder("s3://bucket/a") is reading.folder("/a") is None


def test_no_file_is_made_where_there_is_none(tmp_path: Path) -> None:
    assert reading.registered(Home(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
