"""The test accuracy after equal wall-clock time: `searchfm tune --retrain` against searches of other libraries.

`python -m tests.bench deadline [--minutes 10] [--repeats 3] [--side NAME]`. Every side has the same time from the start
of its process, the same space of convolutional nets, the same 51,000 + 9,000 images of Fashion-MNIST, and the machine
to itself. It answers with one model, which is tested on the 10,000 test images: the best trial's weights, or the best
trial's configuration trained on all 60,000 images, in a time that is part of its own. Each repetition has its own seed.

Each result of committed code is kept in `results/deadline.json`, so that a bench that was stopped continues; `--again`
measures anew. Sides are compared on one machine: results of other hardware are kept beside, and are not used.
`python -m tests.reports.page` writes BENCHMARKS.md's table of what is kept.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

import searchfm
from searchfm.config import DataConfig
from searchfm.home import write_whole
from searchfm.learn.data import load, load_test
from searchfm.records import Record
from tests.bench import _common as common
from tests.bench._environments import ENVIRONMENTS, python_of
from tests.bench.peers import deadline_work as space
from tests.bench.study import PEERS, failing_in_one_line, variables

EPOCHS = 8
SUBSET = 0.2  # of the images, for trials that are followed by a final training
SIDES = {  # a peer's program, its environment, and the fraction of the images that its trials train on
    "Optuna": ("deadline_optuna.py", "searchfm", 1.0),
    "Optuna, fraction, final training": ("deadline_optuna.py", "searchfm", SUBSET),
    "Ray Tune, ASHA": ("deadline_ray.py", "ray", 1.0),
    "Ray Tune, ASHA, fraction, final training": ("deadline_ray.py", "ray", SUBSET),
    "Keras Tuner, hyperband": ("deadline_keras.py", "keras-tuner", 1.0),
    "Keras Tuner, hyperband, fraction, final training": ("deadline_keras.py", "keras-tuner", SUBSET),
}
OURS = {"searchfm, final training": 1.0, "searchfm, fraction, final training": SUBSET}
ALL = (*OURS, *SIDES)
KEPT = Path(__file__).parent / "results" / "deadline.json"
HEAD = (
    "| minutes, side | test accuracy, mean | of each run | best trial, validation | trials | wall, s | when, where |\n"
    "|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Finish:
    """What one side answered with."""

    test: float  # accuracy on the test part, 0 to 1
    value: float  # validation accuracy of its best trial
    trials: int  # that began
    wall: float  # seconds of the process


@dataclass(frozen=True)
class Measured(Record):
    """A run that is kept."""

    side: str
    minutes: float
    seed: int
    finish: Finish
    commit: str
    date: str
    hardware: str

    @property
    def key(self) -> tuple[str, float, int, str]:
        """What distinguishes it from the other runs that are kept."""
        return self.side, self.minutes, self.seed, self.hardware


def study_table(seed: int, fraction: float) -> dict[str, Any]:
    """The study file: the space of the peers, the search as the built-in study of convolutional nets has it. fraction:
    of the images, for the trials.
    """
    low, high = space.STAGES
    filters = {"choice": list(space.FILTERS)}
    cnn = {
        "stages": {"low": low, "high": high},
        "filters": [filters] * high,
        "convs": {"low": space.CONVS[0], "high": space.CONVS[1]},
        "batch_norm": True,
        "dropout": {"low": space.DROPOUT[0], "high": space.DROPOUT[1]},
    }
    return {
        "search": {"trials": 1000, "seed": seed, "sampler": "tpe", "pruner": {"name": "asha", "promote": True}},
        "data": {"name": "fashion-mnist", "subset": fraction},
        "model": {"name": "cnn", "cnn": cnn},
        "optimizer": {"name": "adam", "lr": {"low": space.LR[0], "high": space.LR[1], "log": True}},
        "train": {"epochs": EPOCHS, "batch_size": {"choice": list(space.BATCHES)}},
    }


def write_images(folder: Path) -> None:
    """Writes searchfm's split, and the test part, for the peers."""
    config = DataConfig(name="fashion-mnist")
    data = load(config)
    assert data.val is not None
    for name, part in (("train", data.train), ("val", data.val), ("test", load_test(config))):
        np.savez(folder / f"{name}.npz", images=part.images[:, 0].numpy(), labels=part.labels.numpy())


