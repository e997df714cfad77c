"""The arithmetic of forecasts. Nothing is timed here: `python -m tests.bench forecast` compares with the clock."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from searchfm.config import SearchConfig
from searchfm.forecast import (
    END_SECONDS,
    FINAL_GAIN,
    LATE,
    RETRAIN_SECONDS,
    SEEDS,
    THREADED,
    TOP,
    TRIAL_SECONDS,
    Contest,
    Cost,
    costs,
    fill,
    final_threads,
    fitting_contest,
    make_forecast,
    reserve,
    retrain_seconds,
    search_seconds,
    space_note,
    trained_fraction,
)
from searchfm.format import size
from searchfm.records import DEFAULT, ORIGIN, Forecast, Prepared, StudyRecord, Timing, TrainResult, Trial
from tests.rows import epochs, header, trial

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
    cached = [replace(timings[0], frozen=3.0), timings[1]]
    slower = make_forecast(cached, 5, search=tree, subset=0.5, data=DATA, startup=4, trials=10, workers=1)
    assert slower is not None
    assert slower.seconds == pytest.approx(made.seconds + 3.0), "frozen stages are computed once"
    assert slower.retrain == pytest.approx(made.retrain + 3.0 * 1800 / 1000), "and once for all images"


def test_what_stays_and_the_checkpoints_of_a_search_must_fit_into_the_free_space() -> None:
    timings = [timing(1.0, 0.4, 0.1), replace(timing(2.0, 1.6, 0.4), parameters=3000)]

    def made(pruner: Any = "median", **keys: Any) -> Forecast:
        asked: dict[str, Any] = {"startup": 4, "trials": 10, "workers": 2, **keys}
        result = make_forecast(timings, 5, search=search(pruner, keep=2), subset=1.0, data=DATA, **asked)
        assert result is not None
        return result

    weights = 4 * 3000
    assert made().checkpoints == 2 * 3 * 3 * weights, "of two workers, three each, with Adam's moments"
    assert made(trials=1).checkpoints == 3 * 3 * weights
    paused = made({"name": "asha", "promote": True}).checkpoints - made().checkpoints
    assert paused == 10 * 3 * 4 * 2000, "one of each trial, of mean size"
    one, ten = made(trials=1), made()
    assert ten.disk - one.disk - weights * 2 == 9 * (one.disk - made(trials=0).disk - weights * 2), "two are kept"
    needed = ten.disk + ten.checkpoints
    assert space_note(ten, 10, needed, "runs") == ""
    assert space_note(ten, 10, needed - 1, "runs").startswith(
        f"runs: has {size(needed)} of free disk space, and the search is forecast to take up to {size(needed)}: "
    )
    left = ten.disk // 2 + ten.checkpoints  # of a search whose first half has ended
    assert (space_note(ten, 5, left + 1, "runs"), bool(space_note(ten, 5, left - 1, "runs"))) == ("", True)


# --- from trials that have ended --------------------------------------------------------------------------------------


CPU = "cpu (AVX2, 1 thread)"
MLP = {"model": {"name": "mlp"}, "train": {"batch_size": 32}}
LEAST = THREADED["float32"] // 32  # FLOP of an image: batches of 32 gain from several threads


def ended(seconds: float, number: int = 0, rates: Sequence[float] = (800.0, 800.0), **facts: Any) -> Trial:
    """A trial of two epochs, whose final training takes 2.25 s an epoch at 800 images a second."""
    trained = [replace(e, seconds=seconds / 2, samples_per_second=r) for e, r in zip(epochs(0, 2), rates, strict=True)]
    return trial(number=number, epochs=trained, **{"value": 0.9, "digest": f"{number}", "config": MLP, **facts})


def study(*trials: Trial, default: bool = False, data: Prepared = DATA) -> StudyRecord:
    known = {"first": [{ORIGIN: DEFAULT}]} if default else {}
    resolved = {"data": {"subset": 0.5}, **known}
    facts = vars(header({})) | {"resolved": resolved, "data": data}
    return StudyRecord(**facts, name="x", number=1, folder=Path("x"), trials=trials)


THREE = [ended(10.0, number) for number in range(3)]
FINAL = 2 * 1800 / 800


@pytest.mark.parametrize(
    ("seconds", "contest"), [(1e4, (3, 3)), (100, (3, 2)), (65, (2, 2)), (50, (0, 0)), (-1, (0, 0))]
)
def test_the_most_thorough_contest_that_fits_the_time_is_chosen(seconds: float, contest: tuple[int, int]) -> None:
    assert fitting_contest(study(*THREE), 1, seconds)[:2] == contest


def test_a_contest_includes_the_finalist_whose_final_training_takes_longest() -> None:
    six = retrain_seconds([10.0] * 6, 1, FINAL, 1)
    assert fitting_contest(study(*THREE), 1, six) == Contest(3, 2, six)
    assert fitting_contest(study(*THREE[:2], ended(10.0, 2, (800, 700))), 1, six)[:2] == (2, 2)


def test_a_contest_includes_the_default_once() -> None:
    last = ended(40.0, 0, value=0.1)
    others = [ended(10.0, number) for number in range(1, 4)]
    expensive = retrain_seconds([10.0, 10.0, 10.0, 40.0], 3, FINAL, 1)
    assert fitting_contest(study(last, *others, default=True), 1, 1e4) == Contest(3, 3, expensive)
    even = retrain_seconds([10.0] * 4, 3, FINAL, 1)
    failed = trial(number=0, state="failed", value=None)
    assert fitting_contest(study(failed, *others, default=True), 1, 1e4) == Contest(3, 3, even), (
        "one that failed, by the others"
    )
    assert fitting_contest(study(*THREE, default=True), 1, 1e4)[2] == retrain_seconds([10.0] * 3, 3, FINAL, 1)


@pytest.mark.parametrize(
    ("timeout", "finalists", "seeds"),
    [(3600, 3, 3), (240, 3, 2), (180, 2, 2), (150, 0, 0), (10, 0, 0)],
)
def test_the_reserve_is_for_the_contest_that_fits_into_a_third_at_least_for_the_final_training(
    timeout: float, finalists: int, seeds: int
) -> None:
    expected = END_SECONDS + retrain_seconds([10.0] * finalists, seeds, FINAL, 1)
    assert reserve(study(*THREE), 1, timeout, timeout) == pytest.approx(expected)
    assert reserve(study(), 1, timeout, timeout) == 0


def test_without_a_contest_the_best_trial_wins_whose_final_training_fits() -> None:
    best, middle, cheap = (
        ended(10.0, number, (rate, rate), value=value)
        for number, (rate, value) in enumerate([(8.0, 0.93), (80.0, 0.92), (800.0, 0.91)])
    )
    three = study(cheap, middle, best)
    finals = [retrain_seconds([], 0, 2 * 1800 / rate, 1) for rate in (8, 80, 800)]
    for left, expected in (
        (finals[0], Contest(0, 0, finals[0], 0)),
        (finals[0] / LATE, Contest(0, 0, finals[0], 0)),  # a little late, but the best
        (finals[0] / LATE - 1, Contest(0, 0, finals[1], 1)),
        (finals[1] / LATE - 1, Contest(0, 0, finals[2], 2)),
        (finals[2] / LATE - 1, Contest(0, 0, finals[0], 0)),  # none fits
        (-1.0, Contest(0, 0, finals[0], 0)),
    ):
        assert fitting_contest(three, 1, left, most=1.0) == expected, left
        assert reserve(three, 1, 3.0, left + END_SECONDS) == END_SECONDS + expected.seconds, left


def test_what_a_trial_costs_once_more_is_what_its_own_epochs_took() -> None:
    one = ended(6.0, rates=(400.0, 800.0))
    assert costs(study(one), 1) == [Cost(0, 6.0, 1800 / 400 + 1800 / 800)]
    cached = replace(one, result=TrainResult(0.5, frozen_seconds=4.0))
    assert costs(study(cached), 1) == [Cost(0, 6.0, 4.0 * 1800 / 800 + 1800 / 400 + 1800 / 800)]
    known = replace(DATA, available=1000)
    several = [ended(6.0, number, (400.0, 800.0)) for number in range(5)]
    assert [cost[1:] for cost in costs(study(*several, data=known), 1)] == [(6.0, 1200 / 400 + 1200 / 800)] * 5


@pytest.mark.parametrize(
    ("precision", "flops", "threads"),
    [
        ("float32", LEAST - 1, 1),
        ("float32", LEAST, 8),
        ("", LEAST, 8),
        ("bfloat16", LEAST, 1),
        ("bfloat16", 4 * LEAST, 8),
    ],
)
def test_the_final_training_has_several_threads_for_large_batches_of_large_nets(
    precision: str, flops: int, threads: int
) -> None:
    result = TrainResult(0.5, flops=flops, precision=precision)
    assert final_threads(result, 32, 8) == threads
    assert final_threads(result, 32, 1) == 1


@pytest.mark.parametrize(
    ("model", "flops", "precision", "device", "workers", "gain"),
    [
        ("cnn", LEAST, "float32", CPU, 2, FINAL_GAIN),
        ("residual", 10 * LEAST, "float32", CPU, 8, FINAL_GAIN),
        ("cnn", LEAST - 1, "float32", CPU, 2, 1.0),
        ("cnn", LEAST, "float32", CPU, 1, 1.0),
        ("cnn", LEAST, "bfloat16", CPU, 2, 1.0),
        ("mlp", LEAST, "float32", CPU, 2, 1.0),
        ("cnn", LEAST, "float32", "NVIDIA H100 (cuda:0)", 2, 1.0),
    ],
)
def test_the_final_training_of_larger_nets_of_convolutions_gains_from_a_second_core(
    model: str, flops: int, precision: str, device: str, workers: int, gain: float
) -> None:
    result = TrainResult(0.5, flops=flops, device=device, precision=precision, frozen_seconds=4.0)
    one = ended(6.0, config=MLP | {"model": {"name": model}}, result=result)
    frozen = 4.0 * 1800 / 800
    assert costs(study(one), workers) == [Cost(0, 6.0, pytest.approx(frozen + FINAL / gain))]
