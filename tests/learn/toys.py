"""Small real data and configs that the tests of this folder share."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from searchfm.config import Config
from searchfm.jobs import Result
from searchfm.learn.data import Part, Splits
from searchfm.records import Epoch


def config(model: str = "mlp", settings: dict[str, Any] | None = None, **tables: Any) -> Config:
    """A config on digits: `settings` of the model, and further tables by name."""
    train = {"epochs": 3, "batch_size": 64, "seed": 7} | tables.pop("train", {})
    model_table = {"name": model, model: settings or {}}
    return Config.from_table({"data": {"name": "digits"}, "model": model_table, "train": train, **tables})


def first(data: Splits, images: int) -> Splits:
    """The first images of the training part alone."""
    part = data.train
    cut = Part(part.images[:images], part.labels[:images], part.indices[:images], part.device)
    return replace(data, train=cut)


def drain(job: Generator[Epoch, None, Result]) -> tuple[list[Epoch], Result]:
    """All that a job's entry yields, and what it returns."""
    epochs = []
    while True:
        try:
            epochs.append(next(job))
        except StopIteration as end:
            return epochs, end.value


def losses(epochs: list[Epoch]) -> list[tuple[float, float, float | None, float | None]]:
    """What of epochs must not depend on the clock."""
    return [(e.train_loss, e.train_accuracy, e.val_loss, e.val_accuracy) for e in epochs]
