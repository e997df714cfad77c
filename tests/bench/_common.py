"""What the benchmarks share: alternated repetition, costs of calls and processes, ratios, tables, the header."""

import ctypes
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")
PACKAGES = ("torch", "torchvision", "timm", "optuna", "mlflow", "numpy")
BUSY = 0.5  # a load above this, per core that a run needs, disturbs it
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


@dataclass(frozen=True)
class Cost:
    """Seconds that something took: on the clock, and of CPUs."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} / {self.cpu:.2f}"


def median_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))


@dataclass(frozen=True)
class Ratio:
    """Ratios of the pairs of an alternated run."""

    low: float
    median: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"**{self.median:.2f}** [{self.low:.2f}-{self.high:.2f}] n={self.pairs}"


def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> Ratio:
    """Minimum, median and maximum of the ratios of the pairs, which were measured one right after the other."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return Ratio(min(ratios), statistics.median(ratios), max(ratios), len(ratios))


def alternate(sides: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Results of each side, called once a repetition: A B, then B A, and so on, since load drifts."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for index in range(repeats):
        names = list(sides) if index % 2 == 0 else list(reversed(sides))
        for name in names:
            progress(f"{index + 1} of {repeats}: {name}")
            results[name].append(sides[name]())
    return results


def timed(call: Callable[[], T]) -> tuple[T, Cost]:
    """The call's result, and what it took of this process's CPU time (all threads, no children)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Cost(time.perf_counter() - wall, time.process_time() - cpu)


def run(command: Sequence[str], *, check: bool = True, **options: Any) -> tuple[str, Cost]:
    """What a process printed on stdout, and its cost: wall time until it ends, CPU time of it and all its descendants.

    Descendants that outlive it, as multiprocessing's fork server does for a moment, become children of this process
    (Linux) and are waited for, so that their CPU time counts and the next run does not begin beside them.
    Raises CalledProcessError, with the output as a note; check: unless it ends with 0.
    """
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    # Files, since a pipe ends only when the last descendant that has it ends.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        others = children()
        used, start = children_cpu(), time.perf_counter()
        code = subprocess.run(command, stdout=output, stderr=errors, check=False, **options).returncode
        wall = time.perf_counter() - start
        reap(others)
        cost = Cost(wall, children_cpu() - used)
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    if check and code:
        error = subprocess.CalledProcessError(code, list(command))
        error.add_note("\n".join(texts))
        raise error
    return texts[0], cost


def children_cpu() -> float:
    """CPU seconds of all children that ended, and of their own."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children() -> set[int]:
    """This process's children by process id."""
    return {process.pid for process in psutil.Process().children()}


def reap(others: set[int]) -> None:
    """Waits until this process has no children but `others`."""
    while pending := children() - others:
        for pid in pending:
            os.waitpid(pid, 0)


def progress(text: str) -> None:
    """A line on stderr, so that stdout holds the tables alone."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def row(*cells: Any) -> None:
    """Prints a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def table(*columns: str) -> None:
    """Prints the head of a Markdown table."""
    row(*columns)
    print("|" + "---|" * len(columns), flush=True)


def header(what: str, *, cores: int | None = 1) -> None:
    """Prints what is measured, when, on what, with which versions; and a warning if the machine is busy.

    cores: how many a run needs; None: nothing is timed, so that a busy machine does not matter.
    """
    model, flags = processor()
    load = os.getloadavg()[0]
    print(f"{what}\n")
    print(f"{date.today():%-d %B %Y}, {model}, {usable()} cores ({', '.join(flags) or 'no flags known'})  ")
    print(f"searchfm {commit()}, Python {platform.python_version()}, {', '.join(versions())}  ")
    if cores is None:
        print()
        return
    print(f"load before the run {load:.1f}; a run needs {cores} of the cores\n")
    if load > BUSY * cores:
        print(
            f"WARNING: the load is above {BUSY * cores:g}. Other processes disturb these figures: do not quote them.\n"
        )
    sys.stdout.flush()


def usable() -> int:
    return len(os.sched_getaffinity(0))


def processor() -> tuple[str, list[str]]:
    """The CPU's name, and those of its flags that matter to the speed of training."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    clock = re.search(r"^cpu MHz\s*:\s*(\d+)", text, re.MULTILINE)
    known = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    name = model[1] if model else platform.machine()
    if clock and "GHz" not in name:
        name += f" at {int(clock[1]) / 1000:.1f} GHz"
    present = set(known[1].split()) if known else set()
    return name, [flag for flag in FLAGS if flag in present]


def hardware() -> str:
    """The processor and its cores, in a few words."""
    model, flags = processor()
    return f"{usable()} cores of {model} ({', '.join(flags)})"


def today() -> str:
    """The date, as in ISO 8601."""
    return date.today().isoformat()


def versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def commit(root: Path = Path(__file__).parents[2]) -> str:
    """The commit of a working tree, this one's by default, with a + if code differs from it; results and pages may."""
    git = ["git", "-C", str(root)]
    command = [*git, "describe", "--always", "--exclude=*"]
    name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not name:
        return "of no repository"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "pyproject.toml"], check=False).returncode
    return f"{name}+" if changed else name
