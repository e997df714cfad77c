"""Trials that train only the head of a frozen ResNet-18, one thread: searchfm, with its cache of features, against
plain torch, which computes the frozen stages again in each epoch.

searchfm's trials go through the entry of a worker's job, in one process; filling the cache counts, and writing the
weights of each trial that is among the best three so far, as in a search. The peer has its images in memory, and writes
nothing. Both train the same trials: same weights, same batches, learning rates from 1e-4 to 1e-2 in random order.

`python -m tests.bench transfer [--trials 20] [--sides 32 64] [--repeats 5]`.
"""

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from searchfm.config import Config, SearchConfig
from searchfm.jobs import Context
from searchfm.learn import entries, features
from searchfm.learn.data import Splits, load
from searchfm.learn.models import Classifier
from searchfm.learn.train import Training, _generator
from searchfm.records import TrainJob
from tests.bench._common import Cost, alternate, header, progress, ratio, row, table, timed

TRAIN, VALIDATION, EPOCHS, BATCH = 960, 240, 4, 128
KEEP = SearchConfig().keep  # trials whose weights a search keeps
LOSS_WITHIN, WITHIN = 1e-4, 0.01  # of losses, or else of accuracies, that count as equal


@dataclass(frozen=True)
class Trained:
    steps: int
    loss: float  # of the validation part
    accuracy: float


def config_of(side: int, index: int, trials: int, weights: Path) -> Config:
    rank = torch.randperm(trials, generator=torch.Generator().manual_seed(trials))[index].item()
    lr = 10 ** (-4 + 2 * rank / max(1, trials - 1))
    subset = TRAIN / (60000 - VALIDATION)
    return Config.from_table(
        {
            "data": {"size": side, "validation": VALIDATION / 60000, "subset": subset},
            "model": {"name": "transfer", "transfer": {"weights": str(weights), "tuned_blocks": 0}},
            "optimizer": {"name": "adam", "lr": lr},
            "schedule": {"name": "constant"},  # as the peer
            "train": {"epochs": EPOCHS, "batch_size": BATCH, "seed": index},
        }
    )


def random_weights(path: Path, images: Tensor) -> None:
    """Writes a ResNet-18 with random weights, and batch norm's statistics of the images (N, 1, H, W) uint8."""
    torch.manual_seed(0)
    net = timm.create_model("resnet18", zero_init_last=False)
    with torch.no_grad():
        for start in range(0, 5 * BATCH, BATCH):
            net(images[start : start + BATCH].float().div(255).sub(0.5).div(0.25).expand(-1, 3, -1, -1))
    save_file(net.state_dict(), path)


@contextmanager
def steps() -> Iterator[list[int]]:
    """Counts the steps of all optimizers, in the only item of the list."""
    count = [0]

    def counted(*_: Any) -> None:
        count[0] += 1

    hook = register_optimizer_step_post_hook(counted)
    yield count
    hook.remove()


def ours(configs: Sequence[Config], data: Splits) -> list[Trained]:
    """The trials as a worker trains them, with an empty cache of features."""
    shutil.rmtree(features._folder(), ignore_errors=True)
    results: list[Trained] = []
    for index, config in enumerate(configs):
        best = sorted(round(result.accuracy, 6) for result in results)[-KEEP:]
        job = TrainJob(
            config.to_table(),
            f"bench/{index}",
            None,
            data.fingerprint,
            checkpoint_seconds=5.0,
            weights_from=best[0] if len(best) == KEEP else 0.0,
        )
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, steps() as count:
            context = Context(Path(folder), (), "cpu", tick=lambda: None)
            *_, last = entries.trial(job.to_json(), context)
            results.append(Trained(count[0], last.val_loss or 0.0, last.val_accuracy or 0.0))
    return results


def theirs(configs: Sequence[Config], data: Splits, beginnings: Sequence[Classifier]) -> list[Trained]:
    """The trials with a frozen net in eval mode, whose features are computed for each batch of each epoch."""
    return [_recompute(config, data, model) for config, model in zip(configs, beginnings, strict=True)]


