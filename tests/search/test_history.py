"""Finished and running trials as typed rows."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from searchfm.job import Epoch
from searchfm.search.history import StudyRow, TrialRow, read_epochs, trial_row, write_epochs

EPOCHS = [
    Epoch(1, 2.302585, 0.1, 2.2, 0.15, 1e-3, 0.5, 51234.567, 1790000000.123456),
    Epoch(2, 1 / 3, 2 / 3, 0.1 + 0.2, 1e-17, 5e-324, 12.5, 1e9, 1790000001.0),
]


def frozen(state: TrialState = TrialState.COMPLETE, value: float | None = 0.5, **attrs: Any) -> FrozenTrial:
    if state is not TrialState.COMPLETE:
        value = None
    return create_trial(state=state, value=value, user_attrs=attrs, intermediate_values={2: 0.5, 1: 0.25})


def row(number: int, value: float | None, twin: int | None = None) -> TrialRow:
    state = TrialState.COMPLETE if value is not None else TrialState.FAIL
    trial = create_trial(state=state, value=value, user_attrs={} if twin is None else {"twin": twin})
    return dataclasses.replace(trial_row(trial, Path("nowhere")), number=number)


def study(*trials: TrialRow) -> StudyRow:
    return StudyRow("toy", "u", 1, {}, {}, "", "", 3, {}, Path("toy"), trials)


# --- epochs.csv -------------------------------------------------------------------------------------------------------


def test_epochs_come_back_from_csv_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "epochs.csv"
    write_epochs(path, EPOCHS)
    assert read_epochs(path) == tuple(EPOCHS)
    assert path.read_text().splitlines()[0].split(",") == [field.name for field in dataclasses.fields(Epoch)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["epochs.csv"]


def test_what_is_not_held_out_has_no_validation(tmp_path: Path) -> None:
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
    with pytest.raises(TypeError):
        write_epochs(path, [*EPOCHS, "no epoch"])  # type: ignore[list-item]
    assert read_epochs(path) == tuple(EPOCHS[:1])


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_what_optuna_and_the_folder_say(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs.csv", EPOCHS)
    trial = frozen(
        config={"train": {"epochs": 2}}, digest="d", attempt=3, reason="because", result={"parameters": 7}, twin=0
    )
    found = trial_row(trial, tmp_path)
    assert (found.state, found.value, found.attempts, found.twin, found.reason) == ("complete", 0.5, 3, 0, "because")
    assert (found.config, found.digest, found.result) == ({"train": {"epochs": 2}}, "d", {"parameters": 7})
    assert list(found.reported.items()) == [(1, 0.25), (2, 0.5)]
    assert found.epochs == tuple(EPOCHS)
    assert found.started is not None
    assert found.ended is not None
    assert abs(found.ended - time.time()) < 60  # seconds since 1970, whatever the time zone


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
def test_only_a_complete_trial_has_a_value(tmp_path: Path, state: TrialState, name: str) -> None:
    found = trial_row(frozen(state), tmp_path)
    assert found.state == name
    assert (found.value is not None) == (name == "complete")
    assert (found.twin, found.reason, found.attempts, found.config, found.epochs) == (None, None, 1, {}, ())


def test_a_pruned_trial_has_no_value_although_optuna_gives_it_one(tmp_path: Path) -> None:
    record = optuna.create_study(direction="maximize")
    trial = record.ask()
    trial.report(0.9, 1)
    record.tell(trial, state=TrialState.PRUNED)
    assert record.trials[0].value == 0.9
    assert trial_row(record.trials[0], tmp_path).value is None


def test_the_best_is_the_earliest_of_the_highest() -> None:
    toy = study(row(0, 0.5), row(1, 0.9), row(2, None), row(3, 0.9), row(4, 0.9, twin=1), row(5, 0.7))
    assert toy.best is toy.trials[1]
    assert [found.number for found in toy.ranked()] == [1, 3, 4, 5, 0]
    assert [found.number for found in toy.ranked(twins=False)] == [1, 3, 5, 0]
    assert [found.number for found in toy.of("failed")] == [2]


def test_a_study_without_complete_trials_has_no_best() -> None:
    assert study().best is None
    assert study(row(0, None)).best is None
    assert study().seconds == 0.0


def test_a_study_lasts_from_its_first_start_to_its_last_end() -> None:
    rows = [dataclasses.replace(row(i, 0.5), started=10.0 + i, ended=20.0 - i) for i in range(3)]
    assert study(*rows).seconds == 10.0
    assert study(dataclasses.replace(rows[0], ended=None)).seconds == 0.0
