"""`retrain` on real digits: what it trains, reads, keeps and refuses."""

import dataclasses
import json
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from searchfm import cli, forecast
from searchfm.errors import DataError, StorageError, StudyError, UserError
from searchfm.events import Note
from searchfm.format import final_sentences
from searchfm.home import STORAGE, TRACKING, Home
from searchfm.records import FITTED, Final, Predictions, RegisteredModel, StudyHeader, StudyRecord
from searchfm.retraining import RetrainOptions, make_plan, retrain, retrain_within
from searchfm.search.storage import load_study, open_storage, write_record
from searchfm.search.study import Study
from searchfm.stats import Accuracy
from searchfm.tracking import registry
from searchfm.tuning import Tuning
from tests import rows
from tests.driving import local_engine
from tests.json_page import check

pytestmark = [pytest.mark.slow(seconds=5), pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

DIGITS: dict[str, Any] = {
    "data": {"name": "digits", "subset": 0.8},
    "model": {"name": "mlp", "mlp": {"layers": 1, "width": {"choice": [8, 16, 32, 64]}}},
    "optimizer": {"lr": {"low": 1e-3, "high": 1e-2, "log": True}},
    "train": {"epochs": 2, "batch_size": 64},
}


def never() -> bool:
    return False


def row(home: Home) -> StudyRecord:
    return load_study(open_storage(home), home, "digits")


def tune(home: Home, trials: int = 4, **tables: Any) -> None:
    """Runs the search, on two workers, without MLflow. tables: more of the study file."""
    search = {"trials": trials, "sampler": {"name": "random"}, "pruner": {"name": "none"}}
    study = Study("digits", {"search": search, **DIGITS, **tables}, question="How wide?")
    try:
        stored = load_study(open_storage(home), home, study.name)
    except StudyError:
        stored = None
    for _ in Tuning(study, home, study.resolved, stored, engine=local_engine(2), follow=False).run():
        pass


def finish(home: Home, name: str = "digits", **asked: Any) -> tuple[Final, list[Any]]:
    """Retrains to the end; returns the final record, and the events from the first job or note on."""
    progress, running = [], retrain(RetrainOptions(home, name, **asked), never, local_engine(2))
    while True:
        try:
            progress.append(next(running))
        except StopIteration as end:
            return end.value, [item for item in progress if item.kind not in ("study", "phase")]


def done(progress: list[Any]) -> list[str]:
    return [item.job.label for item in progress if item.kind == "finished"]


def reads(home: Home) -> list[dict[str, Any]]:
    (mine,) = json.loads((home.path / "test-reads.json").read_text())["reads"].values()
    return list(mine)


@pytest.fixture(scope="module", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the module's fixtures too: not the user's home or databases, and a separate cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (STORAGE, TRACKING):
            patch.delenv(name, raising=False)
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "retrain-cache"))
        yield


