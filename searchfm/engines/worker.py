"""The loop inside a worker: receive a job, call its entry, send events, obey stop.

A worker has no database, no tracker and no password: its input comes through its pipe, its output goes through the pipe
or into its job's folder. When the other end of the pipe closes, it stops at its next batch.
"""

import gc
import importlib
import logging
import os
import pkgutil
import signal
import sys
import time
import traceback
from contextlib import closing, suppress
from functools import partial
from multiprocessing.connection import Connection

from searchfm.errors import SearchfmError, Stopped, first_line
from searchfm.forkserver import SIGNALS
from searchfm.jobs import Context, EpochDone, Event, Failed, Finished, Interrupted, Job

STOP = "stop"
LEFT = os.EX_TEMPFAIL  # exit code of a worker that was terminated: a job that was on its way to it is not charged
HEARTBEAT_SECONDS = 1.0  # between two heartbeats
IDLE_SECONDS = 0.5  # within which an idle worker that was terminated exits


class Heartbeat:
    """Sends heartbeats of the worker's job, and stops the job where it, or the worker, must stop."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.terminated, self.last_heartbeat = pipe, False, 0.0

    def terminate(self, *_: object) -> None:
        """The handler of SIGTERM."""
        self.terminated = True

    def tick(self, job: Job) -> None:
        """Raises Stopped if the job must stop."""
        if self.terminated:
            raise Stopped
        try:
            while self.pipe.poll():
                if self.pipe.recv() == (STOP, job.id, job.attempt):
                    raise Stopped
            if time.monotonic() > self.last_heartbeat + HEARTBEAT_SECONDS:
                self.pipe.send(None)
                self.last_heartbeat = time.monotonic()
        except (EOFError, OSError):
            raise Stopped from None


def work(pipe: Connection, device: str, warm: str, allow_code: bool = False) -> None:
    """Runs jobs until the pipe closes or the process is terminated. Runs in the worker's own process."""
    heartbeat = Heartbeat(pipe)
    for number in (signal.SIGINT, signal.SIGHUP):  # these reach the whole group; the coordinator decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heartbeat.terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `forkserver.starting`
    with suppress(ImportError):  # the entry's own import says what is missing
        importlib.import_module(warm)  # done already in a fork; a spawned worker needs its settings too
    while not heartbeat.terminated:
        try:
            # The handler cannot end a wait, and an exception from it could lose a job or the event of its end.
            if not pipe.poll(IDLE_SECONDS):
                continue
            job = pipe.recv()
            if not isinstance(job, Job):
                continue  # a stop that came after its job's end
            heartbeat.last_heartbeat = 0.0  # the first tick sends one: from then on the job must not hang
            folder = job.folder / f"attempt-{job.attempt}" if job.folder else None
            paths = [folder.with_name(f"attempt-{n}") for n in range(job.attempt - 1, 0, -1)] if folder else []
            earlier = tuple(path for path in paths if path.is_dir())
            context = Context(folder, earlier, device, partial(heartbeat.tick, job), allow_code)
            pipe.send(_run(job, context, pipe))
        except (EOFError, OSError):
            return
        gc.collect()  # what a trial held (on a GPU above all) must not weigh on the next
    sys.exit(LEFT)


def _run(job: Job, context: Context, pipe: Connection) -> Event:
    """Calls the entry, sends each epoch as it comes, and returns the event that ends the job."""
    log = logging.getLogger("searchfm")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler: logging.Handler = logging.NullHandler()
    logging.captureWarnings(True)
    if context.folder is not None:
        context.folder.mkdir(parents=True, exist_ok=True)
        handler = file = logging.FileHandler(context.folder / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        assert file.stream is not None
        # What libraries print belongs to the job too, and never on the coordinator's terminal.
        for descriptor in (1, 2):
            os.dup2(file.stream.fileno(), descriptor)
    log.handlers = logging.getLogger("py.warnings").handlers = [handler]
    try:
        entry = pkgutil.resolve_name(job.entry)
        with closing(entry(job.payload, context)) as epochs:  # closed, it writes its checkpoint
            while True:
                try:
                    epoch = next(epochs)
                except StopIteration as end:
                    return Finished(job.id, job.attempt, end.value)
                try:
                    pipe.send(EpochDone(job.id, job.attempt, epoch))
                except OSError:
                    raise Stopped from None
                context.tick()
    except Stopped:
        return Interrupted(job.id, job.attempt)
    except (Exception, SystemExit) as error:
        if not isinstance(error, SearchfmError):
            log.error("%s", traceback.format_exc())
        text = first_line(error)
        reason = text if isinstance(error, SearchfmError) else f"{type(error).__name__}: {text}"
        return Failed(job.id, job.attempt, type(error).__name__, reason[:500])
    finally:
        handler.close()
        log.handlers = logging.getLogger("py.warnings").handlers = [logging.NullHandler()]
        sys.stdout.flush()
        sys.stderr.flush()
