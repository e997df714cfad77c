"""Finished and running trials as typed rows: the one reader for all that tracks and shows a study."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from searchfm.job import Epoch

State = Literal["running", "complete", "pruned", "failed"]

STATES: Mapping[TrialState, State] = {
    TrialState.WAITING: "running",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class TrialRow:
    """One trial of a study, as everything outside `search/` sees it."""

    number: int  # Optuna's
    state: State
    value: float | None  # validation accuracy after the last epoch, 0 to 1; None unless complete
    params: Mapping[str, Any]  # what the search chose, by dotted key
    config: Mapping[str, Any]  # the whole config as a table, seed included
    digest: str  # of the config without its seed
    twin: int | None  # the trial whose end this one took over
    reason: str | None  # why it failed, or who pruned it
    attempts: int
    reported: Mapping[int, float]  # validation accuracy by epoch, as Optuna has it
    epochs: tuple[Epoch, ...]  # as `epochs.csv` has them
    result: Mapping[str, Any]  # what the job returned: best_epoch, parameters, flops, seconds, files ...
    started: float | None  # seconds since 1970
    ended: float | None
    folder: Path


@dataclass(frozen=True)
class StudyRow:
    """A study, and all that was written down when it was opened."""

    name: str
    uuid: str
    number: int  # Optuna's study id, for links to its dashboard
    resolved: Mapping[str, Any]  # the resolved study: file, overrides and defaults
    file: Mapping[str, Any]  # the resolved study without overrides: the file as it was when the study was begun
    question: str  # the first comment of the study file
    digest: str  # of the resolved study
    planned: int  # trials in all
    data: Mapping[str, Any]  # fingerprint, shape, classes, train, validation: what `prepare` found
    folder: Path
    trials: tuple[TrialRow, ...]
    final: Mapping[str, Any] | None = None  # what `retrain` found, see there; None before it has

    def of(self, state: State) -> list[TrialRow]:
        """The trials in one state, by number."""
        return [row for row in self.trials if row.state == state]

    @property
    def best(self) -> TrialRow | None:
        """The complete trial with the highest value; the earliest of equal ones."""
        complete = self.ranked()
        return complete[0] if complete else None

    @property
    def seconds(self) -> float:
        """From the first trial's start to the last one's end."""
        starts = [row.started for row in self.trials if row.started is not None]
        ends = [row.ended for row in self.trials if row.ended is not None]
        return max(ends) - min(starts) if starts and ends else 0.0

    def ranked(self, *, twins: bool = True) -> list[TrialRow]:
        """Complete trials, the best first; without twins only those that were trained."""
        return ranked(self.trials, twins=twins)

    @property
    def kept(self) -> list[TrialRow]:
        """The trials whose weights are kept, the best first."""
        return kept(self.trials, self.resolved["search"]["keep"])


def ranked(trials: Iterable[TrialRow], *, twins: bool = True) -> list[TrialRow]:
    """Complete trials, the best first, the earlier of equal ones; without twins only those that were trained."""
    complete = [row for row in trials if row.state == "complete" and (twins or row.twin is None)]
    return sorted(complete, key=lambda row: (-(row.value or 0.0), row.number))


def kept(trials: Iterable[TrialRow], count: int) -> list[TrialRow]:
    """The trials whose weights are kept: a twin has none, and takes no place of one that has."""
    return ranked(trials, twins=False)[:count]


def trial_row(trial: FrozenTrial, folder: Path) -> TrialRow:
    """Reads one trial: Optuna's record, and `epochs.csv` in its folder."""
    attrs = trial.user_attrs
    return TrialRow(
        number=trial.number,
        state=STATES[trial.state],
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        params=dict(trial.params),
        config=attrs.get("config", {}),
        digest=attrs.get("digest", ""),
        twin=attrs.get("twin"),
        reason=attrs.get("reason"),
        attempts=attrs.get("attempt", 1),
        reported=dict(sorted(trial.intermediate_values.items())),
        epochs=read_epochs(folder / "epochs.csv"),
        result=attrs.get("result", {}),
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        folder=folder,
    )


def read_epochs(path: Path) -> tuple[Epoch, ...]:
    """The epochs that the coordinator wrote down; none where there is no file."""
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        return tuple(
            Epoch(**{f.name: _cell(f.name, line[f.name]) for f in fields(Epoch)}) for line in csv.DictReader(file)
        )


def write_epochs(path: Path, epochs: Sequence[Epoch]) -> None:
    """Writes all epochs of a trial as CSV, whole or not at all."""
    partial = path.with_suffix(".csv.tmp")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Epoch)])
        writer.writeheader()
        writer.writerows(asdict(epoch) for epoch in epochs)
    partial.replace(path)


def _cell(name: str, text: str) -> Any:
    if text == "":
        return None
    return int(text) if name == "index" else float(text)
