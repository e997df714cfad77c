"""Honesty, measured: what is said of a winner holds as often as is said; what a search says of its best does not."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from searchfm.stats import mcnemar
from tests.honesty import DRAWS, SEEDS, TEST, TRIALS, Outcome, studies

pytestmark = pytest.mark.nightly

STUDIES = 120
CHANCE = 0.001  # that a bound here fails although all is as it should be

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return studies(STUDIES)


def share(values: Sequence[bool]) -> str:
    return f"{sum(values)} of {len(values)} ({np.mean(values):.1%})"


def test_a_further_seed_falls_inside_about_as_often_as_is_said(
    outcomes: list[Outcome], record_property: Record
) -> None:
    inside = [one.further_inside for one in outcomes]
    widths = [one.high - one.low for one in outcomes]
    record_property(
        "figures",
        f"inside the 95% interval of {SEEDS} fresh seeds: {share(inside)} searches of {TRIALS} trials; "
        f"half its width {np.mean(widths) / 2:.2%}",
    )
    assert sum(inside) >= binom.ppf(CHANCE, STUDIES, 0.95)
    spread = np.std([one.further - one.mean for one in outcomes])
    assert np.mean(widths) < 8 * spread, "nor is it so wide that anything would fall inside"


def test_the_searchs_own_best_value_does_not(outcomes: list[Outcome], record_property: Record) -> None:
    further, best = [one.further_inside for one in outcomes], [one.best_inside for one in outcomes]
    luck = np.array([one.best - one.mean for one in outcomes])
    error = luck.std(ddof=1) / STUDIES**0.5
    record_property(
        "figures", f"inside: {share(best)}; above the mean of fresh seeds by {luck.mean():.2%} ± {error:.2%}"
    )
    assert sum(best) < sum(further)
    assert mcnemar(further, best) < 0.05
    assert ttest_1samp(luck, 0, alternative="greater").pvalue < CHANCE


def test_the_test_interval_covers_the_accuracy_on_held_out_images(
    outcomes: list[Outcome], record_property: Record
) -> None:
    """The accuracy on 897 images held out is itself measured, so an interval of 95% for the true one holds it in 94%:
    the two differ by sqrt(1 / 100 + 1 / 897) where the interval reckons with sqrt(1 / 100).
    """
    covered, held = np.mean([one.covered for one in outcomes]), [one.held_inside for one in outcomes]
    record_property("figures", f"held: {share(held)}; over {DRAWS} test parts a model {covered:.1%}")
    assert 0.92 < covered < 0.98
    assert sum(held) >= binom.ppf(CHANCE, STUDIES, 0.937)
    assert TEST == 100
