"""One study in MLflow: what its runs hold, and what has to be written to align them with the study's record.

MLflow is a projection of Optuna's record. A run is found by its tags (study uuid, trial number) before one is made,
and metrics carry the time stamps of the epoch records, so that sending again changes nothing and nothing is doubled.
There is one writer a study: see `writer`. mlflow is imported inside functions alone: it costs seconds.
"""

import csv
import functools
import getpass
import io
import json
import logging
import math
import os
import platform
import re
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sqlalchemy
import tomli_w
from filelock import FileLock

import searchfm
from searchfm.errors import SearchfmError, StorageError
from searchfm.home import Home
from searchfm.records import EPOCHS, PREDICTIONS, SPEC, WEIGHTS, Epoch, Predictions, State, StudyRecord, Trial
from searchfm.search.notes import VIEW, Links

# MLflow's word for each state. The page marks KILLED with the red cross of a failure, so a pruned trial ends FINISHED,
# and its name and its tag `state` contain that it was pruned.
STATUS: Mapping[State, str] = {"running": "RUNNING", "complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
PACKAGES = ("searchfm", "torch", "torchvision", "timm", "optuna", "mlflow", "numpy")
LOGGED = ("config.toml", EPOCHS, "log.txt")  # files of a trial's folder that its run carries as they are
TABLE = "predictions.csv"
MARKER = "seconds"  # a metric that every epoch has
REPLACED = "replaced"  # the role of runs that we deleted ourselves, never to be found again
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the pages are those for chat traces
PAGE = 1000  # runs a page
PARAMS, METRICS = 99, 700  # at most this many in one call

# --- the client -------------------------------------------------------------------------------------------------------

# MLflow must not print, send telemetry, or block long in one call (we retry ourselves). What a user has set holds.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# Set whatever the user has set: the printed URL of a run holds the server's password, and it breaks --json.
FORCED = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}


@contextmanager
def reaching(home: Home) -> Iterator[None]:
    """Turns any error of MLflow into a StorageError of one line, without MLflow's own text: that may hold an address
    with a password. Errors of our own pass through.
    """
    try:
        yield
    except SearchfmError:
        raise
    except Exception as error:
        code: Any = getattr(error, "error_code", None)
        text = f"{type(error).__name__}{f' ({code})' if code else ''}"
        raise StorageError(f"MLflow at {shown(home.tracking_uri)}: {text}") from error


@contextmanager
def writer(home: Home, study: str) -> Iterator[None]:
    """Blocks until no other process writes this study into MLflow: a coordinator that was killed may have left its
    tracking process in the middle of a call.
    """
    home.study(study).mkdir(parents=True, exist_ok=True)
    with FileLock(home.study(study) / ".tracking.lock"):
        yield


def import_mlflow() -> None:
    """Imports MLflow's client, quietly."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.update(FORCED)
    # urllib3 warns of every refused connection; we log one line an outage.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.CRITICAL)
    import mlflow.tracking  # noqa: F401


def connect(home: Home) -> Any:
    """An MlflowClient for the home; makes its database if that is a missing file. Raises what MLflow raises."""
    import_mlflow()
    from mlflow.tracking import MlflowClient

    uri, path = home.tracking_uri, database(home)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that make the tables at once leave a file that none can open.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _make(uri, path)
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # pages are read while runs are written
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def make_schema(home: Home) -> None:
    """Makes MLflow's database if that is a missing file. Raises StorageError."""
    with reaching(home):
        connect(home)


def _make(uri: str, path: Path) -> None:
    """Makes MLflow's tables in a file that is renamed once it is whole: they take some 1700 statements, and MLflow
    never again opens what a process leaves that is killed in between.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{partial.name}*"):
        left.unlink()
    base, _, query = uri.partition("?")
    untyped: Any = SqlAlchemyStore
    store = untyped(f"{base}.new{'?' * bool(query)}{query}", (path.parent / "mlartifacts").as_uri())
    store.engine.dispose()
    partial.replace(path)


def database(home: Home) -> Path | None:
    """The file of MLflow's database, if it is one."""
    uri = home.tracking_uri
    return Path(sqlalchemy.make_url(uri).database or "") if uri.startswith("sqlite:") else None


