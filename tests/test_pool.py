"""The pool brings jobs to their ends: none runs twice, none is given up too soon. Toy jobs, real workers."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchfm.engines.local import LocalEngine
from searchfm.errors import DataError, ModelError, NewerError, StorageError
from searchfm.jobs import EpochDone, Event, Failed, Finished, Interrupted, Job, Paused, Started
from searchfm.pool import LOCK_SECONDS, WorkerPool
from searchfm.records import read_epochs
from searchfm.retraining import Task, run_tasks
from tests.driving import LIGHT
from tests.toys import curve

pytestmark = pytest.mark.usefixtures("own_forkserver")


@pytest.fixture(scope="module")
def engine(own_forkserver: None) -> Iterator[LocalEngine]:
    opened = LocalEngine(["cpu"] * 2, warm=LIGHT)
    yield opened
    opened.close()


def config(number: int, epochs: int) -> dict[str, Any]:
    return {
        "optimizer": {"lr": 0.01},
        "model": {"mlp": {"layers": 1, "width": [8 + number]}},
        "train": {"epochs": epochs},
    }


def job(folder: Path, number: int, *, epochs: int = 3, **more: Any) -> Job:
    payload = {"config": config(number, epochs), "identity": f"u/{number}", **more}
    return Job(f"job {number}", folder / str(number), "tests.toys:trial", payload, f"job {number}")


def task(folder: Path, number: int, *, identity: str = "", **more: Any) -> Task:
    return Task(job(folder, number, **more), identity or f"job {number}", "result.json")


def run(engine: LocalEngine, tasks: list[Task], retries: int = 2) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """The kinds of progress without epochs, the results and the failures."""
    kinds, running = [], run_tasks(WorkerPool(engine, retries=retries), tasks)
    while True:
        try:
            kinds.append(next(running).kind)
        except StopIteration as end:
            results, failures = end.value
            return [kind for kind in kinds if kind != "epoch"], results, failures


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_a_job_ends_with_its_result_or_its_failure_and_raises_what_all_others_would_meet(
    engine: LocalEngine, tmp_path: Path
) -> None:
    pool = WorkerPool(engine)
    *_, finished = pool.run_all([job(tmp_path, 0)])
    assert isinstance(finished, Finished)
    assert finished.result["value"] == curve(config(0, 3), 3)
    for number, kind in enumerate((DataError, StorageError, ModelError), 1):
        with pytest.raises(kind, match=r"^made to fail$"):
            list(pool.run_all([job(tmp_path, number, **{"raise": {str(number): kind.__name__}})]))
    *_, failed = pool.run_all([job(tmp_path, 4, fail=[4])])
    assert isinstance(failed, Failed)
    assert failed.reason == "ValueError: made to fail"


def test_a_stopped_job_has_one_further_event_and_leaves_its_log_alone(engine: LocalEngine, tmp_path: Path) -> None:
    pool = WorkerPool(engine)
    spec = job(tmp_path, 0, epochs=50, ticks=5, seconds=0.005)
    assert pool.submit(spec) == 1
    events: list[Any] = []
    while not any(isinstance(event, Interrupted | Finished | Failed) for event in events):
        for event in pool.events():
            events.append(event)
            if isinstance(event, EpochDone) and event.epoch.index == 2:
                pool.stop(spec.id)
    assert [event.epoch.index for event in events if isinstance(event, EpochDone)] == [1, 2]
    assert isinstance(events[-1], Interrupted)
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["log.txt"]


def test_a_paused_job_keeps_its_folders_and_goes_on_where_it_was(engine: LocalEngine, tmp_path: Path) -> None:
    pool = WorkerPool(engine)
    events: list[Any] = list(until_end(pool, job(tmp_path, 0, until=2)))
    assert isinstance(events[-1], Paused)
    assert (tmp_path / "0" / "attempt-1" / "done").read_text() == "2"
    events = list(until_end(pool, replace(job(tmp_path, 0), received=2)))
    assert [event.epoch.index for event in events if isinstance(event, EpochDone)] == [3]
    assert isinstance(events[-1], Finished)
    assert events[-1].attempt == 2
    assert not list((tmp_path / "0").glob("attempt-*"))


def until_end(pool: WorkerPool, spec: Job) -> Iterator[Event]:
    """The events of a job."""
    pool.submit(spec)
    while True:
        for event in pool.events():
            yield event
            if isinstance(event, Paused | Finished | Failed):
                return


def test_a_job_that_keeps_nothing_is_not_waited_for_when_all_is_to_stop() -> None:
    """It may be importing torch or downloading, and reads no stop meanwhile."""
    engine = LocalEngine(["cpu"], warm=LIGHT)
    stopping, began = False, time.monotonic()
    pool = WorkerPool(engine, stopping=lambda: stopping)
    silent = Job("prepare", None, "tests.toys:work", {"sleeps": 20})
    with closing(engine), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for event in pool.run_all([silent]):
            stopping = stopping or isinstance(event, Started)
    assert time.monotonic() < began + 10


def test_an_attempt_has_a_number_that_none_had_before(engine: LocalEngine, tmp_path: Path) -> None:
    """A worker of a dead coordinator may still be writing under the last one."""
    (tmp_path / "0" / "attempt-3").mkdir(parents=True)
    pool = WorkerPool(engine)
    assert pool.submit(job(tmp_path, 0)) == 4
    assert (tmp_path / "0" / "attempt-4").is_dir()
    attempts: list[int] = []
    while not attempts:
        attempts += [event.attempt for event in pool.events() if isinstance(event, Finished)]
    assert attempts == [4]


def test_the_lock_is_checked_by_the_pools_own_clock(engine: LocalEngine) -> None:
    now, checks = [0.0], []
    pool = WorkerPool(engine, check_lock=lambda: checks.append(now[0]), clock=lambda: now[0])
    for moment in (1.0, LOCK_SECONDS + 1, LOCK_SECONDS + 2, 3 * LOCK_SECONDS):
        now[0] = moment
        assert list(pool.events(timeout=0)) == []
    assert checks == [LOCK_SECONDS + 1, 3 * LOCK_SECONDS]


# --- tasks, whose results are kept ------------------------------------------------------------------------------------


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_all_tasks_end_and_leave_their_records(engine: LocalEngine, tmp_path: Path) -> None:
    tasks = [task(tmp_path, number) for number in range(5)]
    kinds, results, failures = run(engine, tasks)
    assert sorted(kinds) == ["finished"] * 5 + ["planned"] * 5 + ["started"] * 5
    assert not failures
    for number, each in enumerate(tasks):
        assert results[each.job.id]["value"] == curve(config(number, 3), 3)
        assert [epoch.index for epoch in read_epochs(each.folder / "epochs.csv")] == [1, 2, 3]
        assert each.result() == results[each.job.id]
    assert not list(tmp_path.rglob("attempt-*"))
    assert left(tmp_path / "0") == {
        "done",
        "epochs.csv",
        "log.txt",
        "model.json",
        "result.json",
        "weights.safetensors",
        "wrote",
    }


def test_a_finished_task_is_not_run_again_unless_its_identity_changed(engine: LocalEngine, tmp_path: Path) -> None:
    run(engine, [task(tmp_path, 0)])
    kinds, results, _ = run(engine, [task(tmp_path, 0), task(tmp_path, 1)])
    assert kinds == ["found", "planned", "started", "finished"]
    assert results.keys() == {"job 0", "job 1"}
    assert "finished" in run(engine, [task(tmp_path, 0, identity="of another study")])[0]
    for damaged in ('{"cut', '{"identity": "job 1"}', "[1]", "[" * 10**5):
        (tmp_path / "1" / "result.json").write_text(damaged)
        assert task(tmp_path, 1).result() is None, "it is run again"
    (tmp_path / "1" / "result.json").write_text('{"identity": "job 1", "result": {}, "format": 99}')
    with pytest.raises(NewerError):  # a newer version's result is not overwritten
        task(tmp_path, 1).result()


def test_a_job_whose_worker_died_goes_on_from_its_last_epoch(engine: LocalEngine, tmp_path: Path) -> None:
    one = task(tmp_path, 0, kill={"0": 2})
    kinds = run(engine, [one])[0]
    assert kinds == ["planned", "started", "retried", "started", "retried", "started", "finished"]
    assert [epoch.index for epoch in read_epochs(one.folder / "epochs.csv")] == [1, 2, 3]


def test_a_job_that_kills_every_worker_fails_and_the_others_go_on(engine: LocalEngine, tmp_path: Path) -> None:
    kinds, results, failures = run(engine, [task(tmp_path, 0, kill={"0": 9}), task(tmp_path, 1)], retries=1)
    assert kinds.count("failed") == 1
    assert failures == {"job 0": "its worker died (signal SIGKILL: the memory may have run out), 2 times"}
    assert results.keys() == {"job 1"}


def test_a_job_that_raises_fails_with_its_reason(engine: LocalEngine, tmp_path: Path) -> None:
    _, results, failures = run(engine, [task(tmp_path, 0, fail=[0])])
    assert failures == {"job 0": "ValueError: made to fail"}
    assert not results
    assert task(tmp_path, 0).result() is None


def test_after_a_stop_request_all_jobs_stop_and_the_same_tasks_resume(engine: LocalEngine, tmp_path: Path) -> None:
    tasks = [task(tmp_path, number, epochs=4, ticks=20, seconds=0.005) for number in range(3)]
    seen: list[Any] = []
    stopping: Callable[[], bool] = lambda: any(item.kind == "epoch" and item.epoch.index == 2 for item in seen)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        seen.extend(run_tasks(WorkerPool(engine, stopping=stopping), tasks))
    assert not engine.busy
    assert not list(tmp_path.rglob("result.json"))
    assert len(run(engine, tasks)[1]) == 3
    for one in tasks:
        times = [epoch.time for epoch in read_epochs(one.folder / "epochs.csv")]
        assert times == sorted(times)
        assert len(times) == 4
    assert json.loads((tmp_path / "0" / "result.json").read_text())["identity"] == "job 0"
