"""Following a study into MLflow: passes that align MLflow, and the process that makes one about every second.

The process (`python -m searchfm.tracking STUDY`) reads Optuna's storage and the trials' folders. MLflow being down or
slow delays its passes and nothing else; what MLflow still lacks at the end is left to `searchfm sync`, one more pass.
"""

import contextlib
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy
from filelock import Timeout
from optuna.storages import BaseStorage

from searchfm import forkserver
from searchfm.home import HOME, Home, shown
from searchfm.records import StudyRecord, Trial
from searchfm.search.lock import holder
from searchfm.search.notes import Notes
from searchfm.search.storage import load_study, open_storage, read_study
from searchfm.tracking.mirror import Difference, Mirror, reaching, study_content, trial_content, writer

log = logging.getLogger("searchfm")

NICE = 5  # of the process: training goes first
PASS_SECONDS = 1.0  # between two passes: several epochs go in one call
STUDY_SECONDS = 5.0  # between two writes to the study's own run
FIRST_DELAY, MAX_DELAY = 0.5, 30.0  # seconds between two attempts while MLflow does not answer
CLOSING_DELAY = 1.0  # the same, once a search is over and the coordinator waits
GIVE_UP_SECONDS = 10.0  # until the coordinator stops waiting for MLflow if it does not answer
REFUSALS = 3  # a run that MLflow refuses so often, while it takes others, is left to `searchfm sync`
# MLflow's error codes while it, or what is before it, is out of reach.
UNREACHABLE = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "IO_ERROR")


class Tracking:
    """The tracking process, as the coordinator sees it: starts with this object. For one search and one thread.

    A process, since the same work in a thread, some 300 ms of Python a trial, would hold the interpreter's lock when
    the coordinator decides: measured, its decisions took four times as long. It runs at low priority, since
    training has precedence, and ends when the coordinator ends, even if that is killed. Until `begin` it only imports.
    """

    def __init__(self, home: Home, name: str) -> None:
        self._home, self._name = home, name
        self._left: int | None = None  # trials that are not aligned; None: unknown
        self._sent: list[str] = []  # lines, which a process that replaces another gets too
        self._ended = False  # by `end`
        self._lock = threading.Lock()  # of the process, and of what it was sent
        self._process = self._start()
        self._relay = threading.Thread(target=self._relay_log, name="tracking", daemon=True)
        self._relay.start()

    def _start(self) -> "subprocess.Popen[bytes] | None":
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "searchfm.tracking", self._name],
                # MLflow makes temporary folders, which a process that is killed leaves.
                env={**os.environ, HOME: str(self._home.path), "TMPDIR": forkserver.temporary_folder()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the coordinator, which then closes the process in order
            )
        except OSError as error:
            log.warning("MLflow is not followed (%s); later: searchfm sync %s --apply", error.strerror, self._name)
            return None
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        return process

    def begin(self, *, draw: bool = True) -> None:
        """Begins to follow the study, which exists. draw: see `Passes`."""
        self._send(f"{draw:d}")

    def close(self, seconds: float) -> int:
        """Lets the process finish within this many seconds, then ends it.

        Returns how many trials are not aligned: 0 unless MLflow was unreachable or refused some.
        """
        self._send(f"{time.monotonic() + seconds:f}")
        self._relay.join(seconds + 1.0)
        self.end()
        return len(read_study(self._home, self._name).trials) if self._left is None else self._left

    def end(self) -> None:
        """Ends the process, if it has not ended: it has written nothing before `begin`, and later what it leaves half
        done is found again.
        """
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()
        self._relay.join()

    def _send(self, line: str) -> None:
        with self._lock:
            self._sent.append(line)
            self._write([line])

    def _write(self, lines: Sequence[str]) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # it has died
                self._process.stdin.write("".join(f"{line}\n" for line in lines).encode())
                self._process.stdin.flush()

    def _relay_log(self) -> None:
        """Logs what the process reports, until it ends. The first one that dies is replaced."""
        for last in (False, True):
            process = self._process
            if process is None:
                return
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    match json.loads(line):
                        case int(left):
                            self._left = left
                        case [int(level), str(text)]:
                            log.log(level, "%s", text)
            status = process.wait()
            with self._lock:
                self._process = None
                with contextlib.suppress(OSError):  # what it did not read
                    process.stdin.close()
                if status == 0 or self._ended:
                    return
                if not last:
                    log.warning("the process that follows into MLflow has died; another one starts")
                    self._process = self._start()
                    self._write(self._sent)
        log.warning("the process that follows into MLflow has died again; later: searchfm sync %s --apply", self._name)


