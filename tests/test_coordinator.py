"""The coordinator on toy trials: none lost, none doubled, and the same study however it was interrupted."""

import itertools
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import FixedTrial, TrialState
from scipy.stats import binom

from searchfm import pool
from searchfm.coordinator import HOPELESS
from searchfm.engines.local import LocalEngine
from searchfm.errors import DataError, LockedError, StorageError, StudyError, WorldError
from searchfm.events import SearchEvent
from searchfm.format import interrupted
from searchfm.home import Home
from searchfm.jobs import EpochDone, Event, Finished, Lost
from searchfm.records import StudyRecord, Trial
from searchfm.search import files
from searchfm.search.database import failures
from searchfm.search.storage import open_storage
from searchfm.stopping import STOP_SECONDS
from tests import driving, toys
from tests.crashing import Crasher
from tests.driving import check, facts, search, toy

pytestmark = pytest.mark.usefixtures("own_forkserver")

SIX: dict[str, Any] = {
    "model": {"mlp": {"layers": {"choice": [1, 2]}, "width": {"choice": [4, 8, 16]}}},
    "optimizer": {},
}
ONE: dict[str, Any] = {"model": {"mlp": {"layers": 1}}, "optimizer": {}}
GRID = {"sampler": {"name": "grid"}}


def goes_on_after(row: Trial) -> list[int]:
    """The epoch after which each attempt of a trial started; empty where no worker had the trial."""
    log = row.folder / "log.txt"
    if not log.exists():
        return []
    return [int(line.rpartition(" ")[2]) for line in log.read_text().splitlines()]


# --- the number of trials ---------------------------------------------------------------------------------------------


def test_ten_trials_are_exactly_ten(any_home: Home) -> None:
    study = search(any_home, toy(), workers=2, trials=10)
    check(study, 10)
    assert len(study.of("complete")) == 10


def test_the_same_search_again_trains_nothing_and_three_more_trials_are_three(home: Home) -> None:
    first = search(home, toy(), trials=5)
    progress: list[SearchEvent] = []
    assert facts(search(home, toy(), trials=5, watch=lambda item, _: progress.append(item))) == facts(first)
    assert progress == []
    more = search(home, toy(), trials=8)
    check(more, 8)
    assert facts(more)[:5] == facts(first)


def test_with_one_worker_each_trial_ends_before_the_next_is_asked_for(home: Home) -> None:
    progress: list[tuple[str, int]] = []
    search(home, toy(train={"epochs": 1}), watch=lambda item, _: progress.append((item.kind, item.trial)))
    assert progress == [(kind, trial) for trial in range(8) for kind in ("started", "epoch", "ended")]


