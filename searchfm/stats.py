"""Intervals of accuracies, and tests of differences between two. Numbers only, nothing of studies.

Distribution functions come from scipy.special, in functions, since a command that only shows intervals needs none: its
import takes 0.25 s of CPU, that of scipy.stats a second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95  # of every interval we show
Correct = NDArray[np.bool_]  # whether a model is correct about each image


@dataclass(frozen=True)
class Accuracy:
    """Predictions of one model that are correct, of n."""

    correct: int
    n: int  # images, at least 1

    @classmethod
    def of(cls, fraction: float, n: int) -> "Accuracy":
        """From the fraction of n images."""
        return cls(round(fraction * n), n)

    @property
    def fraction(self) -> float:
        """Correct, of all: 0 to 1."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval (low, high) of the fraction (Wilson 1927, without continuity correction; Newcombe 1998
        compares it with six others).

        It is about one fixed model, and images drawn like these; another seed is not in it.
        """
        p, n, z = self.fraction, self.n, NormalDist().inv_cdf((1 + LEVEL) / 2)
        center = p + z**2 / (2 * n)
        half = z * math.sqrt((p * (1 - p) + z**2 / (4 * n)) / n)
        scale = 1 + z**2 / n
        low = 0.0 if self.correct == 0 else (center - half) / scale  # exactly: rounding leaves 1e-17
        high = 1.0 if self.correct == n else (center + half) / scale
        return low, high

    def upper(self, level: float) -> float:
        """The exact one-sided upper bound of the fraction (Clopper & Pearson 1934): with a higher one, this few correct
        answers or fewer would have a probability below 1 - level.
        """
        from scipy.special import bdtri

        return 1.0 if self.correct == self.n else float(bdtri(self.correct, self.n, 1 - level))


def mcnemar(first: Correct, second: Correct) -> float:
    """Two-sided mid-p of McNemar's test that two models are correct equally often, from the same images in one order.

    first, second: (N,) bool, whether the model is correct. Only images that one of the two gets wrong count; 1.0 where
    there are none. Mid-p keeps the level better than the exact test, which is conservative, and holds it where the
    asymptotic ones do not (Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91).
    """
    from scipy.special import bdtr

    assert first.shape == second.shape
    gains, losses = int((first & ~second).sum()), int((~first & second).sum())
    fewer, total = min(gains, losses), gains + losses
    if gains == losses:
        return 1.0
    return float(bdtr(fewer, total, 0.5) + (bdtr(fewer - 1, total, 0.5) if fewer else 0.0))  # 2 P(<= f) - P(= f)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of one family of tests, adjusted for their number (Holm 1979), in the order given."""
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, (len(values) - rank) * values[index])
        adjusted[index] = min(largest, 1.0)
    return adjusted


@dataclass(frozen=True)
class Dispersion:
    """How much more the accuracy of fresh trainings varies than if predictions were independent."""

    factor: float  # variance, over that of independent predictions; at least 1
    freedom: int  # degrees of freedom of the estimate


def dispersion(models: Sequence[Correct]) -> Dispersion | None:
    """The dispersion over seeds, pooled over models; None where no model was trained with two seeds or more.

    models: for each an array (S, N) bool, whether each of S seeds is correct about each of N images. Seeds differ in
    single images, by chance, which `flips` measures well even from two of them; and whole seeds are better or worse,
    which takes many seeds to measure. So models of different accuracy share the ratio of the two variances, as in a
    quasi-binomial model (McCullagh & Nelder 1989, Generalized Linear Models, section 4.5). It is taken to be at least
    1: Jordan (2023, arXiv 2304.01910) finds long trainings to vary as independent answers do.
    """
    ratios = []
    freedom = 0
    for correct in models:
        if len(correct) > 1:
            chance, own = flips(correct), len(correct) - 1
            freedom += own
            ratios.append(own * (float(correct.mean(axis=1).var(ddof=1)) / chance if chance else 1.0))
    return Dispersion(max(sum(ratios) / freedom, 1.0), freedom) if freedom else None


def flips(correct: Correct) -> float:
    """The variance that a training's accuracy would have if its predictions were independent, each image correct as
    often as in the other trainings. correct: (S, N) bool, S at least 2.
    """
    return float(correct.var(axis=0, ddof=1).sum() / correct.shape[1] ** 2)


def further_seed(correct: Correct, pooled: Dispersion) -> tuple[float, float]:
    """The 95% prediction interval (low, high) for the accuracy of one further training, with a seed of its own, on the
    same images: mean +- t s sqrt(1 + 1/S) (Hahn & Meeker 1991, Statistical Intervals, section 4.7), cut to 0..1.

    correct: (S, N) bool, whether each of S seeds is correct about each image, S at least 2. All trainings see the same
    images, so the sampling of images is not in it: other images are what the test part is for.
    """
    from scipy.special import stdtrit

    mean, variance = float(correct.mean()), pooled.factor * flips(correct)
    half = float(stdtrit(pooled.freedom, (1 + LEVEL) / 2)) * math.sqrt(variance * (1 + 1 / len(correct)))
    return max(mean - half, 0.0), min(mean + half, 1.0)


def paired(first: Correct, second: Correct, pooled: Dispersion | None) -> float:
    """Two-sided p-value that fresh trainings of two models are equally often correct on the same images, in one order.

    first, second: (S, N) bool, whether each seed is correct about each image. The difference of two accuracies varies
    with the images, as McNemar's test has it for one seed and Durkalski et al. (2003, Statistics in Medicine 22:2417)
    for several predictions an image, and with the seeds as a whole (`pooled`; None leaves it out: then these trainings
    are compared, not further ones). The two variances add up, as in two-way clustering (Cameron, Gelbach & Miller 2011,
    Journal of Business & Economic Statistics 29:238).
    """
    from scipy.special import ndtr

    assert first.shape[1:] == second.shape[1:]
    differences = first.mean(axis=0) - second.mean(axis=0)
    variance = float((differences**2).sum()) / differences.size**2
    if pooled is not None:
        variance += (pooled.factor - 1) * (flips(first) / len(first) + flips(second) / len(second))
    if variance == 0.0:
        return 1.0
    return float(2 * ndtr(-abs(differences.mean()) / math.sqrt(variance)))
