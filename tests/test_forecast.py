"""The arithmetic of forecasts. Nothing is timed here: `python -m tests.bench forecast` compares with the clock."""

from typing import Any

import pytest

from searchfm.config import SearchConfig
from searchfm.forecast import (
    RETRAIN_SECONDS,
    SEEDS,
    TOP,
    TRIAL_SECONDS,
    fill,
    make_forecast,
    retrain_seconds,
    search_seconds,
    trained_fraction,
)
from searchfm.records import Prepared, Timing

DATA = Prepared("sha", (1, 8, 8), tuple("0123456789"), train=800, validation=200)


def timing(work: float, train: float | None, validation: float = 0.0) -> Timing:
    return Timing(6, work, 1000, train, None if train is None else validation)


def search(pruner: Any, **keys: Any) -> SearchConfig:
    return SearchConfig.from_table({"pruner": pruner, **keys})


def test_what_was_not_timed_lies_between_its_neighbours_on_a_logarithmic_scale() -> None:
    filled = fill([timing(100.0, None), timing(1.0, 0.1, 0.02), timing(1e4, 10.0, 2.0), timing(1e6, None)])
    assert [item.train for item in filled] == pytest.approx([1.0, 0.1, 10.0, 10.0])
    assert [item.validation for item in filled] == pytest.approx([0.2, 0.02, 2.0, 2.0])


def test_without_a_timing_there_is_no_forecast() -> None:
    nothing = [timing(1.0, None), timing(2.0, None)]
    assert fill(nothing) == []
    made = make_forecast(nothing, 1, search=search("median"), subset=1.0, data=DATA, startup=4, trials=3, workers=2)
    assert made is None


@pytest.mark.parametrize(
    ("pruner", "epochs", "fraction"),
    [
        ("none", 9, 1.0),
        ("patient", 9, 1.0),
        ("median", 9, 0.5 + 0.5 / 3),
        ({"name": "median", "min_epochs": 6}, 9, 0.5 + 0.5 * 6 / 9),
        ({"name": "percentile", "keep": 25.0}, 9, 0.25 + 0.75 / 3),
        ({"name": "asha", "reduction": 3}, 9, (1 + 2 / 3 + 6 / 9) / 9),  # rungs at 1 and 3; 9 is the end
        ({"name": "asha", "reduction": 3, "min_epochs": 7}, 9, 1.0),  # no rung in the last third
        ("median", 1, 1.0),
        ("asha", 1, 1.0),
        ("hyperband", 1, 1.0),
    ],
)
def test_pruning_saves_what_its_rule_says(pruner: Any, epochs: int, fraction: float) -> None:
    assert trained_fraction(search(pruner), epochs) == pytest.approx(fraction)


def test_hyperband_lies_between_its_most_and_its_least_aggressive_bracket() -> None:
    mean = trained_fraction(search({"name": "hyperband", "reduction": 3}), 27)
    assert trained_fraction(search({"name": "asha", "reduction": 3}), 27) < mean < 1


def test_workers_share_the_trials_and_wait_half_a_trial_at_the_end() -> None:
    one = TRIAL_SECONDS + 2.0
    assert search_seconds([2.0] * 10, 1) == pytest.approx(10 * one)
    assert search_seconds([2.0] * 10, 2) == pytest.approx(5 * one + one / 4)
    assert search_seconds([2.0], 8) == pytest.approx(one)


def test_retraining_is_the_finalists_with_each_seed_and_the_final_training() -> None:
    alone = retrain_seconds([], 3, 7.0, 2)
    assert alone == pytest.approx(RETRAIN_SECONDS + TRIAL_SECONDS + 7.0)
    assert retrain_seconds([1.0, 2.0], 3, 7.0, 1) == pytest.approx(alone + 3 * (3.0 + 2 * TRIAL_SECONDS))


def test_a_forecast_counts_start_up_trials_in_full_and_the_final_training_on_all_data() -> None:
    timings = [timing(1.0, 0.4, 0.1), timing(2.0, 1.6, 0.4)]
    tree = search("median", keep=2)
    made = make_forecast(timings, 5, search=tree, subset=0.5, data=DATA, startup=4, trials=10, workers=1)
    assert made is not None
    whole = 6 * 1.25  # epochs x mean of training and validation
    assert made.seconds == pytest.approx(10 * (TRIAL_SECONDS + whole))
    assert made.pruned == pytest.approx(10 * TRIAL_SECONDS + 4 * whole + 6 * whole * (1 - 0.5 * 4 / 6))
    final = 6 * 1.0 * 1800 / 800  # both parts, the subset's other half too; no validation
    assert made.retrain == pytest.approx(retrain_seconds([whole] * TOP, SEEDS, final, 1))
    assert (made.trials, made.workers, made.memory, made.configs) == (10, 1, 5, 2)
    smaller = make_forecast(timings, 5, search=tree, subset=0.5, data=DATA, startup=4, trials=5, workers=1)
    assert smaller is not None
    assert smaller.disk < made.disk
