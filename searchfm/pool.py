"""A pool of workers on an engine: brings jobs to their ends, with attempts, retries, stopping and the lock check.

Callers submit jobs and read events. They never see a worker that died or left: such a job gets another attempt, which
goes on from its newest checkpoint, and the caller a notice (`Retried`).
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

from searchfm.engines import Engine
from searchfm.errors import CodeError, DataError, ModelError, StorageError
from searchfm.home import flush, make_folder
from searchfm.jobs import (
    PAUSED,
    EpochDone,
    Event,
    Failed,
    Finished,
    Interrupted,
    Job,
    Lost,
    Paused,
    Retried,
    Started,
)
from searchfm.stopping import HANG_SECONDS, STOP_SECONDS

LOCK_SECONDS = 5.0  # between two checks of the lock
EVENT_SECONDS = 0.2  # to wait for an event before the stop request is checked again


class WorkerPool:
    """Runs jobs on the workers of an engine, which is closed by its owner.

    retries: attempts that a job may lose to dying workers before it fails. hang_seconds: of its jobs. stopping: whether
    the command was asked to stop; then every job is asked to stop. check_lock: raises once the study's lock is gone.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        retries: int = 2,
        hang_seconds: float = HANG_SECONDS,
        stopping: Callable[[], bool] = lambda: False,
        check_lock: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.retries, self.hang_seconds = engine, retries, hang_seconds
        self.check_lock = check_lock
        self.stopping, self._clock = stopping, clock
        self._waiting: deque[Job] = deque()
        self._running: dict[str, Job] = {}  # on a worker
        self._stopped: set[str] = set()  # of these, the jobs that `stop` was called for
        self._started: deque[Started] = deque()  # not yielded yet
        self._stop_requested_at: float | None = None
        self._lock_checked_at = clock()

    @property
    def free(self) -> int:
        """Workers without a job, those apart that a waiting job will take; 0 once the pool is to stop."""
        return 0 if self.stopping() else max(self.engine.free - len(self._waiting), 0)

    @property
    def stopped(self) -> bool:
        """Whether the pool was asked to stop, and every job has left or the time for it is over. A job without a folder
        keeps no checkpoint, and is not waited for: its worker may be importing torch, or downloading.
        """
        stop = self._stop_requested_at
        if stop is None:
            return False
        keeps = not self._running or any(job.folder for job in self._running.values())
        return not (keeps and self.engine.busy) or self._clock() > stop + STOP_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where the caller leaves in the middle (a generator that is closed, Ctrl-C), stops all jobs first, and waits
        until they have written their checkpoints. Their events are dropped: the next attempts yield them again.
        """
        if kind not in (GeneratorExit, KeyboardInterrupt) or self._stop_requested_at is not None:
            return
        for job in self._running:
            self.engine.stop(job)
        until = self._clock() + STOP_SECONDS
        while self.engine.busy and self._clock() < until:
            self.engine.next_event(EVENT_SECONDS)

    def submit(self, job: Job) -> int:
        """Gives a job to a free worker, or queues it; returns the number of its attempt."""
        job = replace(_next_attempt(job), hang_seconds=self.hang_seconds)
        self._waiting.append(job)
        self._start_waiting()
        return job.attempt

    def stop(self, job: str) -> None:
        """Asks a job to stop; its one further event is `Interrupted`."""
        self._stopped.add(job)
        self.engine.stop(job)

    def events(self, timeout: float = EVENT_SECONDS) -> Iterator[Event]:
        """Starts waiting jobs, and yields what happened: within `timeout` seconds at most one event of a job.

        Raises DataError or StorageError where a job meets one, and what `check_lock` raises.
        """
        if self._stop_requested_at is None and self.stopping():
            self._stop_requested_at = self._clock()
            for job in self._running:
                self.engine.stop(job)
        self._start_waiting()
        while self._started:
            yield self._started.popleft()
        event = self.engine.next_event(timeout)
        if self._clock() > self._lock_checked_at + LOCK_SECONDS:
            self.check_lock()
            self._lock_checked_at = self._clock()
        if event is not None and event.job in self._running and self._running[event.job].attempt == event.attempt:
            yield from self._on(self._running[event.job], event)  # any other is of an attempt that was given up

    def run_all(self, jobs: Collection[Job]) -> Generator[Event, None, None]:
        """Brings jobs to their ends. Raises KeyboardInterrupt once all have left, if the pool is to stop; DataError,
        ModelError or StorageError where a job meets one, since all others would meet it too.
        """
        for job in jobs:
            self.submit(job)
        open_jobs = {job.id for job in jobs}
        while open_jobs:
            for event in self.events():
                match event:
                    case Failed(kind="ModelError", reason=reason):
                        raise ModelError(reason)
                    case Finished() | Failed():
                        open_jobs.remove(event.job)
                yield event
            if self.stopped:
                raise KeyboardInterrupt

    def _start_waiting(self) -> None:
        while self._waiting and not self.stopping() and self.engine.free > 0:
            job = self._waiting.popleft()
            self._running[job.id] = job
            self.engine.submit(job)
            self._started.append(Started(job.id, job.attempt))

    def _on(self, job: Job, event: Event) -> Iterator[Event]:
        if isinstance(event, EpochDone):
            # Not after `stop`, and not an epoch that a checkpoint replays or an attempt trains again.
            if job.id not in self._stopped and event.epoch.index > job.received:
                assert event.epoch.index == job.received + 1, f"{job.id}: epoch {event.epoch.index} is early"
                self._running[job.id] = replace(job, received=event.epoch.index)
                yield event
            return
        del self._running[job.id]
        if job.id in self._stopped:
            self._stopped.remove(job.id)
            gather(job.folder, keep=False)
            yield Interrupted(job.id, job.attempt)
            return
        match event:
            case Finished(result=result) if PAUSED in result:
                yield Paused(job.id, job.attempt)
            case Finished():
                gather(job.folder, keep=True)
                yield event
            case Failed(kind="DataError", reason=reason):  # every other job would meet it too
                raise DataError(reason)
            case Failed(kind="CodeError" | "CodeNotAllowedError", reason=reason):
                raise CodeError(reason)
            case Failed(kind="StorageError", reason=reason):
                raise StorageError(reason)
            case Failed():
                gather(job.folder, keep=False)
                yield event
            case Interrupted():
                yield self._retry(job, "")
            case Lost(reason=reason):
                job = replace(job, lost=job.lost + 1)
                if job.lost > self.retries:
                    gather(job.folder, keep=False)
                    yield Failed(event.job, event.attempt, "WorldError", f"{reason}, {job.lost} times")
                else:
                    yield self._retry(job, reason)
            case _:
                raise AssertionError(event)

    def _retry(self, job: Job, reason: str) -> Retried:
        job = _next_attempt(job)
        self._waiting.append(job)
        return Retried(job.id, job.attempt, reason, job.lost)


def gather(folder: Path | None, *, keep: bool) -> None:
    """Moves what the attempts wrote up into the job's folder: all logs, and the files of the last attempt if `keep`. A
    loss of power then leaves these files there.
    """
    if folder is None:
        return
    attempts = sorted(folder.glob("attempt-*"), key=_number)
    with (folder / "log.txt").open("a") as log:
        for attempt in attempts:
            if (attempt / "log.txt").is_file():
                log.write((attempt / "log.txt").read_text(errors="replace"))
    for path in attempts[-1].iterdir() if attempts and keep else ():
        if path.name != "log.txt" and path.is_file():
            path.replace(folder / path.name)
    if attempts and keep:
        flush(folder)  # before the caller records the job as done: else a loss of power takes the files back
    for attempt in attempts:
        shutil.rmtree(attempt, ignore_errors=True)


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt-"))


def _next_attempt(job: Job) -> Job:
    """The job with a number that no attempt had, by whichever process: its folder takes it, before a worker knows it.
    The worker of a dead coordinator may still be writing under the one before.
    """
    if job.folder is None:
        return replace(job, attempt=job.attempt + 1)
    number = max([job.attempt, *map(_number, job.folder.glob("attempt-*"))]) + 1
    make_folder(job.folder)
    (job.folder / f"attempt-{number}").mkdir()
    return replace(job, attempt=number)
