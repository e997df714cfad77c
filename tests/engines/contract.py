"""What every engine promises, on real processes. A subclass says how its engine is made."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.engines import Engine
from searchfm.jobs import EpochDone, Event, Failed, Finished, Interrupted, Job, Lost

WORK = "tests.toys:work"


def job(name: str = "1", folder: Path | None = None, attempt: int = 1, **payload: Any) -> Job:
    return Job(name, folder, WORK, payload, attempt=attempt)


def events(engine: Engine, count: int, seconds: float = 60.0) -> list[Event]:
    """The next events, so many of them."""
    events: list[Event] = []
    until = time.monotonic() + seconds
    while len(events) < count:
        assert time.monotonic() < until, events
        event = engine.next_event(0.2)
        if event is not None:
            events.append(event)
    return events


def end(engine: Engine, seconds: float = 60.0) -> Event:
    (event,) = events(engine, 1, seconds)
    return event


def result(event: Event) -> Any:
    assert isinstance(event, Finished), event
    return event.result


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:  # on busy cores a process starts slowly
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


RAISED: list[tuple[list[str], str, str]] = [  # the error and its arguments, its kind and its line
    (["ValueError", "one\ntwo"], "ValueError", "ValueError: one"),
    (["ValueError"], "ValueError", "ValueError: ValueError"),
    (["DataError", "no such folder"], "DataError", "no such folder"),
    (["ModelError", "no such model"], "ModelError", "no such model"),
    (["ConfigError", "model.vit.heads", "= 3: no"], "ConfigError", "model.vit.heads = 3: no"),
    (["DivergedError", "loss is nan"], "DivergedError", "loss is nan"),
    (["SystemExit", "bye"], "SystemExit", "SystemExit: bye"),
]


class MessageContract:
    """Jobs and events, which need no process. A subclass makes `engine`, with two workers, and `single`, with one;
    `folder` is where they may write.
    """

    @pytest.fixture
    def engine(self) -> Iterator[Any]:
        raise NotImplementedError

    @pytest.fixture
    def single(self) -> Iterator[Any]:
        raise NotImplementedError

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path

    def test_epochs_come_in_order_and_the_end_comes_last(self, engine: Any) -> None:
        engine.submit(job(epochs=50))
        *epochs, last = events(engine, 51)
        assert [event.epoch.index for event in epochs] == list(range(1, 51))
        assert isinstance(last, Finished)
        assert {(event.job, event.attempt) for event in [*epochs, last]} == {("1", 1)}

    def test_a_worker_is_not_free_before_the_end_of_its_job_was_handed_out(self, engine: Any) -> None:
        engine.submit(job("1", epochs=3))
        engine.submit(job("2", sleeps=0.8))
        assert engine.free == 0
        time.sleep(0.4)  # all of the first job's news wait by now
        for _ in range(3):
            assert isinstance(end(engine), EpochDone)
            assert engine.free == 0
        assert end(engine).job == "1"
        assert (engine.free, engine.busy) == (1, True)
        assert end(engine).job == "2"
        assert (engine.free, engine.busy) == (2, False)
        assert engine.next_event(0.0) is None

    def test_a_stopped_job_leaves_at_its_next_tick_and_the_other_goes_on(self, engine: Any) -> None:
        engine.submit(job("1", ticks_for=600))
        engine.submit(job("2", sleeps=3.0))  # on busy cores the stop takes a while
        engine.stop("1")
        assert end(engine, 15) == Interrupted("1", 1)
        assert engine.free == 1
        assert result(end(engine))["pid"]
        engine.submit(job("3"))
        assert result(end(engine))["jobs"] <= 2  # the worker that was told to stop is as good as before

    def test_a_stop_that_comes_too_late_does_not_stop_the_next_job(self, single: Any) -> None:
        single.submit(job("1", sleeps=0.3))
        single.stop("1")
        assert isinstance(end(single), Finished)
        single.stop("1")
        single.submit(job("2", ticks_for=0.1))
        assert isinstance(end(single), Finished)

    def test_what_a_job_raises_comes_back_as_kind_and_one_line(self, single: Any) -> None:
        for number, (raises, kind, reason) in enumerate(RAISED, 1):
            single.submit(job(raises=raises))
            assert end(single) == Failed("1", 1, kind, reason)
            single.submit(job("2"))
            assert result(end(single))["jobs"] == number, "the same worker goes on"

    def test_attempts_write_apart_and_know_the_earlier_ones(self, engine: Any, folder: Path) -> None:
        for attempt in (1, 2, 4):
            engine.submit(job("1", folder, attempt))
            answer = result(end(engine))
        assert answer["earlier"] == ["attempt-2", "attempt-1"]
        assert sorted(path.name for path in folder.iterdir()) == ["attempt-1", "attempt-2", "attempt-4"]


class EngineContract(MessageContract):
    """What the coordinator relies on: messages, and workers that are processes on this machine."""

    def test_a_job_runs_in_another_process_with_its_payload_and_device(self, engine: Any) -> None:
        engine.submit(job())
        answer = result(end(engine))
        assert answer["pid"] != os.getpid()
        assert answer["device"] == "cpu"

    def test_one_worker_does_many_jobs_and_keeps_what_it_has_loaded(self, single: Any) -> None:
        answers = []
        for _ in range(4):
            single.submit(job())
            answers.append(result(end(single)))
        assert len({one["pid"] for one in answers}) == 1
        assert [one["jobs"] for one in answers] == [1, 2, 3, 4]

    def test_workers_work_at_the_same_time(self, engine: Any) -> None:
        for name in ("1", "2"):
            engine.submit(job(name, sleeps=0.5))
        began = time.monotonic()
        assert len({result(event)["pid"] for event in events(engine, 2)}) == 2
        assert time.monotonic() - began < 30

    def test_a_killed_worker_loses_its_job_and_another_does_the_next(self, single: Any) -> None:
        single.submit(job("1", epochs=1, dies=signal.SIGKILL))
        epoch, lost = events(single, 2)
        assert isinstance(epoch, EpochDone)  # what it said before it died
        assert lost == Lost("1", 1, "its worker died (signal SIGKILL: the memory may have run out)")
        assert single.free == 1
        single.submit(job("1", attempt=2))
        assert end(single).attempt == 2

    def test_a_worker_killed_while_idle_is_replaced(self, single: Any) -> None:
        single.submit(job("1"))
        pid = result(end(single))["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        while single.next_event(0.2) is not None:
            pass
        single.submit(job("2"))
        assert result(end(single))["pid"] != pid

    def test_a_stopped_worker_hands_its_job_back_and_another_does_the_next(self, single: Any, folder: Path) -> None:
        single.submit(job("0"))
        pid = result(end(single))["pid"]
        single.submit(job("1", folder, ticks_for=600))
        wait_until((folder / "attempt-1" / "tick").exists)
        os.kill(pid, signal.SIGTERM)
        assert end(single, 15) == Interrupted("1", 1)
        single.submit(job("2"))
        assert result(end(single))["pid"] != pid

    def test_what_a_job_and_its_libraries_print_lands_in_its_log(
        self, single: Any, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("first", "second"):
            single.submit(job(name, folder / name, says=f"hello {name}"))
            end(single)
        for name, other in (("first", "second"), ("second", "first")):
            log = (folder / name / "attempt-1" / "log.txt").read_text()
            for line in (f"hello {name}\n", f"hello {name} from a child\n", f"hello {name} as an error\n"):
                assert line in log
            assert other not in log
        assert "hello" not in "".join(capfd.readouterr())

    def test_the_traceback_of_a_bug_is_in_the_log_and_that_of_a_known_error_is_not(
        self, engine: Any, folder: Path
    ) -> None:
        engine.submit(job("bug", folder / "bug", raises=["ValueError", "a bug"]))
        engine.submit(job("known", folder / "known", raises=["DivergedError", "loss is nan"]))
        events(engine, 2)
        assert "Traceback" in (folder / "bug" / "attempt-1" / "log.txt").read_text()
        assert "Traceback" not in (folder / "known" / "attempt-1" / "log.txt").read_text()

    def test_closing_ends_all_workers_whatever_they_do(self, engine: Any) -> None:
        engine.submit(job("1"))
        pids = {result(end(engine))["pid"]}
        engine.submit(job("2", sleeps=600))
        engine.submit(job("3", ticks_for=600))
        began = time.monotonic()
        engine.close()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        assert time.monotonic() - began < 10, "it does not wait for the jobs"
