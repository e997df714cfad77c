"""The final model in MLflow: registered once, the champion only if it is better, usable without anything of ours."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchfm.config import Config
from searchfm.errors import ModelError, StorageError
from searchfm.format import sentence, times
from searchfm.home import TRACKING, Home
from searchfm.jobs import Context
from searchfm.learn import entries
from searchfm.learn.checkpoint import load_classifier, save_weights
from searchfm.learn.models import classifier, served
from searchfm.records import (
    EPOCHS,
    PROGRAM,
    SPEC,
    WEIGHTS,
    ExportJob,
    ExportResult,
    Final,
    FinalPlan,
    RegisteredModel,
    StudyRecord,
    TestFigures,
    Validation,
    write_epochs,
)
from searchfm.search.storage import open_storage, write_record
from searchfm.tracking import registry
from searchfm.tracking.mirror import Mirror, final_content
from tests import rows
from tests.learn.toys import drain
from tests.programs import worker_port

# mlflow's own use of SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

SHAPE, CLASSES = (1, 28, 28), rows.CLASSES


@pytest.fixture(scope="module")
def home(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    return new_home(tmp_path_factory.mktemp("registry") / "home")


@pytest.fixture(scope="module")
def study(home: Home) -> StudyRecord:
    return rows.four(home)


def model(folder: Path, seed: int) -> Final:
    """A final model as `fit` leaves it, untrained, and its record."""
    folder.mkdir(parents=True)
    config = Config.from_table({"model": {"name": "cnn", "cnn": {"filters": 4, "batch_norm": True}}})
    half = torch.full((1,), 0.5)
    net = classifier(config.model, SHAPE, 10, half, half, seed=seed, device=torch.device("cpu"))
    spec = {"config": config.to_table(), "classes": CLASSES, "shape": list(SHAPE)}
    files = save_weights(folder, net.eval(), spec)
    np.save(folder / "example.npy", np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8))
    rows.predictions().write(folder)
    write_epochs(folder / EPOCHS, rows.epochs(seed, 3))
    return Final(
        study="toy",
        plan=FinalPlan(trials=(3,), top=1, seeds=1, trial=None, epochs=None, round=0),
        finalists=(),
        tie=(),
        winner=3,
        optimism=0.01,
        validation=Validation(0.91, None, None, None, 900),
        test=TestFigures(0.9, 0.88, 0.92, 900, 1, "t" * 64),
        per_class=(),
        model=None,
        seconds=None,
        seconds_per_epoch=1.0,
        training_seconds=3.0,
        parameters=100,
        flops=1000,
        epochs=3,
        fingerprint="f" * 64,
        time=rows.STARTED,
        params={"optimizer.lr": 0.1},
        weights=files[WEIGHTS],
    )


def publish(home: Home, study: StudyRecord, final: Final, folder: Path, **options: bool) -> RegisteredModel:
    """As `retrain` does, with the program that a worker leaves."""

    def program() -> registry.Program:
        context = Context(folder, (), "cpu", lambda: None)
        job = ExportJob(str(folder), {WEIGHTS: final.weights})
        _, written = drain(entries.export(job.to_json(), context))
        return registry.Program(folder / PROGRAM, ExportResult.from_json(written, "export").torch)

    return registry.publish(home, study, final, folder, program, **options)


@pytest.fixture(scope="module")
def first(home: Home, study: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Final]:
    folder = tmp_path_factory.mktemp("models") / "first"
    return folder, model(folder, 1)


@pytest.fixture(scope="module")
def published(home: Home, study: StudyRecord, first: tuple[Path, Final]) -> RegisteredModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(TRACKING, raising=False)
        return publish(home, study, first[1], first[0])


def client(home: Home) -> Any:
    return registry.connect(home)


def test_the_first_version_is_the_champion(published: RegisteredModel) -> None:
    assert published == RegisteredModel("searchfm-toy", 1, "models:/searchfm-toy/1", True)


def test_it_loads_with_mlflow_alone_and_answers_what_the_model_does(
    home: Home, first: tuple[Path, Final], published: RegisteredModel
) -> None:
    import mlflow.pyfunc

    source = client(home).get_model_version("searchfm-toy", "1").source
    loaded = mlflow.pyfunc.load_model(source)
    inputs, outputs = loaded.metadata.signature.inputs.inputs, loaded.metadata.signature.outputs.inputs
    assert [(spec.type, spec.shape) for spec in inputs] == [(np.dtype("uint8"), (-1, *SHAPE))]
    assert [(spec.type, spec.shape) for spec in outputs] == [(np.dtype("float32"), (-1, 10))]
    assert loaded.metadata.metadata["classes"] == CLASSES
    example = loaded.input_example
    assert np.array_equal(example, np.load(first[0] / "example.npy"))
    ours = served(load_classifier(first[0])[0])
    for count in (1, 2, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), np.uint8)
        with torch.no_grad():
            expected = ours(torch.from_numpy(images)).numpy()
        assert np.abs(loaded.predict(images) - expected).max() < 1e-6


def test_it_is_laid_out_as_mlflows_own_pytorch_flavor_lays_out_a_program(
    home: Home, first: tuple[Path, Final], published: RegisteredModel, tmp_path: Path
) -> None:
    """`registry.save` writes that flavor without it, since it imports torch."""
    import mlflow.pytorch
    from mlflow.models import Model

    folder = Path(client(home).get_model_version("searchfm-toy", "1").source.removeprefix("file://"))
    ours = Model.load(str(folder))
    example = np.load(first[0] / "example.npy")
    net = served(load_classifier(first[0])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pytorch.save_model(
            net,
            tmp_path / "theirs",
            signature=ours.signature,
            input_example=example,
            pip_requirements=["torch"],
            serialization_format="pt2",
            extra_files=[str(first[0] / name) for name in (WEIGHTS, SPEC)],
        )
        theirs = Model.load(str(tmp_path / "theirs"))
        loaded = mlflow.pytorch.load_model(str(folder))
    moved = {**theirs.flavors["pytorch"], "model_data": "data/pytorch"}
    assert ours.flavors["pytorch"] == moved
    for key in ("loader_module", "env", "python_version"):
        assert ours.flavors["python_function"][key] == theirs.flavors["python_function"][key]
    names = [{path.name for path in root.rglob("*") if path.is_file()} for root in (folder, tmp_path / "theirs")]
    assert names[0] == names[1]
    with torch.no_grad():
        assert torch.equal(loaded(torch.from_numpy(example)), net(torch.from_numpy(example)))


def test_it_says_what_it_needs_and_carries_plain_weights(home: Home, published: RegisteredModel) -> None:
    folder = Path(client(home).get_model_version("searchfm-toy", "1").source.removeprefix("file://"))
    needed = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in needed} == {"mlflow", "torch", "numpy"}
    assert all("+" not in line for line in needed), "a local version is in no registry"
    assert {path.name for path in (folder / "extra_files").iterdir()} == {"weights.safetensors", "model.json"}
    assert not list(folder.rglob("*.pkl")), "no pickle beside the program"


def test_its_run_stands_below_the_studys_with_pictures_and_figures(home: Home, published: RegisteredModel) -> None:
    version = client(home).get_model_version("searchfm-toy", "1")
    run = client(home).get_run(version.run_id)
    parent = client(home).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["role"] == "study"
    assert run.data.tags["role"] == "final"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] == 0.9
    assert "value" not in run.data.metrics, "what studies maximise is validation accuracy"
    assert (run.data.metrics["accuracy"], run.data.tags["split"]) == (0.9, "test")
    assert "90.00% of 900 test images correct" in run.data.tags["mlflow.note.content"]
    assert [m.step for m in client(home).get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    names = {info.path for info in client(home).list_artifacts(run.info.run_id)}
    assert {"epochs.csv", "final.json", "predictions.csv"} <= names
    tags = {name for name in run.data.tags if not name.startswith("mlflow.")}
    assert names | tags | run.data.metrics.keys() | version.tags.keys() <= rows.documented_names()
    assert "Wilson" in version.description


def test_a_model_is_registered_once(
    home: Home, study: StudyRecord, first: tuple[Path, Final], published: RegisteredModel
) -> None:
    assert publish(home, study, first[1], first[0]) == published
    assert len(client(home).search_model_versions("name = 'searchfm-toy'")) == 1


@pytest.mark.slow(seconds=2)
def test_the_champion_changes_only_for_a_better_one_on_the_same_test_part(
    home: Home, study: StudyRecord, published: RegisteredModel, tmp_path: Path
) -> None:
    models: dict[int, Final] = {}

    def publish_one(seed: int, accuracy: float, promote: bool = False, **changes: Any) -> tuple[int, bool]:
        folder = tmp_path / str(seed)
        if seed not in models:
            models[seed] = model(folder, seed)
        final = replace(models[seed], test=replace(models[seed].test, accuracy=accuracy), **changes)
        version = publish(home, study, final, folder, promote=promote)
        alias = client(home).get_model_version_by_alias("searchfm-toy", "champion").version
        assert (str(alias) == str(version.version)) == version.champion
        return version.version, version.champion

    assert publish_one(2, 0.9) == (2, False), "no better"
    assert publish_one(3, 0.91) == (3, True)
    assert publish_one(4, 0.99, fingerprint="0" * 64) == (4, False), "other data say nothing"
    assert publish_one(2, 0.9, promote=True) == (2, True)
    assert publish_one(2, 0.9) == (2, True), "asked again it stays"


def test_a_champion_trained_on_other_data_does_not_answer_by_the_studys_name(
    home: Home, study: StudyRecord, published: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two homes with one server of MLflow: the second study of a name finds the first one's champion."""
    monkeypatch.setenv(TRACKING, home.tracking_uri)
    other = Home(tmp_path / "other")
    mine = rows.begin(other, data="0" * 64)
    write_record(open_storage(other), mine.number, replace(model(tmp_path / "mine", 6), weights="0" * 64))
    expected = (
        r"@champion: version \d was trained on other data than study 'toy' here; may be .*final, models:/searchfm"
    )
    with pytest.raises(ModelError, match=expected), registry.find_model(other, "toy"):
        pass


