"""A search leaves the test part unread, whatever the data: whoever opened it here would hang, fail or leave a trace."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.home import Home
from searchfm.learn.data import load_test
from tests.commands import Done, searchfm_here

pytestmark = pytest.mark.usefixtures("own_forkserver")


def fashion(folder_path: Path, files: Path) -> tuple[str, ...]:
    """Fashion-MNIST in its own format; its test files are pipes without a writer: to open one is to wait for ever."""
    raw = folder_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (raw / name).symlink_to(files / name)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        os.mkfifo(raw / name)
    return "--dataset", "fashion-mnist", "--data-dir", str(folder_path), "--subset", "0.02"


def digits(folder_path: Path, _: Path) -> tuple[str, ...]:
    """One file for all: which images are for testing, their content says."""
    return "--dataset", "digits"


def folder(folder_path: Path, _: Path | None = None) -> tuple[str, ...]:
    """User images; those for testing cannot be read."""
    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images[:400], labels[:400], strict=True)):
        path = folder_path / "train" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(path)
    for label in range(10):
        (folder_path / "test" / str(label)).mkdir(parents=True)
        (folder_path / "test" / str(label) / "poison.png").write_bytes(b"\x89PNG, but not really")
    return "--dataset", str(folder_path)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, so that they share a forkserver."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache: Path) -> Path:
    """The cache, empty."""
    shutil.rmtree(shared_cache, ignore_errors=True)
    return shared_cache


def searchfm(home: Home, cache: Path, *options: str) -> Done:
    return searchfm_here(*options, "--home", str(home.path), SEARCHFM_CACHE=str(cache))


def parts(cache: Path) -> set[str]:
    """The parts of data sets that have been read."""
    return {path.name.partition("-")[0] for path in cache.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("data", [fashion, digits, folder])
def test_no_search_reads_the_test_part(
    data: Callable[[Path, Path], tuple[str, ...]],
    fashion_mnist: Path,
    new_home: Callable[[Path], Home],
    cache: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if data is not fashion:
        request.getfixturevalue("unfollowed")  # one search with the process that follows into MLflow suffices
    home = new_home(tmp_path / "home")
    (tmp_path / "data").mkdir()
    options = data(tmp_path / "data", fashion_mnist)
    asked = ("--trials", "3", "--epochs", "1", "--json", "--workers", "2")
    done = searchfm(home, cache, "tune", "mlp", *options, *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"]["complete"] == 3
    assert parts(cache) == {"train"}


@pytest.mark.slow
@pytest.mark.usefixtures("unfollowed")
def test_the_poison_works_and_only_the_last_step_meets_it(
    new_home: Callable[[Path], Home], cache: Path, tmp_path: Path
) -> None:
    """Finalists and final training leave the test part alone too; what reads it is named, and has been counted."""
    home = new_home(tmp_path / "home")
    (tmp_path / "data").mkdir()
    options = folder(tmp_path / "data")
    searchfm(home, cache, "tune", "mlp", *options, "--trials", "2", "--epochs", "1", "--json")
    done = searchfm(home, cache, "retrain", "mlp", "--top", "1", "--seeds", "2", "--json")
    assert done.returncode == 2
    assert "poison.png" in done.stderr.splitlines()[-1]
    lines = done.stderr.splitlines()
    assert any(line.startswith("final training") and "done" in line for line in lines)
    (reads,) = json.loads((home.path / "test-reads.json").read_text())["reads"].values()
    assert len(reads) == 1
    assert not (home.study("mlp") / "final").exists()


def test_the_test_part_of_digits_leaves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path))
    load_test(DataConfig(name="digits"))
    assert parts(tmp_path) == {"test"}


def test_the_test_part_of_a_poisoned_folder_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    folder(tmp_path / "data")
    with pytest.raises(DataError, match=r"poison\.png"):
        load_test(DataConfig(name=str(tmp_path / "data")))
