"""One trial on one thread: searchfm's training against what people write after Optuna's own PyTorch example.

Both sides start from the same weights and see the same batches in the same order; each repetition has its own seed.
A ratio is printed only if both made the same steps, and their mean accuracies are equal within 0.01.

`python -m tests.bench trial [--arch mlp cnn vit16 vit32 resnet] [--repeats 5] [--precision float32] [--parts]
[--profile] [--dropout 0.1 0.3 0.5]`. --parts: the share of the GEMM peak that searchfm's training reaches. --profile:
torch's operations in which it is. --dropout: what dropout costs it. Each in place of the comparison with the peer.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from searchfm.config import Config
from searchfm.learn.data import Splits, load
from searchfm.learn.precision import cpu_features, faster
from searchfm.learn.train import Training, _first, _generator
from tests.bench import _example as example
from tests.bench._common import Cost, alternate, header, progress, ratio, row, table, timed

BATCH = 128
WITHIN = 0.01  # of mean accuracies that count as equal
VALIDATION, REST = 1200, 58800  # images of Fashion-MNIST

# Model, images of training, epochs: some seconds of the peer's time each.
ARCHS: dict[str, tuple[dict[str, Any], int, int]] = {
    "mlp": ({"name": "mlp", "mlp": {"layers": 3, "width": 200}}, 6016, 3),
    "cnn": (
        {"name": "cnn", "cnn": {"stages": 2, "filters": [32, 64], "dense_layers": 1, "dense_width": 128}},
        6016,
        2,
    ),
    "vit16": ({"name": "vit", "vit": {"hidden_dim": 16, "layers": 2, "heads": 4}}, 6016, 4),
    "vit32": ({"name": "vit", "vit": {"hidden_dim": 32, "layers": 4, "heads": 4}}, 6016, 4),
    "resnet": ({"name": "transfer", "transfer": {"weights": "none", "tuned_blocks": "all"}}, 1280, 4),
}
# Of others 1e-3, with which 40 steps of ResNet-18 magnify the last bits of floats to 0.04 of its accuracy.
LR = {"resnet": 1e-4}
NAMES = {
    "mlp": "MLP 3x200",
    "cnn": "CNN 32/64 + 128",
    "vit16": "ViT d16 x 2",
    "vit32": "ViT d32 x 4",
    "resnet": "ResNet-18, 32 px",
}


def config_of(arch: str, seed: int, precision: str = "auto", dropout: float = 0.0) -> Config:
    model, images, epochs = ARCHS[arch]
    kind = model[model["name"]]
    return Config.from_table(
        {
            "data": {
                "size": 32 if arch == "resnet" else 0,
                "validation": VALIDATION / (VALIDATION + REST),
                "subset": images / REST,
            },
            "model": model | {model["name"]: kind | ({"dropout": dropout} if dropout else {})},
            "optimizer": {"name": "adam", "lr": LR.get(arch, 1e-3)},
            "schedule": {"name": "constant"},  # as the peer
            "train": {"epochs": epochs, "batch_size": BATCH, "seed": seed, "precision": precision},
        }
    )


@cache
def data_of(arch: str) -> Splits:
    return load(config_of(arch, 0).data)


def begin(config: Config, data: Splits) -> Training:
    """The training, in the precision that a study of this machine records for it."""
    return Training(config, data, bfloat16=faster(cpu_features(), [config.model.kind.tag]))


@cache
def initial(arch: str, seed: int, precision: str) -> Mapping[str, Tensor]:
    """The weights that a training begins with, by the peer's names."""
    training = begin(config_of(arch, seed, precision), data_of(arch))
    return example.renamed(arch, copied(training))


def copied(training: Training) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in training.model.net.state_dict().items()}


def orders(config: Config, data: Splits) -> Iterator[list[int]]:
    """The order of the training images, epoch by epoch, that searchfm takes."""
    for epoch in range(1, config.train.epochs + 1):
        generator = _generator(config.train.seed or 0, "order", epoch)
        yield torch.randperm(len(data.train), generator=generator).tolist()


def ours(config: Config, arch: str, data: Splits) -> example.Trained:
    training = begin(config, data)
    *_, last = training
    assert training.validation is not None
    assert last.val_accuracy is not None
    predicted = torch.from_numpy(training.validation[1].probabilities).argmax(1)
    weights = example.renamed(arch, training.model.net.state_dict())
    steps = example.steps_of(training._optimizer)
    return example.Trained(steps, last.val_accuracy, predicted, weights, last.train_loss)


