"""What a study costs beside its training. Each part prints a table of its own:

    coordinator  CPU, statements and commits a trial of the coordinator: toy trials of 5 epochs, the space of mlp.toml
    digits       `tune mlp --dataset digits`: its phases on the clock, and CPU by process; `retrain` after it
    tracking     CPU a trial of the tracking process: by how much it grows with more trials of digits
    share        the share of two cores that trains: 60 trials of about 0.6 s; and the phases of that search

`python -m tests.bench overhead [PART...] [--repeats 5] [--trials 50 200 1000] [--share-trials 60]`, where --trials are
those at whose end the coordinator's cost a trial is printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import event
from sqlalchemy.engine import Engine as Database

from searchfm.home import Home, shipped_folder
from searchfm.records import StudyRecord
from searchfm.search import files
from searchfm.search.study import Study
from tests.bench._common import Cost, alternate, header, progress, row, run, table
from tests.driving import check, search, stored

WORKERS = 2
WINDOW = 50  # trials over which a cost a trial is averaged
TOY = {"ticks": 1, "seconds": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "random, no pruner": {"sampler": "random", "pruner": "none"},
    "tpe, median": {"sampler": "tpe", "pruner": "median"},
}
SHARE = """
[search]
sampler = "random"
pruner = "none"
[data]
validation = 0.02 # 1,200 images
subset = 0.10231 # 6,016 images
[model]
name = "mlp"
[model.mlp]
layers = { low = 1, high = 3 }
width = { low = 64, high = 256 }
[optimizer]
name = "adam"
lr = { low = 1e-4, high = 1e-2, log = true }
[train]
epochs = 5
"""


# --- coordinator ---


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the statements and commits of all databases of this process."""
    counts: Counter[str] = Counter()

    def statement(*_: Any) -> None:
        counts["statements"] += 1

    def commit(*_: Any) -> None:
        counts["commits"] += 1

    hooks: list[tuple[str, Callable[..., None]]] = [("before_cursor_execute", statement), ("commit", commit)]
    for name, hook in hooks:
        event.listen(Database, name, hook)
    yield counts
    for name, hook in hooks:
        event.remove(Database, name, hook)


def marks(case: str, trials: int) -> list[tuple[float, int, int]]:
    """CPU seconds of this process, statements and commits at the end of each trial of a search, and at its start."""
    study_table = dict(files.read(shipped_folder() / "mlp.toml").table)
    study_table["search"] = {**CASES[case], "trials": trials}
    study_table["train"] = {**study_table["train"], "epochs": 5}
    found: list[tuple[float, int, int]] = []

    with tempfile.TemporaryDirectory(prefix="bench-") as folder, counted() as counts:

        def watch(progress: Any, _: Any) -> None:
            if type(progress).__name__ == "TrialEnded" or not found:
                found.append((time.process_time(), counts["statements"], counts["commits"]))

        record = search(Home(Path(folder)), Study("mlp", study_table), workers=WORKERS, payload=TOY, watch=watch)
        check(record, trials)
    return found


def coordinator(repeats: int, trials: Sequence[int]) -> None:
    """Prints the coordinator's cost a trial near the end of so many trials, and its growth."""
    table("coordinator, at trial", *map(str, trials), f"growth, {trials[0]} to {trials[-1]}", "statements", "commits")
    results = alternate({case: partial(marks, case, max(trials)) for case in CASES}, repeats)
    for case, runs in results.items():
        costs = [[1000 * each(run_, end, 0) for run_ in runs] for end in trials]
        last = [[each(run_, max(trials), kind) for run_ in runs] for kind in (1, 2)]
        growth = [late / early for early, late in zip(costs[0], costs[-1], strict=True)]
        cells = [f"{statistics.median(values):.1f} ms" for values in costs]
        counts = [f"{statistics.median(values):.1f}" for values in last]
        row(case, *cells, f"{statistics.median(growth):.2f} [{min(growth):.2f}-{max(growth):.2f}]", *counts)


def each(run_: Sequence[tuple[float, int, int]], end: int, kind: int) -> float:
    """The cost a trial over the last trials before `end`."""
    first = max(0, end - WINDOW)
    end = min(end, len(run_) - 1)
    return (run_[end][kind] - run_[first][kind]) / (end - first)


# --- whole commands ---


class Processes:
    """CPU seconds by role of a command's processes, sampled while it runs. What a process uses after its last sample,
    0.05 s at most, is not in it.
    """

    ROLES: Mapping[str, str] = {"searchfm.tracking": "tracking", "forkserver": "fork server and workers"}

    def __init__(self, pid: int) -> None:
        self.process, self.seconds, self.roles = psutil.Process(pid), dict[int, float](), dict[int, str]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        known = {self.process.pid: self.process}
        while not self._done.wait(0.05):
            with suppress(psutil.Error):
                known |= {child.pid: child for child in self.process.children(recursive=True) if child.pid not in known}
            for pid, process in known.items():
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self.seconds[pid] = times.user + times.system
                    if pid not in self.roles:
                        self.roles[pid] = self._role(process)

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.process.pid:
            return "command"
        line = " ".join(process.cmdline())
        return next((role for text, role in self.ROLES.items() if text in line), "other")

    def close(self) -> dict[str, float]:
        """CPU seconds by role."""
        self._done.set()
        self._thread.join()
        sums: Counter[str] = Counter()
        for pid, seconds in self.seconds.items():
            sums[self.roles.get(pid, "other")] += seconds
        return dict(sums)


