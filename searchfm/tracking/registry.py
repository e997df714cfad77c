"""What MLflow keeps beside the trials: final models in its registry, and reports and comparisons as artifacts.

What is registered needs nothing of ours to be used: a torch.export program (pt2) that takes raw images and answers
probabilities, with signature, input example, class names and pinned requirements.
"""

import json
import logging
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from searchfm import forkserver
from searchfm.errors import ModelError, StorageError, StudyError, one_line
from searchfm.format import sentence
from searchfm.home import Home, command_line, file_sha256, flush, flush_tree, shown, write_whole
from searchfm.records import EXAMPLE, FINAL, SPEC, WEIGHTS, Final, RegisteredModel, StudyRecord
from searchfm.search.notes import Links
from searchfm.search.storage import read_study
from searchfm.tables import digest
from searchfm.tracking import mirror, rows
from searchfm.tracking.mirror import COMMIT, NOTE, PACKAGES, SOURCE, Mirror, connect, reaching, writer
from searchfm.tracking.rows import Registered, database

log = logging.getLogger("searchfm")

CHAMPION = "champion"
REQUIRED = ("mlflow", "torch", "numpy")  # of whoever loads the model
FILES = "extra_files"  # where MLflow keeps files beside a model of its own format
SUFFIXES = (".onnx", ".safetensors")
COMPARISONS = "searchfm comparisons"  # an experiment; no study's can be named so, for the blank
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's error codes for a missing model


# --- registering a final model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A model as a torch.export program, which a worker wrote: raw images -> probabilities."""

    path: Path
    torch: str  # version that wrote it


def preload() -> None:
    """Begins to import what `publish` needs, in a thread: workers train meanwhile, and this process waits for them."""

    def work() -> None:
        with suppress(Exception):  # raised again where it is needed
            import mlflow.pyfunc
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    threading.Thread(target=work, name="import mlflow", daemon=True).start()


def publish(
    home: Home,
    study: StudyRecord,
    final: Final,
    folder: Path,
    program: Callable[[], Program],
    *,
    promote: bool = False,
) -> RegisteredModel:
    """Registers a study's final model as `searchfm-STUDY`. Hold the study's lock.

    The alias `champion` goes to the first version, to one that was better on the same test part than the champion so
    far, and to any with `promote`. A model that is registered already (known by the hash of its weights) is not
    registered again. folder: of the model. program: called where it is not registered yet.
    Raises StorageError where MLflow cannot be reached, ModelError where the folder holds no model.
    """
    name = f"searchfm-{study.name}"
    with writer(home, study.name), tempfile.TemporaryDirectory(dir=forkserver.temporary_folder()) as temporary:
        with reaching(home):
            runs = Mirror(home, study, deep=True)
            runs.open()
            client = runs.client
            # Deep: a crash may have left the run, found by the model's hash, without metrics or files.
            runs.align(mirror.final_content(study, final, folder, runs.parent))
            run = runs.runs[final.weights][0].id
            versions = client.search_model_versions(f"name = '{name}'", max_results=1000)
            registered = next((each for each in versions if each.tags.get("weights") == final.weights), None)
        if registered is None:
            path = Path(temporary) / "model"
            save(folder, program(), path, study)
            with reaching(home):
                registered = _register(client, home, runs.experiment, study, final, run, path)
        with reaching(home):
            number, champion = int(registered.version), _promote(client, name, registered, promote)
            model = RegisteredModel(name, number, f"models:/{name}/{number}", champion)
            client.log_dict(run, replace(final, model=model).to_json(), "final.json")
    return model


