"""Coordinator and pool under random schedules of what may happen to a search: see `simulation.py`."""

import inspect
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, seed
from hypothesis.stateful import run_state_machine_as_test

from searchfm.coordinator import Coordinator
from searchfm.jobs import Interrupted, Lost
from searchfm.pool import WorkerPool
from tests import driving, simulation, toys
from tests.engines.contract import MessageContract, end, events, job
from tests.generated import settings, with_new_seed
from tests.simulation import Clock, InSqlite, Options, Schedule, Search, SimulatedEngine, Violation


def run(schedules: int, *, number: int | None = None, shrink: bool = True) -> None:
    """Runs schedules: those of a seed, else the same ones every time. A failure prints the shortest schedule, as the
    lines of a test. No examples are stored: a schedule that failed becomes a test.
    """
    phases = () if shrink else (Phase.generate,)
    chosen = settings(schedules, number, *phases, stateful_step_count=25)
    machine = Schedule if number is None else seed(number)(Schedule)
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[arg-type]


# CI runs the same 1,000 schedules each time, so that a failure comes from the change; new ones are tried every night.
@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("number", range(2))
def test_schedules(number: int) -> None:
    run(500, number=number)


@pytest.mark.nightly
def test_new_schedules(record_property: Callable[[str, object], None], pytestconfig: pytest.Config) -> None:
    number = with_new_seed(lambda number: run(10_000, number=number), pytestconfig.getoption("--hypothesis-seed"))
    record_property("figures", f"10,000 schedules without a violation, seed {number}")


# --- schedules that failed once ---------------------------------------------------------------------------------------


def test_a_trial_that_fails_after_an_earlier_attempt_came_to_its_end_keeps_no_weights() -> None:
    state = Schedule()
    state.begin(options=Options(trials=3, epochs=1, workers=2, retries=0))
    state.cut_connection(worker=0, lost=False, turns=1)
    state.fail_write(fault="gone before", writes=1)
    state.receive(worker=0)
    state.cut_connection(worker=1, lost=False, turns=1)
    state.receive_late(orphan=0, messages=1)
    state.kill_worker(worker=0, checkpoint=False, turns=1)
    state.teardown()


def test_a_study_that_was_stopped_needs_three_failures_again_to_be_hopeless() -> None:
    state = Schedule()
    state.begin(options=Options(trials=4, epochs=1, workers=1, retries=0, fail=(0, 1, 2)))
    state.cut_connection(worker=0, lost=False, turns=1)
    state.stop()
    state.teardown()


def test_a_hopeless_study_that_is_asked_for_more_trials_goes_on() -> None:
    state = Schedule()
    state.begin(options=Options(trials=4, epochs=1, workers=1, retries=0))
    state.kill_worker(worker=0, checkpoint=False, turns=1)
    state.cut_connection(worker=0, lost=True, turns=2)
    state.cut_connection(worker=0, lost=True, turns=1)
    state.cut_connection(worker=0, lost=False, turns=1)
    state.cut_connection(worker=0, lost=True, turns=2)
    assert state.search.hopeless
    state.ask_for_more(trials=1)
    state.teardown()


def test_a_trial_that_fails_has_no_epoch_that_was_never_reported() -> None:
    state = Schedule()
    state.begin(options=Options(trials=3, epochs=1, workers=1, retries=0))
    state.fail_write(fault="gone before", writes=2)  # the epoch is in epochs.csv, its report is lost
    state.cut_connection(worker=0, lost=False, turns=1)
    state.cut_connection(worker=0, lost=False, turns=3)
    state.kill_worker(worker=0, checkpoint=False, turns=0)
    state.teardown()


# --- planted bugs -----------------------------------------------------------------------------------------------------

