"""Who wins among finalists, and what is said of it."""

import numpy as np
import pytest

from searchfm.retrain.finalists import Finalist, choose


def finalist(trial: int, right: np.ndarray, *, value: float = 0.9, flops: int = 100, parameters: int = 10) -> Finalist:
    seeds = tuple(range(len(right)))
    return Finalist(trial, value, seeds, right, parameters=parameters, flops=flops, seconds=1.0)


def answers(share: float, seed: int, seeds: int = 3) -> np.ndarray:
    """Answers (seeds, 1000), each right with the chance given, but half of the images the same for all."""
    rng = np.random.default_rng(seed)
    right = rng.random((seeds, 1000)) < share
    right[:, :500] = True
    return right


def test_the_best_mean_wins_whatever_the_search_said() -> None:
    verdict = choose([finalist(4, answers(0.7, 0), value=0.95), finalist(2, answers(0.9, 1), value=0.91, flops=10**6)])
    assert verdict.winner.trial == 2
    assert verdict.tie == ()
    assert verdict.optimism == pytest.approx(0.91 - verdict.winner.mean)
    assert verdict.winner.mean == pytest.approx(np.mean(verdict.winner.values))


def test_of_those_that_cannot_be_told_apart_the_cheapest_wins() -> None:
    dear, cheap, small, far = (
        finalist(0, answers(0.905, 0), flops=100, parameters=20),
        finalist(1, answers(0.900, 1), flops=50, parameters=20),
        finalist(2, answers(0.900, 2), flops=50, parameters=10),
        finalist(3, answers(0.500, 3), flops=1, parameters=1),
    )
    verdict = choose([dear, cheap, small, far])
    assert verdict.tie == (0, 1, 2)
    assert verdict.winner is small


def test_the_interval_is_about_the_winner_and_holds_its_mean() -> None:
    verdict = choose([finalist(0, answers(0.9, 0)), finalist(1, answers(0.6, 1))])
    said = verdict.validation()
    assert said["low"] < said["accuracy"] == verdict.winner.mean < said["high"]
    assert said["n"] == 1000
    assert 0 < said["spread"] < 0.02


def test_one_seed_each_gives_a_winner_without_an_interval() -> None:
    verdict = choose([finalist(0, answers(0.9, 0, seeds=1)), finalist(1, answers(0.6, 1, seeds=1))])
    assert verdict.winner.trial == 0
    assert verdict.validation()["low"] is verdict.validation()["spread"] is None


def test_a_single_finalist_wins_with_an_interval_of_its_own() -> None:
    verdict = choose([finalist(7, answers(0.9, 0))])
    assert (verdict.winner.trial, verdict.tie) == (7, ())
    assert verdict.interval is not None
