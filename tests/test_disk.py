"""What `clean` deletes, what it must not, and that everything goes on afterwards."""

import json
import os
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from searchfm import api, disk
from searchfm.events import TrialEpoch
from searchfm.home import CACHE, TRACKING, Home
from searchfm.records import PICTURES, PREDICTIONS, SPEC, WEIGHTS
from searchfm.search.database import process_name
from searchfm.search.lock import study_lock
from searchfm.show.terminal import show_disk
from tests.commands import searchfm_here

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's own use of SQLAlchemy
    pytest.mark.usefixtures("own_forkserver"),
]


def values(home: Home, *arguments: str) -> Any:
    """What a command prints as JSON."""
    done = searchfm_here(*arguments, "--home", str(home.path), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(home: Home, name: str) -> list[str]:
    """The files of that name in the home: MLflow's artifacts too."""
    return sorted(str(path.relative_to(home.path)) for path in home.path.rglob(name))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counts(cleaned: Any) -> dict[str, int]:
    return {each["kind"]: each["files"] for each in cleaned["kinds"] if each["files"]}


def test_a_home_that_is_not_there_is_not_made_and_the_cache_is_deleted_only_by_its_own_flags(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE, str(cache))
    names = {
        "features": ["features-1/abc-def.safetensors", "features-1/.abc.tmp"],
        "parsed data": ["data/parsed-1/digits/train-0.safetensors", "data/pictures/mine-12345678.png"],
        "costs and tables": ["costs/0.json", "tables/mlflow-3.17.2.db"],
        "downloads": ["data/files/cifar10/cifar-10-python.tar.gz"],
        "": ["data/locks/digits.lock", "tables/mlflow-3.17.2.lock", "of-the-user.txt"],
    }
    for name in (name for mine in names.values() for name in mine):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"12345")
    expected = {kind: len(mine) for kind, mine in names.items() if kind}
    assert counts(values(home, "clean", "--cache", "--downloads")) == expected
    assert values(home, "clean", "--apply")["freed"] == 0
    assert len(contents(cache)) == 10, "nothing yet"
    assert values(home, "clean", "--apply", "--cache")["freed"] == 6 * 5
    assert counts(values(home, "clean")) == {"downloads": 1}
    assert values(home, "clean", "--apply", "--downloads")["freed"] == 5
    assert sorted(contents(cache)) == sorted(cache / name for name in names[""])
    assert not home.path.exists()
    refused = searchfm_here("clean", "mlp", "--cache", "--home", str(home.path))
    assert (refused.returncode, refused.stderr) == (
        2,
        "searchfm: --cache: the cache is of all studies; leave out mlp\n",
    )


