"""Which finalist wins, and what may be said of it: the figures that retraining with fresh seeds gives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchfm import plots, stats
from searchfm.job import Result
from searchfm.search.history import TrialRow


@dataclass(frozen=True)
class Finalist:
    """A trial of the search, trained again with fresh seeds on the search's own data and epochs."""

    trial: int
    value: float  # what the search said
    seeds: tuple[int, ...]
    right: NDArray[np.bool_]  # (S, N): whether each seed is right about each image of the validation part
    parameters: int
    flops: int  # of one image's forward pass
    seconds: float  # of a training, on average

    @property
    def values(self) -> list[float]:
        """The accuracy with each seed."""
        return [float(value) for value in self.right.mean(axis=1)]

    @property
    def mean(self) -> float:
        """The mean accuracy over the seeds."""
        return float(self.right.mean())

    def record(self) -> dict[str, Any]:
        """What is kept of it, as plain values."""
        kept = {name: getattr(self, name) for name in ("trial", "value", "values", "mean", "seconds")}
        return kept | {"seeds": list(self.seeds), "parameters": self.parameters, "flops": self.flops}


def read(trial: TrialRow, seeds: Sequence[int], folders: Sequence[Path], results: Sequence[Result]) -> Finalist:
    """A finalist from what its trainings left in their folders, one for each seed, and returned."""
    assert trial.value is not None
    return Finalist(
        trial=trial.number,
        value=trial.value,
        seeds=tuple(seeds),
        right=np.stack([right(folder / plots.PREDICTIONS) for folder in folders]),
        parameters=results[0]["parameters"],
        flops=results[0]["flops"],
        seconds=float(np.mean([result["seconds"] for result in results])),
    )


def right(predictions: Path) -> NDArray[np.bool_]:
    """Which images (N,) of a part the predictions in a file are right about."""
    with np.load(predictions, allow_pickle=False) as file:
        answers: NDArray[np.bool_] = file["probabilities"].argmax(axis=1) == file["labels"]
    return answers


@dataclass(frozen=True)
class Verdict:
    """The winner, and how sure one may be of it."""

    finalists: tuple[Finalist, ...]
    winner: Finalist
    tie: tuple[int, ...]  # trials that cannot be told apart from the best mean, that one included; empty if all can
    optimism: float  # what the search said of the winner, less its mean over fresh seeds
    spread: float | None  # standard deviation of a training over seeds; None from a single seed each
    interval: tuple[float, float] | None  # for a further training of the winner with a seed of its own

    def validation(self) -> Mapping[str, Any]:
        """What is said of the winner on the validation part, as plain values."""
        low, high = self.interval or (None, None)
        mean, n = self.winner.mean, self.winner.right.shape[1]
        return {"accuracy": mean, "low": low, "high": high, "spread": self.spread, "n": n}


def choose(finalists: Sequence[Finalist]) -> Verdict:
    """The best mean wins; where others cannot be told apart from it, the cheapest of them.

    Told apart by `stats.paired` on the validation part's images, each against the best mean, corrected for their number
    (Holm). Cheaper means fewer FLOPs, then fewer parameters.
    """
    best = max(finalists, key=lambda one: (one.mean, -one.flops, -one.parameters, -one.trial))
    others = [one for one in finalists if one is not best]
    dispersion = stats.dispersion([one.right for one in finalists])
    chances = stats.holm([stats.paired(best.right, one.right, dispersion) for one in others])
    equal = [best, *(one for one, p in zip(others, chances, strict=True) if p > 1 - stats.LEVEL)]
    winner = min(equal, key=lambda one: (one.flops, one.parameters, -one.mean, one.trial))
    return Verdict(
        finalists=tuple(finalists),
        winner=winner,
        tie=tuple(sorted(one.trial for one in equal)) if len(equal) > 1 else (),
        optimism=winner.value - winner.mean,
        spread=math.sqrt(dispersion.factor * stats.flips(winner.right)) if dispersion else None,
        interval=stats.further_seed(winner.right, dispersion) if dispersion else None,
    )
