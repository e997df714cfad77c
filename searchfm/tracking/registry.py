"""The final model in MLflow: a run of its own below the study's, and a version in the model registry.

What is registered needs nothing of ours to be used: a torch.export program (pt2) that takes raw images and answers
probabilities, with signature, input example, class names and pinned requirements.
"""

import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from searchfm.home import Home
from searchfm.search.history import StudyRow, read_epochs
from searchfm.tracking import record
from searchfm.tracking.client import connect, prepare, reaching
from searchfm.tracking.mirror import Mirror

CHAMPION = "champion"
EXAMPLE = "example.npy"
LOGGED = ("config.toml", "epochs.csv", "curves.png", "confusion.png", "log.txt")
TESTED = ("accuracy", "low", "high", "reads")  # of the test, as metrics of the run
REQUIRED = ("mlflow", "torch", "numpy")  # of whoever loads the model


def publish(
    home: Home, study: StudyRow, final: Mapping[str, Any], folder: Path, *, promote: bool = False
) -> dict[str, Any]:
    """Registers a study's final model as `searchfm-STUDY`; returns `name`, `version`, `uri` and `champion`.

    The alias `champion` goes to the first version, to one that was better on the same test part than the champion so
    far, and to any with `promote`. A model that is registered already (known by the hash of its weights) is not
    registered again. final: what retraining kept of the study; folder: where the model is.
    Raises StorageError where MLflow cannot be reached, ModelError where the folder holds no model.
    """
    name = f"searchfm-{study.name}"
    with reaching(home):
        client, mirror = connect(home), Mirror(home, study)
        mirror.open()
        found = _version(client, name, final["weights"])
        run = _run(client, mirror, study, final, folder)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="searchfm-") as place:
            path = Path(place) / "model"
            save(folder, path, study)
            with reaching(home):
                found = _register(client, mirror, study, final, run, path)
    with reaching(home):
        champion, number = _crown(client, name, found, promote), int(found.version)
        model = {"name": name, "version": number, "uri": f"models:/{name}/{number}", "champion": champion}
        client.log_dict(run.info.run_id, {**final, "model": model}, "final.json")
    return model


def save(folder: Path, path: Path, study: StudyRow) -> None:
    """Saves the model of a folder in MLflow's format: raw images (N, C, H, W) uint8 -> probabilities (N, K) float32.

    Raises ModelError where the folder holds no model.
    """
    prepare()
    from searchfm.learn.checkpoint import load_classifier
    from searchfm.learn.models import Served

    classifier, spec = load_classifier(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow and torch.export warn of their own insides
        import mlflow.pytorch
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        mlflow.pytorch.save_model(
            Served(classifier).eval(),
            path,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *spec["shape"]))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(spec["classes"])))]),
            ),
            input_example=np.load(folder / EXAMPLE, allow_pickle=False),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIRED],
            serialization_format="pt2",
            extra_files=[str(folder / each) for each in record.WEIGHTS],  # once more: reading these unpickles nothing
            metadata={"study": study.name, "classes": spec["classes"], "shape": spec["shape"]},
        )
    # An exported program stays on the device it was exported on, and MLflow would ask for a GPU wherever there is one.
    saved = Model.load(str(path))
    saved.flavors["python_function"]["config"] = {"device": "cpu"}
    saved.save(str(path / "MLmodel"))


def _version(client: Any, name: str, weights: str) -> Any:
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    return next((each for each in found if each.tags.get("weights") == weights), None)


