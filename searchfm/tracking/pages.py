"""What `show` makes, in MLflow: a study's report as an artifact of its run, comparisons as runs of their own."""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from searchfm.errors import StorageError
from searchfm.home import Home
from searchfm.search.history import StudyRow
from searchfm.search.notes import VIEW
from searchfm.tables import digest
from searchfm.tracking import record
from searchfm.tracking.client import connect, reaching
from searchfm.tracking.mirror import Mirror

COMPARISONS = "searchfm comparisons"  # an experiment; no study's can be named so, for the blank
COMMIT = "mlflow.source.git.commit"


def log_report(home: Home, study: StudyRow, path: Path) -> None:
    """Keeps a report as `report.html` of the study's own run. Raises StorageError, also where there is no such run."""
    with reaching(home):
        client, run = _own(home, study)
        if run is not None:
            client.log_text(run.info.run_id, path.read_text("utf-8"), "report.html")
    if run is None:
        raise StorageError(f"MLflow has no run of study {study.name!r}; to make it: searchfm sync {study.name} --apply")


def study_environment(home: Home, study: StudyRow) -> dict[str, str]:
    """Hardware, system and versions that a study was begun with, as its run has them. Raises StorageError."""
    with reaching(home):
        _, run = _own(home, study)
    tags = {} if run is None else run.data.tags
    names = {**{name: name for name in ("hardware", "platform", "python", *record.PACKAGES)}, "commit": COMMIT}
    return {name: tags[tag] for name, tag in names.items() if tag in tags}


def log_comparison(home: Home, lines: Sequence[Mapping[str, Any]], note: str, files: Mapping[str, str | bytes]) -> None:
    """Keeps a comparison: a run with a note (Markdown), a table and the files by name, below it a run for each study.

    lines: of one study each, with `study` and plain values. The same lines are kept once. Raises StorageError.
    """
    with reaching(home):
        client = connect(home)
        experiment = _experiment(client, home)
        mark = digest({"lines": [dict(line) for line in lines]})
        if not client.search_runs([experiment], f"tags.digest = '{mark}'", max_results=1):
            _log(client, experiment, lines, note, files, mark)


def _own(home: Home, study: StudyRow) -> tuple[Any, Any]:
    """A client, and the study's own run if there is one."""
    client, mirror = connect(home), Mirror(home, study)
    found = mirror.find() and mirror.parent
    return client, client.get_run(mirror.parent) if found else None


def _experiment(client: Any, home: Home) -> str:
    """The experiment that holds all comparisons, made if it is not there, brought back if it was deleted."""
    known = client.get_experiment_by_name(COMPARISONS)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        return str(known.experiment_id)
    local = not home.tracking_uri.startswith(("http:", "https:"))
    return str(
        client.create_experiment(
            COMPARISONS,
            artifact_location=(home.artifacts / "comparisons").as_uri() if local else None,
            tags={
                "mlflow.experimentKind": "custom_model_development",  # else the pages are those for chat traces
                "mlflow.note.content": "Studies side by side: a run a comparison, below it a run a study.",
            },
        )
    )


def _log(
    client: Any,
    experiment: str,
    lines: Sequence[Mapping[str, Any]],
    note: str,
    files: Mapping[str, str | bytes],
    mark: str,
) -> None:
    name, now = ", ".join(line["study"] for line in lines)[:250], round(time.time() * 1000)
    about = record.environment() | {"mlflow.source.name": "searchfm compare"}
    tags = about | {"role": "comparison", "mlflow.note.content": note}
    run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    for line in lines:
        words = {key: value for key, value in line.items() if isinstance(value, str)}
        tags = about | words | {"role": "compared", "mlflow.parentRunId": run}
        below = client.create_run(experiment, run_name=line["study"], tags=tags).info.run_id
        client.log_batch(below, metrics=_metrics(line, now))
        client.set_terminated(below, "FINISHED")
    columns = {key: [line[key] for line in lines] for key in lines[0]}
    client.log_table(run, columns, "comparison.json")
    with tempfile.TemporaryDirectory(prefix="searchfm-") as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content.encode() if isinstance(content, str) else content)
        client.log_artifacts(run, folder)
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", _view(lines[0], run))
    client.set_tag(run, "digest", mark)  # the last: what a crash leaves half-way is not taken for whole
    client.set_terminated(run, "FINISHED")


def _metrics(line: Mapping[str, Any], now: int) -> list[Any]:
    from mlflow.entities import Metric

    numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and math.isfinite(value)}
    return [Metric(key, float(value), now, 0) for key, value in numbers.items()]


def _view(line: Mapping[str, Any], run: str) -> str:
    """The table opened at the newest comparison, with a column for each value: MLflow's undocumented shared view."""
    columns = [f"tags.`{key}`" if isinstance(line[key], str) else f"metrics.`{key}`" for key in line if key != "study"]
    return json.dumps(
        {
            "searchFilter": "",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": columns,
            "columnOrder": ["0", "attributes.`Run Name`", *columns, "runDateAndNestInfo"],
            "columnWidths": {**dict.fromkeys(columns, 100), "attributes.`Run Name`": 220, "0": 60},
            "runsExpanded": {run: True},
            "runsPinned": [],
            "runsHidden": [],
            "viewMaximized": True,
            "autoRefreshEnabled": True,
        }
    )
