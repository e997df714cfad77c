"""Commands that are stopped leave in time, and leave nothing behind: real signals, processes and terminals."""

import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from searchfm.forkserver import FOLDER
from searchfm.home import TRACKING, Home
from searchfm.search.storage import open_storage, read_study
from tests.programs import worker_port
from tests.serving import Server

pytestmark = pytest.mark.slow(seconds=14)

TUNE = ("tune", "mlp", "--dataset", "digits", "--trials", "2", "--workers", "2", "--set", "search.pruner=none")
LONG = ("--epochs", "400")
HANGS = 60.0  # seconds after which a command that does not leave is killed, and the test fails
LEAVES = 14.0  # seconds in which a command leaves: after nine it is killed, and these cores are busy
ENDS = 5.0  # seconds in which a second signal ends it: fewer than the six that workers have after a first one


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder of temporary files of the commands. Its path is short: it holds a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def home(new_home: Callable[[Path], Home], tmp_path: Path) -> Home:
    return new_home(tmp_path / "home")


@contextmanager
def tuning(home: Home, temporary: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A search whose workers are in the middle of training. What still runs at the end is killed."""
    with (home.path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "searchfm", *TUNE, *LONG, "--home", str(home.path)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(temporary), **environment},
            preexec_fn=default_signals,
        )
    family: list[psutil.Process] = []
    try:
        while len(list(home.study("mlp").glob("[0-9]*/epochs.csv"))) < 2:
            assert process.poll() is None, (home.path / "errors").read_text()
            time.sleep(0.02)
        family += psutil.Process(process.pid).children(recursive=True)
        yield process
        _, alive = psutil.wait_procs(family, 20)
        assert not alive, [each.cmdline() for each in alive]
    finally:
        process.kill()  # nothing if it has ended
        process.wait()
        for each in family:
            if each.is_running():
                each.kill()


def default_signals() -> None:
    """A job in the background of a script is started with these ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def workers(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # another one that has just ended
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                return child.children()
    raise AssertionError("no fork server")


def check_leaves(process: "subprocess.Popen[bytes]", number: signal.Signals, seconds: float = LEAVES) -> None:
    """Sends a signal: the command ends within so many seconds, with the exit code of that signal."""
    began = time.monotonic()
    process.send_signal(number)
    process.wait(HANGS)
    assert time.monotonic() - began < seconds
    assert process.returncode == 128 + number


def lost(home: Home) -> int:
    """Attempts that were charged to trials."""
    storage = open_storage(home)
    number = storage.get_study_id_from_name("mlp")
    return sum(trial.user_attrs.get("lost", 0) for trial in storage.get_all_trials(number))


def folders(temporary: Path) -> set[str]:
    """What lies in the folder of temporary files."""
    return {re.sub(r"[-_.].*", "", path.name) for path in temporary.iterdir()}


def test_a_worker_that_reaches_no_batchs_end_is_killed_and_its_trial_not_charged(home: Home, temporary: Path) -> None:
    with tuning(home, temporary) as process:
        for worker in workers(process):
            worker.suspend()
        check_leaves(process, signal.SIGINT)
    assert folders(temporary) == set()
    assert {trial.state for trial in read_study(home, "mlp").trials} == {"running"}
    assert lost(home) == 0


def test_a_server_that_does_not_answer_is_not_waited_for(
    new_home: Callable[[Path], Home], home: Home, temporary: Path, tmp_path: Path
) -> None:
    """MLflow gets what is left of eight seconds, not 60."""
    server = Server(new_home(tmp_path / "server").path, worker_port(5500))
    server.start()
    try:
        with tuning(home, temporary, **{TRACKING: f"http://127.0.0.1:{server.port}"}) as process:
            os.killpg(server.process.pid, signal.SIGSTOP)
            check_leaves(process, signal.SIGTERM)
    finally:
        server.kill()


def test_what_hangs_while_a_command_leaves_is_killed(home: Home, temporary: Path) -> None:
    """Here the database: another process holds its lock."""
    with tuning(home, temporary) as process, closing(sqlite3.connect(home.path / "optuna.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_leaves(process, signal.SIGTERM)
    assert folders(temporary) == set()


def test_a_second_signal_ends_the_command_and_its_workers_at_once(home: Home, temporary: Path) -> None:
    with tuning(home, temporary) as process:
        suspended = workers(process)
        for worker in suspended:
            worker.suspend()
        process.terminate()
        while "stopping" not in (home.path / "errors").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        check_leaves(process, signal.SIGTERM, ENDS)
        _, alive = psutil.wait_procs(suspended, ENDS)
        assert not alive
    assert folders(temporary) == set()


def test_a_second_sighup_is_none(home: Home, temporary: Path) -> None:
    """A terminal that is closed sends two: workers still have their six seconds."""
    with tuning(home, temporary) as process:
        for worker in workers(process):
            worker.suspend()
        began = time.monotonic()
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.1)
        process.wait(HANGS)
        assert time.monotonic() - began > 5
        assert process.returncode == 128 + signal.SIGHUP


def test_the_folder_of_a_killed_run_is_removed_by_the_next_one(home: Home, temporary: Path) -> None:
    with tuning(home, temporary) as process:
        process.kill()
        process.wait(HANGS)
    (left,) = temporary.iterdir()
    assert left.name.startswith(FOLDER)
    with tuning(home, temporary) as process:
        while left.exists() or not (used := list(temporary.glob(f"{FOLDER}*"))):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        process.wait(HANGS)
    assert not used[0].exists()


def test_a_terminal_that_is_closed_stops_the_search(home: Home, temporary: Path) -> None:
    """As the end of an ssh connection does: SIGHUP to the whole group, and output that cannot be written."""
    pid, terminal = pty.fork()
    if not pid:
        default_signals()
        command = [sys.executable, "-m", "searchfm", *TUNE, *LONG, "--home", str(home.path)]
        os.execve(sys.executable, command, {**os.environ, "TMPDIR": str(temporary), "TERM": "xterm"})
    process = psutil.Process(pid)
    try:
        os.set_blocking(terminal, False)
        while len(list(home.study("mlp").glob("[0-9]*/epochs.csv"))) < 2:
            with suppress(BlockingIOError):
                os.read(terminal, 1 << 16)
            time.sleep(0.02)
        family = process.children(recursive=True)
    finally:
        os.close(terminal)
    try:
        assert process.wait(LEAVES) == 128 + signal.SIGHUP
        _, alive = psutil.wait_procs(family, 20)
        assert not alive
    finally:
        for each in (process, *family):
            if each.is_running():
                each.kill()
    assert folders(temporary) == set()
    assert {trial.state for trial in read_study(home, "mlp").trials} == {"running"}
    assert lost(home) == 0


@pytest.mark.parametrize("module", ["typer", "sqlalchemy.orm", "optuna.samplers", "torch.nn"])
def test_ctrl_c_during_an_import_shows_no_traceback(module: str, home: Home) -> None:
    """Python prints each module that it has imported; the signal comes after this one."""
    arguments = ("predict", "mlp", "x.png") if module.startswith("torch") else ("status",)
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "searchfm", *arguments, "--home", str(home.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == module:
            break
    else:
        raise AssertionError(f"{module} was not imported")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    printed = [line for line in (out + err).splitlines() if line and not line.startswith("import time:")]
    assert not printed
    assert process.returncode in (130, -signal.SIGINT)
