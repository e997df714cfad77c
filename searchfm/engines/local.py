"""The local engine: warm worker processes on this machine, forked from a server that has imported torch once.

Importing torch costs seconds and a small trial a tenth of one, so workers are forked from a clean forkserver and live
as long as the search. Where there is no fork (macOS, whose frameworks do not survive one) workers are spawned, and each
pays for its own imports.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from searchfm.engines.worker import LEFT, STOP, work
from searchfm.jobs import EpochDone, Event, Job, Left, Lost

WORKER_BYTES = 1_500_000_000  # what a worker on a CPU may come to, torch, data and a small model together
WARM = "searchfm.learn.warm"  # what the forkserver imports before the first fork, and a spawned worker at its start


@dataclass
class _Worker:
    device: str
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    stopping: bool = False  # we have asked its job to leave
    silent: float | None = None  # seconds since the job's last tick; None before its first


class LocalEngine:
    """Worker processes on this machine, one for each device name given ("cpu", "cuda:0" ...).

    A worker starts with its first job. One whose job has ticked, and then does not for `patience` seconds, hangs: it
    is ended, and its job is lost.
    """

    def __init__(self, devices: Sequence[str], warm: str = WARM, patience: float = 600.0) -> None:
        self._context, self._warm = _context(warm), warm
        self._patience = patience
        self._workers: list[_Worker] = []  # those who spoke last stand last, so that all are heard
        self._devices = list(devices)

    @property
    def free(self) -> int:
        """Workers that could take a job now."""
        return len(self._idle_devices())

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or its end not yet read."""
        return any(worker.job for worker in self._workers)

    def resize(self, devices: Sequence[str]) -> None:
        """One worker for each device named; those that are no longer wanted end, those that are stay warm."""
        self._devices = list(devices)
        wanted = list(devices)
        for worker in list(self._workers):
            if worker.device in wanted:
                wanted.remove(worker.device)
            else:
                assert worker.job is None, "a worker is taken away only between jobs"
                self._end(worker)

    def submit(self, job: Job) -> None:
        """Gives the job to a free worker, which is warm if one is."""
        warm = [worker for worker in self._workers if worker.job is None]
        worker = warm[0] if warm else self._start(self._idle_devices()[0])
        worker.job, worker.stopping, worker.silent = job, False, None
        # A worker that died idle is noticed at the next event, and its job is lost and given again.
        with suppress(OSError):
            worker.pipe.send(job)

    def stop(self, job: str) -> None:
        """Asks the job to leave at its next batch; its end still comes as an event."""
        for worker in self._workers:
            if worker.job is not None and worker.job.id == job:
                worker.stopping = True
                with suppress(OSError):
                    worker.pipe.send((STOP, job, worker.job.attempt))

    def next_event(self, timeout: float) -> Event | None:
        """The next thing that happened, or None after `timeout` seconds (or less) without any.

        One message is read at a time: a worker is not free before its job's end has been handed out.
        """
        began = time.monotonic()
        ready = wait([end for w in self._workers for end in (w.pipe, w.process.sentinel)], timeout)
        # Time in which this process itself did not run (a closed lid, Ctrl-Z) is not the workers' silence.
        waited = min(time.monotonic() - began, timeout)
        for worker in self._workers:
            if worker.pipe in ready or worker.process.sentinel in ready:
                return self._hear(worker)
            if worker.silent is not None and worker.job is not None:
                worker.silent += waited
                if worker.silent > self._patience:
                    worker.process.kill()
                    return self._bury(worker, f"hung for {self._patience:g} seconds")
        return None

    def close(self) -> None:
        """Ends all workers, at once and whatever they do."""
        for worker in list(self._workers):
            self._end(worker)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid or 0 for worker in self._workers]

    def _idle_devices(self) -> list[str]:
        idle = list(self._devices)
        for worker in self._workers:
            if worker.job is not None:
                idle.remove(worker.device)
        return idle

    def _hear(self, worker: _Worker) -> Event | None:
        """Reads one message: what a worker said before it died comes before its death."""
        self._workers.remove(worker)
        self._workers.append(worker)
        try:
            message: Event | None = worker.pipe.recv() if worker.pipe.poll() else self._bury(worker)
        except (EOFError, OSError):
            return self._bury(worker)
        worker.silent = 0.0
        if message is None or isinstance(message, EpochDone):
            return message
        worker.job = None
        if isinstance(message, Left) and not worker.stopping:
            self._end(worker)  # somebody else told it to go (SIGTERM); it takes no further job
        return message

    def _bury(self, worker: _Worker, how: str | None = None) -> Left | Lost | None:
        """A dead worker's job is lost; another worker takes its place when there is something to do."""
        worker.process.join(5)
        code = worker.process.exitcode
        self._end(worker)
        if worker.job is None:
            return None
        if code == LEFT:
            return Left(worker.job.id, worker.job.attempt)
        if how is None:
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return Lost(worker.job.id, worker.job.attempt, f"its worker died ({how})")

    def _start(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(theirs, device, self._warm), name=f"searchfm-{device}", daemon=True
        )
        # A signal to the whole process group must reach neither the forkserver, with which every worker would seem
        # dead, nor a worker that is not ready for it: what is blocked here stays blocked in them. (Python starts its
        # resource tracker with the forkserver, and that start unblocks both signals, so it comes first.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        worker = _Worker(device, process, ours)
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join(10)
        with suppress(ValueError):
            worker.process.close()


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def default_workers() -> int:
    """Workers on a CPU: one a usable core, as far as the free memory goes."""
    return max(1, min(usable_cores(), int(psutil.virtual_memory().available // WORKER_BYTES)))


def _context(warm: str) -> ForkServerContext | SpawnContext:
    # One thread a worker: two workers of one thread beat one of two, and are far less fragile.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([warm])
    return context
