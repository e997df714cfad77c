"""Follows a search into MLflow without anybody waiting for it: a thread that talks to a process of its own.

The process (`python -m searchfm.tracking`) does the work. In a thread of the coordinator's the same work, some 300 ms
of Python a trial, would hold the interpreter's lock whenever the coordinator wants to decide something: measured, its
decisions took four times as long. The process runs at low priority, leaves the cores to training, and ends with us,
however we end.
"""

import contextlib
import logging
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from searchfm.home import Home
from searchfm.job import Epoch
from searchfm.search.history import StudyRow, TrialRow

log = logging.getLogger(__name__)


class NullTracker:
    """Follows nothing."""

    def started(self, row: TrialRow) -> None:
        """Nothing."""

    def epoch(self, number: int, epoch: Epoch) -> None:
        """Nothing."""

    def ended(self, row: TrialRow) -> None:
        """Nothing."""

    def reconcile(self, study: StudyRow) -> None:
        """Nothing."""

    def keep(self, rows: Sequence[TrialRow]) -> None:
        """Nothing."""

    def close(self, study: StudyRow, timeout: float) -> int:
        """Nothing is ever missing."""
        return 0


class Tracker:
    """Every call but `close` returns at once. One instance a search, used by the one thread of its coordinator."""

    def __init__(self, home: Home, study: StudyRow) -> None:
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._left: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended = 0
        threading.Thread(target=self._run, args=(home, study), name="tracker", daemon=True).start()

    def started(self, row: TrialRow) -> None:
        """A trial began, or goes on."""
        self._calls.put(("started", (row,)))

    def epoch(self, number: int, epoch: Epoch) -> None:
        """A trial has trained an epoch; call `started` first. Several epochs go to MLflow in one call."""
        self._calls.put(("epoch", (number, epoch)))

    def ended(self, row: TrialRow) -> None:
        """A trial has ended, as its row says."""
        self._ended += 1
        self._calls.put(("ended", (row,)))

    def reconcile(self, study: StudyRow) -> None:
        """Whatever MLflow lacks or has otherwise is sent again."""
        self._calls.put(("reconcile", (study,)))

    def keep(self, rows: Sequence[TrialRow]) -> None:
        """Exactly these trials' weights stay in MLflow."""
        self._calls.put(("keep", (tuple(rows),)))

    def close(self, study: StudyRow, timeout: float) -> int:
        """Brings the study's own run in line, and waits at most `timeout` seconds for all that is still under way.

        Returns how many trials are not in line: 0 unless MLflow was away or refused some; then `searchfm sync` helps.
        """
        self._calls.put(("close", (study, time.time() + timeout)))
        self._calls.put(None)
        try:
            return self._left.get(timeout=timeout + 1.0)
        except queue.Empty:
            return max(self._ended, 1)

    def _run(self, home: Home, study: StudyRow) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "searchfm.tracking"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the coordinator, which then closes us in order
            )
            assert process.stdin is not None
            threading.Thread(target=self._listen, args=(process,), name="tracker-log", daemon=True).start()
            call: Any = (home, study)
            while call is not None:
                pickle.dump(call, process.stdin)
                process.stdin.flush()
                call = self._calls.get()
        except OSError as error:
            log.warning("nobody follows into MLflow (%s); `searchfm sync` brings what is missing", error.strerror)
            self._left.put(max(self._ended, 1))

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Passes on what the process says, and lets it go once it has said how much is left."""
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdout, contextlib.suppress(EOFError, pickle.UnpicklingError):
            while not isinstance(said := pickle.load(process.stdout), int):
                level, text = said
                log.log(level, text)
            self._left.put(said)
            process.stdin.close()  # which is its leave to go
        process.wait()