@pytest.fixture(scope="module")
def tuned(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = new_home(tmp_path_factory.mktemp("tuned") / "home")
    tune(home)
    return home


@pytest.fixture(scope="module")
def retrained(tuned: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Final, list[Any]]:
    home = Home(tmp_path_factory.mktemp("retrained") / "home")
    shutil.copytree(tuned.path, home.path)
    final, progress = finish(home, top=2, seeds=2)
    return home, final, progress


@pytest.fixture
def copied(retrained: tuple[Home, Final, list[Any]], tmp_path: Path) -> Home:
    """A copy of the retrained study, for one test."""
    home = Home(tmp_path / "home")
    shutil.copytree(retrained[0].path, home.path)
    return home


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_record_is_kept_whole_in_both_places(retrained: tuple[Home, Final, list[Any]]) -> None:
    home, final, _ = retrained
    assert row(home).final == final
    assert final == Final.from_json(json.loads((home.study("digits") / "final" / "final.json").read_text()))
    assert final.study == "digits"
    assert final.fingerprint == row(home).data.fingerprint


def test_the_final_training_has_several_threads_for_large_batches_of_large_nets(
    retrained: tuple[Home, Final, list[Any]], copied: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device(home: Home) -> str:
        fitted = json.loads((home.study("digits") / "final" / FITTED).read_text())["result"]
        assert isinstance(fitted["device"], str)
        return fitted["device"]

    assert device(retrained[0]).endswith("1 thread)")
    monkeypatch.setattr(forecast, "THREADED", {"float32": 1000, "bfloat16": 1000})
    finish(copied, top=2, seeds=2, again=True)
    assert device(copied).endswith("2 threads)")


def test_finalists_are_the_best_trials_with_seeds_that_the_search_did_not_use(
    retrained: tuple[Home, Final, list[Any]],
) -> None:
    home, final, progress = retrained
    study = row(home)
    assert [one.trial for one in final.finalists] == [trial.number for trial in study.ranked(twins=False)[:2]]
    seeds = [seed for one in final.finalists for seed in one.seeds]
    used = {trial.config["train"]["seed"] for trial in study.trials}
    assert len(set(seeds)) == 4
    assert not used & set(seeds)
    for one in final.finalists:
        assert one.value == study.trials[one.trial].value
        assert one.mean == pytest.approx(np.mean(one.values))
        for seed, value in zip(one.seeds, one.values, strict=True):
            with np.load(home.study("digits") / "finalists" / f"{one.trial:04d}-{seed}" / "predictions.npz") as file:
                assert np.mean(file["probabilities"].argmax(1) == file["labels"]) == value
                assert len(file["labels"]) == study.data.validation == final.validation.n
    winner = next(one for one in final.finalists if one.trial == final.winner)
    assert final.optimism == pytest.approx(winner.value - winner.mean)
    assert final.validation.low < final.validation.accuracy == winner.mean < final.validation.high
    assert len(done(progress)) == 6, "two finalists with two seeds, the final training, the test"


def test_the_final_model_saw_all_training_images_and_the_test_part_once(
    retrained: tuple[Home, Final, list[Any]],
) -> None:
    home, final, _ = retrained
    folder = home.study("digits") / "final"
    left = {"weights.safetensors", "model.json", "predictions.npz", "epochs.csv", "curves.png", "confusion.png"}
    assert {path.name for path in folder.iterdir()} == left | {
        *("log.txt", "config.toml", "final.json", "example.npy", "fit.json", "test.json")
    }
    predictions = Predictions.read(folder)
    assert predictions is not None
    correct = int(predictions.correct.sum())
    assert final.test.n == len(predictions.labels) == 384
    assert final.test.accuracy == correct / 384
    assert (final.test.low, final.test.high) == Accuracy(correct, 384).interval
    assert sum(one.n for one in final.per_class) == 384
    assert final.test.reads == 1
    (read,) = reads(home)
    assert (read["study"], read["winner"]) == ("digits", final.winner)
    assert read["time"] < final.time, "counted before it happened"
    assert (final.epochs, final.seconds_per_epoch) == (2, pytest.approx(final.training_seconds / 2))


def test_the_model_is_registered_as_champion(retrained: tuple[Home, Final, list[Any]]) -> None:
    home, final, _ = retrained
    assert final.model == RegisteredModel("searchfm-digits", 1, "models:/searchfm-digits/1", champion=True)
    version = registry.connect(home).get_model_version_by_alias("searchfm-digits", "champion")
    assert version.tags["weights"] == final.weights
    assert version.tags["test_accuracy"] == repr(final.test.accuracy)


def test_nothing_is_left_half_done(retrained: tuple[Home, Final, list[Any]]) -> None:
    home = retrained[0]
    assert not [path for path in home.path.rglob("*") if "attempt-" in path.name or path.name.endswith(".tmp")]
    assert not list(home.study("digits").glob("final-*"))


def test_json_prints_the_promised_keys_and_the_terminal_explains_each_interval(
    retrained: tuple[Home, Final, list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, final, _ = retrained
    outputs = {}
    for arguments in (("--json",), ()):
        monkeypatch.setattr(sys, "argv", ["searchfm", "retrain", "digits", "--home", str(home.path), *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        outputs[arguments] = capsys.readouterr().out
    promised = ("study", "finalists", "tie", "winner", "optimism", "default", "validation", "test", "model", "seconds")
    baselines = {"largest": final.largest, "balanced": final.balanced}
    check(["retrain"], outputs[("--json",)])
    kept = json.loads(json.dumps(final.to_json()))
    assert json.loads(outputs[("--json",)]) == {"schema": 2, **{key: kept[key] for key in promised}, **baselines}
    text = " ".join(outputs[()].split())
    test, validation = final.test, final.validation
    assert f"{validation.accuracy:.2%} with 2 fresh seeds" in text
    assert "2 seeds are too few for an interval of a further one; --seeds 5 gives it." in text
    assert f"{test.accuracy:.2%} of 384 test images correct; 95% interval {test.low:.2%} to {test.high:.2%}" in text
    assert "for this one model on images like these" in text
    assert "had been read once by then" in text
    assert "models:/searchfm-digits/1, the champion" in text


def test_a_reading_of_the_test_part_is_counted_before_it_happens(tuned: Home, tmp_path: Path) -> None:
    """A test job that is killed has been counted, although it has no result."""
    home = Home(tmp_path / "home")
    shutil.copytree(tuned.path, home.path)
    running = retrain(RetrainOptions(home, "digits", trial=0), never, local_engine(1))
    first = next(item for item in running if hasattr(item, "job") and item.job.label == "test")
    running.close()  # as a kill would, before the test job begins
    assert first.kind == "planned"
    assert len(reads(home)) == 1


# --- the same command again -------------------------------------------------------------------------------------------


def test_the_same_command_again_trains_and_reads_nothing(retrained: tuple[Home, Final, list[Any]]) -> None:
    home, final, _ = retrained
    again, progress = finish(home)
    assert (again, progress) == (final, [])
    assert len(reads(home)) == 1


def test_another_winner_is_trained_and_reads_the_test_part_again(copied: Home) -> None:
    before = row(copied).final
    assert before is not None
    other = next(trial.number for trial in row(copied).ranked() if trial.number != before.winner)
    final, progress = finish(copied, trial=other)
    assert any("won under other settings" in item.text for item in progress if item.kind == "note")
    assert done(progress) == ["final training", "test"]
    assert (final.winner, final.finalists, final.optimism) == (other, (), None)
    assert final.validation.accuracy == row(copied).trials[other].value
    assert final.validation.low is None
    assert final.test.reads == 2 == len(reads(copied))
    assert (finish(copied)[0].winner, len(reads(copied))) == (other, 2), "what was chosen stays chosen"
    back, progress = finish(copied, top=2)
    assert back.winner == before.winner
    assert [item.kind for item in progress if hasattr(item, "job") and "seed" in item.job.label] == ["found"] * 4
    assert back.test.accuracy == before.test.accuracy, "the same model, trained again"
    assert back.test.reads == 2 == len(reads(copied)), "a model is counted once"


def test_more_trials_make_other_finalists_and_finished_jobs_are_not_run_again(copied: Home) -> None:
    before = row(copied).final
    assert before is not None
    tune(copied, trials=12)
    study = row(copied)
    best = [trial.number for trial in study.ranked(twins=False)[:2]]
    assert best != list(before.plan.trials)
    final, progress = finish(copied)
    assert progress[0].text == f"the finalists are trials {best[0]}, {best[1]} now, and were " + ", ".join(
        map(str, before.plan.trials)
    )
    labels = {item.job.label for item in progress if item.kind == "found"}
    kept = set(best) & set(before.plan.trials)
    assert {label for label in labels if "seed" in label} == {f"trial {n}, seed {k} of 2" for n in kept for k in (1, 2)}
    assert final.test.reads == (1 if final.winner == before.winner else 2)


def test_again_trains_with_other_seeds_and_reads_the_test_part_again(copied: Home) -> None:
    before = row(copied).final
    assert before is not None
    final, _ = finish(copied, again=True)
    old, new = ({seed for one in each.finalists for seed in one.seeds} for each in (before, final))
    assert len(old | new) == 8
    assert final.weights != before.weights
    assert final.test.reads == 2
    assert finish(copied)[1] == []


def test_without_mlflow_the_figures_are_kept_and_the_model_follows(
    copied: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = row(copied).final
    assert before is not None
    with monkeypatch.context() as away:
        away.setenv(TRACKING, "http://127.0.0.1:9")
        with pytest.raises(StorageError, match="MLflow at"):
            finish(copied, epochs=1)
    kept = row(copied).final
    assert kept is not None
    assert (kept.epochs, kept.model, kept.test.reads) == (1, None, 2)
    final, progress = finish(copied)
    assert done(progress) == []
    assert final == dataclasses.replace(kept, model=final.model)
    assert final.model.version == 2
    assert len(reads(copied)) == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(home: Home) -> StudyRecord:
    """Trials 0 and 3 complete, 1 pruned, 2 failed."""
    return rows.four(home)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"trial": 1}, "study 'toy': trial 1 is pruned; may be 0, 3"),
        ({"trial": 2}, "study 'toy': trial 2 is failed; may be 0, 3"),
        ({"trial": 9}, "study 'toy': trial 9 is unknown; may be 0, 3"),
        ({"trial": 0, "top": 2}, "--trial 0: names the winner; --top and --seeds are for finalists"),
        ({"top": 0}, "--top 0: must be a whole number >= 1"),
        ({"seeds": -1}, "--seeds -1: must be a whole number >= 1"),
        ({"epochs": 0}, "--epochs 0: must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_retrained_is_named(four: StudyRecord, home: Home, asked: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(four, RetrainOptions(home, "toy", **asked))  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_trials_that_no_coordinator_trains_are_left_out(four: StudyRecord, home: Home) -> None:
    before = make_plan(four, RetrainOptions(home, "toy"))
    rows.ask(home)
    assert make_plan(rows.study(home), RetrainOptions(home, "toy")) == before


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (10**6, "277 h 46 min left: 3 finalists with 3 fresh seeds; forecast 57 h "),
        (200_000, "trial 3 wins as the best of the search; forecast "),
        (100, "trial 0 wins as the best of the search whose final training fits; that of trial 3 does not; forecast "),
        (1, "trial 3 wins as the best of the search; forecast "),
    ],
)
def test_a_note_names_the_winner_and_why_before_its_final_training(
    four: StudyRecord, home: Home, left: float, text: str
) -> None:
    slow = [dataclasses.replace(epoch, samples_per_second=1.0) for epoch in four.trials[3].epochs]
    best = dataclasses.replace(four.trials[3], value=0.99, epochs=slow)
    study = dataclasses.replace(four, trials=(*four.trials[:3], best))
    note = next(retrain_within(left, RetrainOptions(home, "toy"), study, 2, never))
    assert isinstance(note, Note)
    assert text in note.text


# --- the default ------------------------------------------------------------------------------------------------------


def test_the_default_is_among_the_finalists_and_how_it_did_is_reported(home: Home) -> None:
    tune(home, first=[{"model": {"mlp": {"width": 8}}, "optimizer": {"lr": 1e-3}}])
    assert row(home).default == 0
    assert (row(home).best or row(home).trials[0]).number != 0
    final, _ = finish(home, top=1, seeds=2)
    assert (final.plan.trials[1:], final.default) == ((0,), 0)
    assert {one.trial for one in final.finalists} == set(final.plan.trials)
    (compared,) = [text for text in final_sentences(final)["Validation"] if "default" in text]
    assert re.fullmatch(
        r"The study's default, trial 0, has .*% with fresh seeds: .* points below the winner\.", compared
    )
    final, progress = finish(home, top=1, seeds=1)
    assert final.default is None
    number = final.winner
    assert f"trial {number} is not compared with the study's default, trial 0" in [
        item.text for item in progress if item.kind == "note"
    ]


def test_a_default_that_did_not_end_is_a_finalist_without_a_value(home: Home) -> None:
    tune(home, 2, first=[{"model": {"mlp": {"width": 64}}, "optimizer": {"lr": 1e-2}}])
    with sqlite3.connect(home.path / "optuna.db") as database:
        database.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE number = 0")
        database.execute("DELETE FROM trial_user_attributes WHERE key IN ('config', 'digest') AND trial_id = 1")
    final, _ = finish(home, top=1, seeds=2)
    assert (final.plan.trials, final.default, final.winner, final.optimism) == ((1, 0), 0, 0, None)
    assert [one.value is None for one in final.finalists] == [False, True]
    assert final.params == {"model.mlp.width": 64, "optimizer.lr": 0.01}
    shown = final_sentences(final)["Validation"]
    assert shown[0].endswith("the winner, the study's default, was not trained to its end in the search.")


def test_a_study_without_a_complete_trial_is_refused(home: Home) -> None:
    rows.begin(home)
    rows.tell(home, rows.ask(home), TrialState.FAIL)
    with pytest.raises(StudyError, match="'toy': has no complete trial"):
        make_plan(rows.study(home), RetrainOptions(home, "toy"))


def test_an_unknown_study_is_one_line_and_leaves_nothing(
    tuned: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for home, message in ((tuned.path, "study 'nothing' is not in "), (tmp_path / "no", "holds no study yet")):
        monkeypatch.setattr(sys, "argv", ["searchfm", "retrain", "nothing", "--home", str(home)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        line = capsys.readouterr().err
        assert left.value.code == 2
        assert message in line
        assert line.count("\n") == 1
    assert not (tuned.study("nothing")).exists()
    assert not (tmp_path / "no").exists()


def test_data_that_changed_are_refused_before_anything_is_trained(tuned: Home, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    shutil.copytree(tuned.path, home.path)
    storage, study = open_storage(home), row(home)
    data = dataclasses.replace(study.data, fingerprint="0" * 64)
    header = StudyHeader.from_json(storage.get_study_system_attrs(study.number)["searchfm"])
    write_record(storage, study.number, dataclasses.replace(header, data=data))
    with pytest.raises(DataError, match="the data have changed since study 'digits' was begun"):
        finish(home)
    assert not (home.study("digits") / "finalists").exists()
    assert not (home.path / "test-reads.json").exists()
