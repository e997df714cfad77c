"""A home written by an earlier version opens, goes on and retrains. Its content: tests/fixtures/README.md.

The commands are the user's: nothing here depends on how records are written.
"""

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from searchfm.home import TRACKING
from searchfm.records import NUMERICS
from tests.commands import searchfm_here

ARCHIVE = Path(__file__).parent / "fixtures" / "home-format-1.tar.xz"
CPU = ("--workers", "2", "--device", "cpu")
RUNNING, COMPLETE, PRUNED, FAIL = TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL

# Class and probability from the champion of `wide`, by the version that registered it. The images show no digits.
ANSWERS = {
    "shapes/bar/00.png": ("3", 0.497659),
    "shapes/cross/00.png": ("4", 0.514911),
    "shapes/frame/00.png": ("0", 0.344966),
}

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/cwd").is_dir(), reason="the home's paths begin with /proc/self/cwd, which only Linux has"
    ),
    pytest.mark.usefixtures("own_forkserver"),
]


@dataclass(frozen=True)
class OlderHome:
    """The unpacked fixture. Its paths are valid for processes that run in this folder."""

    folder: Path
    cache: Path  # of all tests, so that they share a forkserver

    def searchfm(self, *arguments: str) -> str:
        """Runs a command, which must exit with 0; returns its standard output."""
        environment = {
            "SEARCHFM_CACHE": str(self.cache),
            "COLUMNS": "200",
            TRACKING: f"sqlite:///{self.folder}/home/mlflow.db",  # MLflow keeps a connection an address open
        }
        done = searchfm_here(*arguments, "--home", "/proc/self/cwd/home", cwd=self.folder, **environment)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.searchfm(*arguments, "--json"))

    def trials(self, study: str) -> list[FrozenTrial]:
        """The trials in Optuna's storage."""
        storage = RDBStorage(f"sqlite:///{self.folder}/home/optuna.db")
        try:
            return storage.get_all_trials(storage.get_study_id_from_name(study))
        finally:
            storage.engine.dispose()

    def log(self, study: str, number: int) -> str:
        return (self.folder / "home" / "studies" / study / f"{number:04d}" / "log.txt").read_text()

    def final_weights(self, study: str) -> str:
        path = self.folder / "home" / "studies" / study / "final" / "weights.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def older(tmp_path: Path, cache: Path) -> OlderHome:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return OlderHome(tmp_path, cache)


def states(trials: list[FrozenTrial]) -> dict[TrialState, list[int]]:
    return {state: [trial.number for trial in trials if trial.state is state] for state in TrialState}


def check_kept(before: list[FrozenTrial], after: list[FrozenTrial]) -> None:
    """Checks that the records of trials that had ended are unchanged."""
    for old, new in zip(before, after[: len(before)], strict=True):
        assert (new.number, new.params, new.datetime_start) == (old.number, old.params, old.datetime_start)
        if old.state is RUNNING:
            assert new.intermediate_values.items() >= old.intermediate_values.items()
        else:
            assert (new.state, new.values, new.intermediate_values) == (old.state, old.values, old.intermediate_values)
            assert new.datetime_complete == old.datetime_complete
            assert {key: new.user_attrs[key] for key in old.user_attrs} == old.user_attrs


def answers(predicted: list[dict[str, Any]]) -> Mapping[str, tuple[str, float]]:
    return {row["image"]: (row["class"], row["probability"]) for row in predicted}


def check_answers(older: OlderHome, model: str) -> None:
    images = sorted(ANSWERS)
    predicted = answers(older.json("predict", model, *images))
    assert {image: predicted[image][0] for image in images} == {image: ANSWERS[image][0] for image in images}
    assert [predicted[image][1] for image in images] == pytest.approx([ANSWERS[image][1] for image in images], abs=1e-4)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_all_trials_are_shown_as_they_were_written(older: OlderHome) -> None:
    rows = {row["study"]: (row["trials"], row["best"]["trial"], row["best"]["value"]) for row in older.json("status")}
    assert rows == {
        "wide": ({"complete": 4, "pruned": 0, "failed": 0, "total": 4}, 0, 0.90566),
        "shapes": ({"complete": 3, "pruned": 0, "failed": 0, "total": 3}, 0, 1.0),
        "mixed": ({"complete": 3, "pruned": 4, "failed": 1, "total": 10}, 4, 0.962264),
    }
    header, row = re.findall(r"^(?:study|mixed) .*", older.searchfm("status", "mixed"), re.MULTILINE)
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert (shown["trials"], shown["running"], shown["best"]) == ("10/12", "2", "0.9623")


@pytest.mark.slow
def test_a_retrained_study_is_not_trained_again(older: OlderHome) -> None:
    weights = older.final_weights("wide")
    final = older.json("retrain", "wide")
    assert (final["winner"], final["test"]["accuracy"], final["test"]["reads"]) == (0, pytest.approx(352 / 384), 1)
    assert [(one["trial"], one["values"]) for one in final["finalists"]] == [
        (0, pytest.approx([0.886792, 0.839623], abs=1e-6)),
        (1, pytest.approx([0.90566, 0.896226], abs=1e-6)),
    ]
    assert (final["model"]["uri"], final["model"]["champion"]) == ("models:/searchfm-wide/1", True)
    assert older.final_weights("wide") == weights


@pytest.mark.slow
def test_the_champion_answers_as_it_did(older: OlderHome) -> None:
    check_answers(older, "wide")