def is_local(home: Home) -> bool:
    """Whether we choose where artifacts are kept, and not a server."""
    return not home.tracking_uri.startswith(("http:", "https:"))


def shown(uri: str) -> str:
    """The address of a database or server without user, password and query, fit to be shown."""
    return re.sub("//[^/]*@", "//", uri).partition("?")[0]


# --- what a run holds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    time: int  # milliseconds since 1970
    step: int


@dataclass(frozen=True)
class Content:
    """What the run of a trial, or of the study, has to hold: a pure function of the record."""

    trial: Trial | None  # None: the study's own run
    tags: Mapping[str, str]
    params: Mapping[str, str]
    points: Sequence[Point]
    files: Sequence[str]  # names of artifacts
    status: str | None  # MLflow's; None: as it is
    started: float | None  # seconds since 1970
    ended: float | None

    @property
    def number(self) -> int | None:
        """The trial's number."""
        return None if self.trial is None else self.trial.number


def trial_content(study: StudyRecord, trial: Trial, parent: str) -> Content:
    """The content of a trial's run. parent: the id of the study's own run."""
    ended = trial.state != "running"
    return Content(
        trial=trial,
        tags=trial_tags(study, trial, parent),
        params={key: _text(value) for key, value in (*flatten(trial.config), *trial.params.items())},
        points=[point for epoch in trial.epochs for point in epoch_points(epoch)] + end_points(trial),
        files=trial_files(trial) if ended else (),
        status=STATUS[trial.state],
        started=trial.started,
        ended=trial.ended,
    )


def study_content(study: StudyRecord, status: str | None) -> Content:
    """The content of the study's own run."""
    starts = [trial.started for trial in study.trials if trial.started is not None]
    ends = [trial.ended for trial in study.trials if trial.ended is not None]
    return Content(
        trial=None,
        tags=study_tags(study),
        params={},
        points=study_points(study.trials),
        files=("study.toml", "environment.json"),
        status=status,
        started=min(starts, default=None),
        ended=max(ends, default=None),
    )


def epoch_points(epoch: Epoch) -> list[Point]:
    """An epoch's metrics. What is None or not finite is left out: MLflow would store it as something else."""
    values = {
        "train/loss": epoch.train_loss,
        "train/accuracy": epoch.train_accuracy,
        "val/loss": epoch.val_loss,
        "val/accuracy": epoch.val_accuracy,
        "lr": epoch.lr,
        MARKER: epoch.seconds,
        "samples_per_second": epoch.samples_per_second,
    }
    return _points(values, epoch.time, epoch.index)


def end_points(trial: Trial) -> list[Point]:
    """What is known once a trial has ended: `value`, `epochs`, and the numbers of its result."""
    if trial.ended is None:
        return []
    values: dict[str, Any] = {} if trial.result is None else dict(vars(trial.result))
    values["total_seconds"] = values.pop("seconds", None)  # `seconds` is an epoch's
    values |= {"value": trial.value, "epochs": trial.epochs[-1].index if trial.epochs else 0}
    return _points(values, trial.ended, values["epochs"])


def _points(values: Mapping[str, Any], time: float, step: int) -> list[Point]:
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    return [Point(key, float(value), round(time * 1000), step) for key, value in numbers.items()]


def study_points(trials: Iterable[Trial]) -> list[Point]:
    """The search as it went, a step for each trial that ended: the best `value` so far, and how many ended how."""
    counts = {"complete": 0, "pruned": 0, "failed": 0}
    best, points = -math.inf, []
    ended = sorted((trial.ended, trial.number, trial) for trial in trials if trial.ended is not None)
    for step, (end, _, trial) in enumerate(ended, 1):
        counts[trial.state] += 1
        points.append(Point(trial.state, counts[trial.state], round(end * 1000), step))
        if trial.value is not None and trial.value > best:
            best = trial.value
            points.append(Point("value", best, round(end * 1000), step))
    return points


