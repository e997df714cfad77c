"""The tracking process: `python -m searchfm.tracking STUDY`, with the home in SEARCHFM_HOME. See `follow.Tracking`.

Standard input: a line once the study is begun, 1 if each trial is to be drawn at its end, else 0; then a line with the
time by which to finish, in seconds of the monotonic clock, which all processes of a machine share. Its end ends the
process. Before the first line the process only imports.
Standard output: a JSON value a line, [level, text] for a line of log, at last the number of trials not aligned.
"""

import contextlib
import gc
import json
import logging
import os
import sys
import threading
import time
from typing import Any

gc.disable()  # until all is imported: collections among so many objects take 0.5 of 3.4 s of CPU

from searchfm.home import Home  # noqa: E402
from searchfm.tracking.follow import Follower  # noqa: E402
from searchfm.tracking.mirror import load, writer  # noqa: E402

_stdout = os.fdopen(os.dup(1), "w")
_lock = threading.Lock()


class LogHandler(logging.Handler):
    """Sends log records to the coordinator, which controls the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Sends one line of log."""
        send([record.levelno, record.getMessage()])


def main() -> None:
    """Follows until it is closed."""
    logging.getLogger("searchfm").addHandler(LogHandler())
    logging.getLogger("searchfm").setLevel(logging.INFO)
    logging.getLogger("searchfm.database").setLevel(logging.ERROR)  # the coordinator waits for it too, and reports it
    home, name = Home.find(), sys.argv[1]
    follower = Follower(home, name)
    threading.Thread(target=receive, args=(follower,), daemon=True).start()
    with contextlib.suppress(Exception):  # the first pass raises it again
        load(home)
    gc.freeze()  # later collections skip what is imported: they doubled the CPU time of the first pass
    gc.enable()
    follower.begun.wait()
    with writer(home, name):
        follower.run()
        finish(follower)


def receive(follower: Follower) -> None:
    """Reads the lines, in a thread: if the coordinator is killed, the process ends even during a call."""
    if line := sys.stdin.readline():
        follower.draw = line.strip() == "1"
        follower.begun.set()
    for line in sys.stdin:
        timer = threading.Timer(max(0.0, float(line) - time.monotonic()), finish, (follower,))
        timer.daemon = True
        timer.start()
        follower.closing.set()
    os._exit(0)  # the coordinator has ended: another process may now write


def finish(follower: Follower) -> None:
    """Reports how many trials are not aligned, and ends the process."""
    if follower.passes is not None:
        send(follower.passes.left)
    os._exit(0)


def send(value: Any) -> None:
    """Sends one value to the coordinator."""
    with _lock, contextlib.suppress(BrokenPipeError):
        print(json.dumps(value), file=_stdout, flush=True)


if __name__ == "__main__":
    os.dup2(2, 1)  # what is printed must not get into the pipe
    main()