def test_a_file_that_another_process_deletes_first_is_not_counted(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    folder, unlink = tmp_path / "cache" / "features-1", Path.unlink
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_bytes(b"12345")

    def second(path: Path, missing_ok: bool = False) -> None:
        if path.name == "b":
            os.remove(path)  # noqa: PTH107 (as another process does)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", second)
    cleaned = values(home, "clean", "--cache", "--apply")
    assert (counts(cleaned), cleaned["freed"]) == ({"features": 2}, 10)
    assert contents(tmp_path / "cache") == {}


def test_the_command_that_deletes_what_is_listed_names_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    (tmp_path / "cache" / "costs").mkdir(parents=True)
    (tmp_path / "cache" / "costs" / "0.json").write_bytes(b"12345")
    arguments = ("clean", "--cache", "--home", str(tmp_path / "[old]" / "[" / "x]"))  # for rich a tag, and its end
    listed = searchfm_here(*arguments)
    assert (listed.returncode, listed.stderr) == (0, "")
    _, found, command = listed.stdout.partition("nothing was deleted; to delete 1 MB: searchfm ")
    assert found
    assert shlex.split(command) == [*arguments, "--apply"]
    deleted = searchfm_here(*arguments, "--apply")
    assert deleted.stdout.endswith("deleted: 1 MB; the home had 1 MB\n")
    assert searchfm_here(*arguments, "--apply").stdout.endswith("nothing to delete with these flags\n")


def test_of_a_study_nothing_is_printed_about_the_cache_and_the_home() -> None:
    held = {"mlp": "process 7"}
    weights = disk.Deletable("weights", True, 1, 10**7)
    for study, chosen, expected in (
        (None, False, ["not deleted while a study is held: the cache", "nothing to delete with these flags"]),
        ("mlp", False, ["nothing to delete with these flags"]),
        (None, True, ["not deleted while a study is held: the cache", "deleted: 10 MB; the home had 20 MB"]),
        ("mlp", True, ["deleted: 10 MB; the study had 20 MB"]),
    ):
        console = Console(file=StringIO(), width=160)
        show_disk(
            console, disk.Cleaned(study, 2 * 10**7, True, [replace(weights, chosen=chosen)], held), "searchfm clean"
        )
        assert isinstance(console.file, StringIO)
        lines = console.file.getvalue().splitlines()
        assert lines[-len(expected) - 1 :] == ["skipped: study 'mlp', which process 7 holds", *expected]


@pytest.mark.slow(seconds=45)
def test_after_a_clean_mlflow_equals_optuna_and_the_final_model_is_the_same(
    new_home: Callable[[Path], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = new_home(tmp_path / "home"), Home(tmp_path / "other")
    study = ("mlp", "--dataset", "digits", "--epochs", "2", "--trials", "4", "--workers", "1")
    values(home, "tune", *study, "--set", "search.pruner=none")
    values(home, "sync", "mlp", "--apply")  # draws all pictures
    values(home, "backup", str(other.path))
    models = [values(other, "retrain", "mlp", "--top", "2", "--seeds", "1", "--workers", "1")]

    best = next(row for row in values(home, "status", "mlp") if row["best"])["best"]["trial"]
    folder, worst = home.trial("mlp", best), next(n for n in range(4) if n != best)
    for name in (f"{worst:04d}/attempt-9/checkpoint-1.safetensors", f"{worst:04d}/.{WEIGHTS}.tmp", "final/.x.tmp"):
        (home.study("mlp") / name).parent.mkdir(parents=True, exist_ok=True)  # as crashes leave them
        (home.study("mlp") / name).write_bytes(b"12345")
        os.utime(home.study("mlp") / name, (0, 0))  # a younger one may be being written
    users = home.path / "optuna-artifacts" / "of-a-user"
    users.write_bytes(b"12345")
    assert len(files(home, WEIGHTS)) == 6, "of three trials, and MLflow's copies"

    before = contents(home.path)
    listed = values(home, "clean", "mlp", "--keep", "1", "--pictures")
    assert counts(listed) == {"weights": 8, "leftovers": 3, "pictures": 4 * 2 * 3}
    assert {p: b for p, b in contents(home.path).items() if ".db" not in p.name} == {
        p: b for p, b in before.items() if ".db" not in p.name
    }
    with study_lock(home, "mlp"):
        held = values(home, "clean", "--keep", "1", "--pictures", "--apply", "--cache")
    assert (held["held"], held["freed"]) == ({"mlp": process_name()}, 0)
    assert len(files(home, WEIGHTS)) == 6

    with monkeypatch.context() as away:  # MLflow's copies come last: so a crash leaves them, too
        away.setenv(TRACKING, "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        local = values(home, "clean", "mlp", "--keep", "1", "--apply")
    assert local["problem"].startswith("MLflow at http://127.0.0.1:9: ")
    assert counts(local) == {"weights": 4, "leftovers": 3, "pictures": 4 * 2 * 2}
    assert len(files(home, WEIGHTS)) == 4
    assert values(home, "sync", "mlp") == []

    cleaned = values(home, "clean", "--keep", "1", "--pictures", "--apply")
    assert {kind: count for kind, count in counts(cleaned).items() if kind in ("weights", "leftovers", "pictures")} == {
        "weights": 4,
        "pictures": 4 * 2 * 3,
    }
    assert cleaned["freed"] > 0
    lost = before.keys() - contents(home.path).keys()
    assert {path.name for path in lost} - {WEIGHTS, SPEC, *PICTURES} == {
        "checkpoint-1.safetensors",
        f".{WEIGHTS}.tmp",
        ".x.tmp",
        *(path.name for path in lost if path.parent == users.parent),
    }
    assert users.exists()
    assert {path for path in files(home, WEIGHTS) if "mlartifacts" not in path} == {
        str((folder / WEIGHTS).relative_to(home.path))
    }
    assert len(files(home, WEIGHTS)) == 2
    assert (folder / PREDICTIONS).exists()
    assert counts(values(home, "clean", "mlp", "--keep", "1", "--pictures")) == {}

    assert values(home, "sync", "mlp") == []
    models.append(values(home, "retrain", "mlp", "--top", "2", "--seeds", "1", "--workers", "1"))
    for model in models:
        for key in ("seconds", "seconds_per_epoch", "training_seconds", "time", "finalists"):
            model.pop(key, None)
    assert models[0] == models[1]
    weights = [(each.study("mlp") / "final" / WEIGHTS).read_bytes() for each in (other, home)]
    assert weights[0] == weights[1]
    final = contents(home.study("mlp") / "final")
    values(home, "clean", "--keep", "0", "--pictures", "--apply")
    assert contents(home.study("mlp") / "final") == final
    assert files(home, WEIGHTS), "the final model's"
    assert values(home, "sync", "mlp") == []

    values(home, "sync", "mlp", "--apply")  # draws again what was deleted
    assert counts(values(home, "clean", "mlp", "--pictures")) == {"pictures": 4 * 2 * 3}
    assert len([path for path in home.path.glob("optuna-artifacts/*") if path != users]) == 4 * 2


@pytest.mark.slow(seconds=10)
def test_a_stopped_search_goes_on_from_its_checkpoints_after_a_clean(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home")
    asked: dict[str, Any] = {"dataset": "digits", "epochs": 4, "trials": 2, "workers": 1, "home": home.path}
    with closing(api.iter_tune("mlp", **asked, set=["search.pruner=none"])) as events:
        assert any(isinstance(event, TrialEpoch) and (event.trial, event.epoch.index) == (1, 2) for event in events)
    running = home.trial("mlp", 1)
    before = contents(running)
    assert any("checkpoint" in path.name and path.parent.name.startswith("attempt") for path in before)
    disk.clean(home, keep=0, pictures=True, apply=True)
    assert contents(running) == before
    assert files(home, WEIGHTS) == []
    study = values(home, "tune", "mlp", "--trials", "2", "--workers", "1")
    assert study["trials"]["complete"] == 2
    assert "resumed after epoch" in (running / "log.txt").read_text()
    assert values(home, "sync", "mlp") == []


@pytest.mark.nightly
@pytest.mark.parametrize("number", [4])
def test_a_clean_that_is_cut_off_leaves_no_difference_and_the_same_command_goes_on(
    number: int,
    new_home: Callable[[Path], Home],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Cut before its deletion of that number; the files of MLflow's copies are deleted by MLflow."""
    home = new_home(tmp_path / "home")
    values(home, "tune", "mlp", "--dataset", "digits", "--epochs", "1", "--trials", "3", "--workers", "1")
    values(home, "sync", "mlp", "--apply")
    unlink, calls = Path.unlink, iter(range(1, 1000))

    def cut(path: Path, missing_ok: bool = False) -> None:
        if home.study("mlp") in path.parents and path.name in (WEIGHTS, SPEC, *PICTURES) and next(calls) == number:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            disk.clean(home, keep=0, pictures=True, apply=True)
    assert values(home, "sync", "mlp") == []
    assert disk.clean(home, keep=0, pictures=True, apply=True).freed > 0
    assert disk.clean(home, keep=0, pictures=True).freed == 0
    assert files(home, WEIGHTS) == files(home, "curves.png") == []
    assert values(home, "sync", "mlp") == values(home, "check") == []
    record_property("figures", f"cut before deletion {number}")
