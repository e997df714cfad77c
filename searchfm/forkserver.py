"""The fork server of this machine's workers: how it is started, ahead of them if possible, and what they start with.

Imports the standard library alone, so that a command starts the server first, which imports torch (2 s of CPU) while
the command imports Optuna.
"""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.spawn
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

NAME = "searchfm-"  # the beginning of a worker's name
WARM = "searchfm.learn.warm"  # what the fork server imports before the first fork, and a spawned worker at its start

_server: Any = multiprocessing.forkserver._forkserver  # the module tells neither its process nor whether it runs
_lock = threading.Lock()
_commands = 0  # that are within `ahead`
_unused = False  # whether the server was started by `ahead`, and no worker has been forked from it since


@contextmanager
def ahead(engine: str) -> Iterator[None]:
    """Starts the server for the local engine, so that it imports torch during the body. At the end of the body it is
    killed if no worker was forked from it: it would else outlive a command that is refused until torch is imported.

    engine: its name. Does nothing for others, and where workers are spawned.
    """
    global _commands, _unused
    forks = engine == "local" and isinstance(context(), ForkServerContext)
    with _lock:
        _commands += 1
        if forks and _server._forkserver_pid is None:
            with signals_blocked():
                multiprocessing.forkserver.ensure_running()
            _unused = True
    try:
        yield
    finally:
        with _lock:
            _commands -= 1
            if _unused and not _commands and _server._forkserver_pid is not None:
                os.kill(_server._forkserver_pid, signal.SIGKILL)
                _server._stop()  # reaps it, so that a later search starts another
                _unused = False


def used() -> None:
    """Call before a worker is started: from then on the server stays, warm for further searches of this process."""
    global _unused
    with _lock:
        _unused = False


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Starts of processes within it are safe from a signal to the whole process group, which must reach neither the
    fork server, with which every worker would seem dead, nor a worker that is not ready for it: signals blocked here
    stay blocked in them.
    """
    # Python starts its resource tracker with the fork server, and that start unblocks both signals, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_preparation_data = multiprocessing.spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    """What multiprocessing sends ahead to a new process. Not `__main__`, which it would run again in each of our
    workers: a script that calls `tune` outside of `if __name__ == "__main__"` would start a search in every worker.
    """
    data: dict[str, Any] = _preparation_data(name)
    if name.startswith(NAME):
        for key in ("init_main_from_name", "init_main_from_path"):
            data.pop(key, None)
    return data


multiprocessing.spawn.get_preparation_data = _without_main  # there is no setting for it


def context(warm: str = WARM) -> ForkServerContext | SpawnContext:
    """How workers are started; `warm`: the module that they start with."""
    # One thread a worker: two workers of one thread beat one of two, and are far less fragile.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # The final training has several. On busy cores, threads that spin while they wait made it 5 to 25 times as slow (a
    # small mlp, two threads on two cores with a load of 3: 2.5 and 9.1 s, not 0.3 and 0.4).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    forks: ForkServerContext = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([warm])
    return forks
