"""Follows a search into MLflow from a thread, in the tracker's own process.

The calls only change, under a lock, what the thread is to bring about; the thread works on whatever is not in line yet,
one run at a time. MLflow being down or slow delays the runs and nothing else: it is tried again, less and less often,
and what is still missing at the end is left to `searchfm sync`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from searchfm.home import Home
from searchfm.job import Epoch
from searchfm.search.history import StudyRow, TrialRow
from searchfm.search.notes import Notes
from searchfm.tracking.client import shown
from searchfm.tracking.mirror import Mirror

log = logging.getLogger(__name__)

EPOCHS_SECONDS = 1.0  # between two writes to a running trial's run: several epochs go in one call
STUDY_SECONDS = 5.0  # between two writes to the study's own run
FIRST_DELAY, MOST_DELAY = 0.5, 30.0  # seconds between two attempts while MLflow does not answer
CLOSING_DELAY = 1.0  # the same, once a search is over and somebody waits
GIVE_UP_SECONDS = 10.0  # that somebody waits for an MLflow that does not answer
REFUSALS = 3  # a run that MLflow refuses so often, while it takes others, is left to `searchfm sync`


@dataclass(frozen=True)
class Work:
    """One thing to do, for a trial or (None) for the study; `undo` puts it back on the list, under the lock."""

    number: int | None
    act: Callable[[], None]
    undo: Callable[[], object]


class Follower:
    """What `Tracker` says in the coordinator's process is done here. Every call but `close` returns at once."""

    def __init__(self, home: Home, study: StudyRow) -> None:
        self._address = shown(home.tracking_uri)
        self._mirror, self._notes = Mirror(home, study), Notes(home, study)
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._study = study
        self._rows = {row.number: row for row in study.trials}
        self._due: dict[int, float] = {}  # trials not in line yet, and when to bring them there (monotonic seconds)
        self._study_due: float | None = 0.0
        self._compare = False  # all trials are to be looked at
        self._keep: tuple[TrialRow, ...] | None = None
        self._closing = self._stop = self._busy = False
        # The thread's own:
        self._refused: dict[int | None, int] = {}
        self._down = self._mute = False
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    # --- the caller's side --------------------------------------------------------------------------------------------

    def started(self, row: TrialRow) -> None:
        """A trial began, or goes on."""
        self._put(row)

    def epoch(self, number: int, epoch: Epoch) -> None:
        """A trial has trained an epoch. Several go to MLflow in one call."""
        with self._wake:
            row = self._rows[number]
            self._rows[number] = replace(row, epochs=(*row.epochs, epoch))
            self._due.setdefault(number, time.monotonic() + EPOCHS_SECONDS)
            self._wake.notify_all()

    def ended(self, row: TrialRow) -> None:
        """A trial has ended, as its row says."""
        self._put(row)

    def reconcile(self, study: StudyRow) -> None:
        """Whatever MLflow lacks or has otherwise is sent again."""
        with self._wake:
            self._study = study
            self._rows |= {row.number: row for row in study.trials}
            self._compare = True
            self._wake.notify_all()

    def keep(self, rows: Sequence[TrialRow]) -> None:
        """Exactly these trials' weights stay in MLflow."""
        with self._wake:
            self._keep = tuple(rows)
            self._wake.notify_all()

    def close(self, study: StudyRow, timeout: float) -> int:
        """Brings the study's own run in line, and waits at most `timeout` seconds for all that is still under way.

        Returns how many trials are not in line: 0 unless MLflow was away or refused some; then `searchfm sync` helps.
        """
        with self._wake:
            self._study = study
            self._rows = {row.number: row for row in study.trials}
            self._closing, self._study_due = True, 0.0
            self._due = dict.fromkeys(self._due, 0.0)
            self._wake.notify_all()
            end = time.monotonic() + timeout
            while not self._settled and self._thread.is_alive() and (rest := end - time.monotonic()) > 0:
                slept = not self._wake.wait_for(lambda: self._settled, min(rest, GIVE_UP_SECONDS))
                if slept and self._down:
                    break
            left = len(self._due) or int(not self._settled)
            self._stop = True
            self._wake.notify_all()
        self._thread.join(1.0)  # it may be in the middle of a call: it is a daemon, and does not hold us up
        return left + sum(count >= REFUSALS for count in self._refused.values())

    def _put(self, row: TrialRow) -> None:
        with self._wake:
            self._rows[row.number] = row
            self._due[row.number] = 0.0
            self._study_due = self._study_due or time.monotonic() + STUDY_SECONDS
            self._wake.notify_all()

    @property
    def _settled(self) -> bool:
        return not self._busy and not self._due and self._study_due is None and not self._compare and self._keep is None

    # --- the thread's side --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay = FIRST_DELAY
        while (work := self._next()) is not None:
            opened = False
            try:
                self._mirror.open()
                opened = True
                work.act()
            except Exception as error:
                self._mirror.forget()
                with self._wake:
                    work.undo()
                if work.number is not None and opened and not _away(error):
                    self._refuse(work.number, error)
                    continue
                if not self._down:
                    log.warning(
                        "MLflow at %s does not answer (%s); trials go on, and their runs follow when it does",
                        self._address,
                        type(error).__name__,
                    )
                self._down = True
                self._rest(delay)
                delay = min(2 * delay, CLOSING_DELAY if self._closing else MOST_DELAY)
            else:
                if self._down:
                    log.info("MLflow at %s answers again", self._address)
                self._down, delay = False, FIRST_DELAY
                self._refused.pop(work.number, None)

    def _rest(self, seconds: float) -> None:
        """Lets MLflow be for so long, or until somebody waits for us."""
        with self._wake:
            before = self._closing
            self._wake.wait_for(lambda: self._stop or self._closing != before, seconds)

    def _next(self) -> Work | None:
        """Waits for the next thing to do; None when it is time to stop."""
        with self._wake:
            self._busy = False
            while not self._stop:
                now = time.monotonic()
                work = self._pick(now)
                if work is not None:
                    self._busy = True
                    return work
                self._wake.notify_all()  # all that is due is done
                waits = [due - now for due in (*self._due.values(), self._study_due) if due is not None]
                self._wake.wait(max(min(waits), 0.0) if waits else None)
        return None

    def _pick(self, now: float) -> Work | None:
        """What is due, taken off the list."""
        if self._compare:
            self._compare, everyone = False, tuple(self._rows.values())
            return Work(None, lambda: self._compare_all(everyone), lambda: setattr(self, "_compare", True))
        number = min(self._due, key=self._due.__getitem__, default=None)  # what failed has gone to the end
        if number is not None and self._due[number] <= now:
            del self._due[number]
            row, again = self._rows[number], number
            return Work(number, lambda: self._align(row), lambda: self._due.setdefault(again, time.monotonic()))
        if self._keep is not None:
            best, self._keep = self._keep, None
            return Work(None, lambda: self._mirror.keep(best), lambda: setattr(self, "_keep", self._keep or best))
        if self._study_due is not None and self._study_due <= now:
            self._study_due = None
            study = replace(self._study, trials=tuple(self._rows[each] for each in sorted(self._rows)))
            status = ("KILLED" if study.of("running") else "FINISHED") if self._closing else "RUNNING"
            return Work(None, lambda: self._align_study(study, status), lambda: setattr(self, "_study_due", 0.0))
        return None

    def _align(self, row: TrialRow) -> None:
        self._mirror.align(row)
        if row.state != "running":
            self._note(lambda: self._notes.trial(row, self._mirror.links()))

    def _align_study(self, study: StudyRow, status: str) -> None:
        self._mirror.align_study(study, status)
        self._note(lambda: self._notes.study(study, self._mirror.links()))

    def _note(self, write: Callable[[], None]) -> None:
        """The dashboard's notes and pictures are the least of all: without them everything else goes on."""
        try:
            write()
        except Exception as error:
            if not self._mute:
                log.warning("optuna-dashboard gets no notes for now (%s)", type(error).__name__)
            self._mute = True

    def _compare_all(self, rows: Sequence[TrialRow]) -> None:
        different = [row.number for row in rows if self._mirror.compare(row)]
        different += [row.number for row in rows if row.state != "running" and not self._notes.has(row)]
        with self._wake:
            for number in different:
                self._due.setdefault(number, 0.0)

    def _refuse(self, number: int, error: Exception) -> None:
        """MLflow answers, but not for this trial: it is tried again, but not for ever."""
        self._refused[number] = count = self._refused.get(number, 0) + 1
        if count >= REFUSALS:
            log.warning("trial %d: MLflow refuses its run (%s); see searchfm sync", number, type(error).__name__)
            with self._wake:
                self._due.pop(number, None)


def _away(error: Exception) -> bool:
    """Whether MLflow (or what is before it) is out of reach, rather than of another opinion."""
    code = getattr(error, "error_code", None)
    return code is None or code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "IO_ERROR")