def trial_tags(study: StudyRecord, trial: Trial, parent: str) -> dict[str, str]:
    """What a trial's run is found by, and how the trial ended."""
    mark = {"pruned": " (pruned)", "failed": " (failed)"}.get(trial.state, "")
    tags = {
        "mlflow.runName": f"{study.name}-{trial.number:04d}{mark}",
        "mlflow.parentRunId": parent,
        "role": "trial",
        "study": study.name,
        "study_uuid": study.uuid,
        "trial": str(trial.number),
        "state": trial.state,
        "config_digest": trial.digest,
        "attempts": str(trial.attempts),
    }
    if trial.twin is not None:
        tags["twin_of"] = str(trial.twin)
    if trial.reason:
        tags["reason"] = trial.reason[:1000]
        tags["mlflow.note.content"] = f"{trial.state}: {trial.reason[:1000]}"
    if trial.result is not None and trial.result.device:
        tags["device"] = trial.result.device
    return tags


def study_tags(study: StudyRecord) -> dict[str, str]:
    """What a study's own run is found by, and its question."""
    best = study.best
    lines = [study.question, f"`searchfm tune {study.name}`"]
    if best is not None:
        lines.append(f"Best so far: trial {best.number} with {best.value:.2%} of the validation part correct.")
    return {
        "mlflow.runName": study.name,
        "mlflow.note.content": "\n\n".join(line for line in lines if line),
        "role": "study",
        "study": study.name,
        "study_uuid": study.uuid,
        "state": "running" if study.of("running") or not study.trials else "complete",
        "study_digest": study.digest,
    }


def trial_files(trial: Trial) -> list[str]:
    """The artifacts of a trial that has ended, as far as its folder has what they are made of."""
    if not trial.folder.is_dir():
        return []
    names = [name for name in LOGGED if (trial.folder / name).is_file()]
    names += ["curves.png"] if trial.epochs else []
    predicted = trial.state == "complete" and (trial.folder / PREDICTIONS).is_file()
    return names + (["confusion.png", TABLE] if predicted else [])


def predictions_csv(predictions: Predictions, names: Sequence[str]) -> str:
    """Predictions as a table to read and sort, the most confident mistakes first. names: of the K classes."""
    predicted, correct = predictions.predicted, predictions.correct
    confidence = predictions.probabilities[np.arange(len(predicted)), predicted]
    order = np.lexsort((predictions.indices, -confidence, correct))
    columns = (predictions.indices, predictions.labels, predicted, correct, confidence)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "true", "predicted", "correct", "probability"])
    table.writerows(
        (index, names[label], names[answer], str(hit).lower(), f"{probability:.4f}")
        for index, label, answer, hit, probability in zip(*(column[order].tolist() for column in columns), strict=True)
    )
    return text.getvalue()


def searched(resolved: Mapping[str, Any]) -> list[str]:
    """The dotted keys that a study searches over, in the file's order."""
    keys = [key.rpartition(".") for key, _ in flatten(resolved)]
    return [key for key, _, last in keys if last in ("choice", "low") and not key.startswith("search.")]


def study_view(study: StudyRecord, parent: str) -> str:
    """The table of a study's trials: value, state, what the search chose, then the rest; the best on top."""
    value, state, reason = "metrics.`value`", "tags.`state`", "tags.`reason`"
    chosen = {f"params.`{key}`": min(max(110, 8 * len(key) - 6), 240) for key in searched(study.resolved)}
    keys = ("val/accuracy", "val/loss", "train/accuracy", "best_epoch", "epochs", "total_seconds", "parameters")
    rest = {f"metrics.`{key}`": 110 for key in keys}
    return view({value: 110, state: 90, **chosen, **rest, reason: 260}, order=value, expanded=parent, name=190)


