"""The local engine: the contract, and what only it does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from searchfm import forkserver
from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine, default_workers, usable_cores
from searchfm.errors import WorldError
from searchfm.forkserver import ahead
from searchfm.jobs import Finished, Lost
from tests.engines.contract import EngineContract, end, events, job, result

pytestmark = pytest.mark.usefixtures("own_forkserver")


class TestLocalEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[LocalEngine]:
        with closing(LocalEngine(["cpu", "cpu"], warm="tests.toys")) as engine:
            yield engine

    @pytest.fixture
    def single(self) -> Iterator[LocalEngine]:
        with closing(LocalEngine(["cpu"], warm="tests.toys")) as engine:
            yield engine


def test_an_engine_grows_and_shrinks() -> None:
    engine = LocalEngine(["cpu", "cpu"], warm="tests.toys")
    engine.resize(["cpu"] * 3)
    assert engine.free == 3
    for name in "123":
        engine.submit(job(name, sleeps=0.2))
    pids = {result(event)["pid"] for event in events(engine, 3)}
    assert len(pids) == 3
    engine.resize(["cpu"])
    assert engine.free == 1
    engine.submit(job())
    assert result(end(engine))["pid"] in pids  # the one that stays is warm
    engine.resize([])
    assert (engine.free, engine.busy) == (0, False)
    engine.close()


@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_password_reaches_a_worker_and_the_coordinator_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Nor the fork server, be it started with a worker or, which imports torch, ahead."""
    secret = (
        *("SEARCHFM_STORAGE", "SEARCHFM_WORKER_KEY", "SEARCHFM_UI_TOKEN", "PGPASSWORD", "RAY_AUTH_TOKEN"),
        *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"),
    )
    for name in secret:
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("HF_HOME", "kept")
    forkserver._server._stop()
    try:
        with ahead("local") if early else nullcontext(), closing(LocalEngine(["cpu"], warm="tests.toys")) as engine:
            engine.submit(job())
            worker = psutil.Process(result(end(engine))["pid"])
            assert worker.environ()["HF_HOME"] == "kept"
            server = worker.parent()
            assert server is not None
            assert server.pid == forkserver._server._forkserver_pid
            for process in (worker, server):
                assert b"sesame" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        forkserver._server._stop()  # its environment is that of this test
    inherited = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert {f"{name}=sesame" for name in secret} <= set(inherited.splitlines())


@pytest.mark.slow(seconds=2)
def test_a_worker_that_hangs_is_ended_and_its_job_lost_but_not_before_its_first_tick() -> None:
    engine = LocalEngine(["cpu"], warm="tests.toys")
    engine.submit(replace(job("loads", sleeps=1.2), hang_seconds=0.5))  # no tick yet: data may take long
    assert isinstance(end(engine), Finished)
    engine.submit(replace(job("hangs", ticks_for=0.1, sleeps=60), hang_seconds=0.5))
    assert end(engine, 15) == Lost("hangs", 1, "its worker died (hung for 0.5 seconds)")
    engine.submit(job("next"))
    assert isinstance(end(engine), Finished)
    engine.close()