class Passes:
    """Aligns MLflow with a study, pass by pass; what is aligned is not read again.

    deep, send: see `Mirror`; a deep pass raises every error. draw: each trial at its end; else only the trials whose
    weights are kept are drawn, in the last pass. A deep pass that sends draws all that lack pictures, at last.
    """

    def __init__(
        self, home: Home, study: StudyRecord, *, deep: bool = False, send: bool = True, draw: bool = True
    ) -> None:
        self._study, self._draw_each = study, draw and not deep
        self._mirror = Mirror(home, study, send=send, deep=deep)
        self._notes: Notes | None = None  # opened at the first note
        self._aligned: dict[int, Trial] = {}
        self._states: tuple[Any, ...] = ()  # of the study and its trials when the study's own run was aligned
        self._study_due = 0.0  # monotonic seconds
        self._failures: Counter[int] = Counter()
        self._refusals: Counter[int] = Counter()
        self._notes_failed = self._drawing_failed = self._complete = False

    @property
    def left(self) -> int:
        """How many trials are not aligned; at least 1 while weights or the study's own run are not."""
        return len(self._due()) or int(not self._complete)

    @property
    def settled(self) -> bool:
        """Whether nothing is left but runs that MLflow refuses."""
        return self._complete and all(self._refusals[trial.number] >= REFUSALS for trial in self._due())

    def run(self, study: StudyRecord, status: str | None, *, last: bool = False) -> list[Difference]:
        """One pass: trials, weights, the study's own run, and with each its note of optuna-dashboard.

        status: of the study's own run, None to leave it as it is; last: align that run now, not every few seconds.
        Raises what MLflow raises when it does not answer.
        """
        self._study, self._complete = study, False
        try:
            differences = self._mirror.open()
            # Trials that failed go last: they must not block the others.
            for trial in sorted(self._due(), key=lambda trial: self._failures[trial.number]):
                if self._refusals[trial.number] < REFUSALS:
                    differences += self._align_trial(trial)
            differences += self._mirror.align_weights(study.kept)
            states = (status, [trial.state for trial in study.trials])
            if self._states != states and (last or time.monotonic() >= self._study_due):
                differences += self._mirror.align(study_content(study, status))
                self._note(lambda notes: notes.study(study, self._mirror.links()))
                self._states, self._study_due = states, time.monotonic() + STUDY_SECONDS
            if self._mirror.send and (last or self._mirror.deep):
                self.add_pictures(study.trials if self._mirror.deep else study.kept)
        except Exception:
            self._mirror.forget()
            raise
        self._complete = True
        return differences

    def add_pictures(self, trials: Sequence[Trial], going: Callable[[], bool] = lambda: True) -> None:
        """Draws the pictures that trials lack, and adds them to their runs and notes, while `going`."""
        self._mirror.open()
        for trial in trials:
            if not going():
                return
            if (names := trial.undrawn) and self._draw(trial):
                self._mirror.add_pictures(trial, names)
                self._note_trial(trial, again=True)

    def _draw(self, trial: Trial) -> bool:
        """Draws a trial into its folder. Everything else goes on without pictures."""
        from searchfm import figures  # and with it matplotlib

        try:
            figures.draw(trial, self._study.data.classes)
        except Exception as error:
            if self._mirror.deep:
                raise
            if not self._drawing_failed:
                log.warning("trial %d cannot be drawn (%s)", trial.number, type(error).__name__)
            self._drawing_failed = True
            return False
        return True

    def _due(self) -> list[Trial]:
        """The trials that are not aligned. One without a config was begun by 0.3.0, and is of no worker."""
        trials = [trial for trial in self._study.trials if trial.config or trial.state != "running"]
        return [trial for trial in trials if self._aligned.get(trial.number) != trial]

    def _align_trial(self, trial: Trial) -> list[Difference]:
        run, undrawn = self._mirror.active(trial.number), self._draw_each and bool(trial.undrawn)
        ended = run is not None and run.status != "RUNNING"  # by an earlier search: it is trusted to have its files
        if undrawn and not ended:
            self._draw(trial)
        try:
            differences = self._mirror.align(trial_content(self._study, trial, self._mirror.parent))
            if undrawn and ended:
                self.add_pictures([trial])
        except Exception as error:
            self._failures[trial.number] += 1
            if self._mirror.deep or _is_unreachable(error):
                raise
            self._refusals[trial.number] += 1
            if self._refusals[trial.number] == REFUSALS:
                text = "trial %d: MLflow refuses its run (%s); see searchfm sync"
                log.warning(text, trial.number, type(error).__name__)
            self._mirror.forget()
            self._mirror.open()
            return []
        self._aligned[trial.number] = trial
        if trial.state != "running":
            self._note_trial(trial, again=bool(differences))
        return differences

    def _note_trial(self, trial: Trial, *, again: bool) -> None:
        self._note(lambda notes: notes.trial(trial, self._mirror.links(), again=again))

    def _note(self, write: Callable[[Notes], None]) -> None:
        """Writes a note of optuna-dashboard. Notes come last: without them everything else goes on."""
        try:
            if self._mirror.send:
                self._notes = self._notes or Notes(self._mirror.home, self._study)
                write(self._notes)
        except Exception as error:
            if not self._notes_failed:
                log.warning("optuna-dashboard gets no notes for now (%s)", type(error).__name__)
            self._notes_failed = True