def view(columns: Mapping[str, int], *, order: str, expanded: str, name: int) -> str:
    """The state of a table of runs: MLflow's undocumented `mlflow.sharedViewState`, as JSON.

    columns: their widths, from left to right; order: the column to sort by, descending; expanded: the id of the run
    whose children are shown; name: the width of the run's name.
    """
    return json.dumps(
        {
            "searchFilter": "",
            "orderByKey": order,
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": list(columns),
            # "0" holds the boxes to tick; the run's age goes last.
            "columnOrder": ["0", "attributes.`Run Name`", *columns, "runDateAndNestInfo"],
            "columnWidths": {**columns, "attributes.`Run Name`": name, "0": 60},
            "runsExpanded": {expanded: True},
            "runsPinned": [],
            "runsHidden": [],
            "viewMaximized": True,
            "autoRefreshEnabled": True,
        }
    )


def dataset(study: StudyRecord) -> Any:
    """The study's data as an input of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data, table = study.data, study.resolved["data"]
    counts = {"train": data.train, "validation": data.validation, "classes": len(data.classes)}
    return DatasetInput(
        Dataset(
            name=str(table.get("name", "data"))[-500:],
            digest=data.fingerprint[:16],  # the table shows it, and takes at most 36
            source_type="searchfm",
            source=json.dumps(dict(table)),
            profile=json.dumps({**counts, "shape": data.shape}),
        ),
        [InputTag("mlflow.data.context", "training and validation")],
    )


@functools.cache
def environment() -> dict[str, str]:
    """User, versions and hardware: tags of a run when it is made, never compared later."""
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hardware = ", ".join([f"{cores} x {_processor()}", f"{memory:.0f} GiB", *_gpus()])
    tags = {"hardware": hardware, "platform": platform.platform(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            tags[name] = searchfm.__version__ if name == "searchfm" else version(name)
        except PackageNotFoundError:
            continue
    tags |= {"mlflow.user": _user(), "mlflow.source.name": "searchfm tune", "mlflow.source.type": "LOCAL"}
    commit = git_commit(Path(searchfm.__file__).parents[1])
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def git_commit(checkout: Path) -> str | None:
    """The commit of our own code; None for an installed package, whatever repository it was installed into."""
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
    """A param, short enough to read and for MLflow: `config.toml` has it to the last digit."""
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
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text().splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return names


# --- aligning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Something in which MLflow differs from Optuna's record; trial None is the study's own run."""

    trial: int | None
    text: str

    def __str__(self) -> str:
        return f"{'study' if self.trial is None else f'trial {self.trial}'}: {self.text}"


@dataclass
class Run:
    """A run as MLflow has it."""

    id: str
    status: str
    deleted: bool
    started: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]  # the latest of each key
    data: bool  # it names its data set
    artifacts: str  # the address of its folder
    created: bool = False  # by this process
    points: set[Point] | None = None  # the points that we know it holds; None: unknown


@dataclass
class Plan:
    """The writes that align one run, and what they correct."""

    run: Run | None  # the one that stays: the fullest, then the oldest; None: to be created
    surplus: list[Run] = field(default_factory=list)  # to be deleted
    replace: bool = False  # what MLflow can't correct: params and metrics never change
    params: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