def theirs(config: Config, arch: str, data: Splits, weights: Mapping[str, Tensor]) -> example.Trained:
    return example.train(arch, weights, data, orders(config, data), config.optimizer.lr, BATCH)


def same_batches(data: Splits) -> None:
    """Exits unless both sides' pixels and labels, normalised, are equal."""
    images, mean, std = example.dataset(data), data.mean.view(-1, 1, 1), data.std.view(-1, 1, 1)
    for index in range(0, len(data.train), 97):
        image, label = images[int(data.train.indices[index])]
        expected = (data.train.images[index].float() / 255 - mean) / std
        if label != data.train.labels[index] or not torch.allclose(image, expected, atol=1e-5):
            sys.exit(f"image {index} differs between the two sides")


def compare(arch: str, repeats: int, precision: str) -> bool:
    """Prints the row of an architecture, with the ratio if the two sides are equal; whether they are."""
    data = data_of(arch)
    same_batches(data)
    few = replace(data, train=_first(data.train, 2 * BATCH))
    example.train(arch, initial(arch, 0, precision), few, iter([list(range(2 * BATCH))]), 1e-3, BATCH)  # lazy imports
    ours(config_of(arch, 0, precision), arch, few)

    seeds = {"searchfm": iter(range(repeats)), "peer": iter(range(repeats))}

    def measure(side: str) -> tuple[example.Trained, Cost]:
        seed = next(seeds[side])
        config, weights = config_of(arch, seed, precision), initial(arch, seed, precision)
        call = partial(ours, config, arch, data) if side == "searchfm" else partial(theirs, config, arch, data, weights)
        return timed(call)

    results = alternate({side: partial(measure, side) for side in seeds}, repeats)
    mine, peer = results["searchfm"], results["peer"]
    pairs = [(a, b) for (a, _), (b, _) in zip(mine, peer, strict=True)]
    samples = len(data.train) * ARCHS[arch][2]
    steps = sorted({(a.steps, b.steps) for a, b in pairs})
    apart = max(abs(a.accuracy - b.accuracy) for a, b in pairs)
    means = [statistics.mean(side.accuracy for side in sides) for sides in zip(*pairs, strict=True)]
    equal = all(a == b for a, b in steps) and abs(means[0] - means[1]) <= WITHIN
    same = [(a.predicted == b.predicted).float().mean().item() for a, b in pairs]
    moved = [max((a.weights[n] - b.weights[n]).abs().max().item() for n in a.weights) for a, b in pairs]
    rates = [[samples / cost.cpu for _, cost in side] for side in (peer, mine)]
    walls = [[cost.wall for _, cost in side] for side in (peer, mine)]
    row(
        NAMES[arch],
        *(f"{statistics.median(side):,.0f}" for side in rates),
        ratio(rates[1], rates[0]) if equal else "none: not the same work",
        ratio(walls[0], walls[1]) if equal else "",
        ", ".join(f"{a} / {b}" for a, b in steps),
        f"{means[0]:.4f} / {means[1]:.4f}",
        f"{apart:.4f}",
        f"{min(same):.1%} to {max(same):.1%}",
        f"{min(moved):.0e} to {max(moved):.0e}",
    )
    return equal


def gemm_peak() -> float:
    """Floating-point operations a second of one thread's best float32 product of matrices, of several sizes."""
    best = 0.0
    for size in (256, 512, 1024, 2048):
        a, b = torch.rand(size, size), torch.rand(size, size)
        for _ in range(5):
            times = max(1, int(2e9 / (2 * size**3)))
            start = time.process_time()
            for _ in range(times):
                torch.mm(a, b)
            best = max(best, times * 2 * size**3 / (time.process_time() - start))
    return best


def training_flops(config: Config, data: Splits) -> float:
    """Operations of an image's forward and backward pass, as torch counts them: the first layer has no gradient of its
    input, so they are less than three forward passes.
    """
    model = begin(config, data).model.train()
    with FlopCounterMode(display=False) as counter:
        model(data.train.images[:BATCH]).sum().backward()
    return counter.get_total_flops() / BATCH


