"""Records come back as they were written, older formats included; trials are read from Optuna and their folders."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from searchfm.errors import StorageError
from searchfm.home import Home
from searchfm.records import (
    FORMAT,
    Epoch,
    Final,
    JobRecord,
    Predictions,
    Prepared,
    StudyHeader,
    StudyRecord,
    TestReads,
    TrainResult,
    Trial,
    read_epochs,
    write_epochs,
)
from searchfm.search.storage import locked_study, open_storage, read_study, read_trial

EPOCHS = [
    Epoch(1, 2.302585, 0.1, 2.2, 0.15, 1e-3, 0.5, 51234.567, 1790000000.123456),
    Epoch(2, 1 / 3, 2 / 3, 0.1 + 0.2, 1e-17, 5e-324, 12.5, 1e9, 1790000001.0),
]
HEADER: dict[str, Any] = {
    "uuid": "u",
    "resolved": {"search": {"keep": 1}, "data": {"name": "digits"}},
    "file": {},
    "question": "why?",
    "digest": "d",
    "planned": 3,
    "data": Prepared("f", (1, 8, 8), ("a", "b"), 30, 10),
}


def frozen(state: TrialState = TrialState.COMPLETE, value: float | None = 0.5, **attrs: Any) -> FrozenTrial:
    if state is not TrialState.COMPLETE:
        value = None
    return create_trial(state=state, value=value, user_attrs=attrs, intermediate_values={2: 0.5, 1: 0.25})


def row(number: int, value: float | None, twin: int | None = None) -> Trial:
    state = TrialState.COMPLETE if value is not None else TrialState.FAIL
    trial = create_trial(state=state, value=value, user_attrs={} if twin is None else {"twin": twin})
    return dataclasses.replace(read_trial(trial, Path("nowhere")), number=number)


def study(*trials: Trial) -> StudyRecord:
    return StudyRecord(**HEADER, name="toy", number=1, folder=Path("toy"), trials=trials)


# --- epochs.csv -------------------------------------------------------------------------------------------------------


def test_epochs_come_back_from_csv_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    write_epochs(path, EPOCHS)
    assert read_epochs(path) == tuple(EPOCHS)
    assert path.read_text().splitlines()[0].split(",") == [field.name for field in dataclasses.fields(Epoch)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["epochs.csv"]


def test_epochs_without_a_validation_part_have_no_validation_figures(tmp_path: Path) -> None:
    bare = dataclasses.replace(EPOCHS[0], val_loss=None, val_accuracy=None)
    write_epochs(tmp_path / "epochs.csv", [bare])
    assert read_epochs(tmp_path / "epochs.csv") == (bare,)


def test_losses_that_left_the_finite_numbers_are_kept(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs.csv", [dataclasses.replace(EPOCHS[0], train_loss=math.nan, val_loss=math.inf)])
    (read,) = read_epochs(tmp_path / "epochs.csv")
    assert math.isnan(read.train_loss)
    assert read.val_loss == math.inf


def test_a_trial_without_epochs_has_none(tmp_path: Path) -> None:
    assert read_epochs(tmp_path / "epochs.csv") == ()
    write_epochs(tmp_path / "epochs.csv", [])
    assert read_epochs(tmp_path / "epochs.csv") == ()
    (tmp_path / "epochs.csv").write_text("")  # what a power cut may leave
    assert read_epochs(tmp_path / "epochs.csv") == ()


def test_epochs_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    write_epochs(path, EPOCHS[:1])
    with pytest.raises(AttributeError):
        write_epochs(path, [*EPOCHS, "no epoch"])  # type: ignore[list-item]
    assert read_epochs(path) == tuple(EPOCHS[:1])


# --- trials and studies -----------------------------------------------------------------------------------------------


def test_a_trial_is_read_from_optuna_and_its_folder(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs.csv", EPOCHS)
    stored = frozen(
        config={"train": {"epochs": 2}},
        digest="d",
        attempt=3,
        result={"value": 0.5, "parameters": 7},
        twin=0,
    )
    trial = read_trial(stored, tmp_path)
    assert (trial.state, trial.value, trial.attempts, trial.twin) == ("complete", 0.5, 3, 0)
    assert (trial.config, trial.digest, trial.result) == ({"train": {"epochs": 2}}, "d", TrainResult(0.5, parameters=7))
    assert list(trial.reported.items()) == [(1, 0.25), (2, 0.5)]
    assert trial.epochs == tuple(EPOCHS)
    assert trial.started is not None
    assert trial.ended is not None
    assert abs(trial.ended - time.time()) < 60  # seconds since 1970, whatever the time zone


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (TrialState.RUNNING, "running"),
        (TrialState.WAITING, "running"),
        (TrialState.COMPLETE, "complete"),
        (TrialState.PRUNED, "pruned"),
        (TrialState.FAIL, "failed"),
    ],
)
def test_only_a_complete_trial_has_a_value_and_only_pruned_and_failed_ones_a_reason(
    tmp_path: Path, state: TrialState, name: str
) -> None:
    """The reason may be of an attempt that failed, whose coordinator died before it told so."""
    trial = read_trial(frozen(state, reason="because"), tmp_path)
    assert trial.state == name
    assert (trial.value is not None) == (name == "complete")
    assert trial.reason == ("because" if name in ("pruned", "failed") else None)
    assert (trial.twin, trial.attempts, trial.config, trial.epochs) == (None, 1, {}, ())


def test_a_pruned_trial_has_no_value_although_optuna_gives_it_one(tmp_path: Path) -> None:
    record = optuna.create_study(direction="maximize")
    trial = record.ask()
    trial.report(0.9, 1)
    record.tell(trial, state=TrialState.PRUNED)
    assert record.trials[0].value == 0.9
    assert read_trial(record.trials[0], tmp_path).value is None


def test_the_best_is_the_earliest_of_the_highest() -> None:
    toy = study(row(0, 0.5), row(1, 0.9), row(2, None), row(3, 0.9), row(4, 0.9, twin=1), row(5, 0.7))
    assert toy.best is toy.trials[1]
    assert [trial.number for trial in toy.ranked()] == [1, 3, 4, 5, 0]
    assert [trial.number for trial in toy.ranked(twins=False)] == [1, 3, 5, 0]
    assert [trial.number for trial in toy.of("failed")] == [2]


def test_a_study_without_complete_trials_has_no_best() -> None:
    assert study().best is None
    assert study(row(0, None)).best is None
    assert study().seconds == 0.0


def test_a_study_lasts_from_its_first_start_to_its_last_end() -> None:
    rows = [dataclasses.replace(row(i, 0.5), started=10.0 + i, ended=20.0 - i) for i in range(3)]
    assert study(*rows).seconds == 10.0
    assert study(dataclasses.replace(rows[0], ended=None)).seconds == 0.0


def test_a_running_trial_has_the_epochs_that_optuna_holds(tmp_path: Path) -> None:
    """The coordinator writes the file first; after a kill an epoch in it may be neither reported nor judged."""
    write_epochs(tmp_path / "epochs.csv", [*EPOCHS, dataclasses.replace(EPOCHS[1], index=3)])
    assert [epoch.index for epoch in read_trial(frozen(TrialState.RUNNING), tmp_path).epochs] == [1, 2]


def test_the_weights_of_twins_and_of_all_but_the_best_are_not_kept() -> None:
    toy = study(row(0, 0.5), row(1, 0.9, twin=2), row(2, 0.9), row(3, None))
    assert [trial.number for trial in toy.kept] == [2]


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_come_back_and_are_counted(tmp_path: Path) -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.3, 0.0]], dtype=np.float32)
    Predictions(np.array([5, 7, 9]), np.array([0, 1, 1]), probabilities).write(tmp_path)
    read = Predictions.read(tmp_path)
    assert read is not None
    assert read.indices.tolist() == [5, 7, 9]
    assert np.array_equal(read.probabilities, probabilities)
    assert read.correct.tolist() == [True, True, False]
    assert read.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    figures = [(each.name, each.precision, each.recall, each.n) for each in read.per_class(["a", "b", "c"])]
    assert figures == [("a", 0.5, 1.0, 1), ("b", 1.0, 0.5, 2), ("c", 0.0, 0.0, 0)]
    assert Predictions.read(tmp_path / "elsewhere") is None


# --- formats ----------------------------------------------------------------------------------------------------------

FINAL_1: dict[str, Any] = {
    "study": "toy",
    "plan": {"trials": [0], "top": 3, "seeds": 3, "trial": None, "epochs": None, "round": 0},
    "finalists": [],
    "tie": [],
    "winner": 0,
    "optimism": None,
    "validation": {"accuracy": 0.9, "low": None, "high": None, "spread": None, "n": 10},
    "test": {"accuracy": 0.9, "low": 0.8, "high": 1.0, "n": 10, "reads": 1, "fingerprint": "t"},
    "per_class": [{"class": "a", "precision": 1.0, "recall": 0.5, "n": 2}],
    "model": None,
    "seconds": 1,
    "seconds_per_epoch": 0.5,
    "training_seconds": 1.0,
    "parameters": 3,
    "flops": 4,
    "epochs": 2,
    "fingerprint": "f",
    "time": 1.79e9,
    "params": {},
    "weights": "w",
}
STUDY_1 = {**{key: value for key, value in HEADER.items() if key != "planned"}, "trials": 3, "version": "0.1.0"}
STUDY_1["data"] = dataclasses.asdict(HEADER["data"])


def through_json(values: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(json.dumps(values))
    return text


def test_records_of_format_1_are_upgraded_and_come_back_the_same() -> None:
    header = StudyHeader.from_json(through_json(STUDY_1))
    assert (header.planned, header.format, header.data) == (3, FORMAT, HEADER["data"])
    assert StudyHeader.from_json(through_json(header.to_json())) == header
    final = Final.from_json(through_json(FINAL_1))
    assert final.per_class[0].name == "a"
    assert Final.from_json(through_json(final.to_json())) == final
    test = {"identity": "i", "result": {"right": 3, "n": 4, "per_class": FINAL_1["per_class"]}}
    assert JobRecord.from_json(test).result["correct"] == 3
    assert JobRecord.from_json(test).result["per_class"][0]["name"] == "a"
    reads = TestReads.from_json({"f": [{"study": "toy", "winner": 0, "model": "m", "time": 1.0}]})
    assert reads.reads["f"][0].model == "m"
    assert TestReads.from_json(through_json(reads.to_json())) == reads


@pytest.mark.parametrize("kind", [StudyHeader, Final, JobRecord, TestReads])
def test_a_newer_record_is_refused_in_one_line(kind: Any) -> None:
    with pytest.raises(StorageError, match=r"^study 'toy': format 3: this version of searchfm reads 1 to 2$"):
        kind.from_json({"format": FORMAT + 1}, "study 'toy'")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"uuid": None}, r"Expected `str`, got `null` - at `\$.uuid`"),
        ({"data": {}}, "missing required field `fingerprint`"),
    ],
)
def test_the_error_for_a_missing_or_wrong_key_names_it(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(StorageError, match=f"^study 'toy': .*{problem}"):
        StudyHeader.from_json({**STUDY_1, **change}, "study 'toy'")


def test_readers_leave_an_old_record_alone_and_the_lock_holder_upgrades_it_with_a_copy(home: Home) -> None:
    storage = open_storage(home, create=True)
    optuna.create_study(study_name="toy", storage=storage, direction="maximize").set_user_attr("searchfm", STUDY_1)
    number = storage.get_study_id_from_name("toy")
    storage.set_study_user_attr(number, "final", FINAL_1)
    assert read_study(home, "toy").planned == 3
    assert storage.get_study_user_attrs(number) == {"searchfm": through_json(STUDY_1), "final": through_json(FINAL_1)}
    with locked_study(home, "toy") as (study, _):
        attrs = storage.get_study_system_attrs(number)
        assert attrs["searchfm"] == through_json(StudyHeader.from_json(STUDY_1).to_json())
        assert study.final is not None
        assert attrs["final"] == through_json(study.final.to_json())
        shown = storage.get_study_user_attrs(number)
        assert {"question", "data"} < shown.keys(), "what optuna-dashboard shows can be read"
        assert all(isinstance(shown[key], str) for key in shown.keys() - {"searchfm"})
        with pytest.raises(StorageError, match="study 'toy': format 3"):  # as 0.3.0 reads it
            StudyHeader.from_json(shown["searchfm"], "study 'toy'")
    for key, old in (("searchfm", STUDY_1), ("final", FINAL_1)):
        assert json.loads((home.study("toy") / f"{key}-format-1.json").read_text()) == through_json(old)
    assert read_study(home, "toy").planned == 3
    storage.set_study_system_attr(number, "searchfm", {**STUDY_1, "format": FORMAT + 1})
    with pytest.raises(StorageError, match="study 'toy': format 3"), locked_study(home, "toy"):
        pass


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b'{"reads": 1}', b"3"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "test-reads.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"test-reads\.json: "):
        TestReads.read(path)