def _run(client: Any, mirror: Mirror, study: StudyRow, final: Mapping[str, Any], folder: Path) -> Any:
    """The final model's run, found by its tags or made, with all that is known of it."""
    from mlflow.entities import Metric, Param, RunTag

    tags = {
        "mlflow.runName": f"{study.name}-final",
        "mlflow.parentRunId": mirror.parent,
        "role": "final",
        "study": study.name,
        "study_uuid": study.uuid,
        "trial": str(final["winner"]),
        "weights": final["weights"],
        "state": "complete",
        "mlflow.note.content": sentence(final),
    }
    known = client.search_runs(
        [mirror.experiment], f"tags.role = 'final' and tags.weights = '{final['weights']}'", max_results=1
    )
    if known:
        run = known[0]
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    else:
        time = round(final["time"] * 1000)
        run = client.create_run(mirror.experiment, start_time=time, tags=tags | record.environment())
        epochs = read_epochs(folder / "epochs.csv")
        points = [point for epoch in epochs for point in record.epoch_points(epoch)]
        ends = {f"test/{key}": final["test"][key] for key in TESTED}  # no `value`: that is validation accuracy
        ends |= {key: final[key] for key in ("parameters", "flops", "training_seconds", "epochs")}
        ends |= {} if final["optimism"] is None else {"optimism": final["optimism"]}
        metrics = [Metric(point.key, point.value, point.time, point.step) for point in points]
        metrics += [Metric(key, float(value), time, len(epochs)) for key, value in ends.items()]
        for start in range(0, len(metrics), 900):
            client.log_batch(run.info.run_id, metrics=metrics[start : start + 900])
        params = [Param(key, str(value)[:6000]) for key, value in final["params"].items()]
        for start in range(0, len(params), 99):  # MLflow takes at most 100 at once
            client.log_batch(run.info.run_id, params=params[start : start + 99])
    for path in [folder / each for each in LOGGED]:
        if path.is_file():
            client.log_artifact(run.info.run_id, str(path))
    with np.load(folder / record.PREDICTIONS, allow_pickle=False) as file:
        names = list(study.data["classes"])
        table = record.predictions_csv(file["labels"], file["probabilities"], file["indices"], names)
    client.log_text(run.info.run_id, table, "predictions.csv")
    client.set_terminated(run.info.run_id, "FINISHED")
    return run


def _register(client: Any, mirror: Mirror, study: StudyRow, final: Mapping[str, Any], run: Any, path: Path) -> Any:
    """A new version of the study's model, from what `save` made."""
    from mlflow.exceptions import MlflowException

    name = f"searchfm-{study.name}"
    try:
        client.create_registered_model(name, tags={"study": study.name}, description=study.question or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = client.create_logged_model(
        mirror.experiment, name="model", source_run_id=run.info.run_id, model_type="classifier"
    )
    client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, "READY")
    tags = {
        "study": study.name,
        "study_uuid": study.uuid,
        "trial": str(final["winner"]),
        "weights": final["weights"],
        "fingerprint": final["fingerprint"],
        "test_fingerprint": final["test"]["fingerprint"],
        "test_accuracy": repr(final["test"]["accuracy"]),
    }
    return client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run.info.run_id,
        model_id=logged.model_id,
        tags=tags,
        description=sentence(final),
    )


def _crown(client: Any, name: str, found: Any, promote: bool) -> bool:
    """Gives the alias to a version that deserves it; whether it has it then."""
    model = client.get_registered_model(name)
    current = model.aliases.get(CHAMPION)
    if current is not None and str(current) == str(found.version):
        return True
    if current is not None and not promote:
        champion = client.get_model_version(name, current)
        same = all(champion.tags.get(key) == found.tags[key] for key in ("fingerprint", "test_fingerprint"))
        if not same or float(found.tags["test_accuracy"]) <= float(champion.tags["test_accuracy"]):
            return False
    client.set_registered_model_alias(name, CHAMPION, str(found.version))
    return True


def sentence(final: Mapping[str, Any]) -> str:
    """The result in a sentence that says what its interval is an interval of."""
    test = final["test"]
    return (
        f"{test['accuracy']:.2%} of {test['n']:,} test images right; 95% interval {test['low']:.2%} to "
        f"{test['high']:.2%} (Wilson), for this one model on images like these. "
        f"The test part of these data had been read {times(test['reads'])} by then, this time included."
    )


def times(number: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
