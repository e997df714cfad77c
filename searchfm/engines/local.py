"""The local engine: warm worker processes on this machine, forked from a server that has imported torch once.

Importing torch costs seconds and a small trial a tenth of one, so workers are forked from a clean forkserver and live
as long as the search. Where there is no fork (macOS, whose frameworks do not survive one) workers are spawned, and each
pays for its own imports.
"""

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from searchfm import forkserver
from searchfm.engines import DEFAULTS, EngineOptions
from searchfm.engines.worker import LEFT, STOP, work
from searchfm.errors import UserError, WorldError
from searchfm.inputs import free_memory
from searchfm.jobs import EpochDone, Event, Interrupted, Job, Lost

WORKER_BYTES = 1_500_000_000  # of a worker on a CPU: torch, data and a small model together
HEADROOM = 0.25  # fraction of a GPU's memory that packed workers leave free: other configs may take more


@dataclass
class _Worker:
    device: str
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    stopping: bool = False  # its job was asked to stop
    silence: float | None = None  # seconds since the job's last message; None before its first


class LocalEngine:
    """An `Engine` of worker processes on this machine, one for each device name ("cpu", "cuda:0" ...).

    A worker starts with its first job. A job that stops ticking for its `hang_seconds` is lost, its worker killed.
    options: which devices `expand` takes. wake: connections that also end a wait for events, when they can be read.
    """

    def __init__(
        self,
        devices: Sequence[str] = ("cpu",),
        warm: str = forkserver.WARM,
        options: EngineOptions = DEFAULTS,
        wake: Sequence[Connection] = (),
    ) -> None:
        self._context, self._warm = forkserver.context(warm), warm
        self._options, self._wake = options, list(wake)
        self._workers: list[_Worker] = []  # the last to send is last, so that messages of all are received
        self._devices = list(devices)

    @property
    def free(self) -> int:
        """Workers that can receive a job now."""
        return len(self._idle_devices())

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or its end not yet read."""
        return any(worker.job for worker in self._workers)

    def expand(self, accelerators: Mapping[str, int]) -> Sequence[str]:
        """One worker for each device that the options choose. Raises UserError for a device that is not there."""
        self.resize(choose_devices(self._options, accelerators))
        return self._devices

    def each(self, job: Job) -> None:
        """Nothing: this machine is the only node."""

    def pack(self, memory: float) -> str:
        """More workers a GPU, as far as its memory and the cores go."""
        gpus = list(dict.fromkeys(device for device in self._devices if device.startswith("cuda")))
        if self._options.workers_per_gpu != "auto" or not gpus:
            return ""
        number = max(1, min(int((1 - HEADROOM) / memory), usable_cores() // len(gpus)))
        self._options = replace(self._options, workers_per_gpu=number)
        self.resize(sorted(self._devices + gpus * (number - 1), key=gpus.index))
        return f"{number} workers a GPU: a trial took {memory:.0%} of its memory, {HEADROOM:.0%} is kept free"

    def resize(self, devices: Sequence[str]) -> None:
        """One worker for each device named; idle workers of other devices end, the rest stay warm."""
        self._devices = list(devices)
        unused = list(devices)
        for worker in list(self._workers):
            if worker.device in unused:
                unused.remove(worker.device)
            else:
                assert worker.job is None, "a worker is removed only between jobs"
                self._end(worker)

    def submit(self, job: Job) -> None:
        """Sends the job to an idle worker, else to a new one."""
        idle = next((worker for worker in self._workers if worker.job is None), None)
        worker = idle or self._start(self._idle_devices()[0])
        worker.job, worker.stopping, worker.silence = job, False, None
        # A worker that died idle is noticed at the next event, and its job is lost and submitted again.
        with suppress(OSError):
            worker.pipe.send(job)

    def stop(self, job: str) -> None:
        """Sends a stop, which the worker reads at its next tick."""
        for worker in self._workers:
            if worker.job is not None and worker.job.id == job:
                worker.stopping = True
                with suppress(OSError):
                    worker.pipe.send((STOP, job, worker.job.attempt))

    def next_event(self, timeout: float) -> Event | None:
        """Reads one message at most: a worker is not free before its job's end has been returned."""
        began = time.monotonic()
        ready = wait([*self._wake, *(end for w in self._workers for end in (w.pipe, w.process.sentinel))], timeout)
        # Time in which this process itself did not run (a closed lid, Ctrl-Z) is not the workers' silence.
        waited = min(time.monotonic() - began, timeout)
        for worker in self._workers:
            if worker.pipe in ready or worker.process.sentinel in ready:
                return self._receive(worker)
            if worker.silence is not None and worker.job is not None:
                worker.silence += waited
                if worker.silence > worker.job.hang_seconds:
                    worker.process.kill()
                    return self._reap(worker, f"hung for {worker.job.hang_seconds:g} seconds")
        return None

    def close(self) -> None:
        """Kills all workers."""
        for worker in list(self._workers):
            self._end(worker)

    def _idle_devices(self) -> list[str]:
        idle = list(self._devices)
        for worker in self._workers:
            if worker.job is not None:
                idle.remove(worker.device)
        return idle

    def _receive(self, worker: _Worker) -> Event | None:
        """Reads one message: what a worker sent before it died comes before its death."""
        self._workers.remove(worker)
        self._workers.append(worker)
        try:
            if not worker.pipe.poll():
                return self._reap(worker)
            message: Event | None = worker.pipe.recv()
        except (EOFError, OSError):
            return self._reap(worker)
        worker.silence = 0.0
        if message is None or isinstance(message, EpochDone):
            return message
        worker.job = None
        if isinstance(message, Interrupted) and not worker.stopping:
            self._end(worker)  # another process stopped it (SIGTERM); it runs no further job
        return message

    def _reap(self, worker: _Worker, how: str | None = None) -> Interrupted | Lost | None:
        """Ends a dead worker, whose job is lost. The next job starts another."""
        worker.process.join(5)
        code = worker.process.exitcode
        self._end(worker)
        if worker.job is None:
            return None
        if code == LEFT:
            return Interrupted(worker.job.id, worker.job.attempt)
        if how is None:
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            if code == -signal.SIGKILL:  # another process or the kernel sent it
                how += ": the memory may have run out"
        return Lost(worker.job.id, worker.job.attempt, f"its worker died ({how})")

    def _start(self, device: str) -> _Worker:
        """A new worker. Replaces the fork server once if it dies meanwhile. Raises WorldError."""
        for _ in range(2):
            try:
                return self._fork(device)
            except (EOFError, ConnectionError, FileNotFoundError):  # its socket's file is gone
                forkserver.replace()
            except OSError as error:
                raise WorldError(f"no worker can be started: {error.strerror}") from None
        raise WorldError(
            "no worker can be started: the process that forks them was killed twice; run the same command again"
        )

    def _fork(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work,
            args=(theirs, device, self._warm, self._options.allow_code),
            name=f"{forkserver.NAME}{device}",
            daemon=True,
        )
        forkserver.used()
        try:
            with forkserver.starting():
                process.start()
        finally:
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


