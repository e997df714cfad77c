"""What a run of MLflow says about a study or a trial: names, params, metrics and tags, made of rows alone.

Everything here is a pure function of the rows, metric time stamps included, so that sending a trial again changes
nothing. Knows no MLflow; `mirror.py` does the sending.
"""

import csv
import functools
import getpass
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import searchfm
from searchfm.job import Epoch
from searchfm.search.history import State, StudyRow, TrialRow

# MLflow's words for an end. KILLED wears the red cross of a failure, so a pruned trial ends FINISHED, and its name and
# its tag `state` say that it was pruned.
STATUS: Mapping[State, str] = {"running": "RUNNING", "complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}

PACKAGES = ("searchfm", "torch", "torchvision", "timm", "optuna", "mlflow", "numpy")
PREDICTIONS = "predictions.npz"
WEIGHTS = ("weights.safetensors", "model.json")
LOGGED = ("config.toml", "epochs.csv", "log.txt")  # files of a trial's folder that its run carries as they are


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    time: int  # milliseconds since 1970
    step: int


def run_name(study: StudyRow, row: TrialRow) -> str:
    """`vit-0007`, and how it ended where that is not the plain end."""
    mark = {"pruned": " (pruned)", "failed": " (failed)"}.get(row.state, "")
    return f"{study.name}-{row.number:04d}{mark}"


def params(row: TrialRow) -> dict[str, str]:
    """The whole config by dotted key, what the search chose included; at most 6000 characters each."""
    flat = {key: _text(value) for key, value in flatten(row.config)}
    return {**flat, **{key: _text(value) for key, value in row.params.items()}}


def epoch_points(epoch: Epoch) -> list[Point]:
    """An epoch's metrics. What is None or not finite is left out: MLflow would store it as something else."""
    values = {
        "train/loss": epoch.train_loss,
        "train/accuracy": epoch.train_accuracy,
        "val/loss": epoch.val_loss,
        "val/accuracy": epoch.val_accuracy,
        "lr": epoch.lr,
        "seconds": epoch.seconds,
        "samples_per_second": epoch.samples_per_second,
    }
    time = round(epoch.time * 1000)
    return [Point(key, float(v), time, epoch.index) for key, v in values.items() if v is not None and math.isfinite(v)]


def end_points(row: TrialRow) -> list[Point]:
    """What is known once a trial has ended: `value`, `epochs`, and the numbers of its result."""
    if row.ended is None:
        return []
    values: dict[str, Any] = dict(row.result)
    values["total_seconds"] = values.pop("seconds", None)  # `seconds` is an epoch's
    values |= {"value": row.value, "epochs": row.epochs[-1].index if row.epochs else 0}
    time, step = round(row.ended * 1000), values["epochs"]
    return [
        Point(key, float(value), time, step)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def points(row: TrialRow) -> list[Point]:
    """All metrics of a trial."""
    return [point for epoch in row.epochs for point in epoch_points(epoch)] + end_points(row)


def tags(study: StudyRow, row: TrialRow, parent: str) -> dict[str, str]:
    """What a trial's run is found by, and what tells its end at a glance."""
    told = {
        "mlflow.runName": run_name(study, row),
        "mlflow.parentRunId": parent,
        "role": "trial",
        "study": study.name,
        "study_uuid": study.uuid,
        "trial": str(row.number),
        "state": row.state,
        "config_digest": row.digest,
        "attempts": str(row.attempts),
    }
    if row.twin is not None:
        told["twin_of"] = str(row.twin)
    if row.reason:
        told["reason"] = row.reason[:1000]
        told["mlflow.note.content"] = f"{row.state}: {row.reason[:1000]}"
    if "device" in row.result:
        told["device"] = str(row.result["device"])
    return told


def study_tags(study: StudyRow) -> dict[str, str]:
    """What a study's own run is found by, and its question."""
    best = study.best
    lines = [study.question, f"`searchfm tune {study.name}`"]
    if best is not None:
        lines.append(f"Best so far: trial {best.number} with {best.value:.2%} of the validation part right.")
    return {
        "mlflow.runName": study.name,
        "mlflow.note.content": "\n\n".join(line for line in lines if line),
        "role": "study",
        "study": study.name,
        "study_uuid": study.uuid,
        "state": "running" if study.of("running") or not study.trials else "complete",
        "study_digest": study.digest,
    }


def study_points(rows: Iterable[TrialRow]) -> list[Point]:
    """The search as it went, a step for each trial that ended: the best `value` so far, and how many ended how."""
    counts = {"complete": 0, "pruned": 0, "failed": 0}
    best, told = -math.inf, []
    ended = sorted((row for row in rows if row.ended is not None), key=lambda row: (row.ended, row.number))
    for step, row in enumerate(ended, 1):
        assert row.ended is not None
        time = round(row.ended * 1000)
        counts[row.state] += 1
        told.append(Point(row.state, counts[row.state], time, step))
        if row.value is not None and row.value > best:
            best = row.value
            told.append(Point("value", best, time, step))
    return told


def searched(resolved: Mapping[str, Any]) -> list[str]:
    """The dotted keys that a study searches over, in the file's order."""

    def walk(table: Mapping[str, Any], path: str) -> Iterator[str]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                if "choice" in value or "low" in value:
                    yield path + key
                else:
                    yield from walk(value, f"{path}{key}.")

    return [key for key in walk(resolved, "") if not key.startswith("search.")]


def view(study: StudyRow, parent: str) -> str:
    """The table as a person wants it: MLflow's undocumented `mlflow.sharedViewState`, as JSON.

    The value, then how the trial ended and what the search chose, then the rest; the best on top.
    """
    value, state = "metrics.`value`", "tags.`state`"
    chosen = [f"params.`{key}`" for key in searched(study.resolved)]
    rest = [f"metrics.`{key}`" for key in ("val/accuracy", "val/loss", "train/accuracy", "best_epoch", "epochs")]
    rest += ["metrics.`total_seconds`", "metrics.`parameters`", "tags.`reason`"]
    shown = [value, state, *chosen, *rest]
    widths = dict.fromkeys(shown, 110) | {"attributes.`Run Name`": 190, state: 90, "tags.`reason`": 260}
    widths |= {column: min(max(110, 8 * len(column) - 30), 240) for column in chosen}
    return json.dumps(
        {
            "searchFilter": "",
            "orderByKey": value,
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": shown,
            # "0" holds the boxes to tick; the run's age goes behind what was asked for.
            "columnOrder": ["0", "attributes.`Run Name`", *shown, "runDateAndNestInfo"],
            "columnWidths": {**widths, "0": 60},
            "runsExpanded": {parent: True},
            "runsPinned": [],
            "runsHidden": [],
            "viewMaximized": True,
            "autoRefreshEnabled": True,
        }
    )


def predictions_csv(labels: Any, probabilities: Any, indices: Any, names: list[str]) -> str:
    """A validation part's predictions as a table that a person can read and sort, the surest mistakes first.

    labels, indices: (N,) integers; probabilities: (N, K); all of them numpy's; K names.
    """
    predicted = probabilities.argmax(axis=1)
    right = labels == predicted
    sure = probabilities[np.arange(len(predicted)), predicted]
    order = np.lexsort((indices, -sure, right))
    columns = zip(*(column[order].tolist() for column in (indices, labels, predicted, right, sure)), strict=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "true", "predicted", "right", "probability"])
    words = ("false", "true")
    writer.writerows(
        (i, names[label], names[said], words[well], f"{share:.4f}") for i, label, said, well, share in columns
    )
    return text.getvalue()


@functools.cache
def environment() -> dict[str, str]:
    """Who runs this, with what, and on what: tags of a run when it is made, never compared later."""
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hardware = [f"{cores} x {_processor()}", f"{memory:.0f} GiB", *_gpus()]
    found = {"hardware": ", ".join(hardware), "platform": platform.platform(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = searchfm.__version__ if name == "searchfm" else version(name)
        except PackageNotFoundError:
            continue
    found |= {"mlflow.user": _user(), "mlflow.source.name": "searchfm tune", "mlflow.source.type": "LOCAL"}
    commit = git_commit(Path(searchfm.__file__).parents[1])
    return found | ({"mlflow.source.git.commit": commit} if commit else {})


def git_commit(checkout: Path) -> str | None:
    """The commit our own code stands at; None for an installed package, whatever repository it was installed into."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def flatten(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables by dotted key."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield path + key, value


def _text(value: Any) -> str:
    """A value for people: `config.toml` has it to the last digit."""
    if isinstance(value, float):
        return f"{value:.8g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | bool) else str(value)
    return text[:6000]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """NVIDIA's devices as the kernel's driver names them: asking torch would import it."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text().splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return found
