"""What is trained for each row of the reports: its study at the report's own budget unless said otherwise here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.weights import LITE0, LITE0_FILE

STUDIES = Path(__file__).parents[2] / "studies"
RESULTS = STUDIES / "reports" / "results"  # one JSON and its pictures a row


@dataclass(frozen=True)
class Row:
    """How a study of `studies/reports/` is trained, by its name."""

    seeds: tuple[int, ...] = (0,)  # of the study; each gives every point of its grid a seed of its own
    settings: dict[str, Any] = field(default_factory=dict)  # keys that differ from the study file
    retrain: bool = False  # train the best point on all data with a fresh seed, and test it
    best: bool = False  # draw the curves and the confusion matrix of the best run, too


THREE = (0, 1, 2)
FASHION = {"data.name": "fashion-mnist"}  # for CIFAR-100
# For ResNet-18, the ImageNet weights that a package ships. All images take about 4 hours (A7) and 6 (A10), by estimate.
TRANSFER = {"model.transfer.model": LITE0, "model.transfer.weights": LITE0_FILE, "data.subset": 0.2}

ROWS = {
    "b1-mlp-tr1": Row(THREE),
    "b1-mlp-tr2": Row(THREE),
    "b1-mlp-tr3": Row(THREE),
    "b1-mlp-tr4": Row(THREE),
    "b2-mlp-tr1": Row(THREE, retrain=True),
    "b2-mlp-tr2": Row(THREE),
    "b2-mlp-tr3-tr4": Row(THREE),
    "a8-vit-first": Row(),
    "a8-vit-best": Row(),
    "a8-vit-hidden-dim": Row(),
    "a8-vit-layers": Row(),
    "a8-vit-heads": Row(),
    "a7-resnet-stages": Row(settings=TRANSFER),
    "a10-vit-mix": Row(settings={"data.subset": 0.3}),
    "a10-resnet-mix": Row(settings=TRANSFER),
    "a1-cnn-filters-1": Row(),
    # Nets of 64 and 1024 filters take 2.8 GFLOP an image to train. By estimate each row fits 100 minutes of two cores
    # (AVX2, float32), at 110 GFLOP a second.
    "a1-cnn-filters-2": Row(settings={"data.subset": 0.2}),
    "a2-cnn-depth": Row(settings={"data.subset": 0.1}),
    "a3-cnn-optimizer": Row(settings={"data.subset": 0.1, "train.epochs": 6}),
    "a4-cnn-lr": Row(settings={"data.subset": 0.1, "train.epochs": 7}),
    "a4-cnn-schedule": Row(settings={"data.subset": 0.1, "train.epochs": 7}, best=True),
    "a5-cnn-dropout": Row(settings={"data.subset": 0.18}),
    "a10-cnn-cutmix": Row(settings={"data.subset": 0.18}),
    "b4-cifar100-cnn": Row(settings=FASHION),
    "b5-cifar100-deep-cnn": Row(settings=FASHION | {"data.size": 32}),  # 28 pixels cannot be halved five times
    "b6-cifar100-residual": Row(settings=FASHION, best=True),
}


def studies() -> list[str]:
    """The names of all studies of the reports, whether they have a row above or not."""
    return sorted(path.stem for path in (STUDIES / "reports").glob("*.toml"))