def choose_devices(options: EngineOptions, accelerators: Mapping[str, int]) -> list[str]:
    """A device for each worker. accelerators: their numbers, {"cuda": 2, "mps": 0}. Raises UserError."""
    gpus, device, workers = [f"cuda:{i}" for i in range(accelerators["cuda"])], options.device, options.workers
    choices = {"cpu": ["cpu"] * (workers or default_workers())}
    if gpus:
        choices |= {"cuda": gpus} | {name: [name] for name in gpus}
    if accelerators["mps"]:
        choices["mps"] = ["mps"]
    chosen = ("cuda" if gpus else "mps" if accelerators["mps"] else "cpu") if device == "auto" else device
    if chosen not in choices:
        raise UserError(f"--device {device}: torch finds no such device here; may be auto, {', '.join(choices)}")
    names = choices[chosen]
    if options.workers_per_gpu != 1 and not chosen.startswith("cuda"):
        raise UserError(f"--workers-per-gpu {options.workers_per_gpu}: the device is {chosen}, must be a GPU")
    if options.workers_per_gpu != "auto":
        names = names * options.workers_per_gpu
    return [names[i % len(names)] for i in range(workers or len(names))]


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def default_workers() -> int:
    """Workers on a CPU: one per usable core, as far as the free memory goes."""
    return max(1, min(usable_cores(), free_memory() // WORKER_BYTES))
