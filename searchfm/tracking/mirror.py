"""One study in MLflow: what its runs hold, and what has to be written to align them with the study's record.

MLflow is a projection of Optuna's record. A run is found by its tags (study uuid, trial number) before one is made,
and metrics carry the time stamps of the epoch records, so that sending again changes nothing and nothing is doubled.
There is one writer a study: see `writer`. mlflow is imported inside functions alone: it costs seconds.
"""

import functools
import getpass
import json
import math
import os
import platform
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tomli_w
from filelock import FileLock

import searchfm
from searchfm import forkserver
from searchfm.engines.local import usable_cores
from searchfm.errors import SearchfmError, StorageError
from searchfm.format import csv_text, escape, final_sentences, show_params
from searchfm.home import (
    TRACKING_LOCK_FILE,
    Home,
    cache_folder,
    command_line,
    make_folder,
    shown,
    sqlite_url,
    write_whole,
)
from searchfm.records import (
    EPOCHS,
    PICTURES,
    PREDICTIONS,
    SPEC,
    WEIGHTS,
    Epoch,
    Final,
    Predictions,
    State,
    StudyRecord,
    Trial,
    read_epochs,
)
from searchfm.search.database import BUSY_SECONDS, can_write, is_damaged, read_sqlite
from searchfm.search.notes import VIEW, Links, trial_lines, web_address
from searchfm.tables import flatten
from searchfm.tracking.moved import change_paths, correct_paths, has_moved, recorded_folder
from searchfm.tracking.rows import RESTORE_RUNS, database