def test_a_run_has_all_parameters_though_mlflow_takes_a_hundred_at_once(
    home: Home, study: StudyRecord, published: RegisteredModel, tmp_path: Path
) -> None:
    params = {f"key.{number}": number for number in range(250)}
    final = replace(model(tmp_path / "many", 5), params=params)
    version = publish(home, study, final, tmp_path / "many").version
    run = client(home).get_run(client(home).get_model_version("searchfm-toy", str(version)).run_id)
    assert run.data.params == {key: str(value) for key, value in params.items()}


def test_a_final_run_that_a_crash_left_without_metrics_is_completed(
    home: Home, study: StudyRecord, published: RegisteredModel, tmp_path: Path
) -> None:
    final = model(tmp_path / "crashed", 7)
    runs = Mirror(home, study)
    runs.open()
    content = final_content(study, final, tmp_path / "crashed", runs.parent)
    left = runs._create(content).id  # and no more
    version = publish(home, study, final, tmp_path / "crashed").version
    run = client(home).get_run(left)
    assert client(home).get_model_version("searchfm-toy", str(version)).run_id == left
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {point.key for point in content.points}
    assert run.data.params == {"optimizer.lr": "0.1"}
    names = {info.path for info in client(home).list_artifacts(left)}
    assert names == {*content.files, "final.json"} > {"predictions.csv", EPOCHS}