def save(folder: Path, program: Program, path: Path, study: StudyRecord) -> None:
    """Saves a model in MLflow's format, as `mlflow.pytorch.save_model` would, which imports torch and exports the model
    in this process: raw images (N, C, H, W) uint8 -> probabilities (N, K) float32.

    folder: of the model. Raises ModelError where it holds no model.
    """
    try:
        spec = json.loads((folder / SPEC).read_text("utf-8"))
        example = np.load(folder / EXAMPLE, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no model here ({one_line(error)})") from None
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=forkserver.temporary_folder()) as temporary:
        warnings.simplefilter("ignore")  # MLflow warns of its own insides
        import mlflow.pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        data = Path(temporary) / "pytorch"
        data.mkdir()
        shutil.copyfile(program.path, data / "model.pt2")  # the name that `mlflow.pytorch` reads
        extra = [{"path": f"{FILES}/{name}"} for name in (WEIGHTS, SPEC)]  # once more: reading these unpickles nothing
        model = Model()
        model.add_flavor(
            "pytorch", model_data=f"data/{data.name}", pytorch_version=program.torch, code=None, extra_files=extra
        )
        mlflow.pyfunc.save_model(
            path,
            loader_module="mlflow.pytorch",
            data_path=str(data),
            mlflow_model=model,
            # An exported program stays on its device, and MLflow would ask for a GPU wherever there is one.
            model_config={"device": "cpu"},
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *spec["shape"]))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(spec["classes"])))]),
            ),
            input_example=example,
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIRED],
            metadata={"study": study.name, "classes": spec["classes"], "shape": spec["shape"]},
        )
    (path / FILES).mkdir()
    for name in (WEIGHTS, SPEC):
        shutil.copyfile(folder / name, path / FILES / name)


def _register(client: Any, home: Home, experiment: str, study: StudyRecord, final: Final, run: str, path: Path) -> Any:
    """A new version of the study's model, from what `save` made."""
    from mlflow.exceptions import MlflowException

    name = f"searchfm-{study.name}"
    try:
        client.create_registered_model(name, tags={"study": study.name}, description=study.question or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = client.create_logged_model(experiment, name="model", source_run_id=run, model_type="classifier")
    client.log_model_artifacts(logged.model_id, str(path))
    if (kept := rows.folder(logged.artifact_location)) is not None:  # MLflow does not flush what it copies
        flush_tree(kept)
        for parent in kept.parents:
            if parent.is_relative_to(home.path):
                flush(parent)
    client.finalize_logged_model(logged.model_id, "READY")
    tags = {
        "study": study.name,
        "study_uuid": study.uuid,
        "trial": str(final.winner),
        "weights": final.weights,
        "fingerprint": final.fingerprint,
        "test_fingerprint": final.test.fingerprint,
        "test_accuracy": repr(final.test.accuracy),
    }
    return client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run,
        model_id=logged.model_id,
        tags=tags,
        description=sentence(final),
    )


def _promote(client: Any, name: str, candidate: Any, promote: bool) -> bool:
    """Gives the alias to a version that is better than the one that has it; returns whether it has it then."""
    current = client.get_registered_model(name).aliases.get(CHAMPION)
    if current is not None and str(current) == str(candidate.version):
        return True
    if current is not None and not promote:
        champion = client.get_model_version(name, current)
        same = all(champion.tags.get(key) == candidate.tags[key] for key in ("fingerprint", "test_fingerprint"))
        if not same or float(candidate.tags["test_accuracy"]) <= float(champion.tags["test_accuracy"]):
            return False
    client.set_registered_model_alias(name, CHAMPION, str(candidate.version))
    return True


# --- from the name of a model to its files ----------------------------------------------------------------------------


