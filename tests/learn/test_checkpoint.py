"""What is on disk is whole, its owner's, and holds no code; what is not is refused, and the one before it serves."""

import errno
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from searchfm.errors import ModelError, StorageError
from searchfm.home import write_whole
from searchfm.learn import checkpoint
from searchfm.learn.checkpoint import Checkpoint
from searchfm.learn.data import Splits
from searchfm.learn.train import Training
from searchfm.records import NUMERICS, SPEC, WEIGHTS
from tests.learn.test_models import Hostile
from tests.learn.toys import config, losses

OWNER = {"trial": "study/7", "config": "c" * 64, "data": "d" * 64}


@pytest.fixture(scope="module")
def kept(digits: Splits) -> list[Checkpoint]:
    """After one, two and three epochs."""
    training = Training(config(train={"epochs": 3, "ema": 0.9}), digits)
    return [training.checkpoint() for _ in training]


def flip(path: Path, index: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def test_round_trip_is_bitwise(tmp_path: Path, kept: list[Checkpoint]) -> None:
    path = checkpoint.write(tmp_path, kept[1], OWNER)
    again = checkpoint.read(path, OWNER)
    assert again.epochs == kept[1].epochs
    assert again.tensors.keys() == kept[1].tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in kept[1].tensors.items())


def test_a_checkpoint_records_its_numerics_and_an_older_one_has_the_first(
    tmp_path: Path, kept: list[Checkpoint]
) -> None:
    path = checkpoint.write(tmp_path, kept[0], OWNER)
    assert checkpoint.read(path, OWNER).numerics == (NUMERICS,)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[checkpoint.METADATA])
    del about["numerics"]
    content = safetensors.torch.save(dict(kept[0].tensors), {checkpoint.METADATA: json.dumps(about)})
    older = tmp_path / f"checkpoint-0001-{hashlib.sha256(content).hexdigest()}.safetensors"
    older.write_bytes(content)
    assert checkpoint.read(older, OWNER).numerics == (1,)


def test_training_goes_on_bitwise_from_disk(tmp_path: Path, digits: Splits) -> None:
    settings = config(
        "cnn",
        {"filters": 8, "dropout": 0.2, "batch_norm": True},
        optimizer={"name": "sgd", "lr": 0.05},
        augment={"flip": 0.5, "mixup": 0.4},
        train={"epochs": 4, "ema": 0.9},
    )
    begun = Training(settings, digits)
    next(begun), next(begun)
    path = checkpoint.write(tmp_path, begun.checkpoint(), OWNER)
    resumed = Training(settings, digits, resume=checkpoint.read(path, OWNER))
    list(resumed)
    assert losses(resumed.epochs) == losses(list(Training(settings, digits)))


def test_two_are_kept_and_the_newest_is_read(tmp_path: Path, kept: list[Checkpoint]) -> None:
    for each in kept:
        checkpoint.write(tmp_path, each, OWNER)
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["0002", "0003"]
    newest = checkpoint.newest([tmp_path, tmp_path / "never"], OWNER)
    assert newest is not None
    assert newest.epochs == kept[2].epochs


def test_the_newest_of_several_attempts_is_read(tmp_path: Path, kept: list[Checkpoint]) -> None:
    checkpoint.write(tmp_path / "attempt-2", kept[0], OWNER)
    checkpoint.write(tmp_path / "attempt-1", kept[1], OWNER)
    newest = checkpoint.newest([tmp_path / "attempt-2", tmp_path / "attempt-1"], OWNER)
    assert newest is not None
    assert len(newest.epochs) == 2


