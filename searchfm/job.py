"""What crosses the pipe between the coordinator and a worker: jobs one way, events the other. Standard library only.

A job names an entry function `entry(payload, context) -> Generator[Epoch, None, Result]`: it yields an epoch whenever
one is done, and returns what came of it all. Trials, finalists, the final training and a test's toy objective are jobs.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Epoch:
    """One pass over the training part, and what validation said after it."""

    index: int  # from 1
    train_loss: float
    train_accuracy: float  # share of right answers, 0 to 1, while training, treatments and all
    val_loss: float | None  # None where nothing is held out
    val_accuracy: float | None
    lr: float  # learning rate of the last batch
    seconds: float  # wall time of the epoch, validation included
    samples_per_second: float  # training images over the time of training alone
    time: float  # when it ended, seconds since 1970


Result: TypeAlias = Mapping[str, Any]  # plain values (what JSON can hold)
Entry: TypeAlias = Callable[[Mapping[str, Any], "Context"], Generator[Epoch, None, Result]]


@dataclass(frozen=True)
class Job:
    """What a worker is given. `id` and `attempt` come back with every event."""

    id: str
    attempt: int  # from 1; each attempt writes under its own number
    folder: Path | None  # of the job, attempts below it; None for a job that writes nothing
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


@dataclass(frozen=True)
class Left(Event):
    """The job left at a tick because it was told to, or because its worker was."""


@dataclass(frozen=True)
class Lost(Event):
    """The worker died under the job."""

    reason: str