def parts(arch: str, repeats: int, precision: str) -> None:
    """Prints the share of the GEMM peak that training reaches, without validation and the model's construction."""
    data, config = replace(data_of(arch), val=None), config_of(arch, 0, precision)
    work, samples = training_flops(config, data), len(data.train) * config.train.epochs

    def measure() -> float:
        training = begin(config, data)
        return timed(lambda: list(training))[1].cpu

    measure()
    results = alternate({"peak": gemm_peak, "training": measure}, repeats)
    peak, rate = statistics.median(results["peak"]), samples / statistics.median(results["training"])
    reached = ratio([work * samples / seconds for seconds in results["training"]], results["peak"])
    row(NAMES[arch], f"{work / 1e6:.2f}", f"{rate:,.0f}", f"{peak / 1e9:.0f}", reached)


def profiled(arch: str, precision: str) -> None:
    """Prints in which of torch's operations an epoch of training is, without validation. Recording costs small
    operations more than large ones.
    """
    data, config = replace(data_of(arch), val=None), config_of(arch, 0, precision)
    config = replace(config, train=replace(config.train, epochs=1))
    list(begin(config, data))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        list(begin(config, data))
    found = sorted(profile.key_averages(), key=lambda each: -each.self_cpu_time_total)
    whole, steps = sum(each.self_cpu_time_total for each in found), len(data.train) / BATCH
    for each in found:
        if each.self_cpu_time_total >= 0.01 * whole:
            row(NAMES[arch], f"`{each.key}`", f"{each.self_cpu_time_total / whole:.0%}", f"{each.count / steps:.1f}")


def dropped(arch: str, probability: float, repeats: int, precision: str) -> None:
    """Prints what training with dropout costs over training without it, without validation."""
    data = replace(data_of(arch), val=None)

    def measure(dropout: float) -> float:
        training = begin(config_of(arch, 0, precision, dropout), data)
        return timed(lambda: list(training))[1].cpu

    measure(probability)
    results = alternate({"with": partial(measure, probability), "without": partial(measure, 0.0)}, repeats)
    row(NAMES[arch], probability, ratio(results["with"], results["without"]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench trial")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--repeats", type=int, default=5, help="each with a seed of its own; 3 or more")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of searchfm")
    parser.add_argument("--parts", action="store_true", help="share of the GEMM peak")
    parser.add_argument("--profile", action="store_true", help="share of each of torch's operations")
    parser.add_argument("--dropout", nargs="*", type=float, help="ratio of training with and without; of mlp and vits")
    options = parser.parse_args(arguments)
    if options.repeats < 3:
        parser.error("--repeats: 3 or more, since accuracies are compared over three seeds")
    importlib.import_module("searchfm.learn.warm")  # one thread, denormals flushed, as in workers; for both sides
    if options.parts:
        header("Share of the GEMM peak (float32, one thread) that training reaches")
        table("", "MFLOP a sample", "samples/s", "peak, GFLOP/s", "share")
        for arch in options.arch:
            parts(arch, options.repeats, options.precision)
    elif options.profile:
        header("Operations in which an epoch of training is, one thread; those of 1% and more")
        table("", "operation", "share of CPU time", "calls a step")
        for arch in options.arch:
            profiled(arch, options.precision)
    elif options.dropout is not None:
        header("CPU time of training with dropout over that without, one thread")
        table("", "dropout", "ratio")
        for arch in options.arch:
            for probability in options.dropout or [0.1, 0.3, 0.5]:
                if arch in ("mlp", "vit16", "vit32"):
                    dropped(arch, probability, options.repeats, options.precision)
    else:
        header(
            f"A trial on one thread; searchfm with precision {options.precision}. Accuracies are of {VALIDATION} images"
        )
        columns = (
            "peer samples/s",
            "searchfm",
            "ratio, CPU time",
            "ratio, wall",
            "steps",
            "mean accuracy, searchfm / peer",
        )
        table("", *columns, "apart, at most", "equal predictions", "max abs. difference of weights")
        results = []
        for arch in options.arch:
            progress(NAMES[arch])
            results.append(compare(arch, options.repeats, options.precision))
        if not all(results):
            sys.exit(f"not the same work: steps differ, or mean accuracies by more than {WITHIN}")
