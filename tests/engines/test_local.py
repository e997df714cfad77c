"""What every engine promises, on real processes, and what only the local one does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.engines import Engine
from searchfm.engines.local import LocalEngine, default_workers, usable_cores
from searchfm.jobs import EpochDone, Event, Failed, Finished, Interrupted, Job, Lost

pytestmark = pytest.mark.usefixtures("own_forkserver")


def job(name: str = "1", folder: Path | None = None, attempt: int = 1, **payload: Any) -> Job:
    return Job(name, folder, "tests.toys:work", payload, attempt=attempt)


def events(engine: Engine, count: int, seconds: float = 30.0) -> list[Event]:
    """The next events, so many of them."""
    events: list[Event] = []
    until = time.monotonic() + seconds
    while len(events) < count:
        assert time.monotonic() < until, events
        event = engine.next_event(0.2)
        if event is not None:
            events.append(event)
    return events


def end(engine: Engine, seconds: float = 30.0) -> Event:
    (event,) = events(engine, 1, seconds)
    return event


def result(event: Event) -> Any:
    assert isinstance(event, Finished), event
    return event.result


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


class EngineContract:
    """What the coordinator relies on. A subclass says how its engine is made, and how to reach a worker's process."""

    def make(self, devices: Sequence[str]) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def engine(self) -> Iterator[Any]:
        engine = self.make(["cpu", "cpu"])
        yield engine
        engine.close()

    def test_a_job_runs_in_another_process_with_its_payload_and_device(self, engine: Any) -> None:
        engine.submit(job())
        answer = result(end(engine))
        assert answer["pid"] != os.getpid()
        assert answer["device"] == "cpu"

    def test_epochs_come_in_order_and_the_end_comes_last(self, engine: Any) -> None:
        engine.submit(job(epochs=50))
        *epochs, last = events(engine, 51)
        assert [event.epoch.index for event in epochs] == list(range(1, 51))
        assert isinstance(last, Finished)
        assert {(event.job, event.attempt) for event in [*epochs, last]} == {("1", 1)}

    def test_a_worker_is_not_free_before_the_end_of_its_job_was_handed_out(self, engine: Any) -> None:
        engine.submit(job("1", epochs=3))
        engine.submit(job("2", sleeps=0.3))
        assert engine.free == 0
        time.sleep(0.2)  # all of the first job's news wait by now
        for _ in range(3):
            assert isinstance(end(engine), EpochDone)
            assert engine.free == 0
        assert end(engine).job == "1"
        assert (engine.free, engine.busy) == (1, True)
        assert end(engine).job == "2"
        assert (engine.free, engine.busy) == (2, False)
        assert engine.next_event(0.0) is None

    def test_one_worker_does_many_jobs_and_keeps_what_it_has_loaded(self, engine: Any) -> None:
        engine.resize(["cpu"])
        answers = []
        for _ in range(4):
            engine.submit(job())
            answers.append(result(end(engine)))
        assert len({one["pid"] for one in answers}) == 1
        assert [one["jobs"] for one in answers] == [1, 2, 3, 4]

    def test_workers_work_at_the_same_time(self, engine: Any) -> None:
        for name in ("1", "2"):
            engine.submit(job(name, sleeps=0.5))
        began = time.monotonic()
        assert len({result(event)["pid"] for event in events(engine, 2)}) == 2
        assert time.monotonic() - began < 30

    def test_a_stopped_job_leaves_at_its_next_tick_and_the_other_goes_on(self, engine: Any) -> None:
        engine.submit(job("1", ticks_for=60))
        engine.submit(job("2", sleeps=0.5))
        engine.stop("1")
        assert end(engine, 15) == Interrupted("1", 1)
        assert engine.free == 1
        assert result(end(engine))["pid"]
        engine.submit(job("3"))
        assert result(end(engine))["jobs"] <= 2  # the worker that was told to stop is as good as before

    def test_a_stop_that_comes_too_late_does_not_stop_the_next_job(self, engine: Any) -> None:
        engine.resize(["cpu"])
        engine.submit(job("1", sleeps=0.3))
        engine.stop("1")
        assert isinstance(end(engine), Finished)
        engine.stop("1")
        engine.submit(job("2", ticks_for=0.1))
        assert isinstance(end(engine), Finished)

    @pytest.mark.parametrize(
        ("raises", "kind", "reason"),
        [
            (["ValueError", "one\ntwo"], "ValueError", "ValueError: one"),
            (["ValueError"], "ValueError", "ValueError: ValueError"),
            (["DataError", "no such folder"], "DataError", "no such folder"),
            (["ModelError", "no such model"], "ModelError", "no such model"),
            (["ConfigError", "model.vit.heads", "= 3: no"], "ConfigError", "model.vit.heads = 3: no"),
            (["DivergedError", "loss is nan"], "DivergedError", "loss is nan"),
            (["SystemExit", "bye"], "SystemExit", "SystemExit: bye"),
        ],
    )
    def test_what_a_job_raises_comes_back_as_kind_and_one_line(
        self, engine: Any, raises: list[str], kind: str, reason: str
    ) -> None:
        engine.submit(job(raises=raises))
        assert end(engine) == Failed("1", 1, kind, reason)
        engine.submit(job("2"))
        assert result(end(engine))["jobs"] == 1  # by whichever worker, and it works

    def test_a_killed_worker_loses_its_job_and_another_does_the_next(self, engine: Any) -> None:
        engine.resize(["cpu"])
        engine.submit(job("1", epochs=1, dies=signal.SIGKILL))
        epoch, lost = events(engine, 2)
        assert isinstance(epoch, EpochDone)  # what it said before it died
        assert lost == Lost("1", 1, "its worker died (signal SIGKILL)")
        assert engine.free == 1
        engine.submit(job("1", attempt=2))
        assert end(engine).attempt == 2

    def test_a_worker_killed_while_idle_is_replaced(self, engine: Any) -> None:
        engine.resize(["cpu"])
        engine.submit(job("1"))
        pid = result(end(engine))["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        while engine.next_event(0.2) is not None:
            pass
        engine.submit(job("2"))
        assert result(end(engine))["pid"] != pid

    def test_a_stopped_worker_hands_its_job_back_and_another_does_the_next(self, engine: Any, tmp_path: Path) -> None:
        engine.resize(["cpu"])
        engine.submit(job("0"))
        pid = result(end(engine))["pid"]
        engine.submit(job("1", tmp_path, ticks_for=60))
        wait_until((tmp_path / "attempt-1" / "tick").exists)
        os.kill(pid, signal.SIGTERM)
        assert end(engine, 15) == Interrupted("1", 1)
        engine.submit(job("2"))
        assert result(end(engine))["pid"] != pid

    def test_attempts_write_apart_and_know_the_earlier_ones(self, engine: Any, tmp_path: Path) -> None:
        for attempt in (1, 2, 4):
            engine.submit(job("1", tmp_path, attempt))
            answer = result(end(engine))
        assert answer["earlier"] == ["attempt-2", "attempt-1"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt-1", "attempt-2", "attempt-4"]

    def test_what_a_job_and_its_libraries_print_lands_in_its_log(
        self, engine: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        engine.resize(["cpu"])
        for name in ("first", "second"):
            engine.submit(job(name, tmp_path / name, says=f"hello {name}"))
            end(engine)
        for name, other in (("first", "second"), ("second", "first")):
            log = (tmp_path / name / "attempt-1" / "log.txt").read_text()
            for line in (f"hello {name}\n", f"hello {name} from a child\n", f"hello {name} as an error\n"):
                assert line in log
            assert other not in log
        assert "hello" not in "".join(capfd.readouterr())

    def test_the_traceback_of_a_bug_is_in_the_log_and_that_of_a_known_error_is_not(
        self, engine: Any, tmp_path: Path
    ) -> None:
        engine.submit(job("bug", tmp_path / "bug", raises=["ValueError", "a bug"]))
        engine.submit(job("known", tmp_path / "known", raises=["DivergedError", "loss is nan"]))
        events(engine, 2)
        assert "Traceback" in (tmp_path / "bug" / "attempt-1" / "log.txt").read_text()
        assert "Traceback" not in (tmp_path / "known" / "attempt-1" / "log.txt").read_text()

    def test_an_engine_grows_and_shrinks(self, engine: Any) -> None:
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

    def test_closing_ends_all_workers_whatever_they_do(self, engine: Any) -> None:
        engine.submit(job("1"))
        pids = {result(end(engine))["pid"]}
        engine.submit(job("2", sleeps=60))
        engine.submit(job("3", ticks_for=60))
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 10
        assert not any(psutil.pid_exists(pid) for pid in pids)


class TestLocalEngine(EngineContract):
    def make(self, devices: Sequence[str]) -> LocalEngine:
        return LocalEngine(devices, warm="tests.toys")


def test_a_worker_that_hangs_is_ended_and_its_job_lost_but_not_before_its_first_tick() -> None:
    engine = LocalEngine(["cpu"], warm="tests.toys", timeout=0.5)
    engine.submit(job("loads", sleeps=1.2))  # no tick yet: data may take as long as they take
    assert isinstance(end(engine), Finished)
    engine.submit(job("hangs", ticks_for=0.1, sleeps=60))
    assert end(engine, 15) == Lost("hangs", 1, "its worker died (hung for 0.5 seconds)")
    engine.submit(job("next"))
    assert isinstance(end(engine), Finished)
    engine.close()


def test_a_worker_that_ticks_is_not_stopped() -> None:
    engine = LocalEngine(["cpu"], warm="tests.toys", timeout=8.0)  # heartbeats come every second
    engine.submit(job(ticks_for=2.5))
    engine._timeout = 2.0
    assert isinstance(end(engine), Finished)
    engine.close()


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
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
    done = subprocess.run(command, env={**os.environ, "HEAVY": str(heavy)}, capture_output=True, text=True, timeout=60)
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
