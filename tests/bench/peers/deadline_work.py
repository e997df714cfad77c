"""What the peers of `deadline.py` share: the work in a folder, the space, the net in plain torch, the answer."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STARTED = time.monotonic()
SEARCHED = 2 / 3  # of the time, where a final training follows
# The space. `deadline.py` writes the same into searchfm's study file.
STAGES, CONVS, FILTERS = (1, 3), (1, 2), (16, 32, 64)
DROPOUT, LR, BATCHES = (0.0, 0.5), (1e-4, 1e-2), (32, 64, 128)


@dataclass(frozen=True)
class Task:
    """The folder of images, and the time there is."""

    folder: Path
    seconds: float  # from the start of the process to its answer
    fraction: float  # of the training images for the trials; below 1 the best is trained on all images at the end
    epochs: int
    seed: int

    @classmethod
    def parse(cls) -> "Task":
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path)
        for name, kind in (("--seconds", float), ("--fraction", float), ("--epochs", int), ("--seed", int)):
            parser.add_argument(name, type=kind, required=True)
        return cls(**vars(parser.parse_args()))

    @property
    def retrains(self) -> bool:
        return self.fraction < 1

    @property
    def search_ends(self) -> float:
        """On the monotonic clock."""
        return STARTED + self.seconds * (SEARCHED if self.retrains else 1)

    @property
    def ends(self) -> float:
        return STARTED + self.seconds

    def arrays(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 28, 28) uint8 and labels (N,) int64 of the part: train (the fraction), all, val or test."""
        if part == "all":
            parts = [self._read(name) for name in ("train", "val")]
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        images, labels = self._read(part)
        if part == "train":
            count = round(self.fraction * len(labels))
            chosen = np.random.default_rng(self.seed).permutation(len(labels))[:count]
            images, labels = images[chosen], labels[chosen]
        return images, labels

    def _read(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.folder / f"{part}.npz") as arrays:
            return arrays["images"], arrays["labels"]


def answer(test: float, value: float, trials: int) -> None:
    """Prints the JSON line: accuracies of the final model and of the best trial, and how many trials began."""
    print(json.dumps({"test": test, "value": value, "trials": trials}), flush=True)


# --- torch ------------------------------------------------------------------------------------------------------------


def net(point: dict[str, Any]) -> Any:
    """The same function as searchfm's `cnn` with batch norm."""
    from torch import nn

    layers: list[nn.Module] = []
    channels, side = 1, 28
    for filters in point["filters"]:
        for _ in range(point["convs"]):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(point["dropout"]), nn.Linear(channels * side**2, 10))


def loader(task: Task, part: str, batch_size: int) -> Any:
    """A DataLoader with transforms, as the examples have it."""
    from torch.utils.data import DataLoader
    from torch_example import Fashion

    return DataLoader(Fashion(task, part), batch_size=batch_size, shuffle=part in ("train", "all"))


def accuracy(model: Any, batches: Any) -> float:
    """The fraction of the loader's images that the model classifies correctly."""
    import torch

    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in batches:
            correct += int((model(images).argmax(dim=1) == labels).sum())
    return correct / len(batches.dataset)


def train(model: Any, point: dict[str, Any], batches: Any, epochs: int, ends: float) -> Iterator[int]:
    """Trains with Adam; yields each epoch, from 1, and ends early, within an epoch, when the time is over."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.Adam(model.parameters(), lr=point["lr"])
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in batches:
            if time.monotonic() >= ends:
                return
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        yield epoch


@dataclass
class Best:
    """The best epoch of all trials."""

    value: float = 0.0
    point: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    def offer(self, value: float, point: dict[str, Any], model: Any) -> None:
        if value > self.value:
            self.value, self.point, self.model = value, point, deepcopy(model)


def final(task: Task, best: Best) -> Any:
    """The model to test: the best trial's weights; or, where trials saw a fraction, its net trained on all images."""
    if best.model is None:
        sys.exit(f"--seconds {task.seconds:g}: no trial ended an epoch in this time; it must be longer")
    if not task.retrains:
        return best.model
    model = net(best.point)
    for _ in train(model, best.point, loader(task, "all", best.point["batch_size"]), task.epochs, task.ends):
        pass
    return model