def run_searchfm(side: str, minutes: float, seed: int) -> Finish:
    """`searchfm tune FILE --timeout --retrain` in a fresh home, with all workers and MLflow."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file, home = Path(folder) / "task.toml", Path(folder) / "home"
        table = tomli_w.dumps(study_table(seed, OURS[side]))
        file.write_text(f"# Question: which net is best in a short time?\n{table}")
        command = [sys.executable, "-m", "searchfm", "tune", str(file), "--home", str(home), "--retrain"]
        _, cost = common.run([*command, "--timeout", f"{round(60 * minutes)}"], env=variables(path=True))
        study = searchfm.open_study("task", home=home).record
        assert study.final is not None
        assert study.best is not None
        return Finish(study.final.test.accuracy, study.best.value or 0, len(study.trials), cost.wall)


def run_peer(side: str, images: Path, minutes: float, seed: int) -> Finish:
    program, environment, fraction = SIDES[side]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for path in images.iterdir():
            (Path(folder) / path.name).symlink_to(path)
        command = [str(python_of(environment)), str(PEERS / program), folder, "--seconds", str(60 * minutes)]
        command += ["--fraction", str(fraction), "--epochs", str(EPOCHS), "--seed", str(seed)]
        output, cost = common.run(command, env=variables(path=False) | ENVIRONMENTS[environment].variables)
    answer = json.loads(output.strip().splitlines()[-1])
    return Finish(answer["test"], answer["value"], answer["trials"], cost.wall)


def kept() -> list[Measured]:
    """All runs that are kept, in the order of ALL."""
    entries = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else []
    runs = [Measured.from_json(entry) for entry in entries]
    return sorted(runs, key=lambda run: (run.minutes, run.hardware, ALL.index(run.side), run.seed))


def keep(run: Measured) -> None:
    """Adds a run to those that are kept; one of the same side, minutes, seed and hardware is replaced."""
    others = [one for one in kept() if one.key != run.key]
    write_whole(KEPT, (json.dumps([one.to_json() for one in [*others, run]], indent=1) + "\n").encode())


def lines(runs: Sequence[Measured]) -> Iterator[str]:
    """The rows of the table below HEAD, a side a line."""
    if not runs:
        yield "| not yet measured |" + " |" * 6
    for group in dict.fromkeys((run.minutes, run.hardware, run.side) for run in runs):
        minutes, hardware, side = group
        ours = [run for run in runs if (run.minutes, run.hardware, run.side) == group]
        tests = [100 * run.finish.test for run in ours]
        cells = (
            f"{minutes:g}, {side}",
            f"**{statistics.mean(tests):.2f}**",
            ", ".join(f"{test:.2f}" for test in tests),
            f"{100 * statistics.mean(run.finish.value for run in ours):.2f}",
            ", ".join(str(run.finish.trials) for run in ours),
            f"{statistics.mean(run.finish.wall for run in ours):.0f}",
            f"{max(run.date for run in ours)}, {hardware}",
        )
        yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m tests.bench deadline", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="that each side has")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, each with its own seed")
    parser.add_argument("--side", choices=ALL, action="append", help="default: all")
    parser.add_argument("--again", action="store_true", help="do not use results of earlier runs")
    options = parser.parse_args(arguments)
    sides = options.side or ALL
    for side in sides:
        if side in SIDES:
            python_of(SIDES[side][1])  # made first, so that nothing is installed while a side runs
    common.header(f"Test accuracy after {options.minutes:g} minutes", cores=common.usable())
    commit, hardware, runs = common.commit(), common.hardware(), list[Measured]()
    clean = not commit.endswith("+")  # else the files are no commit's, and nothing is kept
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, failing_in_one_line():
        write_images(Path(folder))
        for seed in range(options.repeats):
            for side in sides:
                earlier = [run for run in kept() if run.key == (side, options.minutes, seed, hardware)]
                if earlier and clean and not options.again:
                    runs += earlier
                    continue
                common.progress(f"{side}, seed {seed}")
                if side in OURS:
                    done = run_searchfm(side, options.minutes, seed)
                else:
                    done = run_peer(side, Path(folder), options.minutes, seed)
                runs.append(Measured(side, options.minutes, seed, done, commit, common.today(), hardware))
                if clean:
                    keep(runs[-1])
    print(HEAD + "\n".join(lines(sorted(runs, key=lambda run: ALL.index(run.side)))))