def _recompute(config: Config, data: Splits, beginning: Classifier) -> Trained:
    assert data.val is not None
    file = {"file": config.model.kind.weights}  # type: ignore[union-attr]
    net = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=file, in_chans=1, num_classes=10)
    net.fc.load_state_dict(beginning.net.model.fc.state_dict())
    net.eval().requires_grad_(False)
    net.fc.requires_grad_(True)
    mean, std = beginning.mean.view(-1, 1, 1), beginning.std.view(-1, 1, 1)
    optimizer = torch.optim.Adam(net.fc.parameters(), lr=config.optimizer.lr)

    def frozen(images: Tensor) -> Tensor:
        with torch.no_grad():
            pooled: Tensor = net.forward_head(net.forward_features((images / 255 - mean) / std), pre_logits=True)
        return pooled

    with steps() as count:
        for epoch in range(1, EPOCHS + 1):
            order = torch.randperm(TRAIN, generator=_generator(config.train.seed or 0, "order", epoch))
            for rows in order.split(BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(net.fc(frozen(data.train.images[rows])), data.train.labels[rows])
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits = torch.cat([net.fc(frozen(images)) for images in data.val.images.split(BATCH)])
    correct = (logits.argmax(1) == data.val.labels).float().mean().item()
    return Trained(count[0], F.cross_entropy(logits, data.val.labels).item(), correct)


def compare(side: int, trials: int, repeats: int, weights: Path) -> bool:
    """Prints the row of an image side, with the ratio if the two sides are equal; whether they are."""
    configs = [config_of(side, index, trials, weights) for index in range(trials)]
    data = load(configs[0].data)
    assert (len(data.train), data.val and len(data.val)) == (TRAIN, VALIDATION)
    if not weights.exists():
        random_weights(weights, data.train.images)
    beginnings = [Training(config, data).model for config in configs]
    entries._data(load, configs[0].data, None, "cpu")  # the data: those of both sides are in memory
    sides = {
        "searchfm": lambda: timed(partial(ours, configs, data)),
        "peer": lambda: timed(partial(theirs, configs, data, beginnings)),
    }
    results: dict[str, list[tuple[list[Trained], Cost]]] = alternate(sides, repeats)
    pairs = [
        pair
        for (mine, _), (peer, _) in zip(results["searchfm"], results["peer"], strict=True)
        for pair in zip(mine, peer, strict=True)
    ]
    loss = max(abs(a.loss - b.loss) for a, b in pairs)
    accuracy = max(abs(a.accuracy - b.accuracy) for a, b in pairs)
    equal = all(a.steps == b.steps for a, b in pairs) and (loss <= LOSS_WITHIN or accuracy <= WITHIN)
    cpu = {name: [cost.cpu for _, cost in values] for name, values in results.items()}
    wall = {name: [cost.wall for _, cost in values] for name, values in results.items()}
    row(
        f"{trials} trials, {side} px",
        *(f"{statistics.median(cpu[name]):.2f}" for name in ("peer", "searchfm")),
        ratio(cpu["peer"], cpu["searchfm"]) if equal else "none: not the same work",
        ratio(wall["peer"], wall["searchfm"]) if equal else "",
        f"{sum(a.steps for a, _ in pairs)} / {sum(b.steps for _, b in pairs)}",
        f"{loss:.0e}",
        f"{accuracy:.4f}",
        f"{statistics.median(a.accuracy for a, _ in pairs):.3f}",
    )
    return equal


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench transfer")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    importlib.import_module("searchfm.learn.warm")  # one thread, denormals flushed, as in workers; for both sides
    header(
        f"Head-only transfer of ResNet-18: {TRAIN} + {VALIDATION} images, {EPOCHS} epochs, CPU seconds of all trials"
    )
    columns = ("peer", "searchfm", "ratio, CPU", "ratio, wall", "steps", "losses apart", "accuracies apart")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ["SEARCHFM_CACHE"] = folder  # else the cache of features of this machine's user
        table("", *columns, "median accuracy")
        results = []
        for side in options.sides:
            progress(f"{side} px")
            weights = Path(folder) / f"resnet18-{side}.safetensors"
            results.append(compare(side, options.trials, options.repeats, weights))
    if not all(results):
        sys.exit(f"not the same work: steps differ, or losses by more than {LOSS_WITHIN} and accuracies by {WITHIN}")
