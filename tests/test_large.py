"""A study of 10,000 toy trials: its memory, its time a trial, what reads it; and what the next limits are."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from searchfm.engines.local import LocalEngine
from searchfm.home import HOME, STORAGE, Home
from searchfm.jobs import EpochDone, Finished, Job
from searchfm.pool import WorkerPool
from searchfm.search.storage import open_storage
from searchfm.tracking.mirror import Mirror, make_schema
from tests import driving, large
from tests.driving import let_go

TRIALS = 10_000
MEGABYTE = 1_000_000
pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("own_forkserver")]


def test_a_search_of_10000_trials_keeps_its_pace_and_its_memory(home: Home, record_property: Any) -> None:
    command = [sys.executable, "-m", "tests.large", str(home.path), str(TRIALS)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *marks, end = map(json.loads, lines)
    assert [mark["ended"] for mark in marks] == list(range(large.EVERY, TRIALS + 1, large.EVERY))
    study = driving.stored(home, "toy")
    assert len(study.of("complete")) == len(study.trials) == TRIALS
    assert [trial.number for trial in study.trials] == list(range(TRIALS))

    def cost(index: int, name: str) -> float:
        """Seconds a trial in the thousand that ends with this mark."""
        return float(marks[index][name] - marks[index - 1][name]) / large.EVERY

    wall, cpu = cost(-1, "seconds") / cost(1, "seconds"), cost(-1, "cpu") / cost(1, "cpu")
    coordinator, tracking = (max(mark[name] for mark in marks) / MEGABYTE for name in ("coordinator", "tracking"))
    record_property(
        "figures",
        f"random sampler, 2 workers, followed into MLflow: {1e3 * cost(1, 'seconds'):.0f} ms a trial at 2,000 and "
        f"{1e3 * cost(-1, 'seconds'):.0f} ms at 10,000 (x{wall:.2f}; of the coordinator's CPU x{cpu:.2f}, "
        f"{1e3 * cost(-1, 'cpu'):.0f} ms); memory: coordinator {coordinator:.0f} MB, "
        f"tracking process {tracking:.0f} MB; "
        f"left to sync: {end['missing']}",
    )
    assert wall <= 2
    assert cpu <= 2
    assert coordinator < 1000
    assert tracking < 1500


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict[int, float]]:
    """A home of 10,000 trials, and what TPE took for a proposal on the way there, in seconds by trials."""
    home, costs = Home(tmp_path_factory.mktemp("filled")), {}
    begun = 0
    for count in (100, 1000, 3000, TRIALS):
        large.fill(home, large.large(TRIALS), range(begun, count))
        costs[count], begun = proposal(home, "tpe"), count + 1
    return home, costs


def proposal(home: Home, sampler: str) -> float:
    """Seconds of a proposal, in a home whose last trial it becomes."""
    storage, study = open_storage(home), large.large(TRIALS, sampler)
    loaded = optuna.load_study(study_name=study.name, storage=storage)
    loaded.get_trials(deepcopy=False)  # read once by a coordinator
    began = time.perf_counter()
    loaded.sampler = study.sampler(len(loaded.get_trials(deepcopy=False)))
    trial = loaded.ask()
    study.sample(trial)
    seconds = time.perf_counter() - began
    trial.set_user_attr("reason", "not trained")
    loaded.tell(trial, state=TrialState.FAIL)
    let_go(storage)
    return seconds


def shown(costs: dict[int, float]) -> str:
    return ", ".join(f"{1e3 * seconds:,.0f} ms at {count:,}" for count, seconds in costs.items())


def test_what_proposals_cost_as_a_study_grows(filled: Any, home: Home, record_property: Any) -> None:
    costs, begun = {}, 0
    for count in (100, 300, 1000):
        large.fill(home, large.large(TRIALS), range(begun, count), pruned=10**9)
        costs[count], begun = proposal(home, "gp"), count + 1
    record_property("figures", f"a proposal of TPE: {shown(filled[1])} trials; of GP: {shown(costs)} complete trials")
    assert filled[1][TRIALS] < 5


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, which SQLAlchemy warns of
def test_status_and_report_of_10000_trials(filled: Any, record_property: Any) -> None:
    home, _ = filled
    make_schema(home)
    Mirror(home, driving.stored(home, "toy")).open()  # the study's own run, to which the report belongs

    def seconds(*arguments: str) -> float:
        """Of a command, with the start of Python; the best of three."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            environment = {**os.environ, HOME: str(home.path)}
            command = [sys.executable, "-m", "searchfm", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            times.append(time.perf_counter() - began)
            assert done.returncode == 0, done.stderr
        return min(times)

    every, one, report = seconds("status"), seconds("status", "toy"), seconds("report", "toy")
    size = (home.study("toy") / "report.html").stat().st_size / MEGABYTE
    record_property(
        "figures", f"status {every:.1f} s, of the study {one:.1f} s; report {report:.1f} s, a page of {size:.1f} MB"
    )
    assert max(every, one) < 2
    assert report < 10


def test_messages_a_second_through_engine_and_pool(tmp_path: Path, record_property: Any) -> None:
    count, engine = 5000, LocalEngine(["cpu"] * 2, warm=driving.LIGHT)
    pool = WorkerPool(engine)
    for name in ("first", "second"):
        pool.submit(Job(name, tmp_path / name, "tests.toys:work", {"epochs": count}))
    received, finished, began = 0, 0, 0.0
    while finished < 2:
        for event in pool.events():
            began = began or time.perf_counter()
            received += isinstance(event, EpochDone)
            finished += isinstance(event, Finished)
    rate = received / (time.perf_counter() - began)
    engine.close()
    assert received == 2 * count
    record_property("figures", f"{rate:,.0f} epochs a second from two workers, without a coordinator")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_writes_a_second_of_the_storage(
    kind: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, record_property: Any
) -> None:
    """Reports, as of epochs. SQLite flushes each to the disk; the PostgreSQL of the tests does not (fsync=off)."""
    if kind == "postgresql":
        monkeypatch.setenv(STORAGE, request.getfixturevalue("database"))
    count = 300
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:  # temporary files of tests may be in memory
        large.fill(Home(Path(folder)), large.large(1), range(1))
        storage = open_storage(Home(Path(folder)))
        trial = optuna.load_study(study_name="toy", storage=storage).ask()
        began = time.perf_counter()
        for step in range(1, count + 1):
            trial.report(0.5, step)
        rate = count / (time.perf_counter() - began)
        let_go(storage)
    record_property("figures", f"{rate:,.0f} reports a second to {kind}, of one connection")
    assert rate > 10
