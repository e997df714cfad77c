"""Many searches of convolutional nets, or of heads on frozen features, by the commands: are their intervals right?

`python -m tests.honesty_searches cnn|transfer [--searches 40]`. Each search is `searchfm tune --retrain` of the
built-in study with its own sampler, pruner and known first trials, on a small part of Fashion-MNIST that its seed
chooses. Then its winner and its default are trained with further seeds on the same images. It prints how often one
further training fell inside the interval that `retrain` printed, and how often the winner was no better than the
default. Outcomes are kept in the user's cache folder; a signal stops, and the same command resumes.
"""

import argparse
import json
import statistics
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import searchfm
from searchfm.config import Config
from searchfm.learn.data import load
from searchfm.learn.train import Training
from tests.bench import _common as common
from tests.side_by_side import SideBySide
from tests.weights import LITE0, lite0_file

SEEDS = 3  # further trainings of the winner and of the default, on the same images
SMALL = {"data.subset": 0.03, "data.validation": 0.02}  # 1,764 images to train, 1,200 to validate
TRIALS = 20
TRAINING = threading.Lock()  # trainings in one process share torch's global generator
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # the built-in study, and keys that differ
    "cnn": ("cnn", {**SMALL, "train.epochs": 4}),
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


def accuracies(config: Config, first: int) -> list[float]:
    """Validation accuracies of SEEDS trainings of a config, with seeds from `first` on."""
    data, values = load(config.data), []
    with TRAINING:
        for seed in range(first, first + SEEDS):
            *_, last = Training(replace(config, train=replace(config.train, seed=seed)), data)
            assert last.val_accuracy is not None
            values.append(last.val_accuracy)
    return values


def search(runner: SideBySide, kind: str, seed: int) -> Outcome | None:
    """One search and what follows it; None where it was stopped or failed."""
    file, settings = KINDS[kind]
    settings = settings | {"data.seed": seed}
    if kind == "transfer":
        settings |= {"model.transfer.model": LITE0, "model.transfer.weights": lite0_file()}
    name = f"{kind}-{seed}"
    options = [f"--set={key}={value}" for key, value in settings.items()]
    options += ["--name", name, "--seed", str(seed), "--trials", str(TRIALS), "--workers", "1", "--retrain"]
    if not runner.call("tune", file, *options):
        return None
    study = searchfm.open_study(name).record
    assert study.final is not None
    assert study.best is not None
    final, validation = study.final, study.final.validation
    assert validation.low is not None
    assert validation.high is not None
    assert study.default is not None
    winner, default = (Config.from_table(study.trials[number].config) for number in (final.winner, study.default))
    return Outcome(
        seed=seed,
        best=study.best.value or 0.0,
        mean=validation.accuracy,
        low=validation.low,
        high=validation.high,
        further=accuracies(winner, 10**8),
        default=accuracies(default, 2 * 10**8),
        winner_is_default=final.winner == study.default,
        test=final.test.accuracy,
        pruned=len(study.of("pruned")),
    )


def described(outcomes: list[Outcome]) -> str:
    """The answers."""
    n = len(outcomes)
    inside, no_better = sum(each.inside for each in outcomes), sum(each.no_better for each in outcomes)
    same = sum(each.winner_is_default for each in outcomes)
    optimism = statistics.mean(each.best - each.mean for each in outcomes)
    gain = [statistics.mean(each.further) - statistics.mean(each.default) for each in outcomes]
    half = statistics.mean(each.high - each.low for each in outcomes) / 2
    texts = (
        f"{n} searches of {TRIALS} trials, {statistics.mean(each.pruned for each in outcomes):.1f} of them pruned.",
        f"A further training fell inside the 95% interval in {inside} ({inside / n:.1%}); half its width {half:.2%}.",
        f"The best value was above the mean of fresh seeds by {optimism:.2%} on average.",
        f"The winner was no better than the default in {no_better}, and was the default in {same} of these;",
        f"its gain was {statistics.median(gain):.2%} in the median.",
        f"Mean test accuracy {statistics.mean(each.test for each in outcomes):.2%}.",
    )
    return " ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.honesty_searches", description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--searches", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=common.usable(), help="searches side by side; default: cores")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    runner = SideBySide("honesty", options.jobs)
    runner.home.mkdir(parents=True, exist_ok=True)
    paths = [runner.home / f"{options.kind}-{seed}.json" for seed in range(options.searches)]

    def one(seed: int) -> bool:
        if not paths[seed].is_file() and (outcome := search(runner, options.kind, seed)):
            paths[seed].write_text(json.dumps(asdict(outcome)))
            common.progress(f"{options.kind}: {sum(path.is_file() for path in paths)} of {len(paths)}")
        return paths[seed].is_file()

    done = runner.map(one, range(options.searches))
    if outcomes := [Outcome(**json.loads(path.read_text())) for path in paths if path.is_file()]:
        print(described(outcomes))
    runner.end(done)


if __name__ == "__main__":
    main()
