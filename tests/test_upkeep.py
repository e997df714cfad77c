"""Removal of a study: nothing of it stays but its models and the record of test reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from searchfm import upkeep
from searchfm.errors import StorageError
from searchfm.home import Home
from searchfm.search.lock import study_lock
from searchfm.search.storage import open_storage
from searchfm.tracking.mirror import connect
from tests.commands import Done, searchfm_here

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy
TINY = ("--dataset", "digits", "--epochs", "1", "--workers", "1")


def test_what_is_not_there_is_not_removed(tmp_path: Path) -> None:
    done = searchfm_here("remove", "mlp", "--yes", "--home", str(tmp_path / "home"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "holds no study yet" in done.stderr
    done = searchfm_here("models", "--home", str(tmp_path / "home"))
    assert done.stdout == "no model is registered yet; first: searchfm tune STUDY, then searchfm retrain STUDY\n"
    assert not (tmp_path / "home").exists()


def fail(*_: object) -> None:
    raise StorageError("the disk is full")


@pytest.mark.slow(seconds=20)
def test_a_removed_study_is_gone_from_both_stores_and_its_models_stay_until_they_are_asked_for(
    new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digit: Path
) -> None:
    home = new_home(tmp_path / "home")
    path = home.path

    def run(*arguments: str) -> Done:
        return searchfm_here(*arguments, "--home", str(path))

    def values(*arguments: str) -> Any:
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def experiments(name: str) -> list[str]:
        return [each.name for each in connect(home).search_experiments() if each.name == name]

    for name in ("kept", "gone"):
        values("tune", "mlp", "--name", name, "--trials", "2", *TINY)
    values("retrain", "gone", "--trial", "0", "--workers", "1")
    (model,) = values("models")
    assert (model["uri"], model["champion"], model["study"], model["trial"]) == (
        "models:/searchfm-gone/1",
        True,
        "gone",
        0,
    )
    before = {file.name for file in (path / "optuna-artifacts").iterdir()}

    assert "asks first" in run("remove", "gone").stderr  # there is no terminal
    with study_lock(home, "gone"):
        assert "is held by" in run("remove", "gone", "--yes").stderr
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "delete_study", fail)
        with pytest.raises(StorageError):
            upkeep.remove(home, "gone")
    assert [row["study"] for row in values("status")] == ["kept", "gone"]  # so that the same command goes on

    removed = values("remove", "gone", "--yes")
    assert (removed["trials"], removed["models"], removed["kept"]) == (2, [], ["models:/searchfm-gone/1"])
    assert [row["study"] for row in values("status")] == ["kept"]
    assert not (path / "studies" / "gone").exists()
    assert experiments("gone") == []
    assert experiments("kept") == ["kept"]
    after = {file.name for file in (path / "optuna-artifacts").iterdir()}
    assert after < before
    assert values("sync", "kept") == []
    assert json.loads((path / "test-reads.json").read_text())["reads"]
    assert values("predict", "models:/searchfm-gone/1", str(digit))[0]["class"]

    values("tune", "mlp", "--name", "gone", "--trials", "1", *TINY)  # the name is free
    assert len(open_storage(home).get_all_trials(open_storage(home).get_study_id_from_name("gone"))) == 1
    assert experiments("gone") == ["gone"]
    assert [row["uri"] for row in values("models")] == ["models:/searchfm-gone/1"]
    assert values("remove", "gone", "--models", "--yes")["models"] == []  # that version is of the earlier study
    assert values("remove", "kept", "--yes")["trials"] == 2
    assert values("status") == []

    assert "asks first" in run("remove", "gone", "--models").stderr
    assert run("remove", "gone", "--yes").returncode == 2, "models are removed only where that is asked for"
    left = values("remove", "gone", "--models", "--yes")
    assert (left["trials"], left["models"], left["kept"]) == (0, ["models:/searchfm-gone/1"], [])
    assert left["bytes"] > 1000
    assert values("models") == []
    assert [folder for folder in (path / "mlartifacts").iterdir() if any(folder.rglob("*"))] == []
    assert "is not in" in run("remove", "gone", "--models", "--yes").stderr


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"