# MLflow's status for each state. The page marks KILLED with the red cross of a failure, so a pruned trial ends
# FINISHED, and its name and its tag `state` contain that it was pruned.
STATUS: Mapping[State, str] = {"running": "RUNNING", "complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
PACKAGES = ("searchfm", "torch", "torchvision", "timm", "optuna", "mlflow", "numpy")
# Files of a trial's or a final model's folder that its run has as they are.
LOGGED = ("config.toml", EPOCHS, "log.txt", *PICTURES)
TABLE = "predictions.csv"
COMMIT = "mlflow.source.git.commit"
MARKER = "seconds"  # a metric that every epoch has
REPLACED = "replaced"  # the role of runs that we deleted ourselves; they stay deleted
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the pages are those for chat traces
VIEWS = "mlflow.sharedViewState."
VIEW_TAG = f"{VIEWS}{VIEW}"
NOTE, SOURCE = "mlflow.note.content", "mlflow.source.name"
NOTED = 4000  # characters of a note; MLflow's servers took 5000 in a tag, then 8000
PAGE = 1000  # runs a page
MODELS = "models"  # MLflow's folder of logged models, in that of their experiment

# --- the client -------------------------------------------------------------------------------------------------------


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
        if is_damaged(error):
            text = f"the database is damaged; {RESTORE_RUNS}"
        raise StorageError(f"MLflow at {shown(home.tracking_uri)}: {text}") from error


def writer(home: Home, study: str) -> FileLock:
    """The lock of the process that writes this study into MLflow; it blocks while another does: a coordinator that was
    killed may have left its tracking process in the middle of a call.
    """
    make_folder(home.study(study))
    return FileLock(home.study(study) / TRACKING_LOCK_FILE)


def connect(home: Home) -> Any:
    """An MlflowClient for the home; makes its database if that is a missing file. Where the home cannot be written, it
    reads a copy of the database. Raises what MLflow raises; StorageError for an emptied file.
    """
    from mlflow.tracking import MlflowClient

    uri, path = home.tracking_uri, database(home)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    if path.is_file() and not path.stat().st_size:  # no crash leaves such a file: see `_make`
        raise StorageError(f"{path}: is empty; {RESTORE_RUNS}")
    if path.is_file() and not can_write(path):
        uri = sqlite_url(_copied(home, path))
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes that make the tables at once leave a file that none can open.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _make(uri, path)
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # pages are read while runs are written
        if path.parent == home.path:
            correct_paths(home, path)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def writable(home: Home) -> bool:
    """Whether runs can be written: on a server, or into a database that this process may write."""
    path = database(home)
    return path is None or (can_write(path) if path.exists() else os.access(home.path, os.W_OK))


def _copied(home: Home, path: Path) -> Path:
    """A copy of a database that cannot be written, as MLflow's client opens none other; it goes with this process."""
    folder = Path(tempfile.mkdtemp(dir=forkserver.temporary_folder()))
    with closing(read_sqlite(path)) as source, closing(sqlite3.connect(folder / path.name)) as copy:
        source.backup(copy)
    if path.parent == home.path and has_moved(home):
        change_paths(folder / path.name, recorded_folder(home), home.path)
    return folder / path.name


def load(home: Home) -> None:
    """Imports what aligning a study needs, some 3 s of CPU. Writes nothing."""
    import mlflow.data
    import mlflow.entities
    import mlflow.tracking

    import searchfm.figures  # noqa: F401

    if database(home) is not None:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    environment()


def make_schema(home: Home) -> None:
    """Makes MLflow's database if that is a missing file. Raises StorageError."""
    with reaching(home):
        connect(home)


def _make(uri: str, path: Path) -> None:
    """Makes MLflow's tables in a file that is renamed once it is whole: they take some 1700 statements, and MLflow
    never again opens what a process leaves that is killed in between.

    The tables are copied from the cache folder, where the first home of this MLflow left them: 0.05 s of CPU, not 1.2.
    """
    partial = path.with_name(f"{path.name}.new")
    tables = cache_folder() / "tables" / f"mlflow-{version('mlflow')}.db"
    try:
        _fill(uri, partial, tables)
    except Exception:  # there are none, or they are damaged
        _fill(uri, partial)
        with suppress(StorageError, OSError):
            _keep_tables(partial, tables)
    partial.replace(path)


def _fill(uri: str, partial: Path, tables: Path | None = None) -> None:
    """A database as MLflow makes it, from a copy of its tables if there is one. Raises what MLflow raises; OSError."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for leftover in partial.parent.glob(f"{partial.name}*"):
        leftover.unlink()
    if tables is not None:
        shutil.copyfile(tables, partial)
        with closing(sqlite3.connect(partial)) as connection:
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError(f"{tables}: damaged")
    base, _, query = uri.partition("?")
    untyped: Any = SqlAlchemyStore
    store = untyped(f"{base}.new{'?' * bool(query)}{query}", (partial.parent / "mlartifacts").as_uri())
    store.engine.dispose()


def _keep_tables(source: Path, tables: Path) -> None:
    """Keeps the tables of a new database, without the one experiment that MLflow makes, which names the home."""
    with closing(sqlite3.connect(source)) as made, closing(sqlite3.connect(":memory:")) as copy:
        made.backup(copy)
        copy.execute("DELETE FROM experiments")
        copy.commit()
        content = copy.serialize()
    tables.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(tables.with_suffix(".lock")):
        write_whole(tables, content)


# --- what a run holds -------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One value of a metric: the arguments of MLflow's `Metric`."""

    key: str
    value: float
    time: int  # milliseconds since 1970
    step: int


@dataclass(frozen=True, kw_only=True)
class Content:
    """The expected content of one run: a pure function of the record."""

    trial: Trial | None = None  # of a trial's run
    tags: Mapping[str, str]
    note: Sequence[str] = ()  # the description, paragraphs of Markdown; pictures are added. Empty: as it is
    params: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[Point]
    files: Mapping[str, str | Path]  # artifacts by name: a text, or a file
    status: str | None  # MLflow's; None: as it is
    started: float | None  # seconds since 1970
    ended: float | None = None


def run_key(tags: Mapping[str, str]) -> int | str | None:
    """A run's subject by its tags: None for the study, a trial's number, the hash of a final model; else the role."""
    role = tags.get("role", "")
    return {"study": None, "trial": int(tags.get("trial", -1)), "final": tags.get("weights")}.get(role, role)


def trial_content(study: StudyRecord, trial: Trial, parent: str) -> Content:
    """The content of a trial's run. parent: the id of the study's own run."""
    suffix = {"pruned": " (pruned)", "failed": " (failed)"}.get(trial.state, "")
    tags = {
        **_tags(study, "trial", f"{study.name}-{trial.number:04d}{suffix}", trial.state),
        "mlflow.parentRunId": parent,
        "trial": str(trial.number),
        "config_digest": trial.digest,
        "attempts": str(trial.attempts),
    }
    if trial.twin is not None:
        tags["twin_of"] = str(trial.twin)
    if trial.first is not None:
        tags["first"] = trial.first
    if trial.reason:
        tags["reason"] = trial.reason[:1000]
    if trial.value is not None:
        tags["split"] = "validation"
    if trial.result is not None and trial.result.device:
        tags["device"] = trial.result.device
    points = [point for epoch in trial.epochs for point in epoch_points(epoch)]
    if trial.ended is not None:
        values: dict[str, Any] = {} if trial.result is None else dict(vars(trial.result))
        values["total_seconds"] = values.pop("seconds", None)  # `seconds` is an epoch's
        values |= {
            "value": trial.value,
            "accuracy": trial.value,
            "epochs": trial.epochs[-1].index if trial.epochs else 0,
        }
        points += make_points(values, trial.ended, values["epochs"])
    note = [*trial_lines(trial), escape(show_params(trial.params))] if trial.ended is not None else ()
    return Content(
        trial=trial,
        tags=tags,
        note=note,
        params={key: _text(value) for key, value in (*flatten(trial.config), *trial.params.items())},
        points=points,
        files={} if trial.state == "running" else folder_files(trial.folder),
        status=STATUS[trial.state],
        started=trial.started,
        ended=trial.ended,
    )


def study_content(study: StudyRecord, status: str | None) -> Content:
    """The content of the study's own run."""
    command = study.command or f"searchfm tune {study.name}"
    lines = [study.question, f"`{command.replace('`', '')}`"]
    if (best := study.best) is not None:
        lines.append(f"Best so far: trial {best.number} with {best.value:.2%} of the validation part correct.")
    state = "running" if study.of("running") or not study.trials else "complete"
    return Content(
        tags={
            **_tags(study, "study", study.name, state),
            NOTE: "\n\n".join(line for line in lines if line),
            SOURCE: command,
            "study_digest": study.digest,
        },
        points=study_points(study.trials),
        files={
            "study.toml": tomli_w.dumps(dict(study.resolved)),
            "environment.json": json.dumps(environment(), indent=2),
        },
        status=status,
        started=min((trial.started for trial in study.trials if trial.started is not None), default=None),
        ended=max((trial.ended for trial in study.trials if trial.ended is not None), default=None),
    )


def final_content(study: StudyRecord, final: Final, folder: Path, parent: str) -> Content:
    """The content of the run of a study's final model. folder: the model's."""
    tags = {
        **_tags(study, "final", f"{study.name}-final", "complete"),
        "mlflow.parentRunId": parent,
        SOURCE: command_line() or f"searchfm retrain {study.name}",
        "split": "test",
        "trial": str(final.winner),
        "weights": final.weights,
    }
    epochs = read_epochs(folder / EPOCHS)
    # No `value`: that is validation accuracy. `accuracy` has a tag beside it, `split`, as in a comparison.
    values = {"accuracy": final.test.accuracy}
    values |= {f"test/{key}": getattr(final.test, key) for key in ("accuracy", "low", "high", "reads")}
    values |= {key: getattr(final, key) for key in ("parameters", "flops", "training_seconds", "epochs", "optimism")}
    return Content(
        tags=tags,
        note=[escape(text) for texts in final_sentences(final).values() for text in texts],
        params={key: str(value)[:6000] for key, value in final.params.items()},
        points=[point for epoch in epochs for point in epoch_points(epoch)]
        + make_points(values, final.time, len(epochs)),
        files=folder_files(folder),
        status="FINISHED",
        started=final.time,
    )


def _tags(study: StudyRecord, role: str, name: str, state: str) -> dict[str, str]:
    """The tags that all runs have, and are found by."""
    return {"mlflow.runName": name, "role": role, "study": study.name, "study_uuid": study.uuid, "state": state}


def epoch_points(epoch: Epoch) -> list[Point]:
    """An epoch's metrics."""
    fields = dict(vars(epoch))
    time, index = fields.pop("time"), fields.pop("index")
    return make_points({re.sub("^(train|val)_", r"\1/", key): value for key, value in fields.items()}, time, index)


def make_points(values: Mapping[str, Any], time: float, step: int) -> list[Point]:
    """The values that are finite numbers: MLflow would store others as something else. time: seconds since 1970."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
    return [Point(key, float(value), round(time * 1000), step) for key, value in numbers.items()]


def study_points(trials: Iterable[Trial]) -> list[Point]:
    """The course of the search, a step for each trial that ended: the best `value` so far, and counts by state."""
    counts = {"complete": 0, "pruned": 0, "failed": 0}
    best, points = -math.inf, []
    ended = sorted((trial.ended, trial.number, trial) for trial in trials if trial.ended is not None)
    for step, (end, _, trial) in enumerate(ended, 1):
        counts[trial.state] += 1
        points += make_points({trial.state: counts[trial.state]}, end, step)
        if trial.value is not None and trial.value > best:
            best = trial.value
            points += make_points({"value": best}, end, step)
    return points


def folder_files(folder: Path) -> dict[str, Path]:
    """The artifacts of a trial's or a final model's folder. Pictures that are not drawn yet are none."""
    files = {name: folder / name for name in LOGGED if (folder / name).is_file()}
    return files | ({TABLE: folder / PREDICTIONS} if (folder / PREDICTIONS).is_file() else {})


def predictions_csv(predictions: Predictions, names: Sequence[str]) -> str:
    """Predictions as a table to read and sort, the most confident mistakes first. names: of the K classes."""
    confidence = predictions.probabilities.max(axis=1)
    columns = (predictions.correct, -confidence, predictions.indices, predictions.labels, predictions.predicted)
    rows = (
        (image, names[label], names[predicted], str(correct).lower(), f"{-negative:.4f}")
        for correct, negative, image, label, predicted in sorted(zip(*(c.tolist() for c in columns), strict=True))
    )
    return csv_text([("image", "true", "predicted", "correct", "probability"), *rows])


def searched(resolved: Mapping[str, Any]) -> list[str]:
    """The dotted keys that a study searches over, in the file's order."""
    keys = [key.rpartition(".") for key, _ in flatten(resolved)]
    return [key for key, _, last in keys if last in ("choice", "low") and not key.startswith("search.")]


def study_view(study: StudyRecord) -> str:
    """The table of a study's trials and its final model: accuracy and on what, state, cost, what the search chose, then
    the rest; the best on top. The study's own run, which has the best trial's value, is left out.
    """
    accuracy, reason = "metrics.`accuracy`", "tags.`reason`"
    first = {accuracy: 100, "tags.`split`": 90, "tags.`state`": 90}
    cost = {"metrics.`seconds`": 90, "metrics.`parameters`": 115}
    chosen = {f"params.`{key}`": min(max(100, 7 * len(key) + 34), 260) for key in searched(study.resolved)}
    rest = {f"metrics.`{key}`": 110 for key in ("epochs", "best_epoch", "val/loss", "train/accuracy", "total_seconds")}
    columns = {**first, **cost, **chosen, **rest, reason: 260}
    return view(columns, order=accuracy, condition="tags.role != 'study'", name=190)


def view(columns: Mapping[str, int], *, order: str, condition: str, name: int) -> str:
    """The state of a table of runs: MLflow's undocumented `mlflow.sharedViewState`, as JSON.

    columns: their widths, from left to right; order: the column to sort by, descending; condition: of the runs that are
    shown, as MLflow searches; name: the width of the run's name.
    """
    return json.dumps(
        {
            "searchFilter": condition,
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
            "runsExpanded": {},
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
    from mlflow.utils.git_utils import get_git_commit

    # MLflow's own tags name the commit of the repository that a script is in, and no hardware.
    processor = next(iter(_lines(Path("/proc/cpuinfo"), "model name")), platform.processor() or platform.machine())
    # NVIDIA's devices as the kernel's driver names them: asking torch would import it.
    paths = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpus = [name for path in paths for name in _lines(path, "Model")]
    memory = psutil.virtual_memory().total / 2**30
    tags = {
        "hardware": ", ".join([f"{usable_cores()} x {processor}", f"{memory:.0f} GiB", *gpus]),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mlflow.user": str(os.getuid()),
        "mlflow.source.type": "JOB",  # of a LOCAL one, MLflow's pages show a command from its last slash on
    }
    with suppress(KeyError, OSError):  # a container's user need not have a name
        tags["mlflow.user"] = getpass.getuser()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            tags[name] = searchfm.__version__ if name == "searchfm" else version(name)
    checkout = Path(searchfm.__file__).parents[1]
    # Not of an installed package, whatever repository it was installed into.
    if (checkout / ".git").exists() and (commit := get_git_commit(str(checkout))):
        tags[COMMIT] = commit
    return tags


def _lines(path: Path, name: str) -> list[str]:
    """The values of a file's lines `NAME : VALUE`; none where it cannot be read."""
    with suppress(OSError):
        lines = (line.partition(":") for line in path.read_text().splitlines())
        return [value.strip() for key, _, value in lines if key.strip() == name]
    return []


def _text(value: Any) -> str:
    """A param, short enough to read and for MLflow: `config.toml` has it to the last digit."""
    if isinstance(value, float):
        return f"{value:.8g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | bool) else str(value)
    return text[:6000]


# --- aligning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Something in which MLflow differs from Optuna's record; trial None is the study's own run."""

    trial: int | None
    text: str

    def __str__(self) -> str:
        return f"{'study' if self.trial is None else f'trial {self.trial}'}: {self.text}"


class Run:
    """A run as MLflow has it: as it was read, and what was written since."""

    def __init__(self, run: Any, *, created: bool = False) -> None:
        self.id: str = run.info.run_id
        self.status: str = run.info.status
        self.deleted: bool = run.info.lifecycle_stage == "deleted"
        self.started: int = run.info.start_time or 0
        self.artifacts: str = run.info.artifact_uri  # the address of its folder
        self.tags: dict[str, str] = run.data.tags
        self.params: dict[str, str] = run.data.params
        self.metrics: dict[str, float] = run.data.metrics  # the latest of each key
        self.data = bool(run.inputs and run.inputs.dataset_inputs)  # it names its data set
        self.created = created  # by this process
        self.points: set[Point] | None = None  # the points that we know it holds; None: unknown


class Mirror:
    """One study in MLflow, through a client of its own: no global state. Not for two threads at once.

    send: write, else only list the differences. deep: also read the epochs and artifacts of a run that ended, which
    else is trusted to be whole where its latest values are right.
    Errors of MLflow pass through; call `forget` then, since what MLflow holds is no longer known.
    """

    def __init__(self, home: Home, study: StudyRecord, *, send: bool = True, deep: bool = False) -> None:
        self.home, self.study, self.send, self.deep = home, study, send, deep
        self.experiment = ""
        self.parent = ""  # the id of the study's own run
        self.client: Any = None
        self.runs: dict[int | str | None, list[Run]] = {}  # by `run_key`, the best first; empty until `open`

    def open(self, role: str = "") -> list[Difference]:
        """Reads which runs there are; aligns the experiment and, but for its status, the study's own run, since trials
        have it as their parent. role: read no others; only for what sends nothing.
        """
        assert not (role and self.send)
        if self.runs:
            return []
        from mlflow.entities import ViewType

        study = self.study
        self.client = self.client or connect(self.home)
        experiments = self.client.search_experiments(ViewType.ALL, filter_string=f"tags.study_uuid = '{study.uuid}'")
        experiment = min(experiments, key=lambda each: int(each.experiment_id), default=None)
        differences = []
        if experiment is not None:
            self.experiment = experiment.experiment_id
            self._load(role)
            self.parent = next((run.id for run in self.runs[None]), "")
            if experiment.lifecycle_stage == "deleted":
                differences.append(Difference(None, "its experiment was deleted"))
        if not self.send:
            return differences
        if experiment is None:
            taken = self.client.get_experiment_by_name(study.name) is not None  # by an older study of that name
            name = f"{study.name}-{study.uuid[:8]}" if taken else study.name
            tags = {"study": study.name, "study_uuid": study.uuid, NOTE: study.question}
            self.experiment = create_experiment(self.client, self.home, name, study.uuid, tags)
        elif differences:
            self.client.restore_experiment(self.experiment)  # with all its runs, even those that we had replaced
            self._load()
            for run in self.runs[REPLACED]:
                if not run.deleted:
                    self._remove(run)
        differences += self.align(study_content(study, None))
        self.client.set_experiment_tag(self.experiment, VIEW_TAG, study_view(study))
        return differences

    def forget(self) -> None:
        """After an error: read again before anything is written."""
        self.runs.clear()

    def active(self, key: int | str | None) -> Run | None:
        """The run of a `run_key`, as last seen; None where there is none that is not deleted."""
        return next((run for run in self.runs.get(key, []) if not run.deleted), None)

    def links(self) -> Links:
        """The ids that links are made of, as last seen."""
        ids = {key: run.id for key in self.runs if (run := self.active(key))}
        return Links(self.experiment or None, ids.get(None), {n: id for n, id in ids.items() if isinstance(n, int)})

    def align(self, content: Content) -> list[Difference]:
        """Aligns one run with its content; returns the differences that there were."""
        key = run_key(content.tags)
        number = key if isinstance(key, int) else None
        runs = self.runs.setdefault(key, [])
        if not runs:
            if self.send:
                runs.append(self._create(content))
                self.align(content)
            return [Difference(number, "has no run")]
        run, *surplus = runs
        surplus = [each for each in surplus if not each.deleted]
        tags, params = _changed(run.tags, _with_note(run, content)), _changed(run.params, content.params)
        points, foreign = self._missing_points(run, content)
        metrics = ", ".join(dict.fromkeys([*foreign, *(point.key for point in points)]))
        files = self._missing_files(run, content)
        unequal = content.status not in (None, run.status)
        texts = {
            f"has {len(surplus) + 1} runs": surplus,
            "its run was deleted": run.deleted,
            f"is {content.tags['state']}, its run {run.tags.get('state')} ({run.status})": unequal or "state" in tags,
            f"tags differ: {', '.join(key for key in tags if key != 'state')}": tags.keys() - {"state"},
            f"params differ: {', '.join(params)}": params,
            f"metrics differ: {metrics}": metrics,
            "its run names no data set": not run.data,
            f"its run lacks {', '.join(files)}": files and not unequal,
        }
        differences = [] if run.created else [Difference(number, text) for text, differs in texts.items() if differs]
        if self.send:
            # What MLflow cannot correct, since params and metrics never change. Other runs keep what users logged:
            # replaced, the study's own would lose its report, its trials their parent, and a model its run.
            replaced = content.trial is not None and bool(foreign or params.keys() & run.params.keys())
            for old in [*surplus, *([run] if replaced else [])]:
                self._remove(old)
            self.runs[key] = [] if replaced else [run]
            if replaced:
                self.align(content)
            else:
                self._write(run, content, points, files)
        return differences

    def align_weights(self, kept: Sequence[Trial]) -> list[Difference]:
        """Exactly these trials' weights stay in MLflow, as far as the trials' folders still have them."""
        numbers, differences = {trial.number for trial in kept}, []
        for number in self.runs.keys() - numbers:
            if isinstance(number, int) and (run := self.active(number)) and "weights" in run.tags:
                differences.append(Difference(number, "its weights are kept, though it is not among the best"))
                if self.send:
                    self._delete_weights(run)
        for trial in kept:
            run = self.active(trial.number)
            if run and run.tags.get("weights") != "kept" and (trial.folder / WEIGHTS).is_file():
                if not run.created:  # else its absence was listed
                    differences.append(Difference(trial.number, "its weights are not kept"))
                if self.send:
                    self._log_weights(run, trial.folder)
        return differences

    def add_pictures(self, trial: Trial, names: Sequence[str]) -> None:
        """Adds pictures to the run of a trial that is aligned, and to its note. Nothing where there is no such run."""
        if run := self.active(trial.number):
            for name in names:
                self.client.log_artifact(run.id, str(trial.folder / name))
            tags = _changed(run.tags, _with_note(run, trial_content(self.study, trial, self.parent)))
            if NOTE in tags:
                self._tag(run, NOTE, tags[NOTE])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _missing_points(self, run: Run, content: Content) -> tuple[list[Point], list[str]]:
        """The points that a run lacks, and the metrics with points that it must not have."""
        if run.points is not None:
            return [point for point in content.points if point not in run.points], []
        expected, latest = set(content.points), {point.key: point.value for point in content.points}
        differing = {key for key, value in latest.items() if run.metrics.get(key) != value}
        if self.deep and MARKER in latest.keys() - differing:
            marks = {point for point in expected if point.key == MARKER}
            differing = differing if self._history(run, MARKER) == marks else set(latest)
        held = {point for point in expected if point.key not in differing}
        held = held.union(*(self._history(run, key) for key in differing & run.metrics.keys()))
        foreign = {point.key for point in held - expected} if content.trial is not None else set()
        return [point for point in content.points if point not in held], [key for key in latest if key in foreign]

    def _history(self, run: Run, key: str) -> set[Point]:
        history = self.client.get_metric_history(run.id, key)
        return {Point(metric.key, metric.value, metric.timestamp, metric.step) for metric in history}

    def _missing_files(self, run: Run, content: Content) -> list[str]:
        is_own = run_key(content.tags) is None
        if not is_own and content.status != run.status:
            return list(content.files)  # some may have arrived in part
        if content.files and (self.deep or (is_own and run.points is None)):
            stored = {info.path for info in self.client.list_artifacts(run.id)}
            return [name for name in content.files if name not in stored]
        return []

    def _create(self, content: Content) -> Run:
        command = self.study.command or f"searchfm tune {self.study.name}"
        tags = {SOURCE: command, **environment(), **content.tags}
        start = None if content.started is None else round(content.started * 1000)
        return Run(self.client.create_run(self.experiment, start, tags, tags["mlflow.runName"]), created=True)

    def _write(self, run: Run, content: Content, points: list[Point], files: list[str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        tags, params = _changed(run.tags, _with_note(run, content)), _changed(run.params, content.params)
        if run.deleted:
            self.client.restore_run(run.id)
            run.deleted = False
        if run_key(content.tags) is None:
            self.parent = run.id
        self.client.log_batch(  # in as many calls as MLflow's limits ask for
            run.id,
            metrics=[Metric(*point) for point in points],
            params=[Param(*param) for param in params.items()],
            tags=[RunTag(*tag) for tag in tags.items()],
        )
        run.tags |= tags
        run.params |= params
        run.metrics |= {point.key: point.value for point in points}
        if not run.data:
            self.client.log_inputs(run.id, [dataset(self.study)])
            run.data = True
        if files:
            self._log_files(run, content, files)
        if content.status not in (None, run.status):  # the last write: a run that ended is whole
            if content.status == "RUNNING":
                self.client.update_run(run.id, content.status)
            else:
                end = None if content.ended is None else round(content.ended * 1000)
                self.client.set_terminated(run.id, content.status, end)
            run.status = content.status
        run.points = set(content.points) if run.status == "RUNNING" else None

    def _log_files(self, run: Run, content: Content, names: Sequence[str]) -> None:
        for name in names:
            match content.files[name]:
                case str(text):
                    self.client.log_text(run.id, text, name)
                case path if path.name != PREDICTIONS:
                    self.client.log_artifact(run.id, str(path))
                case path if predictions := Predictions.read(path.parent):
                    self.client.log_text(run.id, predictions_csv(predictions, self.study.data.classes), name)

    def _remove(self, run: Run) -> None:
        self._tag(run, "role", REPLACED)
        self.client.delete_run(run.id)
        run.deleted = True

    def _tag(self, run: Run, key: str, value: str) -> None:
        self.client.set_tag(run.id, key, value)
        run.tags[key] = value

    def _log_weights(self, run: Run, folder: Path) -> None:
        self._tag(run, "weights", "arriving")  # first, so that what a crash leaves half-way is found again
        try:
            for name in (WEIGHTS, SPEC):
                self.client.log_artifact(run.id, str(folder / name))
        except FileNotFoundError:
            return  # a better trial has just displaced them: the next pass deletes what has arrived
        self._tag(run, "weights", "kept")

    def _delete_weights(self, run: Run) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository: Any = get_artifact_repository(run.artifacts, tracking_uri=self.home.tracking_uri)
        for name in (WEIGHTS, SPEC):
            repository.delete_artifacts(name)
        self.client.delete_tag(run.id, "weights")
        del run.tags["weights"]

    def _load(self, role: str = "") -> None:
        from mlflow.entities import ViewType

        text = f"tags.study_uuid = '{self.study.uuid}'" + (f" AND tags.role = '{role}'" if role else "")
        self.runs = {None: [], REPLACED: []}
        page: Any = None
        while page is None or page.token:
            token = page and page.token
            page = self.client.search_runs([self.experiment], text, ViewType.ALL, PAGE, page_token=token)
            for run in map(Run, page):
                self.runs.setdefault(run_key(run.tags), []).append(run)
        for runs in self.runs.values():  # what is not deleted, then what holds most, then the oldest
            runs.sort(key=lambda run: (run.deleted, -len(run.metrics), run.started, run.id))


def find(home: Home, study: StudyRecord, role: str = "") -> Mirror:
    """A study in MLflow as it is, or its runs of one role. Raises StorageError."""
    mirror = Mirror(home, study, send=False)
    with reaching(home):
        mirror.open(role)
    return mirror


def delete_experiment(home: Home, study: StudyRecord, *, keep_models: bool) -> int:
    """Deletes a study's experiment with its runs, and their files where MLflow keeps them in the home; returns the
    bytes of these. keep_models: leave the files of models, which the registry's versions need.

    Hold the lock of `writer`. On a server MLflow marks runs as deleted, and its `mlflow gc` frees the disk.
    Raises StorageError.
    """
    from mlflow.entities import ViewType

    with reaching(home):
        client = connect(home)
        for each in client.search_experiments(ViewType.ALL, filter_string=f"tags.study_uuid = '{study.uuid}'"):
            if each.lifecycle_stage != "deleted":
                if each.name == study.name:  # a new study may take the name
                    client.rename_experiment(each.experiment_id, f"{study.name}-{study.uuid[:8]}")
                client.delete_experiment(each.experiment_id)
    return delete_artifacts(home, study.uuid, keep_models=keep_models)


def delete_artifacts(home: Home, uuid: str, *, keep_models: bool = False) -> int:
    """Deletes the files of a study that MLflow keeps in the home; returns their bytes."""
    freed, folder = 0, home.artifacts / uuid
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name != MODELS or not keep_models:
            freed += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            shutil.rmtree(entry, ignore_errors=True)
    with suppress(OSError):  # not empty: it has models
        folder.rmdir()
    return freed


def trial_copies(
    home: Home, study: StudyRecord, names: Mapping[int, Sequence[str]], delete: Collection[str] = ()
) -> list[tuple[str, int]]:
    """The name and bytes of files in the runs of trials: those of the `names` by trial that are there.

    delete: names of files that are deleted then; hold the locks of the study and of `writer`. Makes no database. Raises
    StorageError.
    """
    path, copies = database(home), list[tuple[str, int]]()
    if path is not None and not path.is_file():
        return copies
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    mirror = find(home, study, "trial")
    with reaching(home):
        for number, run in ((number, mirror.active(number)) for number in names):
            if run is None:
                continue
            repository: Any = get_artifact_repository(run.artifacts, tracking_uri=home.tracking_uri)
            stored = {info.path: info.file_size or 0 for info in repository.list_artifacts()}
            held = [name for name in names[number] if name in stored]
            copies += [(name, stored[name]) for name in held]
            for name in set(held).intersection(delete):
                repository.delete_artifacts(name)
            if WEIGHTS in names[number] and WEIGHTS in delete and "weights" in run.tags:
                mirror.client.delete_tag(run.id, "weights")
    return copies


def run_links(home: Home, study: StudyRecord) -> Links:
    """The ids that links into MLflow's pages are made of. Raises StorageError."""
    return find(home, study).links()


def create_experiment(client: Any, home: Home, name: str, folder: str, tags: Mapping[str, str]) -> str:
    """A new experiment; its artifacts are in that folder of the home unless a server keeps them."""
    location = None if web_address(home.tracking_uri) else (home.artifacts / folder).as_uri()
    return str(client.create_experiment(name, artifact_location=location, tags=KIND | dict(tags)))


def described(paragraphs: Iterable[str], pictures: Iterable[str], run: str, *, first: bool = False) -> str:
    """A note for MLflow's page of a run: Markdown with pictures among the run's artifacts, below or `first`."""
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)[:NOTED]
    images = [f"![{Path(name).stem}](get-artifact?path={name}&run_uuid={run})" for name in pictures]
    return "\n\n".join([*images, text] if first else [text, *images])


def _with_note(run: Run, content: Content) -> Mapping[str, str]:
    """The tags that a run must have. A trial's note is written once, since a user may then edit it; one that is as it
    was written gets the pictures that were drawn later.
    """
    if not content.note:
        return content.tags
    note = described(content.note, [name for name in PICTURES if name in content.files], run.id)
    if content.trial is not None:
        earlier = f"{content.tags['state']}: {content.tags.get('reason')}"  # of 0.3.0
        fewer = [described(content.note, list(PICTURES)[:count], run.id) for count in range(len(PICTURES))]
        ours = (None, "", earlier, *(text for text in fewer if len(text) < len(note)))
        if run.tags.get(NOTE) not in ours:
            return content.tags
    return {**content.tags, NOTE: note}


def _changed(held: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in expected.items() if held.get(key) != value}