@contextmanager
def killing_servers(times: int) -> Iterator[list[int]]:
    """Kills the fork server while a worker starts, so many times: it is stopped, so that it cannot answer before. Gives
    the process ids of those that were killed.
    """
    over, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not over.is_set() and len(killed) < times:
            pid = forkserver._server._forkserver_pid
            if pid is not None and pid not in killed:
                server = psutil.Process(pid)
                server.suspend()
                time.sleep(1.0)  # the start waits for its answer by then
                server.kill()
                killed.append(pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_a_fork_server_that_is_killed_while_a_worker_starts_is_replaced_once() -> None:
    with closing(LocalEngine(["cpu"], warm="tests.toys")) as engine, killing_servers(1) as killed:
        engine.submit(job())
        assert isinstance(end(engine), Finished)
    assert len(killed) == 1
    assert forkserver._server._forkserver_pid not in killed


def test_a_fork_server_that_is_killed_again_is_one_line() -> None:
    with closing(LocalEngine(["cpu"], warm="tests.late")) as engine:
        with (
            killing_servers(2) as killed,
            pytest.raises(WorldError, match=r"^no worker can be started: the process that forks them was killed twice"),
        ):
            engine.submit(job())
        assert len(killed) == 2
        assert engine.free == 1
    with closing(LocalEngine(["cpu"], warm="tests.toys")) as engine:
        engine.submit(job())
        assert isinstance(end(engine), Finished)


@pytest.mark.slow
def test_a_worker_that_ticks_is_not_stopped() -> None:
    engine = LocalEngine(["cpu"], warm="tests.toys")
    engine.submit(replace(job(ticks_for=5.0), hang_seconds=3.0))  # heartbeats come every second
    assert isinstance(end(engine), Finished)
    engine.close()


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from searchfm.engines import EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.jobs import Job, Interrupted

def main():
    engine = LocalEngine(["cpu", "cpu"], warm=sys.argv[1])
    {body}

if __name__ == "__main__":
    main()
"""


def script(tmp_path: Path, body: str, *arguments: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(body=body.strip().replace("\n", "\n    ")))
    return [sys.executable, str(path), *arguments]


@pytest.mark.slow
def test_workers_stop_when_their_coordinator_is_killed(tmp_path: Path) -> None:
    body = """
engine.submit(Job("1", Path(sys.argv[2], "1"), "tests.toys:work", {"ticks_for": 600}, attempt=1))
engine.submit(Job("2", Path(sys.argv[2], "2"), "tests.toys:work", {"sleeps": 1}, attempt=1))
while not Path(sys.argv[2], "1", "attempt-1", "tick").exists():
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen(script(tmp_path, body, "tests.toys", str(tmp_path)), stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # the forkserver and two workers; the resource tracker too
        process.kill()
    _, alive = psutil.wait_procs(family, 20)
    assert not alive


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_the_coordinator_to_decide(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C, or a service manager: the forkserver lives on, and workers leave by themselves or are asked to."""
    body = """
signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
engine.submit(Job("1", Path(sys.argv[2]), "tests.toys:work", {"ticks_for": 600}, attempt=1))
while not Path(sys.argv[2], "attempt-1", "tick").exists():
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(0.5)
engine.stop("1")
event = None
while event is None:
    event = engine.next_event(0.2)
print(event, flush=True)
for attempt in range(1, 9):
    engine.submit(Job("2", None, "tests.toys:work", {}, attempt=attempt))
    event = None
    while event is None:
        event = engine.next_event(0.2)
    if not isinstance(event, Interrupted):  # the stopped worker had taken it
        break
print(type(event).__name__, flush=True)
engine.close()
"""
    command = script(tmp_path, body, "tests.toys", str(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, how)
        assert process.stdout.readline() == "Interrupted(job='1', attempt=1)\n"
        assert process.stdout.readline() == "Finished\n"
    assert process.returncode == 0


def test_ten_jobs_cost_one_import(tmp_path: Path) -> None:
    body = """
found, pids, busy = [], set(), 0
for number in range(10):
    engine.submit(Job(str(number), None, "tests.toys:imports", {}, attempt=1))
    event = None
    while event is None:
        event = engine.next_event(1.0)
    found.append(event.result["imports"])
    if number == 4:
        os.kill(event.result["pid"], signal.SIGKILL)  # a worker that is replaced costs none either
        time.sleep(0.2)
        engine.next_event(0.1)
engine.close()
print(found)
"""
    heavy = tmp_path / "heavy"
    command = script(tmp_path, body, "tests.heavy")
    done = subprocess.run(command, env={**os.environ, "HEAVY": str(heavy)}, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"{[1] * 10}\n", done.stderr
    assert "tests.heavy" not in sys.modules


def test_as_many_workers_as_usable_cores_at_most() -> None:
    assert 1 <= default_workers() <= usable_cores() <= (os.cpu_count() or 1)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == default_workers() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_workers_are_pinned_and_packed_by_the_memory_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up list of devices: the toys only report theirs."""
    monkeypatch.setattr("searchfm.engines.local.usable_cores", lambda: 8)
    options = EngineOptions.from_table({"workers_per_gpu": "auto"})
    with closing(LocalEngine(warm="tests.toys", options=options)) as engine:
        assert engine.expand({"cuda": 2, "mps": 0}) == ["cuda:0", "cuda:1"]
        assert engine.pack(0.3) == "2 workers a GPU: a trial took 30% of its memory, 25% is kept free"
        assert engine.pack(0.1) == "", "once"
        for name in "1234":
            engine.submit(job(name, sleeps=0.2))
        assert sorted(result(event)["device"] for event in events(engine, 4)) == ["cuda:0"] * 2 + ["cuda:1"] * 2
    with closing(LocalEngine(warm="tests.toys", options=options)) as engine:
        engine.expand({"cuda": 1, "mps": 0})
        assert engine.pack(0.01).startswith("8 workers a GPU"), "no more than cores"