def test_mlflow_away_is_one_line_without_a_password(
    home: Home, study: StudyRecord, first: tuple[Path, Final], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACKING, "http://somebody:secret@127.0.0.1:9")
    with pytest.raises(StorageError, match=r"MLflow at http://127\.0\.0\.1:9: ") as refused:
        publish(home, study, first[1], first[0])
    assert "secret" not in str(refused.value)


def test_a_folder_without_a_model_is_named(home: Home, study: StudyRecord, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model here"):
        registry.save(tmp_path, registry.Program(tmp_path / PROGRAM, "2"), tmp_path / "out", study)


def test_the_result_in_a_sentence_says_what_its_interval_is_about(first: tuple[Path, Final]) -> None:
    assert sentence(first[1]) == (
        "90.00% of 900 test images correct; 95% interval 88.00% to 92.00% (Wilson), for this one model on images like "
        "these. The test part of these data had been read once by then, this time included."
    )
    assert [times(number) for number in (1, 2, 3)] == ["once", "twice", "3 times"]


# --- where nothing of ours is installed -------------------------------------------------------------------------------

PREDICT = """
import sys, json, numpy as np, mlflow.pyfunc
for name in ("searchfm", "timm", "torchvision", "optuna"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is here")
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(np.load(sys.argv[2])).tolist()))
"""


@pytest.fixture(scope="module")
def bare(home: Home, published: RegisteredModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The interpreter of a fresh environment with the model's recorded requirements and nothing else; the model."""
    folder = Path(client(home).get_model_version("searchfm-toy", "1").source.removeprefix("file://"))
    venv = tmp_path_factory.mktemp("bare") / "venv"
    quiet = {**os.environ, "UV_NO_PROGRESS": "1"}
    quiet.pop("VIRTUAL_ENV", None)
    subprocess.run(["uv", "venv", "--python", sys.executable, str(venv)], check=True, env=quiet, timeout=120)
    python = venv / "bin" / "python"
    install = ["uv", "pip", "install", "--python", str(python), "-r", str(folder / "requirements.txt")]
    subprocess.run(install, check=True, env=quiet, timeout=1500)
    return python, folder


@pytest.fixture
def asked(first: tuple[Path, Final], tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Images in a file, and what our own model answers."""
    images = np.random.default_rng(7).integers(0, 256, (3, *SHAPE), np.uint8)
    np.save(tmp_path / "images.npy", images)
    with torch.no_grad():
        return tmp_path / "images.npy", served(load_classifier(first[0])[0])(torch.from_numpy(images)).numpy()


def same(answers: list[list[float]], expected: np.ndarray, record_property: Callable[[str, object], None]) -> None:
    difference = np.abs(np.array(answers) - expected).max()
    record_property("figures", f"largest difference of a probability {difference:.1e}, torch {torch.__version__}")
    assert difference < 1e-6


@pytest.mark.nightly
def test_with_its_recorded_requirements_alone_it_predicts_the_same(
    bare: tuple[Path, Path],
    asked: tuple[Path, np.ndarray],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    python, folder = bare
    done = subprocess.run(
        [str(python), "-I", "-c", PREDICT, str(folder), str(asked[0])],  # -I: whatever PYTHONPATH says
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same(json.loads(done.stdout.splitlines()[-1]), asked[1], record_property)


@pytest.mark.nightly
def test_served_over_http_it_answers_the_same(
    bare: tuple[Path, Path],
    asked: tuple[Path, np.ndarray],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    python, folder = bare
    port = worker_port(6900)
    command = [str(python), "-m", "mlflow", "models", "serve", "-m", str(folder), "-p", str(port)]
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        answer = ask(f"http://127.0.0.1:{port}", np.load(asked[0]), server)
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
    same(answer["predictions"], asked[1], record_property)


def ask(address: str, images: np.ndarray, server: "subprocess.Popen[bytes]") -> dict[str, Any]:
    body = json.dumps({"inputs": images.tolist()}).encode()
    question = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    for _ in range(240):
        try:
            with closing(urllib.request.urlopen(question, timeout=60)) as reply:
                answer: dict[str, Any] = json.load(reply)
                return answer
        except urllib.error.URLError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    raise AssertionError("the server never answered")
