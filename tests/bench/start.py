"""What commands take, as whole processes, in a home with a small search of digits and its final model; and what imports
take of a CPU.

`python -m tests.bench start [--repeats 5] [--profile] [NAME...]`, where a NAME is a command's or an import's, as in the
tables. --profile: which packages' imports the time of commands is, once each.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench._common import Cost, alternate, header, progress, ratio, row, run, table

COMMANDS = {
    "help": ["--help"],
    "studies": ["studies"],
    "studies cnn": ["studies", "cnn"],
    "status": ["status"],
    "compare": ["compare", "mlp"],
    "predict": ["predict", "mlp", "IMAGE"],
    "report": ["report", "mlp"],
}
IMPORTS = {
    "python": "",
    "torch": "import torch",
    "torch and its first optimizer": "import torch; torch.optim.AdamW([torch.zeros(1)])",
    "a worker's start (learn.warm)": "import searchfm.learn.warm",
    "timm": "import timm",
    "optuna": "import optuna",
    "a search (tuning)": "import searchfm.tuning",
    "mlflow": "import mlflow",
    "mlflow's client and store": "import mlflow.store.tracking.sqlalchemy_store; mlflow.MlflowClient('sqlite://')",
    "matplotlib": "import matplotlib.figure, matplotlib.backends.backend_agg",
}


LEAST = 0.03  # seconds; packages with less are not listed
PEER = "torch"  # an import that every machine knows: commands are measured against it


def make_home(folder: Path) -> None:
    """A search of digits and its final model, and an image."""
    program, environment = [sys.executable, "-m", "searchfm"], os.environ | {"SEARCHFM_HOME": str(folder)}
    progress("the home: a search of digits, and its final model")
    run([*program, "tune", "mlp", "--dataset", "digits", "--trials", "6", "--epochs", "3"], env=environment)
    run([*program, "retrain", "mlp"], env=environment)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "image.png")


def measure(command: list[str], folder: Path) -> Cost:
    return run(command, env=os.environ | {"SEARCHFM_HOME": str(folder)})[1]


def imports(command: list[str], folder: Path) -> Counter[str]:
    """Seconds on the clock of imports in a command's own process, each module without those it imports, by package."""
    timed, environment = [command[0], "-X", "importtime", *command[1:]], os.environ | {"SEARCHFM_HOME": str(folder)}
    errors = subprocess.run(timed, env=environment, capture_output=True, text=True, check=True).stderr
    seconds: Counter[str] = Counter()
    for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", errors, re.MULTILINE):
        seconds[name.split(".")[0]] += int(own) / 1e6
    return seconds


def profile(commands: Mapping[str, list[str]], folder: Path) -> None:
    """Prints, for each command, what it takes, and the imports of packages that take most of it."""
    table("", "wall, s", "imports, s", f"of packages that take {LEAST} s or more")
    for name, command in commands.items():
        wall, seconds = measure(command, folder).wall, imports(command, folder)
        listed = ", ".join(f"{package} {own:.2f}" for package, own in seconds.most_common() if own >= LEAST)
        row(f"`{name}`", f"{wall:.2f}", f"{seconds.total():.2f}", listed)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench start")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*COMMANDS, *IMPORTS]))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="imports of commands, by package, once each")
    options, names = parser.parse_args(arguments), [*COMMANDS, *IMPORTS]
    if unknown := set(options.names) - set(names):
        parser.error(f"{', '.join(unknown)}: must be among {', '.join(names)}")
    if options.profile and (imported := set(options.names) & set(IMPORTS)):
        parser.error(f"--profile: needs commands, and {', '.join(sorted(imported))} is an import")
    chosen = [*dict.fromkeys([*(options.names or names), PEER])]
    header("Wall time until a process ends, and CPU time with its children; seconds, bytecode compiled")
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        folder, calls = Path(home), dict[str, Callable[[], Cost]]()
        if set(chosen) & set(COMMANDS):
            make_home(folder)
        commands: dict[str, list[str]] = {}
        for name in chosen:
            program = ["-m", "searchfm", *COMMANDS[name]] if name in COMMANDS else ["-c", IMPORTS[name]]
            commands[name] = [
                sys.executable,
                *(str(folder / "image.png") if part == "IMAGE" else part for part in program),
            ]
            calls[name] = partial(measure, commands[name], folder)
        for call in calls.values():
            call()  # compiles bytecode, and fills the machine's cache of files
        if options.profile:
            profile({name: command for name, command in commands.items() if name in COMMANDS}, folder)
            return
        results = alternate(calls, options.repeats)
    table("", "wall, median", "min", "max", "CPU, median", f"CPU over that of importing {PEER}")
    for name, costs in results.items():
        walls = [cost.wall for cost in costs]
        over = ratio((cost.cpu for cost in costs), (cost.cpu for cost in results[PEER]))
        figures = (statistics.median(walls), min(walls), max(walls), statistics.median(cost.cpu for cost in costs))
        row(f"`{name}`" if name in COMMANDS else f"import: {name}", *(f"{figure:.2f}" for figure in figures), over)