def sync(home: Home, study: StudyRecord, *, apply: bool = False) -> list[Difference]:
    """One pass over everything: what differs in MLflow, and with `apply` (hold the study's lock) is aligned.

    Raises StorageError.
    """
    status = "FINISHED" if study.trials and not study.of("running") else None
    with reaching(home), writer(home, study.name) if apply else contextlib.nullcontext():
        return Passes(home, study, deep=True, send=apply).run(study, status, last=True)


def draw_missing(home: Home, study: StudyRecord, going: Callable[[], bool] = lambda: True) -> None:
    """Draws the pictures that the study's trials lack, and sends them, trial by trial: while `going`, no other process
    writes the study into MLflow, and no process searches or retrains it. Raises StorageError.
    """

    def free() -> bool:
        return going() and holder(home, study.name) is None

    if study.undrawn and free():
        with contextlib.suppress(Timeout), writer(home, study.name).acquire(timeout=0), reaching(home):
            Passes(home, study).add_pictures(study.undrawn, free)


class Follower:
    """The work of the tracking process: a pass about every second, until it is closed. `run` is for one thread.

    draw: see `Passes`; it is set before `begun`, and that once the study exists.
    """

    def __init__(self, home: Home, name: str) -> None:
        self.begun, self.closing, self.draw = threading.Event(), threading.Event(), True
        self._home, self._name = home, name
        self._storage: BaseStorage | None = None
        self._ended: dict[int, Trial] = {}
        self.passes: Passes | None = None  # None until the study is read
        self._unreachable = ""  # the database or server that does not answer

    def run(self) -> None:
        """Returns after `closing`, once everything is aligned or MLflow does not answer."""
        delay = FIRST_DELAY
        closed: float | None = None  # since when, in monotonic seconds
        failed: float | None = None
        while True:
            closing = self.closing.is_set()  # before the study is read: the last pass sees all of it
            done, now = self._pass(closing), time.monotonic()
            closed = closed or (now if closing else None)
            failed = None if done else failed or now
            if closed and failed and now - max(closed, failed) >= GIVE_UP_SECONDS:
                return
            if closed and done and self.passes is not None and self.passes.settled:
                return
            pause, delay = (PASS_SECONDS, FIRST_DELAY) if done else (delay, min(2 * delay, MAX_DELAY))
            if closing:
                time.sleep(min(pause, CLOSING_DELAY))
            else:
                self.closing.wait(pause)

    def _pass(self, closing: bool) -> bool:
        """One pass; logs when the first of several fails, and when one succeeds again. Returns whether it succeeded."""
        subject = f"the database of study {self._name!r}"
        try:
            study = self._read()
            subject = f"MLflow at {shown(self._home.tracking_uri)}"
            status = "RUNNING" if not closing else "KILLED" if study.of("running") else "FINISHED"
            self.passes = self.passes or Passes(self._home, study, draw=self.draw)
            self.passes.run(study, status, last=closing)
        except Exception as error:
            if self._unreachable != subject:
                text = "%s does not answer (%s); trials go on, and their runs follow when it does"
                log.warning(text, subject, type(error).__name__)
            self._unreachable = subject
            return False
        if self._unreachable:
            log.info("%s answers again", self._unreachable)
        self._unreachable = ""
        return True

    def _read(self) -> StudyRecord:
        """The study as it is now; trials that were read after their end are not read again."""
        self._storage = self._storage or open_storage(self._home, stopping=self.closing.is_set)
        study = load_study(self._storage, self._home, self._name, self._ended)
        self._ended = {trial.number: trial for trial in study.trials if trial.state != "running"}
        return study


def _is_unreachable(error: Exception) -> bool:
    """Whether MLflow (or what is before it) is out of reach, and not refusing."""
    code = getattr(error, "error_code", None)
    return code in UNREACHABLE if code else isinstance(error, OSError | sqlite3.Error | sqlalchemy.exc.SQLAlchemyError)
