"""The fork server of this machine's workers: how it is started, ahead of them if possible, and what they start with.

Imports the standard library alone, so that a command starts the server first, which imports torch (2 s of CPU) while
the command imports Optuna.
"""

import fcntl
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.spawn
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

NAME = "searchfm-"  # the beginning of a worker's name
SECRETS = ("MLFLOW_", "SEARCHFM_STORAGE", "SEARCHFM_UI_TOKEN", "PGPASSWORD")  # prefixes of variables that no worker has
KEYS = ("SEARCHFM_WORKER_KEY", "RAY_AUTH_TOKEN")  # that no worker has either; agents and Ray's driver need them
WARM = "searchfm.learn.warm"  # what the fork server imports before the first fork, and a spawned worker at its start
FOLDER = "searchfm-server-"  # the beginning of the name of the folder for the server's socket and temporary files
LONGEST = 60  # bytes of the path of the folder of temporary files: that of a socket has 107 at most
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that reach the whole process group

_server: Any = multiprocessing.forkserver._forkserver  # no public function returns its process, or whether it runs
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
        if forks and _server._forkserver_pid is None:
            with starting():
                multiprocessing.forkserver.ensure_running()
            _unused = True
        _commands += 1
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


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an agent."""
    return {name: value for name, value in environment.items() if not name.startswith(SECRETS)}


@contextmanager
def starting() -> Iterator[None]:
    """Processes that are started within it have no passwords in their environment, and are safe from a signal to the
    whole process group. That must reach neither the fork server, with which every worker would seem dead, nor a worker
    that is not ready for it: signals blocked here stay blocked in them.
    """
    _make_folder()
    # Other threads may read the environment meanwhile: no change where nothing inherits it.
    hidden = (*SECRETS, *KEYS) if not _runs() else ()
    secrets = {name: value for name, value in os.environ.items() if name.startswith(hidden)}
    for name in secrets:
        os.unsetenv(name)  # from what a new process inherits; `os.environ` keeps it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    try:
        # Python starts its resource tracker with the fork server, and that unblocks the others, so it comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        for name, value in secrets.items():
            os.putenv(name, value)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _runs() -> bool:
    """Whether the server runs, so that no process is started but forks of it."""
    pid = _server._forkserver_pid
    return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def replace() -> None:
    """Forgets a server that does not answer; if it lives, its workers go on. The next worker comes from another one."""
    with _server._lock:
        if _server._forkserver_pid is not None:
            os.close(_server._forkserver_alive_fd)
            os.waitpid(_server._forkserver_pid, os.WNOHANG)
            _server._forkserver_address = _server._forkserver_alive_fd = _server._forkserver_pid = None


def temporary_folder() -> str:
    """A folder for temporary files of this process and of those that it starts. It is removed at the end of the
    process; if that is killed, by the next one that makes such a folder.
    """
    _make_folder()
    return util.get_temp_dir()


def kill() -> None:
    """Kills the workers of this process and their server, for an end at once. Removes its temporary files."""
    for child in multiprocessing.active_children():
        if child.name.startswith(NAME):
            child.kill()
    if _server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(_server._forkserver_pid, signal.SIGKILL)
    if folder := _config().get("tempdir"):
        shutil.rmtree(folder, ignore_errors=True)


def _make_folder() -> None:
    """Makes the folder for temporary files, and removes those of processes that have ended.

    Python would name it pymp-*. A killed process leaves it, and nothing shows which process it belonged to. This one
    has a file that its process locks until it ends.
    """
    config = _config()
    if config.get("tempdir") is not None or sys.platform != "linux":
        return
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > LONGEST:
        root = "/tmp"
    _sweep(Path(root))
    hidden = Path(tempfile.mkdtemp(prefix=f".{FOLDER}", dir=root))
    lock = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR)  # open until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = str(hidden.rename(hidden.with_name(hidden.name.removeprefix("."))))  # only now another process looks at it
    util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
    config["tempdir"] = folder


def _config() -> dict[str, Any]:
    """What multiprocessing keeps of this process; "tempdir" is its folder of temporary files."""
    process: Any = multiprocessing.current_process()
    config: dict[str, Any] = process._config
    return config


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{FOLDER}*"):
        with suppress(OSError):  # of another user, or in use
            lock = os.open(folder / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


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
    # small mlp, two threads on two cores with a load of 3: 2.5 and 9.1 s, not 0.3 and 0.4). A short spin has half of
    # what spinning gains on idle cores. Images a second of the default of `cnn`, two threads on two cores, medians of
    # two to four: without a spin 381, with 1,000 turns 441, with gcc's 300,000 turns 486; beside a load of 1: 262, 269,
    # 158. Beside a load of 3 the small mlp took 1.15 times as long with 1,000 turns as without.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for gcc's OpenMP, which torch has on Linux
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    forks: ForkServerContext = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([warm])
    return forks