class Mirror:
    """One study in MLflow, through a client of its own: no global state. Not for two threads at once.

    Errors of MLflow pass through; call `forget` then, since what MLflow holds is no longer known.
    """

    def __init__(self, home: Home, study: StudyRecord) -> None:
        self.home, self.study = home, study
        self.experiment = ""
        self.parent = ""  # the id of the study's own run
        self._client: Any = None
        self._opened = False
        self._deleted = False  # the whole experiment
        self._runs: dict[int | None, list[Run]] = {}
        self._replaced: list[Run] = []  # replaced, and yet not deleted

    def find(self) -> list[Difference]:
        """Connects, and reads which runs there are. Writes nothing."""
        self._client = self._client or connect(self.home)
        from mlflow.entities import ViewType

        experiments = self._client.search_experiments(
            view_type=ViewType.ALL, filter_string=f"tags.study_uuid = '{self.study.uuid}'"
        )
        if not experiments:
            self.experiment = ""
            return []
        experiment = min(experiments, key=lambda each: int(each.experiment_id))
        self.experiment, self._deleted = experiment.experiment_id, experiment.lifecycle_stage == "deleted"
        self._load()
        self.parent = next((run.id for run in _by_content(self._runs.get(None, []))), "")
        return [Difference(None, "its experiment was deleted")] if self._deleted else []

    def open(self) -> list[Difference]:
        """Connects, and aligns the experiment and the study's own run but for its status, on which trials hang."""
        if self._opened:
            return []
        study = self.study
        differences = self.find()
        if not self.experiment:
            self.experiment = self._client.create_experiment(
                self._free_name(),
                artifact_location=(self.home.artifacts / study.uuid).as_uri() if is_local(self.home) else None,
                tags=KIND | {"study": study.name, "study_uuid": study.uuid, "mlflow.note.content": study.question},
            )
        elif self._deleted:
            self._client.restore_experiment(self.experiment)  # with all its runs, even those that we had replaced
            self._load()
            for run in self._replaced:
                self._client.delete_run(run.id)
        differences += self.align(study_content(study, None))
        self._client.set_experiment_tag(
            self.experiment, f"mlflow.sharedViewState.{VIEW}", study_view(study, self.parent)
        )
        self._opened = True
        return differences

    def forget(self) -> None:
        """After an error: read again before anything is written."""
        self._opened = False
        self._runs.clear()

    def links(self) -> Links:
        """The ids that links are made of, as last seen."""
        runs = {number: active[0].id for number, runs in self._runs.items() if (active := _active(runs))}
        return Links(self.experiment or None, runs.pop(None, None), {n: id for n, id in runs.items() if n is not None})

    def align(self, content: Content, *, send: bool = True, deep: bool = False) -> list[Difference]:
        """Aligns the run of a trial, or the study's own; with `send` false only tells what differs.

        A run that ended is trusted to be whole where its latest values are right; with `deep` its epochs and its
        artifacts are read too.
        """
        plan = self._plan(content, deep=deep)
        if send:
            self._send(content, plan)
        return [Difference(content.number, text) for text in plan.differences]

    def align_weights(self, kept: Sequence[Trial], *, send: bool = True) -> list[Difference]:
        """Exactly these trials' weights stay in MLflow, as far as the trials' folders still have them."""
        numbers, differences = {trial.number for trial in kept}, []
        for number, runs in self._runs.items():
            for run in _active(runs):
                if "weights" in run.tags and number not in numbers:
                    differences.append(Difference(number, "its weights are kept, though it is not among the best"))
                    if send:
                        self._delete_weights(run)
        for trial in kept:
            for run in _active(self._runs.get(trial.number, []))[:1]:
                if run.tags.get("weights") != "kept" and (trial.folder / WEIGHTS).is_file():
                    if not run.created:  # else its absence was told
                        differences.append(Difference(trial.number, "its weights are not kept"))
                    if send:
                        self._log_weights(run, trial.folder)
        return differences

    # --- inside -------------------------------------------------------------------------------------------------------

    def _plan(self, content: Content, *, deep: bool = False) -> Plan:
        """The writes that align a run. Reads alone."""
        runs = self._runs.get(content.number, [])
        if not runs:
            return Plan(None, differences=["has no run"])
        run, *surplus = _by_content(runs)
        plan = Plan(run, [each for each in surplus if not each.deleted])
        if plan.surplus:
            plan.differences.append(f"has {len(plan.surplus) + 1} runs")
        if run.deleted:
            plan.differences.append("its run was deleted")
        state = content.tags["state"]
        if content.status not in (None, run.status) or run.tags.get("state") != state:
            plan.differences.append(f"is {state}, its run {run.tags.get('state')} ({run.status})")
        plan.tags = _changed(run.tags, content.tags)
        if names := [key for key in plan.tags if key != "state"]:
            plan.differences.append(f"tags differ: {', '.join(names)}")
        plan.params = _changed(run.params, content.params)
        if plan.params:
            plan.differences.append(f"params differ: {', '.join(plan.params)}")
        plan.points, foreign = self._missing(run, content, deep)
        if keys := dict.fromkeys([*foreign, *(point.key for point in plan.points)]):
            plan.differences.append(f"metrics differ: {', '.join(keys)}")
        plan.replace = bool(foreign or plan.params.keys() & run.params.keys())
        if not run.data:
            plan.differences.append("its run names no data set")
        if content.trial is not None and content.status != run.status:
            plan.files = list(content.files)  # some may have arrived in part
        elif content.files and (deep or (content.trial is None and run.points is None)):
            stored = self._artifact_names(run)
            plan.files = [name for name in content.files if name not in stored]
            if plan.files:
                plan.differences.append(f"its run lacks {', '.join(plan.files)}")
        if run.created:
            plan.differences.clear()  # its absence was told
        return plan

    def _missing(self, run: Run, content: Content, deep: bool) -> tuple[list[Point], list[str]]:
        """The points that a run lacks, and the metrics in which it holds what it must not hold."""
        if run.points is not None:
            return [point for point in content.points if point not in run.points], []
        expected: dict[str, set[Point]] = {}
        for point in content.points:
            expected.setdefault(point.key, set()).add(point)
        latest = {point.key: point.value for point in content.points}
        differing = {key for key, value in latest.items() if run.metrics.get(key) != value}
        held = {key: points for key, points in expected.items() if key not in differing}
        if deep and MARKER in held:
            held[MARKER] = self._history(run, MARKER)
            if held[MARKER] != expected[MARKER]:
                differing = set(latest)
        held |= {key: self._history(run, key) if key in run.metrics else set() for key in differing}
        # The study's own run keeps what users logged: replaced it would lose its report, and its trials their parent.
        foreign = [key for key, points in expected.items() if held[key] - points and content.trial is not None]
        return [point for point in content.points if point not in held[point.key]], foreign

    def _send(self, content: Content, plan: Plan) -> None:
        run = plan.run
        for old in plan.surplus + [run] * plan.replace if run else []:
            self._remove(old)
        if run is None or plan.replace:
            run = self._create(content)
            self._runs[content.number] = [run]
            plan = self._plan(content)
        self._runs[content.number] = [run]
        if run.deleted:
            self._client.restore_run(run.id)
            run.deleted = False
        if content.trial is None:
            self.parent = run.id
        self._log_batch(run, plan)
        if not run.data:
            self._client.log_inputs(run.id, [dataset(self.study)])
            run.data = True
        if plan.files:
            self._log_files(run, content.trial, plan.files)
        if content.status not in (None, run.status):  # the last write: a run that ended is whole
            self._end(run, content.status, content.ended)
        run.points = set(content.points) if run.status == "RUNNING" else None

    def _create(self, content: Content) -> Run:
        tags = {**content.tags, **environment(), "mlflow.source.name": f"searchfm tune {self.study.name}"}
        start = None if content.started is None else round(content.started * 1000)
        run = self._client.create_run(self.experiment, start, tags, tags["mlflow.runName"])
        return replace(_read(run), created=True)

    def _log_batch(self, run: Run, plan: Plan) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params = [Param(key, value) for key, value in plan.params.items()]
        tags = [RunTag(key, value) for key, value in plan.tags.items()]
        metrics = [Metric(point.key, point.value, point.time, point.step) for point in plan.points]
        while params or tags or metrics:
            self._client.log_batch(run.id, params=params[:PARAMS], tags=tags[:PARAMS], metrics=metrics[:METRICS])
            params, tags, metrics = params[PARAMS:], tags[PARAMS:], metrics[METRICS:]
        run.tags |= plan.tags
        run.params |= plan.params
        run.metrics |= {point.key: point.value for point in plan.points}

    def _log_files(self, run: Run, trial: Trial | None, names: Sequence[str]) -> None:
        if trial is None:
            self._client.log_text(run.id, tomli_w.dumps(dict(self.study.resolved)), "study.toml")
            self._client.log_dict(run.id, environment(), "environment.json")
            return
        from searchfm import figures  # and with it matplotlib

        classes = self.study.data.classes
        figures.draw(trial, classes)
        for name in names:
            if name != TABLE:
                self._client.log_artifact(run.id, str(trial.folder / name))
            elif predictions := Predictions.read(trial.folder):
                self._client.log_text(run.id, predictions_csv(predictions, classes), name)

    def _end(self, run: Run, status: str, ended: float | None) -> None:
        if status == "RUNNING":
            self._client.update_run(run.id, status)
        else:
            self._client.set_terminated(run.id, status, None if ended is None else round(ended * 1000))
        run.status = status

    def _remove(self, run: Run) -> None:
        self._tag(run, "role", REPLACED)
        self._client.delete_run(run.id)

    def _tag(self, run: Run, key: str, value: str) -> None:
        self._client.set_tag(run.id, key, value)
        run.tags[key] = value

    def _log_weights(self, run: Run, folder: Path) -> None:
        self._tag(run, "weights", "arriving")  # first, so that what a crash leaves half-way is found again
        try:
            for name in (WEIGHTS, SPEC):
                self._client.log_artifact(run.id, str(folder / name))
        except FileNotFoundError:
            return  # a better trial has just displaced them: the next pass deletes what has arrived
        self._tag(run, "weights", "kept")

    def _delete_weights(self, run: Run) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository: Any = get_artifact_repository(run.artifacts, tracking_uri=self.home.tracking_uri)
        for name in (WEIGHTS, SPEC):
            repository.delete_artifacts(name)
        self._client.delete_tag(run.id, "weights")
        del run.tags["weights"]

    def _history(self, run: Run, key: str) -> set[Point]:
        history = self._client.get_metric_history(run.id, key)
        return {Point(metric.key, metric.value, metric.timestamp, metric.step) for metric in history}

    def _artifact_names(self, run: Run) -> set[str]:
        return {info.path for info in self._client.list_artifacts(run.id)}

    def _free_name(self) -> str:
        """The study's name, or one with part of its uuid where MLflow still has an older study of that name."""
        taken = self._client.get_experiment_by_name(self.study.name) is not None
        return f"{self.study.name}-{self.study.uuid[:8]}" if taken else self.study.name

    def _load(self) -> None:
        from mlflow.entities import ViewType

        self._runs.clear()
        self._replaced.clear()
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment],
                f"tags.study_uuid = '{self.study.uuid}'",
                run_view_type=ViewType.ALL,
                max_results=PAGE,
                page_token=token,
            )
            for run in map(_read, page):
                match run.tags.get("role"):
                    case "study":
                        self._runs.setdefault(None, []).append(run)
                    case "trial":
                        self._runs.setdefault(int(run.tags["trial"]), []).append(run)
                    case "replaced" if not run.deleted:
                        self._replaced.append(run)
            token = page.token
            if not token:
                return


def run_links(home: Home, study: StudyRecord) -> Links:
    """The ids that links into MLflow's pages are made of. Raises StorageError."""
    mirror = Mirror(home, study)
    with reaching(home):
        mirror.find()
    return mirror.links()


def _read(run: Any) -> Run:
    return Run(
        id=run.info.run_id,
        status=run.info.status,
        deleted=run.info.lifecycle_stage == "deleted",
        started=run.info.start_time or 0,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        data=bool(run.inputs and run.inputs.dataset_inputs),
        artifacts=run.info.artifact_uri,
    )


def _by_content(runs: Iterable[Run]) -> list[Run]:
    """Runs that are not deleted first, then those that hold most, then the oldest."""
    return sorted(runs, key=lambda run: (run.deleted, -len(run.metrics), run.started, run.id))


def _active(runs: Iterable[Run]) -> list[Run]:
    return [run for run in _by_content(runs) if not run.deleted]


def _changed(held: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in expected.items() if held.get(key) != value}
