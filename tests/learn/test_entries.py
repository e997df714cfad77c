"""The job entries, end to end on digits, as a worker calls them."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_score, recall_score

from searchfm.config import Config
from searchfm.errors import DataError, DivergedError, ModelError, Stopped, WorldError
from searchfm.jobs import PAUSED, Context
from searchfm.learn import entries
from searchfm.learn.checkpoint import load_classifier
from searchfm.learn.data import Splits, load, load_full, load_test
from searchfm.learn.entries import fit, forecast, prepare, trial
from searchfm.learn.models import served
from searchfm.records import NUMERICS, Epoch, ForecastJob, ForecastResult, Prepared, PrepareResult
from tests.learn.test_transfer_real import lite0_weights
from tests.learn.toys import config, drain, losses


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "entries-cache"))


def payload(settings: Config, digits: Splits, **changes: Any) -> dict[str, Any]:
    return {
        "config": settings.to_table(),
        "data_dir": None,
        "fingerprint": digits.fingerprint,
        "identity": "a-study-uuid/7",
        "checkpoint_seconds": 1000.0,
    } | changes


def context(folder: Path, *earlier: Path, tick: Callable[[], None] = lambda: None) -> Context:
    return Context(folder, earlier, "cpu", tick)


def stop_after(calls: int) -> Callable[[], None]:
    """A tick that asks to leave at its `calls`-th call, as a coordinator does through its pipe."""
    left = calls

    def tick() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Stopped

    return tick


SETTINGS = config(
    "cnn",
    {"filters": 8, "dropout": 0.2},
    optimizer={"name": "sgd", "lr": 0.05},
    augment={"mixup": 0.2},
    train={"epochs": 4, "ema": 0.9},
)
BATCHES = math.ceil(1201 / 64) + math.ceil(212 / 64)  # an epoch's, validation included


def test_prepare_says_what_there_is(digits: Splits, tmp_path: Path) -> None:
    models = [["test_resnet", "none"]]
    epochs, prepared = drain(
        prepare({"data": {"name": "digits"}, "models": models, "data_dir": None}, context(tmp_path))
    )
    assert epochs == []
    assert digits.val is not None
    counts = tuple(torch.bincount(digits.val.labels).tolist())
    assert sum(counts) == 212
    names = tuple(str(digit) for digit in range(10))
    assert PrepareResult.from_json(prepared) == PrepareResult(
        Prepared(digits.fingerprint, (1, 8, 8), names, len(digits.train), 212, counts, "", 1201, 384, (8, 8)),
        {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())},
    )


def test_forecast_times_the_minimum_and_the_maximum_and_writes_nothing(digits: Splits, tmp_path: Path) -> None:
    widths = (300, 10, 50)
    tables = tuple(config(settings={"layers": 1, "width": width}).to_table() for width in widths)
    epochs, values = drain(forecast(ForecastJob(tables, None, seconds=0.0).to_json(), context(tmp_path)))
    result = ForecastResult.from_json(values)
    wide, narrow, middle = result.timings
    assert (epochs, list(tmp_path.iterdir())) == ([], [])
    assert (wide.train or 0) > 0
    assert (narrow.validation or 0) > 0
    assert (middle.train, middle.validation) == (None, None)
    assert narrow.work < middle.work < wide.work
    assert wide.parameters == 64 * 300 + 300 + 300 * 10 + 10
    assert result.memory > 10_000_000


def test_a_config_that_diverges_is_not_timed(digits: Splits, tmp_path: Path) -> None:
    table = config(optimizer={"name": "sgd", "lr": 1e30}).to_table()
    _, values = drain(forecast(ForecastJob((table,), None, seconds=9.0).to_json(), context(tmp_path)))
    assert ForecastResult.from_json(values).timings[0].train is None


def test_prepare_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="digitz"):
        drain(prepare({"data": {"name": "digitz"}, "models": [], "data_dir": None}, context(tmp_path)))
    models = [["resnet18", str(tmp_path / "missing.pth")]]
    with pytest.raises(ModelError, match="no such file"):
        drain(prepare({"data": {"name": "digits"}, "models": models, "data_dir": None}, context(tmp_path)))


def test_prepare_refuses_weights_of_another_model_before_the_first_trial(tmp_path: Path) -> None:
    path = lite0_weights(tmp_path / "lite0.safetensors")
    models = [["test_resnet", str(path)]]
    with pytest.raises(ModelError, match=r"does not load into test_resnet|not of test_resnet"):
        drain(prepare({"data": {"name": "digits"}, "models": models, "data_dir": None}, context(tmp_path)))


def test_a_trial_leaves_all_that_it_says(digits: Splits, tmp_path: Path) -> None:
    epochs, result = drain(trial(payload(SETTINGS, digits), context(tmp_path)))
    assert [epoch.index for epoch in epochs] == [1, 2, 3, 4]
    assert result["value"] == epochs[-1].val_accuracy
    assert epochs[result["best_epoch"] - 1].val_accuracy == max(epoch.val_accuracy or 0 for epoch in epochs)
    assert result["seconds"] == pytest.approx(sum(epoch.seconds for epoch in epochs))
    assert result["parameters"] == result["trainable"] == (72 + 8) + (9 * 8 * 8 + 8) + (2 * 2 * 8 * 10 + 10)
    assert result["flops"] == 2 * (64 * 72 + 16 * 9 * 64 + 320)
    assert result["epochs"] == 4
    assert json.loads(json.dumps(result)) == result  # plain values, as they cross a pipe and a database
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "model.json", "predictions.npz"}
    for name, sha in result["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha


def test_predictions_and_weights_tell_the_same(digits: Splits, tmp_path: Path) -> None:
    _, result = drain(trial(payload(SETTINGS, digits), context(tmp_path)))
    predictions = np.load(tmp_path / "predictions.npz", allow_pickle=False)
    assert (predictions["probabilities"].argmax(1) == predictions["labels"]).mean() == result["value"]
    assert digits.val is not None
    assert np.array_equal(predictions["indices"], digits.val.indices.numpy())
    model, spec = load_classifier(tmp_path)
    np.testing.assert_allclose(
        model(digits.val.images).softmax(1).detach().numpy(), predictions["probabilities"], rtol=1e-4, atol=1e-6
    )
    assert Config.from_table(spec["config"]) == SETTINGS
    assert spec["fingerprint"] == digits.fingerprint


@pytest.mark.parametrize(("above", "written"), [(0.0, True), (1e-6, False), (None, False)])
def test_weights_are_written_from_a_value_on(
    above: float | None, written: bool, digits: Splits, tmp_path: Path
) -> None:
    _, result = drain(trial(payload(SETTINGS, digits, weights_from=None), context(tmp_path / "none")))
    weights_from = None if above is None else round(result["value"], 6) + above
    _, again = drain(trial(payload(SETTINGS, digits, weights_from=weights_from), context(tmp_path / "some")))
    assert again["value"] == result["value"]
    names = {"weights.safetensors", "model.json", "predictions.npz"} if written else {"predictions.npz"}
    assert {path.name for path in (tmp_path / "some").iterdir()} == again["files"].keys() == names


def test_operations_are_counted_once_for_each_architecture(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    whole = entries.flops
    monkeypatch.setattr(entries, "_counted", {})
    monkeypatch.setattr(entries, "flops", lambda model, shape: counted.append(whole(model, shape)) or counted[-1])

    def result(model: str, settings: dict[str, Any], lr: float) -> int:
        table = config(model, settings, optimizer={"lr": lr}, train={"epochs": 1})
        return int(drain(trial(payload(table, digits, weights_from=None), context(tmp_path)))[1]["flops"])

    nets: list[tuple[str, dict[str, Any]]] = [
        ("mlp", {"layers": 1, "width": 8}),
        ("mlp", {"layers": 1, "width": 9}),
        ("transfer", {"model": "test_resnet", "weights": "none", "tuned_blocks": "all"}),
    ]
    first = [result(*net, lr=0.01) for net in nets]
    assert [result(*net, lr=0.02) for net in nets] == first == counted
    dropping = nets[2][1] | {"dropout": 0.5, "layer_decay": 0.5, "tuned_blocks": 1}
    assert result("transfer", dropping, 0.01) == first[2]
    assert len(counted) == 3
    assert result("transfer", {**nets[2][1], "model": "test_efficientnet"}, 0.01) != first[2]


@pytest.mark.parametrize("call", [1, BATCHES + 5, 2 * BATCHES - 1, 3 * BATCHES + 2])
def test_stopped_anywhere_and_taken_up_again_is_bitwise_unbroken(digits: Splits, tmp_path: Path, call: int) -> None:
    unbroken, whole = drain(trial(payload(SETTINGS, digits), context(tmp_path / "whole")))
    job = trial(payload(SETTINGS, digits), context(tmp_path / "attempt-1", tick=stop_after(call)))
    seen: list[Epoch] = []
    with pytest.raises(Stopped):
        seen.extend(job)  # keeps what came before
    assert len(seen) == (call - 1) // BATCHES
    epochs, result = drain(trial(payload(SETTINGS, digits), context(tmp_path / "attempt-2", tmp_path / "attempt-1")))
    assert epochs[: len(seen)] == seen  # replayed as they were, clock and all
    assert losses(epochs) == losses(unbroken)
    assert result["value"] == whole["value"]
    weights = "weights.safetensors"
    assert result["files"][weights] == whole["files"][weights]
    assert not list((tmp_path).glob("attempt-*/checkpoint-*"))


def test_a_trial_that_is_paused_twice_is_bitwise_unbroken(digits: Splits, tmp_path: Path) -> None:
    unbroken, whole = drain(trial(payload(SETTINGS, digits), context(tmp_path / "whole")))
    folders: list[Path] = []
    for until in (1, 3, 3, None):  # the second 3: nothing was received of the attempt before
        folders.insert(0, tmp_path / f"attempt-{len(folders) + 1}")
        epochs, result = drain(trial(payload(SETTINGS, digits, until=until), context(*folders)))
        assert [epoch.index for epoch in epochs] == list(range(1, (until or 4) + 1))
        if until is not None:
            assert result == {PAUSED: until}
            assert [path.name[:15] for path in tmp_path.glob("attempt-*/*")] == [f"checkpoint-{until:04}"]
    assert losses(epochs) == losses(unbroken)
    assert result["value"] == whole["value"]
    assert result["files"]["weights.safetensors"] == whole["files"]["weights.safetensors"]
    assert not list((tmp_path).glob("attempt-*/checkpoint-*"))


def test_a_job_that_is_let_go_between_epochs_leaves_a_checkpoint(digits: Splits, tmp_path: Path) -> None:
    """A worker hears of a stop after it has sent an epoch, and drops the generator."""
    job = trial(payload(SETTINGS, digits), context(tmp_path / "attempt-1"))
    next(job)
    first = next(job)
    job.close()
    epochs, _ = drain(trial(payload(SETTINGS, digits), context(tmp_path / "attempt-2", tmp_path / "attempt-1")))
    assert epochs[1] == first


def test_a_killed_attempt_goes_on_from_its_last_checkpoint(digits: Splits, tmp_path: Path) -> None:
    """`checkpoint_seconds` = 0 writes after each epoch, before the epoch is told to anyone."""
    job = trial(payload(SETTINGS, digits, checkpoint_seconds=0.0), context(tmp_path / "attempt-1"))
    before = [next(job), next(job), next(job)]
    names = sorted(path.name[:15] for path in (tmp_path / "attempt-1").glob("checkpoint-*"))
    assert names == ["checkpoint-0002", "checkpoint-0003"]
    resumed = trial(payload(SETTINGS, digits), context(tmp_path / "attempt-2", tmp_path / "attempt-1"))
    assert [next(resumed), next(resumed), next(resumed)] == before
    assert next(resumed).index == 4


def test_a_trial_begun_under_another_numerics_records_both(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("searchfm.learn.train.NUMERICS", 1)
        job = trial(payload(SETTINGS, digits, checkpoint_seconds=0.0), context(tmp_path / "attempt-1"))
        next(job), next(job)
        job.close()
    _, both = drain(trial(payload(SETTINGS, digits), context(tmp_path / "attempt-2", tmp_path / "attempt-1")))
    _, new = drain(trial(payload(SETTINGS, digits), context(tmp_path / "attempt-3")))
    assert (both["numerics"], new["numerics"]) == ([1, NUMERICS], [NUMERICS])


def test_checkpoints_keep_their_distance(digits: Splits, tmp_path: Path) -> None:
    job = trial(payload(SETTINGS, digits), context(tmp_path))
    next(job), next(job)
    assert not list(tmp_path.glob("checkpoint-*"))
    job.close()


def test_another_trial_s_checkpoint_is_not_taken(digits: Splits, tmp_path: Path) -> None:
    job = trial(payload(SETTINGS, digits, checkpoint_seconds=0.0), context(tmp_path / "attempt-1"))
    one = next(job)
    other = payload(SETTINGS, digits, identity="a-study-uuid/8")
    fresh = next(trial(other, context(tmp_path / "attempt-2", tmp_path / "attempt-1")))
    assert fresh.time > one.time
    assert losses([fresh]) == losses([one])  # the same config and seed, trained anew


def test_changed_data_are_refused(digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits.*changed since the study began"):
        drain(trial(payload(SETTINGS, digits, fingerprint="0" * 64), context(tmp_path)))


def test_divergence_ends_a_trial_with_its_reason(digits: Splits, tmp_path: Path) -> None:
    wild = config(optimizer={"name": "sgd", "lr": 1e30}, train={"epochs": 3})
    with pytest.raises(DivergedError, match="in epoch 1"):
        drain(trial(payload(wild, digits), context(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_loads_its_data_once_and_keeps_few(digits: Splits, tmp_path: Path) -> None:
    entries._data.cache_clear()
    table = config(train={"epochs": 1}).to_table()
    loads = []
    for size in (0, 0, 4, 6, 10, 6, 10, 4):
        table["data"]["size"] = size
        drain(trial(payload(Config.from_table(table), digits), context(tmp_path)))
        loads.append(entries._data.cache_info().misses)
    assert loads == [1, 1, 2, 3, 4, 4, 4, 5]
    assert entries._data.cache_info().currsize == 2


HUNGRY = """
import resource, sys
import torch
from pathlib import Path
from searchfm.jobs import Context
from searchfm.records import Epoch
from searchfm.learn.entries import trial
import json
torch.set_num_threads(1)
large, small = map(json.loads, sys.argv[1:3])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
folder = Path(sys.argv[3])
try:
    list(trial(large, Context(folder / "1", (), "cpu", lambda: None)))
