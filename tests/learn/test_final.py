"""The entries of the final model, as a worker calls them: all training data, then the test part, once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_score, recall_score
from test_trial import context, stop_after

from searchfm.config import Config
from searchfm.errors import DataError, ModelError, Stopped
from searchfm.learn import final
from searchfm.learn.checkpoint import load_classifier
from searchfm.learn.data import Splits, load_full, load_test
from tests.learn.toys import config, drain

SETTINGS = config("cnn", {"filters": 8, "batch_norm": True}, train={"epochs": 3, "ema": 0.9})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "final-cache"))


def payload(digits: Splits, settings: Config = SETTINGS, **changes: Any) -> dict[str, Any]:
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
        patch.setenv("SEARCHFM_CACHE", str(tmp_path_factory.getbasetemp() / "final-cache"))
        folder = tmp_path_factory.mktemp("fitted")
        epochs, result = drain(final.fit(payload(digits), context(folder)))
    assert [(epoch.index, epoch.val_accuracy) for epoch in epochs] == [(1, None), (2, None), (3, None)]
    return folder, dict(result)


def test_training_takes_all_training_and_validation_images(digits: Splits, fitted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = fitted
    assert result["value"] is None
    full = load_full(SETTINGS.data)
    assert len(full.train) > len(digits.train) > 0
    _, spec = load_classifier(folder)
    assert spec["mean"] == pytest.approx(full.mean.tolist(), abs=1e-6), "the moments of all of them"
    assert set(result["files"]) == {"weights.safetensors", "model.json", "example.npy"}
    example = np.load(folder / "example.npy")
    assert (example.dtype, example.shape) == (np.uint8, (2, 1, 8, 8))
    assert np.array_equal(example, full.train.images[:2].numpy())


def test_a_final_training_goes_on_from_its_checkpoint(
    digits: Splits, fitted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first, second = tmp_path / "attempt-1", tmp_path / "attempt-2"
    steps = -(-len(load_full(SETTINGS.data).train) // 64)
    job = final.fit(payload(digits), context(first, tick=stop_after(2 * steps + 3)))
    with pytest.raises(Stopped):
        drain(job)
    epochs, result = drain(final.fit(payload(digits), context(second, first)))
    assert len(epochs) == 3
    assert result["files"]["weights.safetensors"] == fitted[1]["files"]["weights.safetensors"]


def test_the_test_part_is_answered_as_sklearn_counts(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = fitted
    asked = {"model": str(folder), "files": result["files"], "data_dir": None}
    epochs, tested = drain(final.test(asked, context(tmp_path)))
    assert epochs == []
    part = load_test(SETTINGS.data)
    with np.load(tmp_path / "predictions.npz") as file:
        labels, answers = file["labels"], file["probabilities"].argmax(1)
        assert np.array_equal(file["indices"], part.indices.numpy())
    assert np.array_equal(labels, part.labels.numpy())
    assert tested["accuracy"] == accuracy_score(labels, answers) == tested["right"] / tested["n"]
    assert tested["n"] == len(part)
    assert tested["fingerprint"] == part.fingerprint
    rows = tested["per_class"]
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
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
        drain(final.test(asked, context(tmp_path / "test")))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        drain(final.test(asked, context(tmp_path / "test")))


def test_data_that_changed_are_refused(digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data changed since the study began"):
        drain(final.fit(payload(digits, fingerprint="0" * 64), context(tmp_path)))


def test_what_is_served_takes_raw_images_and_answers_probabilities(fitted: tuple[Path, dict[str, Any]]) -> None:
    model, spec = final.served(fitted[0])
    images = load_full(SETTINGS.data).train.images[:50]
    with torch.no_grad():
        answers, logits = model(images), load_classifier(fitted[0])[0](images)
    assert answers.shape == (50, len(spec["classes"]))
    assert torch.equal(answers, logits.softmax(1))
