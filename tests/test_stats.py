"""The statistics, against figures that others have published."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from searchfm.stats import Accuracy, dispersion, flips, further_seed, holm, mcnemar, paired


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_gives_newcombes_table(correct: int, n: int, interval: tuple[float, float]) -> None:
    assert Accuracy(correct, n).interval == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (1, 7), (250, 500), (9_999, 10_000), (10_000, 10_000)])
def test_wilson_is_scipys(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert Accuracy(correct, n).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 1), (97, 1000), (500, 1000), (9_999, 10_000)])
def test_the_upper_bound_is_scipys_exact_one(correct: int, n: int) -> None:
    expected = binomtest(correct, n, alternative="less").proportion_ci(0.99, method="exact")
    assert Accuracy(correct, n).upper(0.99) == pytest.approx(expected.high, abs=1e-9)


def test_wilson_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for fraction in (0.5, 0.9, 0.97):
        counts, times = np.unique(rng.binomial(300, fraction, 20_000), return_counts=True)
        ends = [Accuracy(int(correct), 300).interval for correct in counts]
        covered = np.average([low <= fraction <= high for low, high in ends], weights=times)
        assert 0.93 < covered < 0.97, fraction


def test_mcnemar_gives_fagerlands_example() -> None:
    """Airway hyper-responsiveness of 21 children before and after: 1 and 7 changed sides."""
    before = np.array([True] + [False] * 7 + [True] * 1 + [False] * 12)
    after = np.array([False] + [True] * 7 + [True] * 1 + [False] * 12)
    assert mcnemar(before, after) == pytest.approx(0.039, abs=5e-4)
    assert mcnemar(after, before) == mcnemar(before, after)


@pytest.mark.parametrize(("gains", "losses"), [(0, 1), (3, 8), (40, 61), (500, 600)])
def test_mcnemar_is_the_mid_p_of_scipys_binomial(gains: int, losses: int) -> None:
    first = np.arange(gains + losses) < gains
    total = binom(gains + losses, 0.5)
    assert mcnemar(first, ~first) == pytest.approx(2 * total.cdf(gains) - total.pmf(gains), abs=1e-12)


def test_models_that_agree_or_are_even_cannot_be_distinguished() -> None:
    correct = np.array([True, False, True, True])
    assert mcnemar(correct, correct) == 1.0
    assert mcnemar(np.array([True, False, True, False]), np.array([False, True, True, False])) == 1.0
    assert mcnemar(correct[:0], correct[:0]) == 1.0


def test_mcnemar_is_wrong_about_equals_as_seldom_as_it_says() -> None:
    rng = np.random.default_rng(0)
    alarms = [mcnemar(*(rng.random((2, 400)) < 0.9)) < 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(alarms) < 0.06


def test_holm_equals_r() -> None:
    """R's `p.adjust(p, "holm")`."""
    assert holm([0.05, 0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.09, 0.05, 0.08, 0.09, 0.09])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def trainings(rng: np.random.Generator, chances: np.ndarray, seeds: int, spread: float) -> np.ndarray:
    """Predictions (seeds, N): each is correct with its image's chance; `spread` makes whole seeds better or worse."""
    shift = spread * rng.standard_normal((seeds, 1))
    logits = np.log(chances / (1 - chances)) + shift
    return np.asarray(rng.random((seeds, len(chances))) < 1 / (1 + np.exp(-logits)))


def images(rng: np.random.Generator, count: int = 300) -> np.ndarray:
    """The chances of images: most are easy, some hard."""
    return rng.beta(4, 0.5, count).clip(0.001, 0.999)


def test_flips_are_the_variance_of_independent_predictions() -> None:
    """Against the closed form: the sum of p (1 - p) over the images, over their number squared."""
    rng = np.random.default_rng(0)
    chances = images(rng)
    variance = np.mean([flips(trainings(rng, chances, 3, 0.0)) for _ in range(500)])
    assert variance == pytest.approx(float((chances * (1 - chances)).sum()) / 300**2, rel=0.02)


def test_dispersion_is_one_for_independent_predictions_and_more_where_whole_seeds_differ() -> None:
    rng = np.random.default_rng(0)
    for spread, least, most in ((0.0, 1.0, 1.1), (0.5, 2.0, 10.0)):
        pooled = dispersion([trainings(rng, images(rng), 40, spread) for _ in range(10)])
        assert pooled is not None
        assert pooled.freedom == 390
        assert least <= pooled.factor <= most, spread


def test_one_seed_each_says_nothing_of_the_spread() -> None:
    assert dispersion([np.ones((1, 10)), np.zeros((1, 10))]) is None


def test_seeds_that_never_differ_leave_nothing_to_predict() -> None:
    same = np.tile(np.arange(10) < 9, (3, 1))
    pooled = dispersion([same])
    assert pooled is not None
    assert further_seed(same, pooled) == (0.9, 0.9)


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_a_further_seed_falls_inside_as_often_as_stated(spread: float) -> None:
    """Three models with three seeds each; a fourth training of the first falls inside its interval in 95% of cases."""
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(1000):
        models = [trainings(rng, chances, 4, spread) for chances in (images(rng), images(rng), images(rng))]
        pooled = dispersion([model[:3] for model in models])
        assert pooled is not None
        low, high = further_seed(models[0][:3], pooled)
        inside.append(low <= models[0][3].mean() <= high)
    assert 0.93 < np.mean(inside) < 0.985


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_equal_models_are_distinguished_as_rarely_as_stated(spread: float) -> None:
    rng = np.random.default_rng(2)
    alarms = []
    for _ in range(1000):
        chances = images(rng)
        models = [trainings(rng, chances, 3, spread) for _ in range(3)]
        alarms.append(paired(models[0], models[1], dispersion(models)) < 0.05)
    assert 0.01 < np.mean(alarms) < 0.09
    assert paired(models[0], models[0], None) == 1.0


def test_different_models_are_distinguished_whichever_comes_first() -> None:
    rng = np.random.default_rng(3)
    chances = images(rng)
    models = [trainings(rng, chances, 3, 0.1), trainings(rng, chances * 0.9, 3, 0.1)]
    pooled = dispersion(models)
    assert paired(*models, pooled) < 0.01
    assert paired(*models, pooled) == paired(*reversed(models), pooled)


def test_with_one_seed_the_paired_test_is_mcnemars_without_correction() -> None:
    """10 against 2 changed sides: chi-square (10 - 2)^2 / 12 = 5.333, one degree of freedom."""
    first = np.array([[True] * 10 + [False] * 2 + [True] * 50])
    second = np.array([[False] * 10 + [True] * 2 + [True] * 50])
    assert paired(first, second, None) == pytest.approx(0.020921, abs=1e-6)