def test_a_second_coordinator_is_refused_while_the_first_goes_on(any_home: Home) -> None:
    def second(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "started":
            with pytest.raises(LockedError, match=f"process {os.getpid()} on {socket.gethostname()[:30]};"):
                search(any_home, toy())

    check(search(any_home, toy(), trials=2, watch=second), 2)


def test_a_trial_is_not_pruned_after_its_last_epoch(home: Home) -> None:
    """After it, successive halving would prune trials that have their value already."""
    halving = {"pruner": {"name": "asha", "reduction": 4}}
    study = search(home, toy(search=halving, train={"epochs": 1}))
    check(study, 8)
    assert all(row.state == "complete" and row.value is not None for row in study.trials)
    pruned = search(home, toy("longer", search=halving, train={"epochs": 2}))
    check(pruned, 8)
    assert pruned.of("pruned"), "the pruner does stop trials before their last epoch"


# --- rules that end a search ------------------------------------------------------------------------------------------


def test_a_target_ends_the_search_and_a_higher_one_goes_on(home: Home) -> None:
    def make(target: float) -> Any:
        return toy(search={"target": target, "trials": 20, "seed": 1})

    values = [toys.curve(row.config, 3) for row in search(home, toy("all", search={"trials": 20, "seed": 1})).trials]
    better = [i for i, value in enumerate(values) if value > max(values[:i], default=0.0)]
    first, second = better[1:3]
    assert len(search(home, make(values[first])).trials) == first + 1
    assert len(search(home, make(values[first])).trials) == first + 1, "the rule holds after a resume"
    study = search(home, make(values[second]))
    check(study, second + 1)
    ending = make(values[second]).ended_by(study.trials)
    assert ending is not None
    assert ending.key == "target"
    assert ending.text.endswith(f" is reached by trial {second} with {values[second]:.4f}")


@pytest.mark.slow(seconds=2)
def test_a_search_ends_after_trials_without_a_better_one_however_it_was_stopped(tmp_path: Path) -> None:
    def make() -> Any:
        return toy(search={"stop_after": 4, "trials": 40})

    study = search(Home(tmp_path / "unbroken"), make(), payload={"fail": [2]})
    check(study, len(study.trials))
    assert study.best is not None
    after = [row for row in study.trials if row.number > study.best.number]
    assert len([row for row in after if row.state == "complete"]) == 4
    for length in (5, 3, 5, 4, 5, 6) * 20:
        broken = search(Home(tmp_path / "broken"), make(), payload={"fail": [2]}, watch=stop_every(length))
        if make().ended_by(broken.trials) and not broken.of("running"):
            break
    assert facts(broken) == facts(study)


def test_trials_that_run_when_a_rule_holds_are_brought_to_their_ends(home: Home) -> None:
    study = search(home, toy(search={"target": 0.01}), workers=3, payload={"seconds": 0.05})
    check(study, 3)
    assert len(study.of("complete")) == 3


# --- trials at chance -------------------------------------------------------------------------------------------------

COUNTED: dict[str, Any] = {"validation": 1000, "validation_classes": (100,) * 10}
LATE = {"pruner": {"name": "median", "startup_trials": 99}}  # prunes nothing itself


def at_chance(row: Trial) -> bool:
    """Whether it is at chance after its first epoch: at 1% or less, one of 1000 images with probability 0.12 each."""
    return binom.cdf(round(1000 * toys.curve(row.config, 1)), 1000, 0.12) < 0.01


def test_a_trial_at_chance_is_pruned_and_says_so(home: Home) -> None:
    study = search(home, toy(search={**LATE, "trials": 20, "seed": 1}), data=COUNTED)
    check(study, 20)
    assert {row.number for row in study.of("pruned")} == {row.number for row in study.trials if at_chance(row)}
    assert 0 < len(study.of("pruned")) < 10
    assert {row.reason for row in study.of("pruned")} == {"pruned at chance after epoch 1"}


@pytest.mark.parametrize(
    ("search_table", "data"),
    [
        ({"pruner": {"name": "none"}}, COUNTED),
        ({**LATE, **GRID}, COUNTED),
        (LATE, {}),  # as in studies begun before images were counted
        (LATE, {**COUNTED, "validation_classes": (9, 991)}),
    ],
)
def test_no_trial_is_at_chance_without_a_pruner_in_a_grid_or_with_few_images(
    home: Home, search_table: dict[str, Any], data: dict[str, Any]
) -> None:
    space = {**SIX, "optimizer": {"lr": {"choice": [0.1, 0.01]}}}
    study = search(home, toy(search=search_table, **space), data=data)
    assert len(study.of("complete")) == 8
    assert any(at_chance(row) for row in study.trials)


def test_on_a_task_where_all_trials_are_at_chance_those_after_the_third_are_trained(home: Home) -> None:
    hard = {"optimizer": {"lr": {"low": 0.2, "high": 0.9}}}
    study = search(home, toy(search={**LATE, "trials": 6}, **hard), data=COUNTED)
    assert [row.state for row in study.trials] == ["pruned"] * 3 + ["complete"] * 3
    other = {**COUNTED, "validation_classes": (900, 100)}  # no accuracy is above 1.2 times the largest class's
    assert len(search(home, toy("larger", search=LATE, **hard), data=other).of("complete")) == 8


@pytest.mark.slow(seconds=2)
def test_trials_at_chance_are_the_same_however_the_study_was_stopped(tmp_path: Path) -> None:
    def make() -> Any:
        return toy(search={"pruner": {"name": "asha", "reduction": 2}, "trials": 9, "seed": 1}, train={"epochs": 4})

    unbroken = search(Home(tmp_path / "unbroken"), make(), data=COUNTED)
    assert len({row.reason for row in unbroken.of("pruned")}) > 1
    broken, stops = in_pieces(Home(tmp_path / "broken"), make, [3, 8, 1, 6], COUNTED)
    assert stops > 3
    assert facts(broken) == facts(unbroken)


# --- trials that fail -------------------------------------------------------------------------------------------------


def test_trials_that_raise_or_have_no_value_fail_and_the_study_goes_on(home: Home) -> None:
    study = search(home, toy(), payload={"fail": [1], "nan": [2], "inf": [3]})
    check(study, 8)
    assert {row.number: row.reason for row in study.of("failed")} == {
        1: "ValueError: made to fail",
        2: "its value is nan, not a finite number",
        3: "its value is inf, not a finite number",
    }
    assert study.best is not None
    assert study.best.number not in (1, 2, 3)


def test_a_study_whose_every_trial_fails_stops_early_and_resumes_once_the_cause_is_fixed(home: Home) -> None:
    with pytest.raises(WorldError, match=r"[34] trials failed and none succeeded, the last with: .*made to fail"):
        search(home, toy(), workers=2, payload={"fail": list(range(20))})
    stored = driving.stored(home, "toy")
    check(stored, len(stored.trials))
    assert HOPELESS <= len(stored.trials) <= HOPELESS + 1  # the other worker had begun another
    resumed = search(home, toy())
    check(resumed, 8)
    assert len(resumed.of("complete")) == 8 - len(stored.trials)


def test_retry_failed_trains_the_failed_configs_again(home: Home) -> None:
    search(home, toy(), trials=6, payload={"fail": [2, 4]})
    study = search(home, toy(), trials=8, retry_failed=True, payload={"fail": [7]})
    check(study, 8)
    assert [study.trials[i].digest for i in (6, 7)] == [study.trials[i].digest for i in (2, 4)]
    assert study.trials[6].state == "complete"
    last = search(home, toy(), trials=9, retry_failed=True)  # only what has not succeeded since
    check(last, 9)
    assert last.trials[8].digest == last.trials[4].digest
    assert last.trials[8].state == "complete"


@pytest.mark.parametrize("kind", ["StorageError", "DataError"])
def test_an_error_that_every_trial_would_meet_stops_the_study_and_fails_no_trial(home: Home, kind: str) -> None:
    expected = {"StorageError": StorageError, "DataError": DataError}[kind]
    with pytest.raises(expected, match=r"^made to fail$"):
        search(home, toy(), payload={"raise": {"1": kind}})
    assert [row.state for row in driving.stored(home, "toy").trials] == ["complete", "running"]
    study = search(home, toy())
    check(study, 8)
    assert len(study.of("complete")) == 8


def test_a_trial_that_kills_its_worker_every_time_fails_and_the_study_goes_on(home: Home) -> None:
    study = search(home, toy(search={"retries": 1}), trials=4, workers=2, payload={"kill": {"1": 9}})
    check(study, 4)
    assert study.trials[1].state == "failed"
    assert study.trials[1].reason == "its worker died (signal SIGKILL: the memory may have run out), 2 times"
    assert study.trials[1].attempts == 2
    assert len(study.of("complete")) == 3


# --- workers that die or leave ----------------------------------------------------------------------------------------


def test_a_trial_whose_worker_was_killed_goes_on_from_its_last_epoch(home: Home) -> None:
    progress: list[SearchEvent] = []
    study = search(home, toy(), trials=3, payload={"kill": {"1": 2}}, watch=lambda item, _: progress.append(item))
    check(study, 3)
    row = study.trials[1]
    assert (row.state, row.attempts) == ("complete", 3)
    assert goes_on_after(row) == [0, 1, 1]
    assert [item.epoch.index for item in progress if item.trial == 1 and item.kind == "epoch"] == [1, 2, 3]
    assert [item.kind for item in progress if item.trial == 1].count("retried") == 2


def test_the_last_worker_dies_in_the_last_epoch_of_the_last_trial(home: Home) -> None:
    study = search(home, toy(train={"epochs": 2}), trials=2, payload={"kill": {"1": 1}})
    check(study, 2)
    assert [(row.state, row.attempts) for row in study.trials] == [("complete", 1), ("complete", 2)]


@pytest.mark.slow
def test_a_worker_stopped_by_sigterm_costs_its_trial_no_retry(home: Home) -> None:
    pids: list[int] = []

    def terminate(item: SearchEvent, engine: LocalEngine) -> None:
        if item.kind == "epoch" and item.trial == 1 and len(pids) < 3:
            (worker,) = engine._workers
            pid = worker.process.pid or 0
            if pid not in pids:  # it may send another epoch before it stops
                pids.append(pid)
                os.kill(pid, signal.SIGTERM)

    toys = toy(search={"retries": 0}, train={"epochs": 9})
    study = search(home, toys, trials=2, payload={"seconds": 0.05}, watch=terminate)
    check(study, 2)
    assert len(study.of("complete")) == 2
    assert len(pids) == 3  # a fresh worker each time
    assert study.trials[1].attempts in (3, 4)  # the third signal comes just before it is done, or after


class Echo(LocalEngine):
    """Delivers every event twice, and events of an attempt that was given up."""

    def __init__(self, devices: list[str], warm: str) -> None:
        super().__init__(devices, warm)
        self.again: list[Event] = []

    def next_event(self, timeout: float) -> Event | None:
        if self.again:
            return self.again.pop()
        event = super().next_event(timeout)
        match event:
            case EpochDone(job, attempt, epoch) if attempt > 1:
                self.again = [event, EpochDone(job, 1, epoch), Finished(job, 1, {"value": 1.0}), Lost(job, 1, "dead")]
            case EpochDone():
                self.again = [event]
            case Finished(job, attempt):
                self.again = [Finished(job, attempt, {"value": 1.0})]
        return event


def test_late_and_repeated_events_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = toy(search={"pruner": {"name": "hyperband"}, "trials": 10}, train={"epochs": 5})
    payload = {"kill": {"0": 1, "3": 1}}
    once = search(Home(tmp_path / "once"), study, payload=payload)
    monkeypatch.setattr(driving, "LocalEngine", Echo)
    twice = search(Home(tmp_path / "twice"), study, payload=payload)
    assert facts(twice) == facts(once)
    assert once.of("pruned")


# --- coordinators that stop or die ------------------------------------------------------------------------------------


def stop_every(count: int) -> Callable[[SearchEvent, LocalEngine], bool]:
    seen = itertools.count(1)
    return lambda *_: next(seen) == count


def in_pieces(home: Home, make: Callable[[], Any], lengths: list[int], data: Any = None) -> tuple[StudyRecord, int]:
    """The study, stopped after each of `lengths` progress events in turn and resumed; and the number of stops."""
    for stops in itertools.count():
        study = search(home, make(), data=data, watch=stop_every(lengths[stops % len(lengths)]))
        if len(study.trials) == make().trials and not study.of("running"):
            return study, stops
    raise AssertionError


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        pytest.param({"name": "tpe", "startup_trials": 3}, {"name": "hyperband"}, marks=pytest.mark.slow),
        ({"name": "random"}, {"name": "asha", "reduction": 2}),
        ({"name": "tpe", "startup_trials": 3}, {"name": "asha", "reduction": 2, "promote": True}),
        pytest.param(
            {"name": "tpe", "startup_trials": 3}, {"name": "median", "startup_trials": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"name": "cmaes", "startup_trials": 2},
            {"name": "percentile", "startup_trials": 2, "keep": 50.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({"name": "qmc"}, {"name": "patient", "patience": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_study_stopped_and_resumed_is_bitwise_the_unbroken_one(
    tmp_path: Path, sampler: dict[str, Any], pruner: dict[str, Any]
) -> None:
    def make() -> Any:
        return toy(search={"sampler": sampler, "pruner": pruner, "trials": 9}, train={"epochs": 4})

    unbroken = search(Home(tmp_path / "unbroken"), make())
    check(unbroken, 9)
    broken, stops = in_pieces(Home(tmp_path / "broken"), make, [3, 8, 1, 6])
    assert stops > 3
    assert facts(broken) == facts(unbroken)
    assert any(row.attempts > 1 for row in broken.trials)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StudyRecord]]:
    """Runs coordinators in one home, one after another, each killed at a given write; None: not killed."""
    with Crasher() as crasher:

        def run(home: str, spec: dict[str, Any], moments: list[int | None]) -> StudyRecord:
            path = tmp_path_factory.mktemp("killed", numbered=True) / home
            for moment in moments:
                answer = crasher.run("toy", path, moment, **spec)
                assert answer is None or moment is None or answer["writes"] in (moment - 1, moment - 2)
                with suppress(StudyError):  # killed before it was begun
                    trials = driving.stored(Home(path), "toy").trials
                    assert all(row.config and row.digest and row.params for row in trials), "whole, or not there"
                if answer is not None:
                    (path / "writes").write_text(str(answer["writes"]))
            return driving.stored(Home(path), "toy")

        yield run


SPEC = {
    "tables": {"search": {"trials": 4, "pruner": {"name": "asha", "reduction": 2}}, "train": {"epochs": 2}},
    "workers": 1,
    "payload": {"fail": [2]},
}


def check_killed(broken: StudyRecord, unbroken: StudyRecord) -> None:
    """The same counts, and for the same configs bitwise the same values."""
    check(broken, 4)
    assert [row.number for row in broken.of("failed")] == [2]
    for row in broken.of("complete"):
        assert row.value == toys.curve(row.config, 2)
    values = {row.digest: row.value for row in unbroken.of("complete")}
    assert all(row.value == values.get(row.digest, row.value) for row in broken.of("complete"))


def promoting(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with promotion."""
    tables = spec["tables"]
    search = {**tables["search"], "pruner": {**tables["search"]["pruner"], "promote": True}}
    return {**spec, "tables": {**tables, "search": search}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "promote", "every"),
    [(1, False, 18), *(pytest.param(*each, marks=pytest.mark.nightly) for each in ((1, False, 9), (2, True, 9)))],
)
def test_after_a_kill_at_any_write_another_coordinator_completes_the_study(
    killed: Any, workers: int, promote: bool, every: int, record_property: Callable[[str, object], None]
) -> None:
    """Every 18th write, nightly every 9th: from the first with one worker, from the second with two. The next test
    kills the coordinator of one worker at each write of a trial.
    """
    spec = (promoting(SPEC) if promote else SPEC) | {"workers": workers}
    unbroken = killed("unbroken", spec, [None])
    writes = int((unbroken.folder.parents[1] / "writes").read_text())
    assert writes > 60
    for moment in range(workers, writes - 5, every):
        check_killed(killed("broken", spec, [moment, None]), unbroken)
    record_property("figures", f"killed at every {every}th of {writes} writes")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("promote", [False, True])
def test_after_a_kill_at_each_write_of_a_trial_the_study_is_bitwise_the_unbroken_one(
    killed: Any, promote: bool, record_property: Callable[[str, object], None]
) -> None:
    """Nothing that a sampler or pruner reads is lost: the trial is proposed again, or adopted with its rungs."""
    spec = promoting(SPEC) if promote else SPEC
    one, two = (
        {**spec, "tables": {**spec["tables"], "search": {**spec["tables"]["search"], "trials": n}}} for n in (2, 3)
    )
    writes = [int((killed("unbroken", spec, [None]).folder.parents[1] / "writes").read_text()) for spec in (one, two)]
    unbroken = killed("unbroken", two, [None])
    for moment in range(writes[0] + 1, writes[1] + 1):
        assert facts(killed("broken", two, [moment, None])) == facts(unbroken), moment
    record_property("figures", f"bitwise the unbroken study after a kill at each of {writes[1] - writes[0]} writes")


@pytest.mark.slow
def test_after_six_kills_another_coordinator_completes_the_study(killed: Any) -> None:
    spec = promoting(SPEC)
    unbroken = killed("unbroken", spec, [None])
    check_killed(killed("broken", spec, [40, 20, 9, 14, 30, 11, None]), unbroken)


# --- promotion --------------------------------------------------------------------------------------------------------

PROMOTE: dict[str, Any] = {"pruner": {"name": "asha", "reduction": 2, "promote": True}}


def asha(study: Any, trials: list[Trial], rungs: list[int], *totals: int) -> list[tuple[int, int]]:
    """Algorithm 2 of arXiv 1810.05834 with one worker, in searches of so many trials in all: each job as (trial, epoch
    that it trains to). At the end of a search the best go on until three are complete; the others never are promoted.
    """
    reached: list[dict[int, float]] = [{} for _ in rungs]
    promoted: list[set[int]] = [set() for _ in rungs]
    jobs: list[tuple[int, int]] = []
    asked = complete = 0
    for total in totals:
        while True:
            for k, reduction in [(k, r) for r in (2, 1) for k in reversed(range(len(rungs)))]:
                if reduction == 1 and (asked < total or complete >= 3):
                    continue
                ranked = sorted(reached[k], key=lambda trial: (-reached[k][trial], trial))
                candidates = [t for t in ranked[: len(ranked) // reduction] if t not in promoted[k]]
                if candidates:
                    trial, rung = candidates[0], k + 1
                    promoted[k].add(trial)
                    break
            else:
                if asked == total:
                    break
                trial, rung, asked = asked, 0, asked + 1
            complete += rung == len(rungs)
            jobs.append((trial, rungs[rung] if rung < len(rungs) else study.epochs))
            if rung < len(rungs):
                reached[rung][trial] = toys.curve(trials[trial].config, rungs[rung])
        for at, done in zip(promoted, reached, strict=True):
            at.update(done)
    return jobs


def jobs_of(progress: list[SearchEvent]) -> list[tuple[int, int]]:
    """Each job as (trial, last epoch that it trained)."""
    jobs: list[tuple[int, int]] = []
    for item in progress:
        if item.kind in ("started", "promoted"):
            jobs.append((item.trial, 0))
        if item.kind == "epoch":
            assert jobs[-1][0] == item.trial
            jobs[-1] = (item.trial, item.epoch.index)
    return jobs


def test_trials_are_promoted_as_the_paper_says_and_told_ones_compete_but_are_not_resumed(home: Home) -> None:
    def make(trials: int) -> Any:
        return toy(search={**PROMOTE, "trials": trials}, train={"epochs": 6})

    progress: list[SearchEvent] = []
    first = search(home, make(9), watch=lambda item, _: progress.append(item))
    check(first, 9)
    assert jobs_of(progress) == asha(make(9), list(first.trials), [1, 2, 4], 9)
    assert {len(row.epochs) for row in first.trials} == {1, 2, 6}, (
        "what was paused after epoch 4 is among the best three"
    )
    assert all(row.reason == f"pruned by asha after epoch {len(row.epochs)}" for row in first.of("pruned"))
    assert {row.attempts for row in first.of("complete")} == {4}
    more = search(home, make(15), watch=lambda item, _: progress.append(item))
    check(more, 15)
    assert facts(more)[:9] == facts(first)
    assert jobs_of(progress) == asha(make(15), list(more.trials), [1, 2, 4], 9, 15)
    assert len(more.of("complete")) > len(first.of("complete"))


def test_of_a_few_trials_the_best_three_are_trained_to_their_ends(any_home: Home) -> None:
    settings = {"pruner": {"name": "asha", "promote": True}, "trials": 5}
    study = search(any_home, toy(search=settings, train={"epochs": 6}), workers=2)
    check(study, 5)
    by_first = sorted(study.trials, key=lambda row: -(row.epochs[0].val_accuracy or 0.0))
    assert {row.number for row in study.of("complete")} == {row.number for row in by_first[:3]}
    assert {len(row.epochs) for row in study.of("pruned")} == {1}


def test_two_workers_give_exactly_the_trials_and_a_pause_charges_no_retry(any_home: Home) -> None:
    study = search(any_home, toy(search={**PROMOTE, "trials": 12, "retries": 0}, train={"epochs": 6}), workers=2)
    check(study, 12)
    assert study.of("complete")
    assert {len(row.epochs) for row in study.of("pruned")} <= {1, 2, 4}


def test_a_worker_that_dies_after_a_promotion_costs_one_retry(home: Home) -> None:
    settings = toy(search={**PROMOTE, "trials": 4, "retries": 1}, train={"epochs": 3})
    first = search(home, toy("same", search={**PROMOTE, "trials": 4}, train={"epochs": 3}))
    best = max(first.trials, key=lambda row: len(row.epochs)).number
    study = search(home, settings, payload={"kill": {str(best): 2}})
    assert facts(study) == facts(first)
    assert study.trials[best].attempts == first.trials[best].attempts + 1
    assert (interrupted(study), interrupted(first)) == ({best}, set()), "a promotion is no interruption"
    lost = search(home, toy("lost", search={**PROMOTE, "trials": 4, "retries": 1}), payload={"kill": {str(best): 9}})
    check(lost, 4)
    assert lost.trials[best].reason == "its worker died (signal SIGKILL: the memory may have run out), 2 times"


def test_a_stopped_search_leaves_trials_paused_for_the_next(home: Home) -> None:
    study = toy(search={**PROMOTE, "trials": 6}, train={"epochs": 6})
    slow = {"seconds": 0.25}  # a tick: the promoted trial is stopped before it ends an epoch
    stopped = search(home, study, payload=slow, watch=lambda item, _: item.kind == "promoted")
    assert [(row.state, row.paused) for row in stopped.trials] == [("running", None), ("running", 1)]
    assert stopped.paused == [stopped.trials[1]]
    assert [path.name for path in stopped.trials[1].folder.glob("attempt-*")] == ["attempt-1"]
    progress: list[SearchEvent] = []
    resumed = search(home, study, watch=lambda item, _: progress.append(item))
    check(resumed, 6)
    assert (progress[0].kind, progress[0].trial) == ("promoted", 0), (
        "by its reports it is paused; the decision is the same"
    )
    assert not resumed.paused


def test_a_paused_trial_shows_that_not_every_trial_fails(home: Home) -> None:
    study = search(home, toy(search=PROMOTE), payload={"fail": [1, 2, 3]})
    check(study, 8)
    assert [row.number for row in study.of("failed")] == [1, 2, 3]


def test_a_target_prunes_the_paused_trials_and_a_default_is_never_paused(home: Home) -> None:
    study = toy(search={**PROMOTE, "trials": 30, "target": 0.01}, train={"epochs": 6})
    done = search(home, study)
    check(done, len(done.trials))
    assert len(done.trials) < 30
    assert len(done.of("complete")) == 1
    known = search(home, toy("known", search=PROMOTE, first=KNOWN, train={"epochs": 6}))
    check(known, 8)
    assert (known.trials[0].state, known.trials[0].attempts) == ("complete", 1)
    assert known.trials[1].attempts > 1 or known.trials[1].state == "pruned"


def test_a_trial_at_chance_is_pruned_at_its_rung(home: Home) -> None:
    study = search(home, toy(search={**PROMOTE, "trials": 20, "seed": 1}), data=COUNTED)
    check(study, 20)
    assert {row.number for row in study.trials if (row.reason or "").startswith("pruned at chance")} == {
        row.number for row in study.trials if at_chance(row)
    }


@pytest.mark.nightly  # it tries hundreds of seeds; the simulation has such twins too
def test_a_twin_of_a_paused_trial_waits_and_ends_with_it_however_the_study_is_stopped(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pruner = {**PROMOTE["pruner"], "min_epochs": 2}
    made = with_twins("abcdd", falling=True, pruner=pruner, sampler={"name": "random"})
    study = search(Home(tmp_path / "unbroken"), made)
    check(study, 5)
    assert [(row.state, row.twin) for row in study.trials] == [
        *[("complete", None)] * 3,
        ("pruned", None),
        ("pruned", 3),
    ]
    assert study.trials[4].reported == study.trials[3].reported
    assert goes_on_after(study.trials[4]) == []
    broken, stops = in_pieces(Home(tmp_path / "broken"), lambda: made, [2, 3, 4])
    assert stops > 1
    assert facts(broken) == facts(study)
    record_property("figures", f"stopped {stops} times")


# --- twins ------------------------------------------------------------------------------------------------------------


def with_twins(pattern: str, falling: bool = False, **search: Any) -> Any:
    """A study of six points whose first trials are equal where the letters are: with `aab`, 1 is a twin of 0. With
    `falling`, each point has a lower value than the one before.
    """
    for seed in itertools.count():
        study = toy(search={"seed": seed, "trials": len(pattern), **search}, **SIX)
        asked = [optuna.create_study(sampler=study.sampler(number)).ask() for number in range(len(pattern))]
        configs = [study.sample(trial) for trial in asked]
        digests = [config.digest() for config in configs]
        values = list({config.digest(): toys.curve(config.to_table(), 1) for config in configs}.values())
        alike = [digests.index(digest) for digest in digests] == [pattern.index(letter) for letter in pattern]
        if alike and (not falling or values == sorted(values, reverse=True)):
            return study
    raise AssertionError


def test_a_twin_of_a_complete_trial_takes_its_value_without_training(home: Home) -> None:
    progress: list[SearchEvent] = []
    study = search(home, with_twins("abab"), watch=lambda item, _: progress.append(item))
    check(study, 4)
    for first, twin in ((0, 2), (1, 3)):
        a, b = study.trials[first], study.trials[twin]
        assert (b.state, b.value, b.twin, b.digest, b.reported) == ("complete", a.value, first, a.digest, a.reported)
        assert a.config["train"]["seed"] != b.config["train"]["seed"]  # what a twin may differ in
        assert b.epochs == a.epochs
        assert goes_on_after(b) == []  # no worker had it
        assert [item.kind for item in progress if item.trial == twin] == ["ended"]
    assert {row.number for row in study.ranked(twins=False)} == {0, 1}


def test_a_twin_does_not_count_among_the_kept_weights(home: Home) -> None:
    study = search(home, with_twins("aab", falling=True, keep=2))
    check(study, 3)
    assert [row.number for row in study.ranked()] == [0, 1, 2], "the twin ranks before the other that was trained"
    assert [row.number for row in study.trials if (row.folder / "weights.safetensors").exists()] == [0, 2]
    assert [row.number for row in study.kept] == [0, 2]


def test_a_twin_of_a_running_trial_waits_for_it(home: Home) -> None:
    study = search(home, with_twins("aab"), workers=2, payload={"seconds": 0.05})
    check(study, 3)
    assert (study.trials[1].twin, study.trials[1].value) == (0, study.trials[0].value)
    assert goes_on_after(study.trials[1]) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_twin_of_a_failed_trial_is_trained_and_the_next_is_its_twin(home: Home, workers: int) -> None:
    study = search(home, with_twins("aaab"), workers=workers, payload={"fail": [0], "seconds": 0.02})
    check(study, 4)
    assert [row.state for row in study.trials] == ["failed", "complete", "complete", "complete"]
    assert [row.twin for row in study.trials] == [None, None, 1, None]


def test_a_twin_of_a_pruned_trial_is_pruned_with_its_reports(home: Home) -> None:
    study = search(home, with_twins("abb", falling=True, pruner={"name": "asha", "reduction": 2}))
    check(study, 3)
    first, twin = study.trials[1:]
    assert (first.state, first.twin, first.reason) == ("pruned", None, "pruned by asha after epoch 1")
    assert (twin.state, twin.twin, twin.reason, twin.reported) == ("pruned", 1, first.reason, first.reported)


def test_twins_that_wait_when_a_search_stops_are_adopted_by_the_next(home: Home) -> None:
    """Trial 0 fails after the stop request: its waiting twin gets no worker any more, and must not delay the end."""
    study = with_twins("aab")
    began = time.monotonic()

    def stop_once_0_trains(item: SearchEvent, _: object) -> bool:
        """Once trial 2 has started, and trial 0 cannot be stopped any more before it fails."""
        if (item.kind, item.trial) != ("started", 2):
            return False
        log = home.trial("toy", 0) / "attempt-1" / "log.txt"
        while not (log.exists() and "goes on after" in log.read_text()):
            assert time.monotonic() < began + 30
            time.sleep(0.01)
        time.sleep(0.1)  # its one tick
        return True

    payload = {"seconds": 0.5, "ticks": 1, "fail": [0]}
    stopped = search(home, study, workers=2, payload=payload, watch=stop_once_0_trains)
    assert time.monotonic() - began < STOP_SECONDS / 2
    assert [row.state for row in stopped.trials] == ["failed", "running", "running"]
    study = search(home, study, workers=2)
    check(study, 3)
    assert [row.state for row in study.trials] == ["failed", "complete", "complete"]


def test_a_finite_space_ends_the_study_once_every_point_was_trained(home: Home) -> None:
    study = search(home, toy(search={"trials": 200}, **SIX), workers=2)
    assert len({row.digest for row in study.trials}) == 6
    check(study, len(study.trials))
    assert len(study.trials) < 60
    assert len(study.ranked(twins=False)) == 6


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_runs_in_order_and_resumes_at_its_next_point(home: Home) -> None:
    study = toy(search=GRID, **SIX)
    search(home, study, trials=2)
    done = search(home, study, workers=2, trials=100)
    check(done, 6)
    assert [(row.params["model.mlp.layers"], row.params["model.mlp.width"]) for row in done.trials] == [
        (layers, width) for layers in (1, 2) for width in (4, 8, 16)
    ]


def test_retry_failed_trains_the_failed_points_of_a_grid_again(home: Home) -> None:
    study = toy(search=GRID, **SIX)
    search(home, study, trials=6, payload={"fail": [1, 5]})
    done = search(home, study, trials=8, retry_failed=True)
    check(done, 8)
    assert [done.trials[i].digest for i in (6, 7)] == [done.trials[i].digest for i in (1, 5)]
    assert len({row.digest for row in done.of("complete")}) == 6


def test_a_failed_point_is_repeated_after_every_point_of_the_grid(home: Home) -> None:
    study = toy(search=GRID, **SIX)
    search(home, study, trials=3, payload={"fail": [1]})
    done = search(home, study, trials=7, retry_failed=True)
    check(done, 7)
    assert len({row.digest for row in done.trials[:6]}) == 6, "no point is skipped"
    assert done.trials[6].digest == done.trials[1].digest


# --- known configurations ---------------------------------------------------------------------------------------------

KNOWN: list[dict[str, Any]] = [{"optimizer": {"lr": 0.02}}, {"optimizer": {"lr": 0.05}}]


def test_known_configurations_are_tried_first_however_the_search_is_stopped(tmp_path: Path) -> None:
    study = toy(first=KNOWN)
    whole = search(Home(tmp_path / "whole"), study, trials=5)
    check(whole, 5)
    assert [row.params["optimizer.lr"] for row in whole.trials[:2]] == [0.02, 0.05]
    assert [row.first for row in whole.trials] == ["study file"] * 2 + [None] * 3
    assert whole.default == 0
    for length in (2, 1, 3, 100):
        broken = search(Home(tmp_path / "broken"), study, trials=5, watch=stop_every(length))
    assert facts(broken) == facts(whole)


def test_a_failed_configuration_is_repeated_after_all_known_ones_and_then_is_the_default(home: Home) -> None:
    search(home, toy(first=KNOWN), trials=1, payload={"fail": [0]})
    done = search(home, toy(first=KNOWN), trials=4, retry_failed=True)
    assert [row.params["optimizer.lr"] for row in done.trials[:3]] == [0.02, 0.05, 0.02]
    assert done.default == 2


def test_the_points_of_a_grid_come_after_known_configurations(home: Home) -> None:
    study = toy(search=GRID, first=[{"model": {"mlp": {"layers": 2, "width": 4}}}], **SIX)
    assert study.fixed == 7
    done = search(home, study)
    check(done, 7)
    assert [row.params["model.mlp.width"] for row in done.trials] == [4, 4, 8, 16, 4, 8, 16]
    assert [row.twin for row in done.trials] == [None] * 4 + [0] + [None] * 2


class Always(optuna.pruners.BasePruner):
    """Prunes every trial."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


def test_a_default_is_never_pruned_and_no_known_configuration_is_at_chance(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = [{"optimizer": {"lr": lr}} for lr in (0.08, 0.1)]
    study = toy(search={"pruner": {"name": "median"}}, first=poor)
    monkeypatch.setattr(study, "pruner", Always)
    done = search(home, study, trials=3, data=COUNTED)
    assert [row.reason for row in done.trials] == [None, *["pruned by median after epoch 1"] * 2]
    mild = toy("mild", search={"pruner": {"name": "median"}}, first=poor)
    done = search(home, mild, trials=2, data=COUNTED)
    assert mild.at_chance(mild.sample(FixedTrial(done.trials[1].params)), 1, done.trials[1].reported[1], done.data)
    assert [row.state for row in done.trials] == ["complete"] * 2


def test_a_space_of_one_point_is_one_trial(home: Home) -> None:
    check(search(home, toy(search={"trials": 20}, **ONE)), 1)


# --- files and the database -------------------------------------------------------------------------------------------


def test_only_the_best_trials_keep_their_weights(home: Home) -> None:
    study = search(home, toy(search={"keep": 2}), workers=2)
    held = {row.number for row in study.trials if (row.folder / "weights.safetensors").exists()}
    assert held == {row.number for row in study.ranked(twins=False)[:2]}
    fewer = search(home, toy(search={"keep": 1}))  # nothing is left to train
    assert fewer.best is not None
    assert [row.number for row in fewer.trials if (row.folder / "weights.safetensors").exists()] == [fewer.best.number]


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_only_trials_that_may_be_among_the_best_write_their_weights(home: Home, keep: int) -> None:
    study = search(home, toy(search={"keep": keep, "pruner": "none", "trials": 12}), workers=1)
    before: list[float] = []
    for row in study.trials:
        assert row.value is not None
        assert row.twin is None
        among = bool(keep) and (len(before) < keep or row.value >= sorted(before)[-keep])
        assert (row.folder / "wrote").exists() == among
        before.append(row.value)
    held = {row.number for row in study.trials if (row.folder / "weights.safetensors").exists()}
    assert held == {row.number for row in study.ranked()[:keep]}


def test_a_trials_folder_holds_a_study_file_that_repeats_this_trial(home: Home, tmp_path: Path) -> None:
    study = search(home, toy(), trials=3)
    row = study.trials[2]
    file = files.read(row.folder / "config.toml")
    again = search(Home(tmp_path / "again"), file.study())
    assert again.name == "toy-0002"
    assert [(trial.value, trial.config) for trial in again.trials] == [(row.value, row.config)]


def test_a_database_that_disappears_stops_the_study_and_is_not_created_again(home: Home, monkeypatch: Any) -> None:
    monkeypatch.setattr(pool, "LOCK_SECONDS", 0.0)

    def remove(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "ended":
            (home.path / "optuna.db").rename(home.path / "kept.db")

    with pytest.raises(StorageError, match=r"optuna.db: the database is gone"):
        search(home, toy(), watch=remove)
    assert not (home.path / "optuna.db").exists()
    (home.path / "kept.db").rename(home.path / "optuna.db")
    check(search(home, toy()), 8)


@pytest.mark.slow(seconds=2)
def test_a_database_locked_by_another_process_only_delays_the_study(home: Home) -> None:
    def lock_database(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "started" and item.trial == 1:
            other = sqlite3.connect(home.path / "optuna.db", check_same_thread=False)
            other.execute("BEGIN EXCLUSIVE")
            threading.Timer(1.5, lambda: (other.rollback(), other.close())).start()

    began = time.monotonic()
    check(search(home, toy(), trials=3, watch=lock_database), 3)
    assert time.monotonic() - began > 1.5


def test_a_database_locked_for_too_long_ends_the_search_in_one_line_and_it_resumes(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchfm.search.storage.BUSY_SECONDS", 0.3)
    locks: list[sqlite3.Connection] = []

    def lock_database(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "epoch" and (item.trial, item.epoch.index) == (1, 1):
            locks.append(sqlite3.connect(home.path / "optuna.db"))
            locks[0].execute("BEGIN EXCLUSIVE")

    with pytest.raises(StorageError, match=r"^study 'toy': database is locked$"), failures("study 'toy'"):
        search(home, toy(), trials=3, watch=lock_database)
    locks[0].close()
    check(search(home, toy(), trials=3), 3)


# --- proposals asked ahead --------------------------------------------------------------------------------------------

TPE: dict[str, Any] = {"search": {"sampler": {"name": "tpe", "startup_trials": 2}, "trials": 9}}


class Asks:
    """A study that counts the proposals it is asked for."""

    def __init__(self, **tables: Any) -> None:
        self.study, self.count = toy(**TPE, **tables), 0
        self.sampler, self.study.sampler = self.study.sampler, self.counted  # type: ignore[method-assign]

    def counted(self, number: int) -> Any:
        assert number == self.count, "one proposal a trial, in their order"
        self.count += 1
        return self.sampler(number)


def test_with_two_workers_the_next_trial_is_proposed_while_they_train_and_is_in_no_database(any_home: Home) -> None:
    asks, ahead = Asks(), set()

    def watch(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "epoch" and item.epoch.index == 2:
            stored = driving.stored(any_home, "toy").trials
            assert all(row.config for row in stored)
            ahead.add(asks.count - len(stored))

    check(search(any_home, asks.study, workers=2, trials=5, payload={"seconds": 0.05}, watch=watch), 5)
    assert ahead == {0, 1}, "the last trial has none after it"
    assert asks.count == 5


def test_with_one_worker_nothing_is_asked_ahead(home: Home) -> None:
    asks, ahead = Asks(), []
    watch = lambda item, _: ahead.append(asks.count - item.trial - 1) if item.kind == "epoch" else None  # noqa: E731
    search(home, asks.study, trials=5, watch=watch)
    assert ahead == [0] * 15


def test_a_proposal_that_no_worker_took_is_dropped(home: Home) -> None:
    asks = Asks()
    watch = lambda item, _: item.kind == "epoch" and asks.count > item.trial + 2  # noqa: E731
    stopped = search(home, asks.study, workers=2, payload={"seconds": 0.1}, watch=watch)
    assert len(stopped.trials) == asks.count - 1
    assert all(row.config for row in stopped.trials)
    study = search(home, toy(**TPE), workers=2)
    check(study, 9)
    assert len(study.of("complete")) == 9


def test_nothing_is_asked_ahead_after_a_stop_request(home: Home) -> None:
    asks = Asks()
    watch = lambda item, _: (item.kind, item.trial) == ("started", 1)  # noqa: E731
    stopped = search(home, asks.study, workers=2, payload={"seconds": 0.1}, watch=watch)
    assert len(stopped.trials) == asks.count == 2
    assert len(stopped.of("running")) == 2


def test_asked_ahead_a_finite_space_still_ends_and_twins_are_trained_once(home: Home) -> None:
    study = search(home, toy(search={"trials": 200}, **SIX), workers=2, payload={"fail": [0], "seconds": 0.01})
    assert len({row.digest for row in study.trials}) == 6
    check(study, len(study.trials))
    assert len(study.trials) < 60
    assert len({row.digest for row in study.ranked(twins=False)}) == len(study.ranked(twins=False))


def test_asked_ahead_a_study_whose_every_trial_fails_leaves_no_running_trial(home: Home) -> None:
    with pytest.raises(WorldError, match="none succeeded"):
        search(home, toy(**TPE), workers=2, payload={"fail": list(range(20))})
    assert driving.stored(home, "toy").of("running") == []


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_records_of_events_are_those_of_the_database(any_home: Home) -> None:
    study, ended = with_twins("aabc", pruner={"name": "asha", "reduction": 2}), {}

    def watch(item: SearchEvent, _: LocalEngine) -> None:
        if item.kind == "ended":
            ended[item.trial] = item.record

    stored = search(any_home, study, payload={"fail": [3]}, watch=watch)
    for row in stored.trials:
        record = ended[row.number]
        assert record.started == pytest.approx(row.started, abs=1e-5)
        assert record.ended == pytest.approx(row.ended, abs=1e-5)
        assert replace(record, started=row.started, ended=row.ended) == row


def test_a_trial_takes_a_transaction_when_it_begins_for_each_epoch_and_at_its_end(home: Home) -> None:
    commits: list[int] = []
    count = lambda _: commits.append(1)  # noqa: E731
    seen: list[int] = []
    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", count)
    try:
        watch = lambda item, _: seen.append(len(commits)) if item.kind == "ended" else None  # noqa: E731
        search(home, toy(search={"pruner": {"name": "hyperband"}}, first=KNOWN), trials=4, watch=watch)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "commit", count)
    assert [after - before for before, after in itertools.pairwise(seen)] == [1 + 3 + 1] * 3


def test_a_running_trial_without_its_config_is_adopted_with_the_parameters_it_has(home: Home) -> None:
    """Up to 0.3.0 a trial was created before its parameters, and these before its config."""
    whole = search(home, toy(), trials=3)
    other = Home(home.path / "other")
    search(other, toy(), trials=2)
    storage = open_storage(other)
    optuna_study = optuna.load_study(study_name="toy", storage=storage, sampler=optuna.samplers.RandomSampler(1))
    layers = optuna_study.ask().suggest_int("model.mlp.layers", 1, 3)
    driving.let_go(storage)
    progress: list[SearchEvent] = []
    study = search(other, toy(), trials=3, watch=lambda item, _: progress.append(item))
    check(study, 3)
    assert progress[0].kind == "started"
    assert study.trials[2].params.keys() == whole.trials[2].params.keys()
    assert (study.trials[2].params["model.mlp.layers"], study.trials[2].attempts) == (layers, 1)


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "random"},
        {"name": "tpe", "startup_trials": 2},
        *(
            pytest.param(sampler, marks=pytest.mark.slow)
            for sampler in (
                {"name": "cmaes", "startup_trials": 2},
                {"name": "qmc"},
                {"name": "gp", "startup_trials": 2},
            )
        ),
    ],
    ids=lambda table: table["name"],
)
def test_proposals_and_prunings_in_memory_are_those_of_a_study_in_the_database(
    home: Home, sampler: dict[str, Any]
) -> None:
    """Optuna alone, on its storage in a database, against the search. A twin copies its end, and the pruner is not
    asked about it.
    """
    study = toy(search={"sampler": sampler, "pruner": {"name": "hyperband"}, "trials": 9}, train={"epochs": 4})
    record = search(home, study)
    storage = open_storage(Home(home.path / "direct"), create=True)
    direct = optuna.create_study(storage=storage, study_name="toy", direction="maximize", pruner=study.pruner())
    for row in record.trials:
        direct.sampler = study.sampler(row.number)
        trial = direct.ask()
        config = study.sample(trial)
        assert trial.params == row.params, row.number
        reports = [toys.curve(config.to_table(), epoch) for epoch in range(1, 5)]
        for epoch, value in enumerate(reports[: len(row.reported)], 1):
            trial.report(value, epoch)
            pruned = row.twin is None and study.judges(config, epoch) and trial.should_prune()
            assert pruned == (row.twin is None and row.state == "pruned" and epoch == len(row.reported))
        state = TrialState.PRUNED if row.state == "pruned" else TrialState.COMPLETE
        direct.tell(trial, row.value, state)
    here = open_storage(home)
    pairs = zip(here.get_all_trials(record.number), direct.get_trials(), strict=True)
    for mine, theirs in pairs:
        assert mine.system_attrs == theirs.system_attrs
        assert (mine.params, mine.distributions, mine.values) == (theirs.params, theirs.distributions, theirs.values)
    driving.let_go(here)
    driving.let_go(storage)
