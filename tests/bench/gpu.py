"""Training on a GPU: samples a second of searchfm's workers, alone and side by side, against Optuna's PyTorch example.

`python -m tests.bench gpu [--arch mlp cnn vit32 resnet] [--workers 1 4 8] [--repeats 5] [--airbench] [--device cuda]`.
Each worker is a process with its own training of the same work; all begin an epoch together, after one that warms up.
They train with CUDA graphs (see `learn.graphs`) and without. The rate of a side is that of all its workers together,
from the first one's start to the last one's end, validation not included. The peer is one process, as its users run
it. --airbench: the time of an epoch of airbench94's net.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from searchfm.config import Config
from searchfm.learn.data import Part, Splits, load
from searchfm.learn.graphs import SWITCH
from searchfm.learn.models.custom import Code
from searchfm.learn.train import Training, _first
from tests.bench import _example as example
from tests.bench._common import alternate, header, progress, ratio, row, table
from tests.bench.trial import NAMES, REST, config_of, initial, orders

IMAGES = {"mlp": 40_960, "cnn": 40_960, "vit16": 40_960, "vit32": 40_960, "resnet": 10_240}
EPOCHS = 3  # timed; the one before them warms up
WITHIN = 0.05  # of training losses, since searchfm trains in bfloat16
CIFAR = (50_000, 3, 32, 32)  # images of CIFAR-10; random pixels take as long
PUBLISHED = 2.6 / 9.9  # seconds of an epoch of airbench94 on an A100, as published


def work(arch: str, images: int) -> Config:
    """The config of `bench trial`, with more images, and EPOCHS after a first one."""
    config = config_of(arch, 0)
    data, train = replace(config.data, subset=images / REST), replace(config.train, epochs=EPOCHS + 1)
    return replace(config, data=data, train=train)


def wait(device: str) -> float:
    """Waits until the device has done all, and returns the time."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def begin(device: str) -> None:
    """What a process would else do in its first training: imports, one thread as in workers, CUDA's context."""
    importlib.import_module("searchfm.learn.warm")
    torch.zeros(1, device=device)


def ours(recorded: bool, arch: str, images: int, device: str, barrier: Barrier) -> tuple[float, float, float]:
    """A worker of searchfm, with CUDA graphs or without: when it began and ended its timed epochs, and the training
    loss of the one before them.
    """
    os.environ[SWITCH] = str(int(recorded))
    config = work(arch, images)
    training = Training(config, replace(load(config.data, device=device), val=None), device=device)
    loss = next(training).train_loss
    barrier.wait()
    began = wait(device)
    list(training)
    return began, wait(device), loss


def theirs(arch: str, images: int, device: str, barrier: Barrier) -> tuple[float, float, float]:
    """The peer: an epoch from the same weights, in float32, after another one; with its validation on one image."""
    config, data = work(arch, images), load(work(arch, images).data)
    assert data.val is not None
    few, order = replace(data, val=_first(data.val, 1)), list(orders(config, data))[:1]
    train = partial(example.train, arch, initial(arch, 0, "float32"), few, lr=config.optimizer.lr, batch=128)
    train(iter(order), device=device)
    barrier.wait()
    began = wait(device)
    trained = train(iter(order), device=device)
    return began, wait(device), trained.loss


@dataclass(frozen=True)
class Side:
    """Processes that train side by side, for all repetitions of all nets."""

    pool: Pool
    manager: SyncManager
    device: str

    def rate(self, train: Any, epochs: int, workers: int, arch: str, images: int) -> tuple[float, float]:
        """Samples a second of so many processes together, and the mean of their losses."""
        barrier = self.manager.Barrier(workers)  # so that each process has one
        ends = self.pool.starmap(train, [(arch, images, self.device, barrier)] * workers, chunksize=1)
        seconds = max(end for _, end, _ in ends) - min(began for began, _, _ in ends)
        found = workers * images * epochs / seconds
        progress(f"{found:,.0f} samples/s")  # known at once: a run may be ended early
        return found, statistics.mean(loss for *_, loss in ends)


def compare(own: Side, other: Side, arch: str, workers: Sequence[int], images: int, repeats: int) -> None:
    """Prints a row for each number of workers, without and with graphs."""
    calls: dict[str, Callable[[], tuple[float, float]]] = {
        f"{count}{', graphs' if graphs else ''}": partial(own.rate, partial(ours, graphs), EPOCHS, count, arch, images)
        for graphs in ([False, True] if own.device.startswith("cuda") else [False])
        for count in workers
    }
    results = alternate({**calls, "peer": partial(other.rate, theirs, 1, 1, arch, images)}, repeats)
    peer = [each for each, _ in results["peer"]]
    for name in calls:
        rates, losses = zip(*results[name], strict=True)
        loss, expected = statistics.median(losses), statistics.median(loss for _, loss in results["peer"])
        equal = abs(loss - expected) <= WITHIN
        medians = (f"{statistics.median(side):,.0f}" for side in (peer, rates))
        found = ratio(rates, peer) if equal else "none: not the same work"
        row(NAMES[arch], name, *medians, found, f"{loss:.4f} / {expected:.4f}")


def airbench(device: str, count: int, epochs: int) -> None:
    """Prints the time of an epoch of airbench94's net."""
    images = torch.randint(256, (count, *CIFAR[1:]), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (count,), device=device)
    train = Part(images, labels, torch.arange(count), torch.device(device))
    data = Splits(train, None, tuple("0123456789"), torch.full((3,), 0.5), torch.full((3,), 0.25), "")
    table_of = {
        "model": {"name": "custom", "custom": {"factory": "tests.bench.peers.airbench:net"}},
        "optimizer": {"name": "sgd", "lr": 0.05, "sgd": {"momentum": 0.85, "nesterov": True}},
        "schedule": {"name": "constant"},
        "augment": {"flip": 0.5, "crop": 2},
        "train": {"epochs": epochs + 2, "batch_size": 1024, "label_smoothing": 0.2},
    }
    training = Training(Config.from_table(table_of), data, device=device, code=Code(allowed=True))
    seconds = [epoch.seconds for epoch in training][2:]
    print(f"an epoch of {count:,} images: {statistics.median(seconds):.3f} s, {training.precision}; ", end="")
    print(f"published for an A100: {PUBLISHED:.3f} s for 50,000")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench gpu")
    parser.add_argument("--arch", nargs="+", choices=NAMES, default=["mlp", "cnn", "vit32", "resnet"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4, 8], help="side by side on the device")
    parser.add_argument("--images", type=int, help="of an epoch; default: 40,960, ResNet-18: 10,240")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--airbench", action="store_true", help="only the time of an epoch of airbench94's net")
    parser.add_argument("--device", default="cuda", help="cpu tries the benchmark out")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("this machine has no GPU; --device cpu tries the benchmark out")
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "no GPU"
    header(f"Training on {name}: samples/s of all workers together", cores=max(options.workers))
    if options.airbench:
        airbench(options.device, options.images or CIFAR[0], 10)
        return
    table("", "workers", "peer", "searchfm", "ratio, wall", "training loss of the first epoch, searchfm / peer")
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        context.Pool(max(options.workers), begin, (options.device,)) as pool,
        context.Pool(1) as alone,
    ):
        own, other = (Side(each, manager, options.device) for each in (pool, alone))
        for arch in options.arch:
            compare(own, other, arch, options.workers, options.images or IMAGES[arch], options.repeats)
