"""Promotion: the rungs, which paused trial goes on, and what the sampler sees of paused ones."""

from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from searchfm.config import rungs
from searchfm.home import Home
from searchfm.search.memory import MemoryStudy
from searchfm.search.promotion import Rungs
from searchfm.search.storage import open_storage
from searchfm.search.study import Study
from tests import toys
from tests.driving import let_go, toy


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 4, 20), [1, 4]),  # 16 is in the last third
        ((1, 2, 12), [1, 2, 4, 8]),  # 8 is not
        ((3, 3, 27), [3, 9]),
        ((2, 2, 2), []),
        ((1, 2, 1), []),
    ],
)
def test_rungs_are_powers_of_the_reduction_but_none_in_the_last_third(
    arguments: tuple[int, int, int], expected: list[int]
) -> None:
    assert rungs(*arguments) == expected


def test_the_best_of_the_highest_rung_goes_first_and_each_once() -> None:
    ladder = Rungs([1, 2], 2)
    paused = set(range(5))
    ladder.add(0, {1: 0.5})
    assert ladder.promotable(paused) is None, "of one trial none is promoted"
    for trial, value in enumerate((0.7, 0.7, 0.9, 0.1), 1):
        ladder.add(trial, {1: value})
    assert ladder.promotable(paused) == 3
    assert ladder.promotable(paused - {3}) == 1, "of equal ones the earlier; 2 of 5 are promoted"
    assert ladder.promotable(paused - {1, 3}) is None
    ladder.add(3, {2: 0.2})
    assert ladder.promotable(paused) == 1, "3 is paused at the second rung"
    ladder.add(1, {2: 0.1})
    assert ladder.promotable(paused) == 3
    assert [ladder.best(paused - told) for told in ({9}, {3}, {1, 3}, set(range(5)))] == [3, 1, 2, None]
    assert [ladder.after(epoch) for epoch in (0, 1, 2)] == [1, 2, None]


def test_promotion_has_rungs_and_prunes_nothing_itself() -> None:
    def make(**pruner: Any) -> Study:
        settings = {"name": "asha", "min_epochs": 2, "reduction": 3, **pruner}
        return toy(search={"pruner": settings, "trials": 9}, train={"epochs": 9})

    assert make().rungs().epochs == ()
    study = make(promote=True)
    assert (study.rungs().epochs, study.rungs().reduction) == ([2, 6], 3)
    assert isinstance(study.pruner(), optuna.pruners.NopPruner)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "gp", "qmc"])
def test_a_sampler_proposes_the_same_whether_trials_are_paused_or_pruned(home: Home, sampler: str) -> None:
    startup = {} if sampler in ("random", "qmc") else {"startup_trials": 3}
    study = toy(search={"sampler": {"name": sampler, **startup}})
    storage = open_storage(home, create=True)

    def proposals(state: str) -> list[dict[str, Any]]:
        """Of two trials that are paused, pruned or running, three complete ones, and one more after each."""
        number = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], state)
        memory = MemoryStudy(storage, number, state, study.pruner())
        for trial_number in range(8):
            trial = memory.ask(study.sampler(trial_number))
            config = study.sample(trial).to_table()
            memory.write(trial_number)
            trial.report(toys.curve(config, 1), 1)
            memory.write(trial_number)
            if trial_number % 2:
                memory.tell(trial, toys.curve(config, 3), TrialState.COMPLETE)
            elif state == "pruned":
                memory.tell(trial, None, TrialState.PRUNED)
            elif state == "paused":
                memory.pause(trial_number, trial_number)
        proposed = [trial.params for trial in memory.trials]
        if state == "paused":
            in_database = storage.get_all_trials(number)
            assert [trial.state.name for trial in in_database] == ["RUNNING", "COMPLETE"] * 4
            assert memory.trial(0).state is TrialState.RUNNING
            memory.unpause(0)
            memory.optuna.tell(0, state=TrialState.PRUNED)
            assert [trial.params for trial in memory.trials] == proposed
        return proposed

    paused = proposals("paused")
    assert paused == proposals("pruned")
    if sampler == "tpe":
        assert paused != proposals("running"), "it takes running ones for bad"
    let_go(storage)
