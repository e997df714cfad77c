"""Whole studies as processes, alternated: `searchfm tune` as a user runs it, against searches of other libraries.

`python -m tests.bench study [--trials 12] [--peer optuna|keras-tuner|ray|all] [--variant NAME] [--repeats 5]
[--asha]`. The work is the same on both sides: nets of 1 to 3 layers, 5 epochs, 47 batches of 128 Fashion-MNIST images,
the same images and the same configurations. They are those that searchfm's random sampler draws with seed 0, so that
searchfm takes its usual way, and the peers take them from a list where they would draw. Only the seed of the trainings
differs from run to run.

A peer runs as a program of `peers/`, in an environment that `_environments.py` makes. No ratio is printed where the
numbers of steps differ, or the accuracies by more than 0.01; then the exit code is 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

import searchfm
from searchfm.learn.data import load
from searchfm.search.study import Study
from tests.bench import _common as common
from tests.bench._common import Cost
from tests.bench._environments import ENVIRONMENTS, python_of

PEERS = Path(__file__).parent / "peers"
EPOCHS, BATCH = 5, 128
TRAIN, VALIDATION = 47 * BATCH, 16 * BATCH  # images; Optuna's example has a third as many for validation, too
ALL = 60_000
TOLERANCE = 0.01  # between accuracies of both sides
ASHA = {"name": "asha", "min_epochs": 1, "reduction": 2}  # as in Ray's example


@dataclass(frozen=True)
class Peer:
    """A program of `peers/`, and how it is run: name of a row -> options and environment variables."""

    program: str
    environment: str
    variants: dict[str, tuple[list[str], dict[str, str]]]


ONE_THREAD = (["--one-thread"], {"OMP_NUM_THREADS": "1"})
THREADS = {"1 thread": ONE_THREAD, "default threads": ([], {})}
PEERS_BY_NAME = {
    "optuna": Peer("optuna_example.py", "searchfm", THREADS),
    "keras-tuner": Peer("keras_search.py", "keras-tuner", THREADS),
    "ray": Peer("ray_tune.py", "ray", {"a process a trial": ([], {}), "processes reused": (["--reuse-actors"], {})}),
}


@dataclass(frozen=True)
class Run:
    """One search, as a process: what it took, and of each trial the steps and the last validation accuracy."""

    cost: Cost
    steps: Sequence[int]
    accuracies: Sequence[float]


def study_table(trials: int, seed: int, asha: bool) -> dict[str, Any]:
    """The study file. seed: of the trainings; that of the proposals is always 0."""
    width = {"low": 64, "high": 256}
    return {
        "search": {"trials": trials, "seed": 0, "sampler": "random", "pruner": ASHA if asha else "none"},
        "data": {"name": "fashion-mnist", "validation": VALIDATION / ALL, "subset": TRAIN / (ALL - VALIDATION)},
        "model": {"name": "mlp", "mlp": {"layers": {"low": 1, "high": 3}, "width": [width] * 3}},
        "optimizer": {"name": "adam", "lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "schedule": {"name": "constant"},  # as the peers
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "seed": seed},
    }


def write_work(folder: Path, trials: int) -> None:
    """Writes what the peers train: the images of searchfm's split, and the configurations that it will draw."""
    study = Study("bench", study_table(trials, 0, False))
    data = load(study.example.data)  # parses the data set where that was not done yet, so that no run does
    assert data.val is not None
    assert (len(data.train), len(data.val)) == (TRAIN, VALIDATION)
    for name, part in (("train", data.train), ("val", data.val)):
        np.savez(folder / f"{name}.npz", images=part.images[:, 0].numpy(), labels=part.labels.numpy())
    configs = [config.to_table() for config in study.samples(trials)]
    points = [{"widths": c["model"]["mlp"]["width"], "lr": c["optimizer"]["lr"]} for c in configs]
    (folder / "points.json").write_text(json.dumps(points))


