"""Many small searches on digits, each retrained as `searchfm retrain` does, and its intervals then tested."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from searchfm.config import Config
from searchfm.learn.data import Part, Splits, moments
from searchfm.learn.models import flops, parameters
from searchfm.learn.train import Training, evaluate
from searchfm.records import FinalistFigures
from searchfm.retraining import TOP, Selection, choose
from searchfm.stats import Accuracy

TRAIN, VALIDATION, TEST = 600, 200, 100  # images of 1,797; all others are held out of searches and trainings
TRIALS, SEEDS = 50, 5
DRAWS = 200  # further test parts that each final model is tested on

Answers = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """The estimates of one search's winner, and what was measured afterwards."""

    best: float  # the value of the search's best trial
    mean: float  # of the winner over fresh seeds
    optimism: float
    low: float  # for one further training of the winner
    high: float
    further: float  # accuracy of a further training, on the same validation images
    tie: int  # finalists that could not be distinguished
    tested: int  # correct answers of the final model among TEST images
    held: float  # its accuracy on the images held out
    covered: float  # fraction of DRAWS further test parts whose interval held its accuracy on all other images

    @property
    def further_inside(self) -> bool:
        """Whether the further training fell inside the interval."""
        return self.low <= self.further <= self.high

    @property
    def best_inside(self) -> bool:
        """Whether the search's best value is inside the interval."""
        return self.low <= self.best <= self.high

    @property
    def held_inside(self) -> bool:
        """Whether the test interval holds the accuracy on images held out."""
        low, high = Accuracy(self.tested, TEST).interval
        return low <= self.held <= high


def study(seed: int) -> Outcome:
    """One search of TRIALS, its finalists, its final training, and the measurements after it. All by `seed`."""
    torch.set_num_threads(1)
    parts = _parts(seed)
    splits = _splits(parts["train"], parts["validation"])
    rng = np.random.default_rng(seed)
    configs = [_config(rng) for _ in range(TRIALS)]
    values = [float(_train(config, splits, 1000 * seed + i).mean()) for i, config in enumerate(configs)]
    top = sorted(range(TRIALS), key=lambda i: (-values[i], i))[:TOP]
    answers = {i: np.stack([_train(configs[i], splits, each) for each in _fresh(seed, i)]) for i in top}
    selection = choose([_finalist(i, configs[i], values[i], splits, seed, answers[i]) for i in top], answers)
    winner = configs[selection.winner]
    further = _train(winner, splits, 10**8 + seed).mean()

    final = Training(_seeded(winner, 10**9 + seed), _splits(_both(parts["train"], parts["validation"]), None))
    for _ in final:
        pass
    unseen = _both(parts["test"], parts["held"])
    _, predictions = evaluate(final.classifier, unseen, winner.train, lambda: None)
    return _outcome(selection, max(values), float(further), predictions.correct, rng)


def _outcome(selection: Selection, best: float, further: float, correct: Answers, rng: np.random.Generator) -> Outcome:
    low, high = selection.validation.low, selection.validation.high
    assert low is not None
    assert high is not None
    assert selection.optimism is not None
    draws = [correct[rng.permutation(len(correct))] for _ in range(DRAWS)]
    intervals = [(Accuracy(int(draw[:TEST].sum()), TEST).interval, float(draw[TEST:].mean())) for draw in draws]
    return Outcome(
        best=best,
        mean=selection.validation.accuracy,
        optimism=selection.optimism,
        low=low,
        high=high,
        further=further,
        tie=len(selection.tie),
        tested=int(correct[:TEST].sum()),
        held=float(correct[TEST:].mean()),
        covered=float(np.mean([least <= held <= most for (least, most), held in intervals])),
    )


def _config(rng: np.random.Generator) -> Config:
    """A point of a narrow space, as late in a search: all points are about equally good."""
    return Config.from_table(
        {
            "data": {"name": "digits"},
            "model": {"name": "mlp", "mlp": {"layers": 1, "width": int(rng.integers(40, 65))}},
            "optimizer": {"lr": float(10 ** rng.uniform(-2.05, -1.95))},
            "schedule": {"name": "constant"},  # few steps
            "train": {"epochs": 3, "batch_size": 64},
        }
    )


def _parts(seed: int) -> dict[str, Part]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.round(images * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    order = torch.from_numpy(np.random.default_rng(10**6 + seed).permutation(len(labels)))
    ends = np.cumsum([0, TRAIN, VALIDATION, TEST, len(labels)])
    indices = {name: order[ends[i] : ends[i + 1]] for i, name in enumerate(("train", "validation", "test", "held"))}
    truth = torch.from_numpy(labels)
    return {name: Part(pixels[rows], truth[rows], rows, torch.device("cpu")) for name, rows in indices.items()}


def _both(one: Part, other: Part) -> Part:
    joined = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in ("images", "labels", "indices")}
    return replace(one, **joined)


def _splits(training: Part, validation: Part | None) -> Splits:
    mean, std = moments(training.images)
    return Splits(training, validation, tuple("0123456789"), mean, std, "")


def _seeded(config: Config, seed: int) -> Config:
    return replace(config, train=replace(config.train, seed=seed))


def _train(config: Config, splits: Splits, seed: int) -> Answers:
    """(N,) whether a training classifies each validation image correctly."""
    training = Training(_seeded(config, seed), splits)
    for _ in training:
        pass
    assert training.validation is not None
    return training.validation[1].correct


def _fresh(seed: int, number: int) -> tuple[int, ...]:
    return tuple(10**7 + 10000 * seed + 100 * number + k for k in range(SEEDS))


def _finalist(
    number: int, config: Config, value: float, splits: Splits, seed: int, correct: Answers
) -> FinalistFigures:
    model, values = Training(config, splits).classifier, tuple(correct.mean(axis=1).tolist())
    cost = parameters(model)[0], flops(model, (1, 8, 8))
    return FinalistFigures(number, value, values, float(correct.mean()), 1.0, _fresh(seed, number), *cost)


def studies(count: int, workers: int = 2) -> list[Outcome]:
    """The outcomes of `count` searches, on `workers` processes."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(study, range(count)))