@pytest.mark.parametrize("damage", ["flip", "flip-header", "cut", "empty"])
def test_a_damaged_one_is_refused_and_the_one_before_serves(
    tmp_path: Path, kept: list[Checkpoint], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.write(tmp_path, kept[0], OWNER)
    path = checkpoint.write(tmp_path, kept[1], OWNER)
    match damage:
        case "flip":
            flip(path)
            safetensors.torch.load_file(path)  # which is why there is a hash
        case "flip-header":
            flip(path, 40)
        case "cut":
            path.write_bytes(path.read_bytes()[:5000])
        case "empty":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(path, OWNER)
    with caplog.at_level(logging.WARNING, "searchfm"):
        newest = checkpoint.newest([tmp_path], OWNER)
    assert newest is not None
    assert len(newest.epochs) == 1
    assert "damaged" in caplog.text


def test_with_nothing_whole_training_starts_afresh(tmp_path: Path, kept: list[Checkpoint]) -> None:
    flip(checkpoint.write(tmp_path, kept[0], OWNER))
    (tmp_path / f"checkpoint-0009-{'0' * 64}.safetensors").mkdir()
    assert checkpoint.newest([tmp_path], OWNER) is None


@pytest.mark.parametrize("key", OWNER)
def test_another_s_is_refused(tmp_path: Path, kept: list[Checkpoint], key: str) -> None:
    path = checkpoint.write(tmp_path, kept[0], OWNER)
    other = OWNER | {key: "another"}
    with pytest.raises(ValueError, match=f"belongs to {key} {OWNER[key]}, not another"):
        checkpoint.read(path, other)
    assert checkpoint.newest([tmp_path], other) is None


def test_a_whole_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    import hashlib

    content = safetensors.torch.save({"a": torch.zeros(2)})
    path = tmp_path / f"checkpoint-0001-{hashlib.sha256(content).hexdigest()}.safetensors"
    path.write_bytes(content)
    with pytest.raises(checkpoint.UNREADABLE):
        checkpoint.read(path, OWNER)
    with pytest.raises(ValueError, match="not the name"):
        checkpoint.read(tmp_path / "checkpoint.safetensors", OWNER)


def test_a_hostile_pickle_runs_no_code(tmp_path: Path, kept: list[Checkpoint]) -> None:
    """Even one that brings the right hash in its name: nothing here unpickles."""
    import hashlib
    import pickle

    mark = tmp_path / "ran"
    content = pickle.dumps(Hostile(mark))
    folder = tmp_path / "folder"
    checkpoint.write(folder, kept[0], OWNER)
    (folder / f"checkpoint-0002-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    newest = checkpoint.newest([folder], OWNER)
    assert newest is not None
    assert len(newest.epochs) == 1
    (folder / WEIGHTS).write_bytes(content)
    (folder / SPEC).write_text("{}")
    with pytest.raises(ModelError):
        checkpoint.load_classifier(folder)
    assert not mark.exists()


@contextmanager
def full_disk() -> Iterator[None]:
    """The kernel's own refusal: no file of this process may grow beyond a few kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, kept: list[Checkpoint]) -> None:
    checkpoint.write(tmp_path, kept[0], OWNER)
    with full_disk(), pytest.raises(StorageError, match=os.strerror(errno.EFBIG)):
        checkpoint.write(tmp_path, kept[1], OWNER)
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file either
    newest = checkpoint.newest([tmp_path], OWNER)
    assert newest is not None
    assert len(newest.epochs) == 1


KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from searchfm.home import write_whole
folder = Path(sys.argv[1])
write_whole(folder / "a", b"old")
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # at the worst moment: written, not yet renamed
write_whole(folder / "a", b"new" * 100_000)
"""


def test_a_process_killed_while_writing_leaves_the_old_file_and_the_next_write_no_other(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(tmp_path / "a", b"next")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, kept: list[Checkpoint]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        checkpoint.write(tmp_path / "file", kept[0], OWNER)


def test_remove_takes_checkpoints_only(tmp_path: Path, kept: list[Checkpoint]) -> None:
    checkpoint.write(tmp_path, kept[0], OWNER)
    (tmp_path / "log.txt").write_text("")
    checkpoint.remove([tmp_path, tmp_path / "never"])
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


# --- weights for people -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, digits: Splits) -> Path:
    training = Training(config("cnn", {"filters": 8, "batch_norm": True}, train={"epochs": 1, "ema": 0.5}), digits)
    next(training)
    spec = {"config": training.config.to_table(), "classes": list(digits.classes), "shape": [1, 8, 8]}
    hashes = checkpoint.save_weights(tmp_path / "model", training.classifier, spec)
    assert hashes.keys() == {WEIGHTS, SPEC}
    return tmp_path / "model"


def test_weights_on_a_full_disk_leave_the_ones_before(saved: Path, digits: Splits) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert len(before[WEIGHTS]) > 4096
    other = Training(config("cnn", {"filters": 8, "batch_norm": True}, train={"seed": 8}), digits).classifier
    with full_disk(), pytest.raises(StorageError, match=f"{WEIGHTS}: cannot be written: .*File too large") as caught:
        checkpoint.save_weights(saved, other, {})
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_weights_answer_as_the_trained_model_did(saved: Path, digits: Splits) -> None:
    training = Training(config("cnn", {"filters": 8, "batch_norm": True}, train={"epochs": 1, "ema": 0.5}), digits)
    next(training)
    assert digits.val is not None
    model, spec = checkpoint.load_classifier(saved)
    torch.testing.assert_close(model(digits.val.images), training.classifier.eval()(digits.val.images))
    assert spec["classes"] == list(digits.classes)
    assert spec["mean"] == pytest.approx(digits.mean.tolist())


def test_pretrained_weights_need_not_be_fetched_again(tmp_path: Path, digits: Splits) -> None:
    training = Training(config("transfer", {"model": "test_resnet", "weights": "none"}, train={"epochs": 1}), digits)
    table = training.config.to_table()
    table["model"]["transfer"]["weights"] = "hub"
    spec = {"config": table, "classes": list(digits.classes), "shape": [1, 8, 8]}
    checkpoint.save_weights(tmp_path, training.classifier, spec)
    model, _ = checkpoint.load_classifier(tmp_path)
    assert digits.val is not None
    trained = training.classifier.eval().to(memory_format=torch.contiguous_format)  # as a model that was loaded
    assert torch.equal(model(digits.val.images), trained(digits.val.images))


def test_models_that_are_none_are_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    def refused(folder: Path, text: str) -> None:
        with pytest.raises(ModelError, match=text) as caught:
            checkpoint.load_classifier(folder)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nothing", "no model here")
    spec = json.loads((saved / SPEC).read_text())
    for number, change in enumerate([{"config": {"modle": {}}}, {"classes": ["one"]}, {"shape": [1, 8]}]):
        folder = shutil.copytree(saved, tmp_path / str(number))
        (folder / SPEC).write_text(json.dumps(spec | change))
        refused(folder, "not a model of this version")
    (saved / WEIGHTS).write_bytes(b"not tensors")
    refused(saved, "not a model of this version")
