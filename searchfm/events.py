"""What `iter_tune` and `iter_retrain` yield: a frozen dataclass for each event, told apart by class or by `kind`.

for event in searchfm.iter_tune("vit"):
    match event:
        case TrialEnded(trial=number, record=record):
            print(number, record.state, record.value)
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from searchfm.jobs import Job
from searchfm.records import Epoch, Final, StudyRecord, Trial


@dataclass(frozen=True)
class Phase:
    """Work that trains nothing begins, and may take seconds: "starting a worker", "reading digits"."""

    text: str
    kind: Literal["phase"] = "phase"


@dataclass(frozen=True)
class Note:
    """A line for the user, such as how many workers share a GPU from now on."""

    text: str
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class StudyFound:
    """The study file was read and checked, or the study of the home was read. Nothing is written yet."""

    name: str
    question: str
    dataset: str
    resumed: bool  # whether the study was begun before
    kind: Literal["study"] = "study"


# --- a search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyOpened:
    """The data are read, the study is in the database, and the search begins."""

    study: StudyRecord
    trials: int  # in all, those of earlier searches included
    workers: tuple[str, ...]  # their devices; none where nothing is left to train
    left: float = math.inf  # seconds to the end of the timeout; infinite without one
    kind: Literal["opened"] = "opened"


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins to train; "adopted": it goes on where an earlier search left it; "promoted": from its pause."""

    trial: int
    record: Trial
    kind: Literal["started", "adopted", "promoted"] = "started"


@dataclass(frozen=True)
class TrialEpoch:
    """A trial trained an epoch, which was recorded and judged."""

    trial: int
    epoch: Epoch
    kind: Literal["epoch"] = "epoch"


@dataclass(frozen=True)
class TrialRetried:
    """The worker of a trial died; the trial goes on from its last checkpoint."""

    trial: int
    text: str  # how it died
    kind: Literal["retried"] = "retried"


@dataclass(frozen=True)
class TrialPaused:
    """A trial reached a halving (`promote = true`), and waits, without a worker, to be continued or pruned."""

    trial: int
    record: Trial
    kind: Literal["paused"] = "paused"


@dataclass(frozen=True)
class TrialEnded:
    """A trial is complete, pruned or failed, for good."""

    trial: int
    record: Trial
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True)
class SearchEnded:
    """The search is over; the last event but those of a final training that was asked for too."""

    study: StudyRecord  # as it stands
    trials: int  # asked for in all
    exhausted: bool  # whether a finite space has no further point
    rule: str  # of [search] that ended it: "target", "stop_after", or nothing
    reason: str  # why it ended before its number of trials, in a sentence
    missing: int  # trials that MLflow lacks
    seconds: float  # since the call, or since the command began
    stopped: str  # why it ended early: "Ctrl-C", "SIGTERM", "searchfm stop", "timeout", "stopping", or nothing
    kind: Literal["finished"] = "finished"


SearchEvent: TypeAlias = TrialStarted | TrialEpoch | TrialRetried | TrialPaused | TrialEnded | Note
TuneEvent: TypeAlias = Phase | StudyFound | StudyOpened | SearchEvent | SearchEnded

# --- a final model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobPlanned:
    """A training, or the test, that is to be done."""

    job: Job  # with `label` and `epochs`
    kind: Literal["planned"] = "planned"


@dataclass(frozen=True)
class JobStarted:
    """A worker has the job."""

    job: Job
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class JobEpoch:
    """The job trained an epoch."""

    job: Job
    epoch: Epoch
    kind: Literal["epoch"] = "epoch"


@dataclass(frozen=True)
class JobRetried:
    """The worker of the job died; the job goes on from its last checkpoint."""

    job: Job
    text: str  # how it died
    kind: Literal["retried"] = "retried"


@dataclass(frozen=True)
class JobEnded:
    """The job is finished or failed; "found": an earlier command had finished it."""

    job: Job
    kind: Literal["finished", "found", "failed"] = "finished"
    value: float | None = None  # accuracy, 0 to 1
    text: str = ""  # why it failed


@dataclass(frozen=True)
class Retrained:
    """The final model is trained, tested and registered; always the last event."""

    final: Final
    kind: Literal["retrained"] = "retrained"


JobEvent: TypeAlias = JobPlanned | JobStarted | JobEpoch | JobRetried | JobEnded
RetrainEvent: TypeAlias = Phase | StudyFound | Note | JobEvent | Retrained