# Of each: the function, what is replaced in its source, by what, and the violation that is found.
PLANTED: dict[str, tuple[type, str, str, str, str]] = {
    "attempt not checked": (
        WorkerPool,
        "events",
        " and self._running[event.job].attempt == event.attempt",
        "",
        r"(the search ended while a worker has a job|trial \d+ is told before predictions.npz is in its folder)",
    ),
    "tell before artifacts": (
        WorkerPool,
        "_on",
        "gather(job.folder, keep=True)\n            yield event",
        "yield event\n            gather(job.folder, keep=True)",
        r"trial \d+ is told before predictions.npz is in its folder",
    ),
    "twin not waited for": (
        Coordinator,
        "_begin",
        "if first != number:",
        "if first in self.ended:",
        r"trial \d+ is trained, although \d+ is its twin",
    ),
    "epochs come again": (
        WorkerPool,
        "_on",
        " and event.epoch.index > job.received",
        "",
        r"AssertionError: \d+: epoch \d+ is early",
    ),
    "a stopped worker is charged": (
        WorkerPool,
        "_on",
        'yield self._retry(job, "")',
        'yield self._retry(replace(job, lost=job.lost + 1), "its worker was stopped")',
        r"\d+ attempts lost",
    ),
    "reports are forgotten": (
        Coordinator,
        "_adopt",
        "current.epochs = list(self.stored.trials[current.number].epochs)",
        "pass",
        r"(trial \d+: epoch \d+ is judged after its report was written|UserWarning: The reported value is ignored .+)",
    ),
    "weights are not dropped": (
        Coordinator,
        "_count",
        "drop_weights(other.folder)",
        "pass",
        r"weights of \[.+\] are kept",
    ),
    "one trial too many": (
        Coordinator,
        "_may_ask",
        "self.asked < self.trials",
        "self.asked <= self.trials",
        r"\d+ trials of \d+",
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, old: str, new: str) -> None:
    """Replaces a piece of a method's source."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) == 1, source
    namespace = dict(inspect.getmodule(owner).__dict__)
    exec(source.replace(old, new), namespace)
    monkeypatch.setattr(owner, name, namespace[name])


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    owner, name, old, new, text = PLANTED[bug]
    plant(monkeypatch, owner, name, old, new)
    with pytest.raises(Violation, match=f"^{text}\n"):
        run(500, shrink=False)


# --- the simulation itself --------------------------------------------------------------------------------------------


class TestSimulatedEngine(MessageContract):
    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> SimulatedEngine:
        return self.made(monkeypatch, 2)

    @pytest.fixture
    def single(self, monkeypatch: pytest.MonkeyPatch) -> SimulatedEngine:
        return self.made(monkeypatch, 1)

    def made(self, monkeypatch: pytest.MonkeyPatch, workers: int) -> SimulatedEngine:
        clock = Clock()
        monkeypatch.setattr(toys, "time", clock)
        monkeypatch.setattr(toys, "JOBS", itertools.count(1))
        return SimulatedEngine(workers, clock)

    def test_what_a_worker_sent_comes_before_its_death_and_it_is_replaced(self, single: SimulatedEngine) -> None:
        single.submit(job("1", epochs=3))
        (worker,) = single.workers
        assert worker.attempt is not None
        worker.attempt.advance()
        single.kill(worker, checkpoint=True)
        assert [type(event).__name__ for event in events(single, 2)] == ["EpochDone", "Lost"]
        single.submit(job("1", attempt=2))
        assert end(single).attempt == 2

    def test_a_terminated_worker_hands_its_job_back(self, single: SimulatedEngine) -> None:
        single.submit(job("1", ticks_for=600))
        single.terminate(single.workers[0])
        assert end(single) == Interrupted("1", 1)

    def test_an_attempt_that_is_given_up_goes_on_as_an_orphan(self, single: SimulatedEngine) -> None:
        single.submit(job("1", epochs=1))
        single.cut(single.workers[0], Lost)
        assert end(single) == Lost("1", 1, "node is lost")
        (orphan,) = single.orphans
        assert single.next_event(1.0) is None
        orphan.advance()
        single.chosen = orphan
        assert end(single).job == "1"
        assert single.free == 1


@pytest.mark.parametrize("pruner", ["promote", "hyperband"])
def test_tables_in_memory_hold_what_those_of_sqlite_hold(tmp_path: Path, pruner: str) -> None:
    """The same schedule, with each fault of the storage once."""

    def facts(name: str, storage: Any) -> list[Any]:
        options = Options(trials=6, epochs=4, workers=2, pruner=pruner, fail=(1,), keep=1)
        search = Search(options, tmp_path / name, storage)
        search.turn()
        for fault in simulation.FAULTS:
            search.engine.fair = True
            search.turn()
            search.faults.kind, search.faults.writes = fault, 1
            for _ in range(3):
                search.engine.fair = True
                search.turn()
        study = driving.facts(search.finish())
        if storage is InSqlite:
            search.rows.engine.dispose()
        return study

    assert facts("memory", simulation.InMemory) == facts("sqlite", InSqlite)