@pytest.mark.slow
def test_it_is_aligned_with_mlflow_compared_and_reported(older: OlderHome) -> None:
    differences = older.json("sync", "wide", "--apply")
    assert {row["problem"] for row in differences} == {
        "study: tags differ: mlflow.note.content",  # this version words its notes otherwise, and trials have some
        *(f"trial {number}: tags differ: split, mlflow.note.content" for number in range(4)),
        *(f"trial {number}: metrics differ: accuracy" for number in range(4)),
    }
    assert older.json("sync", "wide") == []
    check_answers(older, "models:/searchfm-wide/1")
    wide, mixed = older.json("compare", "wide", "mixed")
    assert (wide["split"], wide["accuracy"], wide["n"]) == ("test", pytest.approx(352 / 384), 384)
    assert (mixed["split"], mixed["accuracy"], mixed["n"]) == ("validation", 0.962264, 212)
    older.searchfm("report", "wide", "--output", "wide.html")
    page = (older.folder / "wide.html").read_text()
    assert "do more units help on digits?" in page
    assert "91.67%" in page


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_search_goes_on_from_its_checkpoints_and_is_retrained(older: OlderHome) -> None:
    before = older.trials("mixed")
    assert states(before) == {
        **{COMPLETE: [1, 4, 7], PRUNED: [0, 3, 5, 6], FAIL: [2], RUNNING: [8, 9]},
        TrialState.WAITING: [],
    }
    assert {trial.number: trial.user_attrs["twin"] for trial in before if "twin" in trial.user_attrs} == {6: 5, 7: 4}
    assert [max(before[number].intermediate_values) for number in (8, 9)] == [2, 2]
    checkpoints = (older.folder / "home" / "studies" / "mixed" / "0008").rglob("checkpoint-*")
    assert max(path.name[:15] for path in checkpoints) == "checkpoint-0003", "one epoch further than what was reported"

    tuned = older.json("tune", "mixed.toml", "--trials", "13", *CPU)
    after = older.trials("mixed")
    assert len(after) == tuned["trials"]["total"] == 13
    assert not states(after)[RUNNING]
    check_kept(before, after)
    assert (after[8].state, sorted(after[8].intermediate_values)) == (COMPLETE, [1, 2, 3, 4, 5, 6])
    assert after[9].state in (COMPLETE, PRUNED)
    assert [after[number].user_attrs["attempt"] for number in (8, 9)] == [2, 2]
    for number in (8, 9):
        trained = re.findall(r"epoch (\d+): ", older.log("mixed", number))
        assert trained == [str(epoch) for epoch in after[number].intermediate_values], "no epoch was trained twice"
    numerics = {row["number"]: row["numerics"] for row in tuned["trial_list"]}
    assert (tuned["numerics"], numerics[1], numerics[8]) == ([1, NUMERICS], [1], [1, NUMERICS]), "begun under another"
    # A new trial equal to an earlier one is its twin: digests are what they were.
    ended = [trial for trial in after[:10] if trial.state is not FAIL and "twin" not in trial.user_attrs]
    twins = {trial.number: old.number for trial in after[10:] for old in ended if trial.params == old.params}
    assert twins, "else this shows nothing"
    assert {new: after[new].user_attrs["twin"] for new in twins} == twins
    assert older.json("sync", "mixed") == []

    final = older.json("retrain", "mixed", "--top", "2", "--seeds", "2", *CPU)
    best = sorted(
        (trial for trial in after if trial.state is COMPLETE and "twin" not in trial.user_attrs),
        key=lambda trial: (-trial.values[0], trial.number),
    )
    assert [one["trial"] for one in final["finalists"]] == [trial.number for trial in best[:2]]
    assert final["test"]["reads"] == 2, "the earlier version's reading counts"
    assert final["test"]["accuracy"] > 0.9
    assert (final["model"]["uri"], final["model"]["champion"]) == ("models:/searchfm-mixed/1", True)


@pytest.mark.slow
def test_a_retrained_study_goes_on_and_is_retrained_again(older: OlderHome) -> None:
    before, weights = older.trials("wide"), older.final_weights("wide")
    assert older.json("tune", "wide.toml", "--trials", "5", *CPU)["trials"]["complete"] == 5
    check_kept(before, older.trials("wide"))
    assert older.final_weights("wide") == weights
    final = older.json("retrain", "wide", "--again", "--promote", *CPU)
    assert (len(final["finalists"]), final["test"]["reads"]) == (2, 2), "as many finalists as the time before"
    assert (final["model"]["uri"], final["model"]["champion"]) == ("models:/searchfm-wide/2", True)
    assert older.final_weights("wide") != weights


@pytest.mark.slow
def test_a_study_on_user_images_goes_on_and_is_retrained(older: OlderHome) -> None:
    before = older.trials("shapes")
    assert older.json("tune", "shapes.toml", "--trials", "4", *CPU)["trials"]["complete"] == 4
    check_kept(before, older.trials("shapes"))
    final = older.json("retrain", "shapes", "--top", "1", "--seeds", "2", *CPU)
    assert (final["test"]["reads"], final["model"]["champion"]) == (1, True)
    images = [f"shapes/{name}/{number:02}.png" for name in ("bar", "cross", "frame") for number in range(20)]
    predicted = answers(older.json("predict", "shapes", *images))
    assert Counter(predicted[image][0] == Path(image).parent.name for image in images)[True] > 40
