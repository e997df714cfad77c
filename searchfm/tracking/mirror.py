"""One study in MLflow, brought in line with its rows. The only import of mlflow, inside functions: it costs seconds.

MLflow is a projection of Optuna's record. A run is found by its tags (study uuid, trial number) before one is made,
and metrics carry the time stamps of the epoch records, so that sending again changes nothing and nothing is doubled.
There is one writer a study: whoever holds the study's lock.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tomli_w

from searchfm.home import Home
from searchfm.search.history import StudyRow, TrialRow
from searchfm.search.notes import VIEW, Links
from searchfm.tracking import record
from searchfm.tracking.client import connect
from searchfm.tracking.record import Point

PAGE = 1000  # runs a page
GONE = "replaced"  # the role of runs that we deleted ourselves, never to be found again

Kind = Literal["missing", "doubled", "deleted", "state", "params", "metrics", "tags", "data", "artifacts", "weights"]


@dataclass(frozen=True)
class Difference:
    """Something in which MLflow differs from Optuna's record; trial None is the study's own run."""

    trial: int | None
    kind: Kind
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
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the latest of each key
    data: bool = False  # it names its data set
    artifacts: str = ""  # the address of its folder
    sent: set[int] | None = None  # the steps that we know it holds; None: look first


class Mirror:
    """One study in MLflow, through a client of its own: no global state. Not for two threads at once.

    Whatever MLflow raises passes through; call `forget` then, since what is there is no longer known.
    """

    def __init__(self, home: Home, study: StudyRow) -> None:
        self.home, self.study = home, study
        self.experiment = ""
        self.parent = ""
        self._client: Any = None
        self._deleted = False  # the whole experiment
        self._runs: dict[int | None, list[Run]] = {}
        self._gone: list[Run] = []  # replaced, and yet not deleted

    # --- the study's own place ----------------------------------------------------------------------------------------

    def find(self) -> bool:
        """Connects, and reads which runs there are. False if the study has no experiment yet."""
        self._client = self._client or connect(self.home)
        from mlflow.entities import ViewType

        found = self._client.search_experiments(
            view_type=ViewType.ALL, filter_string=f"tags.study_uuid = '{self.study.uuid}'"
        )
        if not found:
            return False
        experiment = min(found, key=lambda each: int(each.experiment_id))
        self.experiment = experiment.experiment_id
        self._load()
        self.parent = next((run.id for run in _active(self._runs.get(None, []))), "")
        self._deleted = experiment.lifecycle_stage == "deleted"
        return True

    def open(self) -> None:
        """Connects, and makes whatever is missing of the experiment and the study's own run."""
        if self.parent:
            return
        study = self.study
        if not self.find():
            local = not self.home.tracking_uri.startswith(("http:", "https:"))
            self.experiment = self._client.create_experiment(
                self._free_name(),
                artifact_location=(self.home.artifacts / study.uuid).as_uri() if local else None,
                tags={
                    "study": study.name,
                    "study_uuid": study.uuid,
                    "mlflow.experimentKind": "custom_model_development",  # else the pages are those for chat traces
                    "mlflow.note.content": study.question,
                },
            )
        elif self._deleted:
            self._client.restore_experiment(self.experiment)  # with all its runs, even those that we had replaced
            self._load()
            for run in self._gone:
                self._client.delete_run(run.id)
        self.parent = self._take(None).id
        self._client.set_experiment_tag(
            self.experiment, f"mlflow.sharedViewState.{VIEW}", record.view(study, self.parent)
        )

    def forget(self) -> None:
        """After an error: look again before anything is written."""
        self.parent = ""
        self._runs.clear()

    def links(self) -> Links:
        """The ids that links are made of, as last seen."""
        first = {number: _active(runs)[0].id for number, runs in self._runs.items() if _active(runs)}
        return Links(self.experiment or None, first.get(None), {n: run for n, run in first.items() if n is not None})

    # --- bringing in line ---------------------------------------------------------------------------------------------

    def align(self, row: TrialRow) -> str:
        """Brings a trial's run in line with its row, and returns the run's id."""
        run = self._take(row)
        if run.sent is None:
            history = self._client.get_metric_history(run.id, "seconds") if run.metrics else ()
            run.sent = {metric.step for metric in history}
        new = [epoch for epoch in row.epochs if epoch.index not in run.sent]
        points = [point for epoch in new for point in record.epoch_points(epoch)]
        points += [point for point in record.end_points(row) if not _holds(run, point)]
        params = {key: value for key, value in record.params(row).items() if key not in run.params}
        self._send(run, points, record.tags(self.study, row, self.parent), params)
        run.sent |= {epoch.index for epoch in new}
        if row.state == "running":
            self._end(run, "RUNNING", None)
        else:
            self._log_artifacts(run, row)
            self._end(run, record.STATUS[row.state], row.ended)  # the last write: an ended run is whole
        return run.id

    def align_study(self, study: StudyRow, status: str) -> None:
        """Brings the study's own run in line; `status`: RUNNING, FINISHED, or KILLED for one that was stopped."""
        self.study = study
        run = self._take(None)
        points = record.study_points(study.trials)
        if run.sent is None:
            last = {point.key: point for point in points}.values()
            run.sent = {point.step for point in points} if all(_holds(run, point) for point in last) else set()
        self._send(run, [point for point in points if point.step not in run.sent], record.study_tags(study))
        run.sent |= {point.step for point in points}
        if run.started and "study.toml" not in self._artifact_names(run):
            self._client.log_text(run.id, tomli_w.dumps(dict(study.resolved)), "study.toml")
            self._client.log_dict(run.id, record.environment(), "environment.json")
        ends = [row.ended for row in study.trials if row.ended is not None]
        self._end(run, status, max(ends, default=None) if status != "RUNNING" else None)

    def keep(self, rows: Sequence[TrialRow]) -> None:
        """Exactly these trials' weights stay in MLflow, as far as the trials' folders still have them."""
        wanted = {row.number: row for row in rows}
        for number, runs in self._runs.items():
            for run in _active(runs):
                if "weights" in run.tags and number not in wanted:
                    for name in record.WEIGHTS:
                        self._delete_artifact(run, name)
                    self._client.delete_tag(run.id, "weights")
                    del run.tags["weights"]
        for row in rows:
            run = self._take(row)
            if run.tags.get("weights") == "kept" or not (row.folder / record.WEIGHTS[0]).is_file():
                continue
            self._tag(run, "weights", "arriving")  # first, so that what a crash leaves half-way is found again
            for name in record.WEIGHTS:
                self._client.log_artifact(run.id, str(row.folder / name))
            self._tag(run, "weights", "kept")

    def replace(self, number: int | None) -> None:
        """Takes away runs that cannot be corrected: params and metrics never change in MLflow."""
        for run in self._runs.pop(number, []):
            self._remove(run)

    # --- looking ------------------------------------------------------------------------------------------------------

    def compare(self, row: TrialRow, *, deep: bool = False) -> list[Difference]:
        """In what a trial's run differs from its row. `deep` also reads histories and lists artifacts."""
        runs = self._runs.get(row.number, [])
        if not _active(runs):
            word: Kind = "deleted" if runs else "missing"
            return [Difference(row.number, word, "its run was deleted" if runs else "has no run")]
        run = _active(runs)[0]
        status, state = record.STATUS[row.state], run.tags.get("state")
        tags = _different(run.tags, record.tags(self.study, row, self.parent))
        params = _different(run.params, record.params(row))
        points = record.points(row)
        metrics = [point.key for point in {p.key: p for p in points}.values() if not _holds(run, point)]
        found: dict[Kind, str] = {}
        if len(_active(runs)) > 1:
            found["doubled"] = f"has {len(_active(runs))} runs"
        if run.status != status or state != row.state:
            found["state"] = f"is {row.state}, its run {state} ({run.status})"
        if tags:
            found["tags"] = f"tags differ: {', '.join(tags)}"
        if params:
            found["params"] = f"params differ: {', '.join(params)}"
        if metrics:
            found["metrics"] = f"metrics differ: {', '.join(metrics)}"
        elif deep and self._epochs(run) != {(p.step, p.time) for p in points if p.key == "seconds"}:
            found["metrics"] = "its run holds other epochs"
        if self.study.data and not run.data:
            found["data"] = "its run names no data set"
        if deep and row.state != "running":
            there = self._artifact_names(run)
            if lack := [name for name in _expected(row) if name not in there]:
                found["artifacts"] = f"its run lacks {', '.join(lack)}"
        return [Difference(row.number, kind, text) for kind, text in found.items()]

    def compare_weights(self, kept: Iterable[TrialRow]) -> list[Difference]:
        """Whose weights should be in MLflow and are not, or the other way round."""
        wanted = {row.number: (row.folder / record.WEIGHTS[0]).is_file() for row in kept}
        found = []
        for number, runs in self._runs.items():
            word = next((run.tags.get("weights") for run in _active(runs)), None)
            if number in wanted and wanted[number] and word != "kept":
                found.append(Difference(number, "weights", "its weights are not kept"))
            elif word is not None and number not in wanted:
                found.append(Difference(number, "weights", "its weights are kept, though it is not among the best"))
        return found

    def compare_study(self) -> list[Difference]:
        """In what the study's own run differs. Whether a search is under way only its coordinator knows."""
        runs = self._runs.get(None, [])
        active = _active(runs)
        if not active or self._deleted:
            return [Difference(None, "deleted" if runs else "missing", "its own run is not there")]
        run, study = active[0], self.study
        tags = _different(run.tags, record.study_tags(study))
        last = {point.key: point for point in record.study_points(study.trials)}
        metrics = [key for key, point in last.items() if not _holds(run, point)]
        found: dict[Kind, str] = {}
        if len(active) > 1:
            found["doubled"] = f"has {len(active)} runs of its own"
        if study.trials and not study.of("running") and run.status != "FINISHED":
            found["state"] = f"is complete, its own run {run.status}"
        if tags:
            found["tags"] = f"tags differ: {', '.join(tags)}"
        if metrics:
            found["metrics"] = f"metrics differ: {', '.join(metrics)}"
        return [Difference(None, kind, text) for kind, text in found.items()]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        from mlflow.entities import ViewType

        self._runs.clear()
        self._gone.clear()
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
                if run.tags.get("role") == "study":
                    self._runs.setdefault(None, []).append(run)
                elif run.tags.get("role") == "trial":
                    self._runs.setdefault(int(run.tags["trial"]), []).append(run)
                elif run.tags.get("role") == GONE and not run.deleted:
                    self._gone.append(run)
            token = page.token
            if not token:
                return

    def _take(self, row: TrialRow | None) -> Run:
        """The one run of a trial (or of the study): the oldest, brought back if it was deleted, or a new one."""
        number = None if row is None else row.number
        runs = self._runs.get(number, [])
        one, *others = _active(runs) or sorted(runs, key=_age)[:1] or [self._create(row)]
        for other in others:
            self._remove(other)
        if one.deleted:
            self._client.restore_run(one.id)
            one.deleted = False
        self._runs[number] = [one]
        return one

    def _create(self, row: TrialRow | None) -> Run:
        study = self.study
        tags = record.study_tags(study) if row is None else record.tags(study, row, self.parent)
        tags |= record.environment() | {"mlflow.source.name": f"searchfm tune {study.name}"}
        began = [one.started for one in ([row] if row else study.trials) if one.started is not None]
        return _read(
            self._client.create_run(
                self.experiment,
                start_time=round(min(began) * 1000) if began else None,
                run_name=tags["mlflow.runName"],
                tags=tags,
            )
        )

    def _send(
        self, run: Run, points: list[Point], tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        left = [Param(key, value) for key, value in (params or {}).items()]
        words = [RunTag(key, value) for key, value in tags.items() if run.tags.get(key) != value]
        metrics = [Metric(point.key, point.value, point.time, point.step) for point in points]
        while left or words or metrics:
            self._client.log_batch(run.id, params=left[:99], tags=words[:99], metrics=metrics[:700])
            left, words, metrics = left[99:], words[99:], metrics[700:]
        run.tags |= tags
        run.params |= params or {}
        run.metrics |= {point.key: point.value for point in points}
        if self.study.data and not run.data:
            self._client.log_inputs(run.id, [_dataset(self.study)])
            run.data = True

    def _end(self, run: Run, status: str, ended: float | None) -> None:
        if run.status == status:
            return
        if status == "RUNNING":
            self._client.update_run(run.id, status)
        else:
            self._client.set_terminated(run.id, status, None if ended is None else round(ended * 1000))
        run.status = status

    def _remove(self, run: Run) -> None:
        self._tag(run, "role", GONE)
        self._client.delete_run(run.id)

    def _tag(self, run: Run, key: str, value: str) -> None:
        self._client.set_tag(run.id, key, value)
        run.tags[key] = value

    def _epochs(self, run: Run) -> set[tuple[int, int]]:
        return {(metric.step, metric.timestamp) for metric in self._client.get_metric_history(run.id, "seconds")}

    def _artifact_names(self, run: Run) -> set[str]:
        return {info.path for info in self._client.list_artifacts(run.id)}

    def _log_artifacts(self, run: Run, row: TrialRow) -> None:
        """The trial's files and pictures, as far as its folder has what they are made of."""
        from searchfm import plots

        if not row.folder.is_dir():
            return
        names = list(self.study.data.get("classes", ()))
        for path in [row.folder / name for name in record.LOGGED] + plots.draw(row, names):
            if path.is_file():
                self._client.log_artifact(run.id, str(path))
        predictions = plots.read_predictions(row)
        if predictions is not None:
            self._client.log_text(run.id, record.predictions_csv(*predictions, names), "predictions.csv")

    def _delete_artifact(self, run: Run, name: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository: Any = get_artifact_repository(run.artifacts, tracking_uri=self.home.tracking_uri)
        repository.delete_artifacts(name)

    def _free_name(self) -> str:
        """The study's name, or one with part of its uuid where an older study of that name is remembered."""
        taken = self._client.get_experiment_by_name(self.study.name) is not None
        return f"{self.study.name}-{self.study.uuid[:8]}" if taken else self.study.name


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


def _age(run: Run) -> tuple[int, str]:
    return run.started, run.id


def _active(runs: Iterable[Run]) -> list[Run]:
    """Those that are not deleted: first those that hold most, then the oldest."""
    return sorted((run for run in runs if not run.deleted), key=lambda run: (-len(run.metrics), *_age(run)))


def _holds(run: Run, point: Point) -> bool:
    return run.metrics.get(point.key) == point.value


def _different(there: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    return [key for key, value in wanted.items() if there.get(key) != value and key != "state"]


def _expected(row: TrialRow) -> list[str]:
    """The artifacts that a trial's folder allows for."""
    if not row.folder.is_dir():
        return []
    names = [name for name in record.LOGGED if (row.folder / name).is_file()]
    names += ["curves.png"] if row.epochs else []
    predicted = row.state == "complete" and (row.folder / record.PREDICTIONS).is_file()
    return names + (["confusion.png", "predictions.csv"] if predicted else [])


def _dataset(study: StudyRow) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data, asked = study.data, study.resolved.get("data", {})
    profile = {key: data[key] for key in ("train", "validation", "shape") if key in data}
    return DatasetInput(
        Dataset(
            name=str(asked.get("name", "data"))[-500:],
            digest=str(data.get("fingerprint", ""))[:16],  # the table shows it, and takes at most 36
            source_type="searchfm",
            source=json.dumps(dict(asked)),
            profile=json.dumps(profile | {"classes": len(data.get("classes", ()))}),
        ),
        [InputTag("mlflow.data.context", "training and validation")],
    )