@contextmanager
def find_model(home: Home, model: str) -> Iterator[tuple[str, Path]]:
    """A name for files made of a model, without suffix, and its own files while the body runs: an exported file, or a
    folder with weights.safetensors and model.json. Its weights are those that were registered, by their hash.

    model: the name of a study (its champion), `models:/NAME@ALIAS`, `models:/NAME/VERSION`, an exported file, or a
    folder with weights.safetensors and model.json, as trials leave them.
    Raises StudyError for a study that is unknown or was not retrained, ModelError for what is not there or damaged,
    StorageError where MLflow cannot be reached.
    """
    path = Path(model)
    with tempfile.TemporaryDirectory(prefix="searchfm-") as temporary:
        if model.startswith("models:"):
            registered = _version(home, model)
            yield registered.name, _fetch(home, registered, model, Path(temporary))
        elif path.suffix in SUFFIXES or path.is_file():
            yield path.stem, path
        elif (path / SPEC).is_file():
            folder = path.absolute()
            name = folder.parent.name
            yield name if folder.name == FINAL else f"{name}-{folder.name}", path
        else:
            study = read_study(home, path.name)
            yield study.name, _champion(home, study, Path(temporary))


def _champion(home: Home, study: StudyRecord, temporary: Path) -> Path:
    """The version with the alias, which may be older than the final model; the final model where MLflow has none."""
    if study.final is None:
        raise StudyError(
            f"study {study.name!r}: was not retrained, so it has no model; first: searchfm retrain {study.name}"
        )
    folder, ours = study.final_folder, study.final.weights
    uri = f"models:/searchfm-{study.name}@{CHAMPION}"
    try:
        registered = _version(home, uri)
    except (ModelError, StorageError) as error:
        log.warning("%s; %s is used instead", error, folder)
        registered = None
    if registered is None or registered.tags.get("weights") == ours:
        _check(folder, ours)
        return folder
    if registered.tags.get("fingerprint") != study.data.fingerprint:
        # Homes that share a server of MLflow share its names too.
        raise ModelError(
            f"{uri}: version {registered.version} was trained on other data than study {study.name!r} here; may be "
            f"{folder}, models:/searchfm-{study.name}/VERSION, or first: searchfm retrain {study.name} --promote"
        )
    return _fetch(home, registered, uri, temporary)


def _version(home: Home, uri: str) -> Registered:
    """MLflow's record of a registered version."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(f"{uri}: must be models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    for each in rows.registered(home):
        if each.name == name and (alias in each.aliases if alias else str(each.version) == number):
            return each
    where = f"MLflow at {shown(home.tracking_uri)}"
    if (file := database(home)) is not None and not file.is_file():
        raise ModelError(f"{uri}: {where} is not there yet; begin with `searchfm tune`, or name another --home")
    with reaching(home):
        client = connect(home)
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            return _as_row(found, source=client.get_model_version_download_uri(name, found.version))
        except Exception as error:
            if getattr(error, "error_code", None) in _UNKNOWN:
                raise ModelError(f"{uri}: {where} has no such model") from None
            raise


def _fetch(home: Home, registered: Registered, uri: str, temporary: Path) -> Path:
    """A folder with the files of a version: MLflow's own on this machine, else a copy."""
    foreign = ModelError(
        f"{uri}: version {registered.version} carries no {WEIGHTS} and {SPEC}; "
        "must be one that `searchfm retrain` registered"
    )
    if (folder := rows.folder(registered.source)) is not None:
        if not all((folder / FILES / name).is_file() for name in (WEIGHTS, SPEC)):
            raise foreign
        found = folder / FILES
    else:
        from mlflow.artifacts import download_artifacts, list_artifacts

        with reaching(home):
            source = f"{registered.source}/{FILES}"
            names = {item.path.rpartition("/")[2] for item in list_artifacts(source, tracking_uri=home.tracking_uri)}
            if not names.issuperset((WEIGHTS, SPEC)):
                raise foreign
            download_artifacts(source, dst_path=str(temporary), tracking_uri=home.tracking_uri)
        found = temporary / FILES
    _check(found, registered.tags.get("weights"))
    return found


def _as_row(found: Any, *, source: str = "", aliases: Iterable[str] = ()) -> Registered:
    """MLflow's object of a version."""
    created = found.creation_timestamp / 1000
    return Registered(found.name, int(found.version), source, created, found.tags, frozenset(aliases))


