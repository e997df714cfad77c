"""How `choose` selects the winner among finalists, and the interval it reports."""

import numpy as np
import pytest

from searchfm.records import FinalistFigures
from searchfm.retraining import Selection, choose


def finalist(
    trial: int, correct: np.ndarray, *, value: float = 0.9, flops: int = 100, parameters: int = 10
) -> tuple[FinalistFigures, np.ndarray]:
    values, seeds = tuple(correct.mean(axis=1).tolist()), tuple(range(len(correct)))
    return FinalistFigures(trial, value, values, float(correct.mean()), 1.0, seeds, parameters, flops), correct


def selected(*finalists: tuple[FinalistFigures, np.ndarray]) -> Selection:
    return choose([one for one, _ in finalists], {one.trial: correct for one, correct in finalists})


def answers(fraction: float, seed: int, seeds: int = 3) -> np.ndarray:
    """(seeds, 1000) answers, correct with probability `fraction`; half of the images are correct for all seeds."""
    rng = np.random.default_rng(seed)
    correct = rng.random((seeds, 1000)) < fraction
    correct[:, :500] = True
    return correct


def test_the_best_mean_wins_whatever_its_value_in_the_search() -> None:
    better = answers(0.9, 1)
    selection = selected(finalist(4, answers(0.7, 0), value=0.95), finalist(2, better, value=0.91, flops=10**6))
    assert selection.winner == 2
    assert selection.tie == ()
    assert selection.optimism == pytest.approx(0.91 - better.mean())


def test_of_finalists_that_cannot_be_distinguished_the_one_of_minimum_cost_wins() -> None:
    first, second, small, far = (
        finalist(0, answers(0.905, 0), flops=100, parameters=20),
        finalist(1, answers(0.900, 1), flops=50, parameters=20),
        finalist(2, answers(0.900, 2), flops=50, parameters=10),
        finalist(3, answers(0.500, 3), flops=1, parameters=1),
    )
    selection = selected(first, second, small, far)
    assert selection.tie == (0, 1, 2)
    assert selection.winner == small[0].trial


def test_the_interval_is_the_winners_and_holds_its_mean() -> None:
    first = finalist(0, answers(0.9, 0))
    selection = selected(first, finalist(1, answers(0.6, 1)))
    validation = selection.validation
    assert validation.low is not None
    assert validation.high is not None
    assert validation.low < validation.accuracy == first[0].mean < validation.high
    assert validation.n == 1000
    assert 0 < (validation.spread or 0) < 0.02


def test_one_seed_each_gives_a_winner_without_an_interval() -> None:
    selection = selected(finalist(0, answers(0.9, 0, seeds=1)), finalist(1, answers(0.6, 1, seeds=1)))
    assert selection.winner == 0
    assert selection.validation.low is selection.validation.spread is None


def test_a_single_finalist_wins_with_an_interval_of_its_own() -> None:
    selection = selected(finalist(7, answers(0.9, 0)))
    assert (selection.winner, selection.tie) == (7, ())
    assert selection.validation.low is not None
