"""What crosses between a pool and its workers: jobs one way, events the other.

A job names an entry function `entry(payload, context) -> Generator[Epoch, None, Result]`: it yields each epoch as it
ends, and returns a result. Trials, finalists, the final training and a test's toy objective are jobs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from searchfm.records import Epoch
from searchfm.stopping import HANG_SECONDS

Result: TypeAlias = Mapping[str, Any]  # plain values (what JSON can hold)
PAUSED = "paused"  # the one key of the result of a job that ended at an epoch that its payload names, with a checkpoint


@dataclass(frozen=True)
class Job:
    """Work for a worker. A pool makes as many attempts as it takes: an engine receives the job with its `attempt`."""

    id: str  # comes back with every event, as `attempt` does
    folder: Path | None  # an attempt writes to FOLDER/attempt-N; None for a job that writes nothing
    entry: str  # "module:function"
    payload: Mapping[str, Any]  # plain values
    label: str = ""  # name shown to users: "trial 7, seed 2 of 3"
    epochs: int = 0  # that it trains
    attempt: int = 0  # the latest, counted from 1; each writes under its own number
    lost: int = 0  # attempts whose worker died
    received: int = 0  # epochs that were received; they are not delivered again
    hang_seconds: float = HANG_SECONDS  # from a heartbeat on, without a further one, until its worker is killed


@dataclass(frozen=True)
class Context:
    """What a worker hands to a job's entry, besides its payload."""

    folder: Path | None  # where this attempt writes: FOLDER/attempt-2
    earlier: tuple[Path, ...]  # the folders of earlier attempts, the latest first
    device: str  # "cpu", "cuda:0", "mps"
    tick: Callable[[], None]  # call it every batch: the heartbeat; raises Stopped when the job must stop
    allow_code: bool = False  # whether the user's code may run on this host: no job can grant it


@dataclass(frozen=True)
class Event:
    """Something that happened to a job's attempt."""

    job: str
    attempt: int


@dataclass(frozen=True)
class EpochDone(Event):
    """The job yielded an epoch."""

    epoch: Epoch


@dataclass(frozen=True)
class Finished(Event):
    """The job returned."""

    result: Result


@dataclass(frozen=True)
class Failed(Event):
    """The job raised: `kind` is the exception's class, `reason` one line."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Interrupted(Event):
    """The job ended at a tick because it, or its worker, was stopped. From a pool: the end of a job after
    `WorkerPool.stop`, in whatever way.
    """


@dataclass(frozen=True)
class Lost(Event):
    """The worker died under the job. An event of engines alone."""

    reason: str


# Events of pools alone.


@dataclass(frozen=True)
class Paused(Event):
    """The job returned at the epoch that its payload names; its folders and checkpoint stay for a later `submit`."""


@dataclass(frozen=True)
class Started(Event):
    """A worker has the attempt."""


@dataclass(frozen=True)
class Retried(Event):
    """The job waits for a worker again; `attempt` is the new one, `lost` counts the workers that died under it."""

    reason: str  # empty where its worker was stopped, which is not charged
    lost: int