def _check(folder: Path, expected: str | None) -> None:
    path = folder / WEIGHTS
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if expected is not None and sha256 != expected:
        raise ModelError(f"{path}: damaged, its sha256 is {sha256[:12]}..., not {expected[:12]}...")


@dataclass(frozen=True)
class Version:
    """A version in MLflow's registry, as `searchfm models` lists it."""

    name: str
    version: int
    uri: str
    champion: bool
    study: str
    trial: int | None
    test_accuracy: float | None
    created: float  # seconds since 1970


def models(home: Home) -> list[Version]:
    """The versions that `retrain` registered, by name, the newest first. Raises StorageError."""
    found = [each for each in rows.registered(home) if each.name.startswith("searchfm-")]
    if not found:
        with reaching(home):
            client, listed = _search(home, "name LIKE 'searchfm-%'")
            champions = {
                name: client.get_registered_model(name).aliases.get(CHAMPION) for name in {e.name for e in listed}
            }
        found = [
            _as_row(each, aliases=[CHAMPION] if str(each.version) == str(champions[each.name]) else [])
            for each in listed
        ]
    return sorted(map(_listed, found), key=lambda row: (row.name, -row.version))


def versions(home: Home, uuid: str) -> tuple[str, ...]:
    """The versions of a study's models, as URIs. Raises StorageError."""
    with reaching(home):
        _, found = _search(home, f"tags.study_uuid = '{uuid}'")
    return tuple(f"models:/{each.name}/{each.version}" for each in sorted(found, key=lambda each: int(each.version)))


def removed_studies(home: Home, name: str) -> list[str]:
    """The uuids of the studies of this name that were removed and whose models are still registered: they have no
    experiment. Homes that share a server share names too, but not uuids. Raises StorageError.
    """
    with reaching(home):
        client, found = _search(home, f"tags.study = '{name}'")
        uuids = dict.fromkeys(str(each.tags.get("study_uuid")) for each in found)
        return [uuid for uuid in uuids if not client.search_experiments(filter_string=f"tags.study_uuid = '{uuid}'")]


def delete_versions(home: Home, uuid: str) -> None:
    """Deletes the versions of a study's models, and a registered model that has no other. Raises StorageError."""
    with reaching(home):
        client, found = _search(home, f"tags.study_uuid = '{uuid}'")
        for each in found:
            client.delete_model_version(each.name, each.version)
        for name in {each.name for each in found}:
            if not client.search_model_versions(f"name = '{name}'", max_results=1):
                client.delete_registered_model(name)


def _search(home: Home, condition: str) -> tuple[Any, list[Any]]:
    """A client, and the registry's versions that meet a condition; none where there is no database yet."""
    if (file := database(home)) is not None and not file.is_file():
        return None, []
    client = connect(home)
    return client, list(client.search_model_versions(condition, max_results=10_000))


def _listed(found: Registered) -> Version:
    tags = found.tags
    return Version(
        name=found.name,
        version=found.version,
        uri=f"models:/{found.name}/{found.version}",
        champion=CHAMPION in found.aliases,
        study=tags.get("study", ""),
        trial=int(tags["trial"]) if "trial" in tags else None,
        test_accuracy=float(tags["test_accuracy"]) if "test_accuracy" in tags else None,
        created=found.created,
    )


# --- reports and comparisons ------------------------------------------------------------------------------------------


def log_report(home: Home, study: StudyRecord, path: Path) -> None:
    """Logs a report as `report.html` of the study's own run. Raises StorageError, also where there is no such run."""
    run = rows.study_run(home, study.uuid)
    if run is not None and (folder := rows.folder(run.artifacts)) is not None:
        write_whole(folder / "report.html", path.read_bytes())  # as MLflow's client does
        return
    runs = mirror.find(home, study, "study")
    if (active := runs.active(None)) is None:
        raise StorageError(f"MLflow has no run of study {study.name!r}; to make it: searchfm sync {study.name} --apply")
    with reaching(home):
        runs.client.log_text(active.id, path.read_text("utf-8"), "report.html")