except Exception as error:
    print(type(error).__name__, error)
print("epochs:", len(list(trial(small, Context(folder / "2", (), "cpu", lambda: None)))))
"""


@pytest.mark.slow
def test_the_error_begins_with_out_of_memory_and_the_next_trial_is_trained(digits: Splits, tmp_path: Path) -> None:
    """In a process of its own, which the kernel grants 300 MB more: the second layer alone wants 4 GB."""
    large = config(settings={"layers": 2, "width": 32_000}, train={"epochs": 1})
    load(large.data)  # into the cache: whoever makes it imports scikit-learn, which needs memory too
    texts = [json.dumps(payload(each, digits)) for each in (large, config(train={"epochs": 2}))]
    command = [sys.executable, "-c", HUNGRY, *texts, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    error, epochs = ended.stdout.splitlines()
    assert error.startswith(f"{WorldError.__name__} out of memory on cpu: "), ended.stdout + ended.stderr
    assert epochs == "epochs: 2"


def test_a_device_is_named(digits: Splits, tmp_path: Path) -> None:
    _, result = drain(trial(payload(config(train={"epochs": 1}), digits), context(tmp_path)))
    assert result["device"].startswith("cpu (")
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]


# --- the final model: all training data, then the test part, once ----------------------------------------------------


FINAL = config("cnn", {"filters": 8, "batch_norm": True}, train={"epochs": 3, "ema": 0.9})


def final_payload(digits: Splits, settings: Config = FINAL, **changes: Any) -> dict[str, Any]:
    table = settings.to_table()
    return {
        "config": {**table, "data": {**table["data"], "subset": 0.2}},
        "data_dir": None,
        "fingerprint": digits.fingerprint,
        "identity": "a-study-uuid/7/final",
        "threads": 2,
        "checkpoint_seconds": 1000.0,
    } | changes


@pytest.fixture(scope="module")
def fitted(digits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.set_num_threads(1)  # as everywhere here, but a module's fixture comes first
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "entries-cache"))
        folder = tmp_path_factory.mktemp("fitted")
        epochs, result = drain(fit(final_payload(digits), context(folder)))
    assert [(epoch.index, epoch.val_accuracy) for epoch in epochs] == [(1, None), (2, None), (3, None)]
    return folder, dict(result)


def test_training_takes_all_training_and_validation_images(digits: Splits, fitted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = fitted
    assert result["value"] is None
    full = load_full(FINAL.data)
    assert len(full.train) > len(digits.train) > 0
    _, spec = load_classifier(folder)
    assert spec["mean"] == pytest.approx(full.mean.tolist(), abs=1e-6), "the moments of all of them"
    assert set(result["files"]) == {"weights.safetensors", "model.json", "example.npy"}
    example = np.load(folder / "example.npy")
    assert (example.dtype, example.shape) == (np.uint8, (2, 1, 8, 8))
    assert np.array_equal(example, full.train.images[:2].numpy())


@pytest.mark.slow
def test_a_final_training_goes_on_from_its_checkpoint(
    digits: Splits, fitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first, second = tmp_path / "attempt-1", tmp_path / "attempt-2"
    steps = -(-len(load_full(FINAL.data).train) // 64)
    job = fit(final_payload(digits), context(first, tick=stop_after(2 * steps + 3)))
    with pytest.raises(Stopped):
        drain(job)
    epochs, result = drain(fit(final_payload(digits), context(second, first)))
    assert len(epochs) == 3
    assert result["files"]["weights.safetensors"] == fitted[1]["files"]["weights.safetensors"]


def test_the_test_part_is_answered_as_sklearn_counts(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = fitted
    asked = {"model": str(folder), "files": result["files"], "data_dir": None}
    epochs, tested = drain(entries.test(asked, context(tmp_path)))
    assert epochs == []
    part = load_test(FINAL.data)
    with np.load(tmp_path / "predictions.npz") as file:
        labels, answers = file["labels"], file["probabilities"].argmax(1)
        assert np.array_equal(file["indices"], part.indices.numpy())
    assert np.array_equal(labels, part.labels.numpy())
    assert tested["accuracy"] == accuracy_score(labels, answers) == tested["correct"] / tested["n"]
    assert tested["n"] == len(part)
    assert tested["fingerprint"] == part.fingerprint
    rows = tested["per_class"]
    assert [row["name"] for row in rows] == [str(digit) for digit in range(10)]
    assert [row["n"] for row in rows] == np.bincount(labels).tolist()
    assert [row["precision"] for row in rows] == pytest.approx(
        precision_score(labels, answers, average=None, zero_division=0).tolist()
    )
    assert [row["recall"] for row in rows] == pytest.approx(recall_score(labels, answers, average=None).tolist())


def test_what_was_trained_is_what_is_tested(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = fitted
    (tmp_path / "model.json").write_bytes((folder / "model.json").read_bytes())
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(weights)
    files = {name: sha for name, sha in result["files"].items() if name != "example.npy"}
    asked = {"model": str(tmp_path), "files": files, "data_dir": None}
    with pytest.raises(ModelError, match=r"weights\.safetensors: damaged"):
        drain(entries.test(asked, context(tmp_path / "test")))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        drain(entries.test(asked, context(tmp_path / "test")))


def test_data_that_changed_are_refused(digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data changed since the study began"):
        drain(fit(final_payload(digits, fingerprint="0" * 64), context(tmp_path)))


def test_what_is_served_takes_raw_images_and_answers_probabilities(fitted: tuple[Path, dict[str, Any]]) -> None:
    model, spec = load_classifier(fitted[0])
    images = load_full(FINAL.data).train.images[:50]
    with torch.no_grad():
        answers, logits = served(model)(images), model(images)
    assert answers.shape == (50, len(spec["classes"]))
    assert torch.equal(answers, logits.softmax(1))