def variables(*, path: bool) -> dict[str, str]:
    """The environment of a run: no settings of this shell that would change what is measured."""
    dropped = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI")
    kept = ("SEARCHFM_CACHE", "SEARCHFM_DATA", "SEARCHFM_MIRROR")
    chosen = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and (name in kept or not name.startswith("SEARCHFM_"))
    }
    if not path:
        chosen.pop("PYTHONPATH", None)  # the peers' packages are their own
    return {**chosen, "RAY_USAGE_STATS_ENABLED": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run_searchfm(work: Path, trials: int, seed: int, asha: bool) -> Run:
    """`searchfm tune FILE` in a fresh home, with all workers and MLflow."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file, home = Path(folder) / "bench.toml", Path(folder) / "home"
        file.write_text(f"# Question: how long does a search take?\n{tomli_w.dumps(study_table(trials, seed, asha))}")
        command = [sys.executable, "-m", "searchfm", "tune", str(file), "--home", str(home)]
        _, cost = common.run(command, env=variables(path=True))
        record = searchfm.open_study("bench", home=home).record
        points = json.loads((work / "points.json").read_text())
        for trial, point in zip(record.trials, points, strict=False):
            assert trial.params["optimizer.lr"] == point["lr"], "searchfm drew another configuration"
        return Run(
            cost,
            [len(trial.epochs) * -(-record.data.train // BATCH) for trial in record.trials],
            [trial.epochs[-1].val_accuracy or 0.0 for trial in record.trials],
        )


def run_peer(peer: Peer, variant: str, work: Path, trials: int, seed: int, asha: bool) -> Run:
    options, more = peer.variants[variant]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in ("train.npz", "val.npz"):
            (Path(folder) / name).symlink_to(work / name)
        points = json.loads((work / "points.json").read_text())[:trials]
        values = {"points": points, "epochs": EPOCHS, "batch_size": BATCH, "seed": seed}
        (Path(folder) / "work.json").write_text(json.dumps(values))
        command = [str(python_of(peer.environment)), str(PEERS / peer.program), folder, *options]
        environment = {**variables(path=False), **ENVIRONMENTS[peer.environment].variables, **more}
        output, cost = common.run([*command, *(["--asha"] if asha else [])], env=environment)
    answer = json.loads(output.strip().splitlines()[-1])
    return Run(replace(cost, cpu=answer.get("cpu", cost.cpu)), answer["steps"], answer["accuracies"])


@contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Ends the bench with the last lines of a process that failed."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        output = "\n".join(getattr(error, "__notes__", ())).strip().splitlines()
        sys.exit("\n".join([f"{' '.join(error.cmd)} ended with {error.returncode}:", *output[-15:]]))


def difference(ours: Sequence[Run], theirs: Sequence[Run], asha: bool) -> str:
    """What differs in the work of the two sides, with both numbers; empty if it is the same."""
    for one, other in zip(ours, theirs, strict=True):
        if len(one.steps) != len(other.steps):
            return f"trials: {len(one.steps)} of searchfm, {len(other.steps)} of the peer"
        if sum(one.steps) != sum(other.steps) and not asha:
            return f"steps: {sum(one.steps)} of searchfm, {sum(other.steps)} of the peer"
    # With halving the trials that end early differ, and so does the median.
    for name, summary in [("best", best), *([] if asha else [("median", middle)])]:
        one, other = summary(ours), summary(theirs)
        if abs(one - other) > TOLERANCE:
            return f"{name} accuracy: {one:.4f} of searchfm, {other:.4f} of the peer"
    return ""


def best(runs: Sequence[Run]) -> float:
    """The best accuracy of a search: the median over the runs, each with another seed."""
    return statistics.median(max(run.accuracies) for run in runs)


def middle(runs: Sequence[Run]) -> float:
    """The median accuracy of a search's trials: the median over the runs."""
    return statistics.median(statistics.median(run.accuracies) for run in runs)


def measure(peers: Sequence[str], trials: int, repeats: int, asha: bool, chosen: str | None) -> dict[str, list[Run]]:
    """The runs of searchfm, and of each variant of each peer or the chosen one, alternated, after a short run each."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, failing_in_one_line():
        work = Path(folder)
        write_work(work, trials)
        calls: dict[str, Callable[[int, int], Run]] = {
            "searchfm": lambda count, seed: run_searchfm(work, count, seed, asha)
        }
        for name in peers:
            for variant in PEERS_BY_NAME[name].variants:
                if chosen not in (None, variant):
                    continue
                calls[f"{name}, {variant}"] = lambda count, seed, name=name, variant=variant: run_peer(
                    PEERS_BY_NAME[name], variant, work, count, seed, asha
                )
        for side, call in calls.items():
            common.progress(f"warm-up: {side}")
            call(1, 0)  # files are read from the disk once
        seeds = {side: count() for side in calls}
        sides = {side: lambda side=side: calls[side](trials, next(seeds[side])) for side in calls}
        return common.alternate(sides, repeats)


def print_table(results: dict[str, list[Run]], asha: bool) -> bool:
    """Prints a row a side. Returns whether all sides did the same work."""
    ours, same = results["searchfm"], True
    common.table("side", "wall / CPU s", "wall, peer over searchfm", "CPU", "steps", "best", "median accuracy")
    for side, runs in results.items():
        problem = difference(ours, runs, asha)
        same = same and not problem
        ratios = ["", ""]
        if problem:
            ratios = [f"none: {problem}", ""]
        elif side != "searchfm":
            ratios = [
                str(common.ratio([run.cost.wall for run in runs], [run.cost.wall for run in ours])),
                str(common.ratio([run.cost.cpu for run in runs], [run.cost.cpu for run in ours])),
            ]
        steps = round(statistics.median(sum(run.steps) for run in runs))
        cost = common.median_cost([run.cost for run in runs])
        common.row(side, cost, *ratios, steps, f"{best(runs):.4f}", f"{middle(runs):.4f}")
    return same


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m tests.bench study", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=12, help="trials of each search")
    parser.add_argument("--peer", choices=[*PEERS_BY_NAME, "all"], default="all", help="the other library")
    variants = sorted({variant for peer in PEERS_BY_NAME.values() for variant in peer.variants})
    parser.add_argument("--variant", choices=variants, help="of the peer; default: each")
    parser.add_argument("--repeats", type=int, default=5, help="alternated runs of each side")
    parser.add_argument("--asha", action="store_true", help="both sides prune by ASHA; for --peer ray")
    options = parser.parse_args(arguments)
    if options.asha and options.peer != "ray":
        parser.error("--asha needs --peer ray")
    peers = list(PEERS_BY_NAME) if options.peer == "all" else [options.peer]
    if options.variant and not any(options.variant in PEERS_BY_NAME[name].variants for name in peers):
        known = ", ".join(PEERS_BY_NAME[options.peer].variants)
        parser.error(f"--variant {options.variant}: of --peer {options.peer} must be among {known}")
    for name in peers:
        python_of(PEERS_BY_NAME[name].environment)  # made first, so that nothing is installed between the runs
    work = f"{options.trials} MLPs, {EPOCHS} epochs of {TRAIN} images, {'ASHA' if options.asha else 'no pruning'}"
    common.header(f"Whole studies as processes: {work}", cores=common.usable())
    results = measure(peers, options.trials, options.repeats, options.asha, options.variant)
    same = print_table(results, options.asha)
    print(f"\nAccuracies are medians over the runs, each with a seed of its own ({options.repeats}).")
    print("Of a peer with two rows, the ratio to quote is the smaller one.")
    if not same:
        sys.exit("the two sides did not do the same work: no ratio")