def study_environment(home: Home, study: StudyRecord) -> dict[str, str]:
    """Hardware, system and versions that a study was begun with, as its run has them. Raises StorageError."""
    run = rows.study_run(home, study.uuid) or mirror.find(home, study, "study").active(None)
    tags = {} if run is None else run.tags
    names = {**{name: name for name in ("hardware", "platform", "python", *PACKAGES)}, "commit": COMMIT}
    return {name: tags[tag] for name, tag in names.items() if tag in tags}


def log_comparison(
    home: Home, lines: Sequence[Mapping[str, Any]], note: str, files: Callable[[], Mapping[str, str | bytes]]
) -> str:
    """Logs a comparison: a run with a note (Markdown), a table and the files by name, below it a run for each study.
    Returns the path of its table, the best study first; append it to the server's address.

    lines: of one study each, with `study` and plain values. The same lines are logged once. files: makes them, where
    they are needed; the picture of the note is `front.png`. Raises StorageError.
    """
    lines_digest = digest({"lines": [dict(line) for line in lines]})
    if (logged := rows.experiment_with(home, COMPARISONS, lines_digest)) is not None:
        return Links(logged, None, {}).table(lines_digest[:12])
    from mlflow.entities import Metric, RunTag

    with reaching(home):
        client = connect(home)
        experiment = _comparisons(client, home)
        table = Links(experiment, None, {}).table(lines_digest[:12])
        if client.search_runs([experiment], f"tags.digest = '{lines_digest}'", max_results=1):
            return table
        name, now = ", ".join(line["study"] for line in lines)[:250], time.time()
        common = mirror.environment() | {SOURCE: command_line() or "searchfm compare"}
        tags = common | {"role": "comparison"}
        run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        for line in lines:
            texts = {key: value for key, value in line.items() if isinstance(value, str)}
            tags = common | texts | {"role": "compared", "mlflow.parentRunId": run}
            child = client.create_run(experiment, run_name=line["study"], tags=tags).info.run_id
            client.log_batch(child, metrics=[Metric(*point) for point in mirror.make_points(line, now, 0)])
            client.set_terminated(child, "FINISHED")
        client.log_table(run, {key: [line[key] for line in lines] for key in lines[0]}, "comparison.json")
        with tempfile.TemporaryDirectory(prefix="searchfm-") as folder:
            for file, content in files().items():
                (Path(folder) / file).write_bytes(content.encode() if isinstance(content, str) else content)
            client.log_artifacts(run, folder)
        # The table has the studies of this comparison alone, with a column for each value.
        columns = {f"{'tags' if isinstance(value, str) else 'metrics'}.`{key}`": 100 for key, value in lines[0].items()}
        del columns["tags.`study`"]
        below = f"tags.`mlflow.parentRunId` = '{run}'"
        view = mirror.view(columns, order="metrics.`accuracy`", condition=below, name=220)
        for tag in (mirror.VIEW_TAG, f"{mirror.VIEWS}{lines_digest[:12]}"):  # the newest, and this one
            client.set_experiment_tag(experiment, tag, view)
        # The last: what a crash leaves half-way is not taken for whole.
        described = {NOTE: mirror.described([note], ["front.png"], run, first=True), "digest": lines_digest}
        client.log_batch(run, tags=[RunTag(*tag) for tag in described.items()])
        client.set_terminated(run, "FINISHED")
    return table


def _comparisons(client: Any, home: Home) -> str:
    """The experiment that holds all comparisons, made if it is missing, restored if it was deleted."""
    experiment = client.get_experiment_by_name(COMPARISONS)
    if experiment is None:
        text = "Studies compared: a run a comparison, below it a run a study."
        return mirror.create_experiment(client, home, COMPARISONS, "comparisons", {NOTE: text})
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)