def tune(home: Path, *arguments: str) -> tuple[float, float, dict[str, float], StudyRecord]:
    """Times of a `tune`'s start and end, seconds since 1970; CPU seconds by role; the study's record."""
    start = time.time()
    with (home / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "searchfm", "tune", *arguments]
        process = subprocess.Popen(command, env=os.environ | {"SEARCHFM_HOME": str(home)}, stdout=output, stderr=output)
        sampled = Processes(process.pid)
        code = process.wait()
        end = time.time()
    cpu = sampled.close()
    if code:
        sys.exit(f"{' '.join(command)}: exit code {code}\n{(home / 'output.txt').read_text()}")
    return start, end, cpu, stored(Home(home), "mlp" if arguments[0] == "mlp" else "share")


def digits_search(trials: int, home: Path) -> tuple[float, float, dict[str, float], StudyRecord]:
    return tune(home, "mlp", "--dataset", "digits", "--trials", str(trials), "--epochs", "3")


PHASES = ("all", "to the first trial", "trials", "after the last trial")


def phases(start: float, end: float, record: StudyRecord) -> tuple[float, float, float, float]:
    """Seconds of a search: all, until the first trial began, its trials, after the last trial's end."""
    first = min(trial.started for trial in record.trials if trial.started)
    last = max(trial.ended for trial in record.trials if trial.ended)
    return end - start, first - start, last - first, end - last


def digits(repeats: int) -> None:
    """Prints the phases of a search of digits and its CPU by process, and the wall time of `retrain`."""
    walls, cpus, finals = [], [], list[Cost]()
    for index in range(repeats):
        progress(f"{index + 1} of {repeats}: tune and retrain on digits")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            start, end, cpu, record = digits_search(12, Path(folder))
            walls.append(phases(start, end, record))
            cpus.append(cpu)
            command = [sys.executable, "-m", "searchfm", "retrain", "mlp"]
            finals.append(run(command, env=os.environ | {"SEARCHFM_HOME": folder})[1])
    table("`tune mlp --dataset digits --trials 12 --epochs 3`, wall", "median", "min", "max")
    for name, values in zip(PHASES, zip(*walls, strict=True), strict=True):
        row(name, *figures(values))
    row("`retrain mlp` after it", *figures([cost.wall for cost in finals]))
    print()
    table("CPU", "median", "min", "max")
    for role in sorted({role for cpu in cpus for role in cpu}):
        row(role, *figures([cpu.get(role, 0.0) for cpu in cpus]))
    row("`retrain mlp`, all processes", *figures([cost.cpu for cost in finals]))


def tracking(repeats: int) -> None:
    """Prints the CPU of the tracking process for searches of 12 and of 36 trials, and a trial's share."""
    few, many = 12, 36

    def measure(trials: int) -> float:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            return digits_search(trials, Path(folder))[2].get("tracking", 0.0)

    results = alternate({str(trials): partial(measure, trials) for trials in (few, many)}, repeats)
    table("tracking process, CPU", "median", "min", "max")
    for trials, values in results.items():
        row(f"{trials} trials", *figures(values))
    pairs = zip(results[str(few)], results[str(many)], strict=True)
    row("a trial", *figures([(more - less) / (many - few) for less, more in pairs], digits=3))


def share(repeats: int, trials: int) -> None:
    """Prints the share of the cores' time that trains, in a search of so many trials, and the phases of the search."""
    trained, lengths, walls = [], [], []
    for index in range(repeats):
        progress(f"{index + 1} of {repeats}: {trials} trials")
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            study = Path(folder) / "share.toml"
            study.write_text(SHARE)
            start, end, _, record = tune(Path(folder), str(study), "--workers", str(WORKERS), "--trials", str(trials))
            seconds = [trial.seconds for trial in record.trials if trial.twin is None]  # read from the folder
        trained.append(sum(seconds) / (WORKERS * (end - start)))
        lengths.append(statistics.median(seconds))
        walls.append(phases(start, end, record))
    table(f"{trials} trials on {WORKERS} cores", "median", "min", "max")
    row("share that trains", *(f"{value:.0%}" for value in summary(trained)))
    row("seconds of a trial", *figures(lengths))
    for name, values in zip(PHASES, zip(*walls, strict=True), strict=True):
        row(f"wall, s: {name}", *figures(values))


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def figures(values: Sequence[float], digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}" for value in summary(values)]


PARTS = ("coordinator", "digits", "tracking", "share")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench overhead")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, nargs="+", default=[50, 200, 1000], help="of the coordinator's part")
    parser.add_argument("--share-trials", type=int, default=60, help="trials of the part share")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: must be among {', '.join(PARTS)}")
    header("What a study costs beside its training; seconds unless it says otherwise", cores=WORKERS)
    calls: dict[str, Callable[[int], None]] = {
        "coordinator": lambda repeats: coordinator(repeats, sorted(options.trials)),
        "digits": digits,
        "tracking": tracking,
        "share": lambda repeats: share(repeats, options.share_trials),
    }
    for part in options.parts or PARTS:
        calls[part](options.repeats)
        print(flush=True)
