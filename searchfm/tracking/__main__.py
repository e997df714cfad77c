"""The tracker's own process: reads a tracker's calls from standard input, and ends when that does.

Calls come pickled from our own coordinator, over a pipe that it alone holds.
"""

import contextlib
import logging
import os
import pickle
import sys
import threading
import time
from typing import Any

from filelock import FileLock

from searchfm.search.history import StudyRow
from searchfm.tracking.follower import Follower


class _Voice(logging.Handler):
    """What we log is said by the coordinator, which knows what the terminal shows."""

    def emit(self, record: logging.LogRecord) -> None:
        _say((record.levelno, record.getMessage()))


def main() -> None:
    """Follows until the pipe breaks."""
    with contextlib.suppress(OSError):
        os.nice(5)  # training goes first
    home, study = _heard()
    study.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("searchfm").addHandler(_Voice())
    logging.getLogger("searchfm").setLevel(logging.INFO)
    # A coordinator that was killed may have left such a process in the middle of something: never two at once.
    with FileLock(study.folder / ".tracking.lock"):
        follower = Follower(home, study)
        while True:
            name, arguments = _heard()
            if name == "close":
                # In a thread: should the coordinator be killed meanwhile, the pipe tells us even so.
                threading.Thread(target=_close, args=(follower, *arguments), daemon=True).start()
            else:
                getattr(follower, name)(*arguments)


def _close(follower: Follower, study: StudyRow, deadline: float) -> None:
    _say(follower.close(study, max(0.0, deadline - time.time())))


def _heard() -> Any:
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)  # the coordinator is gone, and with it the right to write


_lock = threading.Lock()
_mouth = os.fdopen(os.dup(1), "wb")


def _say(something: Any) -> None:
    with _lock, contextlib.suppress(BrokenPipeError):
        pickle.dump(something, _mouth)
        _mouth.flush()


if __name__ == "__main__":
    os.dup2(2, 1)  # whatever prints must not print into the pipe
    main()
