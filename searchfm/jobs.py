"""What crosses between a pool and its workers: jobs one way, events the other.

A job names an entry function `entry(payload, context) -> Generator[Epoch, None, Result]`: it yields each epoch as it
ends, and returns a result. Trials, finalists, the final training and a test's toy objective are jobs.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from searchfm.records import Epoch

Result: TypeAlias = Mapping[str, Any]  # plain values (what JSON can hold)
Entry: TypeAlias = Callable[[Mapping[str, Any], "Context"], Generator[Epoch, None, Result]]


@dataclass(frozen=True)
class JobSpec:
    """Work for a pool, which makes as many attempts (`Job`s) of it as it takes."""

    id: str
    folder: Path | None  # attempts write below it; None for a job that writes nothing
    entry: str  # "module:function"
    payload: Mapping[str, Any]  # plain values
    label: str = ""  # name shown to users: "trial 7, seed 2 of 3"
    epochs: int = 0  # that it trains
    attempts: int = 0  # made by earlier processes
    lost: int = 0  # of these, the attempts whose worker died
    received: int = 0  # epochs that earlier processes received; they are not delivered again


@dataclass(frozen=True)
class Job:
    """One attempt, as a worker receives it. `id` and `attempt` come back with every event."""

    id: str
    attempt: int  # from 1; each attempt writes under its own number
    folder: Path | None  # of the job; this attempt writes to FOLDER/attempt-N
    entry: str  # "module:function"
    payload: Mapping[str, Any]  # plain values


@dataclass(frozen=True)
class Context:
    """What a worker hands to a job's entry, besides its payload."""

    folder: Path | None  # where this attempt writes: FOLDER/attempt-2
    earlier: tuple[Path, ...]  # the folders of earlier attempts, the latest first
    device: str  # "cpu", "cuda:0", "mps"
    tick: Callable[[], None]  # call it every batch: the heartbeat; raises Stopped when the job must leave
    cache: dict[Any, Any] = field(default_factory=dict)  # outlives the job: data now, frozen features later


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


# Events of engines alone.


@dataclass(frozen=True)
class Left(Event):
    """The job left at a tick because it, or its worker, was stopped."""


@dataclass(frozen=True)
class Lost(Event):
    """The worker died under the job."""

    reason: str


# Events of pools alone.


@dataclass(frozen=True)
class Started(Event):
    """A worker has the attempt."""


@dataclass(frozen=True)
class Retried(Event):
    """The job waits for a worker again; `attempt` is the new one, `lost` counts the workers that died under it."""

    reason: str  # empty where its worker was stopped, which is not charged
    lost: int


@dataclass(frozen=True)
class StoppedEarly(Event):
    """The job ended after `WorkerPool.stop`, in whatever way."""
