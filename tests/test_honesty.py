"""Honesty, measured: a winner's intervals hold as often as they claim; a search's best value is too high."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from searchfm.stats import mcnemar
from tests.honesty import DRAWS, SEEDS, TEST, TRIALS, Outcome, studies

pytestmark = pytest.mark.nightly

STUDIES = 120
CHANCE = 0.001  # probability that a bound here fails although nothing is wrong

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return studies(STUDIES)


def fraction(values: Sequence[bool]) -> str:
    return f"{sum(values)} of {len(values)} ({np.mean(values):.1%})"


def test_a_further_seed_falls_inside_the_interval_in_about_95_percent_of_searches(
    outcomes: list[Outcome], record_property: Record
) -> None:
    inside = [one.further_inside for one in outcomes]
    widths = [one.high - one.low for one in outcomes]
    record_property(
        "figures",
        f"inside the 95% interval of {SEEDS} fresh seeds: {fraction(inside)} searches of {TRIALS} trials; "
        f"half its width {np.mean(widths) / 2:.2%}",
    )
    assert sum(inside) >= binom.ppf(CHANCE, STUDIES, 0.95)
    spread = np.std([one.further - one.mean for one in outcomes])
    assert np.mean(widths) < 8 * spread, "so wide an interval would hold anything"


def test_the_searchs_best_value_falls_inside_less_often_and_is_too_high(
    outcomes: list[Outcome], record_property: Record
) -> None:
    further, best = [one.further_inside for one in outcomes], [one.best_inside for one in outcomes]
    luck = np.array([one.best - one.mean for one in outcomes])
    error = luck.std(ddof=1) / STUDIES**0.5
    record_property(
        "figures", f"inside: {fraction(best)}; above the mean of fresh seeds by {luck.mean():.2%} ± {error:.2%}"
    )
    assert sum(best) < sum(further)
    assert mcnemar(np.array(further), np.array(best)) < 0.05
    assert ttest_1samp(luck, 0, alternative="greater").pvalue < CHANCE


def test_the_test_interval_covers_the_accuracy_on_held_out_images(
    outcomes: list[Outcome], record_property: Record
) -> None:
    """A 95% interval for the true accuracy holds the one measured on 897 images in only 94%: their difference has a
    spread proportional to sqrt(1 / 100 + 1 / 897), the interval assumes sqrt(1 / 100).
    """
    covered, held = np.mean([one.covered for one in outcomes]), [one.held_inside for one in outcomes]
    record_property("figures", f"held: {fraction(held)}; over {DRAWS} test parts a model {covered:.1%}")
    assert 0.92 < covered < 0.98
    assert sum(held) >= binom.ppf(CHANCE, STUDIES, 0.937)
    assert TEST == 100
