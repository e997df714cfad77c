"""Runs many studies by searchfm's commands, some side by side, for hours; a signal stops all, to be resumed."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import platformdirs

from searchfm.home import HOME

T = TypeVar("T")


class SideBySide:
    """Commands in one home, at most `jobs` at a time."""

    def __init__(self, name: str, jobs: int) -> None:
        """name: of the home, in the user's cache folder."""
        self.home = Path(platformdirs.user_cache_dir("searchfm-bench")) / name
        self.jobs = jobs
        self.stopped = threading.Event()
        self._starting = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        os.environ[HOME] = str(self.home)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def call(self, *arguments: str) -> bool:
        """Runs a command of searchfm, which prints to stderr; whether it did its work. None begins after a stop."""
        with self._starting:
            if self.stopped.is_set():
                return False
            command = [sys.executable, "-m", "searchfm", *arguments]
            process = subprocess.Popen(command, stdout=sys.stderr, process_group=0)  # Ctrl-C goes through `_stop`
            self._processes.add(process)
        code = process.wait()
        self._processes.discard(process)
        return code == 0

    def map(self, work: Callable[[T], bool], entries: Sequence[T]) -> list[bool]:
        """Whether the work of each entry was done."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(work, entries))

    def _stop(self, *_: object) -> None:
        """A command that is stopped writes its checkpoints."""
        self.stopped.set()
        for process in list(self._processes):
            process.terminate()

    def end(self, done: Sequence[bool]) -> None:
        """Exits with an error where not all is done."""
        if self.stopped.is_set():
            sys.exit("stopped; the same command resumes")
        if not all(done):
            sys.exit("a study failed; see above")
