"""Searches of an hour, from a fresh clone, retrained and tested: python -m tests.reports.hours [NAME ...].

Each is one `searchfm tune ... --timeout 1h --retrain` with all cores and an empty cache folder, alone on the machine.
What it reached is kept as `studies/reports/results/hours/NAME-SEED.json`; a run that is kept is skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import searchfm
from searchfm.home import CACHE, write_whole
from searchfm.records import Record, StudyRecord
from tests.bench import _common as common
from tests.reports.rows import RESULTS
from tests.weights import LITE0, LITE0_FILE, MNIST_FILE, lite0_file, mnist_file

HOURS = RESULTS / "hours"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Search:
    """What is run, once for each seed."""

    study: str
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ("--timeout", "1h")


FILES = {LITE0_FILE: lite0_file, MNIST_FILE: mnist_file}  # made on this machine when a search names them

SEARCHES = {
    "cnn": Search("cnn", seeds=(0, 1, 2)),
    "vit": Search("vit"),
    "mlp": Search("mlp"),
    "transfer": Search(
        "resnet",
        settings={"model.transfer.model": LITE0, "model.transfer.weights": LITE0_FILE, "data.size": 64},
    ),
    "any": Search("any"),
    "digits": Search("cnn", settings={"data.name": "digits"}, options=("--timeout", "5m")),
    "mnist-5k": Search("cnn", settings={"data.name": MNIST_FILE}, options=("--timeout", "10m")),
}


@dataclass(frozen=True)
class Hour(Record):
    """What one search reached."""

    name: str
    command: str
    seed: int
    test: float  # accuracy of the final model on the test part, 0 to 1
    low: float  # its 95% interval (Wilson)
    high: float
    images: int  # of the test part
    value: float  # of the search's best trial
    fresh: float | None  # mean of the winner over fresh seeds; None without a contest of finalists
    trials: int
    pruned: int
    seconds: float  # of the whole command
    training_seconds: float  # of the final training
    epochs: int
    parameters: int
    flops: int  # of one image's forward pass
    config: dict[str, Any]  # of the winner
    date: str
    hardware: str
    commit: str
    versions: dict[str, str]

    @classmethod
    def of(cls, name: str, command: str, seed: int, study: StudyRecord, seconds: float, commit: str) -> "Hour":
        """What is kept of a study that was tuned and retrained."""
        final, best = study.final, study.best
        assert final is not None
        assert best is not None
        assert best.result is not None
        fresh = final.validation.accuracy if final.validation.low is not None else None
        return cls(
            name=name,
            command=command,
            seed=seed,
            test=final.test.accuracy,
            low=round(final.test.low, 4),
            high=round(final.test.high, 4),
            images=final.test.n,
            value=round(best.value or 0, 4),
            fresh=None if fresh is None else round(fresh, 4),
            trials=len(study.trials),
            pruned=len(study.of("pruned")),
            seconds=round(seconds),
            training_seconds=round(final.training_seconds),
            epochs=final.epochs,
            parameters=final.parameters,
            flops=final.flops,
            config=dict(study.trials[final.winner].config),
            date=common.today(),
            hardware=common.hardware(),
            commit=commit,
            versions=dict(best.result.versions),
        )


def path_of(name: str, seed: int) -> Path:
    return HOURS / f"{name}-{seed}.json"


def kept() -> Iterator[Hour]:
    """All that are kept, in the order of SEARCHES."""
    for name, search in SEARCHES.items():
        yield from (Hour.read(path_of(name, seed)) for seed in search.seeds if path_of(name, seed).is_file())


def run(name: str, seed: int) -> None:
    """Runs one search as a new user does."""
    search = SEARCHES[name]
    settings = [(key, str(value)) for key, value in search.settings.items()]
    shown = ["searchfm", "tune", search.study, *(f"--set {key}={value}" for key, value in settings), *search.options]
    with tempfile.TemporaryDirectory(prefix="hour-") as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        subprocess.run(["uv", "sync", "--quiet"], cwd=folder, check=True)
        command = ["uv", "run", "searchfm", "tune", search.study, "--retrain", *search.options, "--seed", str(seed)]
        command += [f"--set={key}={FILES[value]() if value in FILES else value}" for key, value in settings]
        variables = {**os.environ, CACHE: str(Path(folder) / "cache")}  # features are computed within the hour
        began = time.monotonic()
        subprocess.run(command, cwd=folder, env=variables, check=True, stdout=sys.stderr)
        seconds = time.monotonic() - began
        study = searchfm.open_study(search.study, home=Path(folder) / "runs").record
        shown += ["--retrain", *(["--seed", str(seed)] if seed else [])]
        hour = Hour.of(name, " ".join(shown), seed, study, seconds, common.commit(Path(folder)))
    values = hour.to_json()
    for part in (values["config"]["model"].get("transfer", {}), values["config"]["data"]):
        for key in {"weights", "name"} & part.keys():
            part[key] = Path(part[key]).name  # folders of this machine say nothing
    write_whole(path_of(name, seed), (json.dumps(values, indent=1) + "\n").encode())


def main() -> None:
    from tests.reports import page

    parser = argparse.ArgumentParser(prog="python -m tests.reports.hours", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SEARCHES)}; default: all")
    parser.add_argument("--seed", type=int, action="append", help="one of its seeds; default: all")
    options = parser.parse_args()
    names = options.names or list(SEARCHES)
    if unknown := sorted(set(names) - set(SEARCHES)):
        parser.error(f"no search {', '.join(unknown)}; there are {', '.join(SEARCHES)}")
    for name in names:
        for seed in SEARCHES[name].seeds:
            if seed in (options.seed or [seed]) and not path_of(name, seed).is_file():
                common.progress(f"{name}, seed {seed}")
                run(name, seed)
                page.write()


if __name__ == "__main__":
    main()
