"""Parts, splits, batches and the cache, on Fashion-MNIST and scikit-learn's digits."""

import gzip
import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import FashionMNIST

from searchfm.config import DATASETS, DataConfig
from searchfm.errors import DataError
from searchfm.learn import datasets
from searchfm.learn.data import Part, batches, load, load_full, load_test, moments, split
from searchfm.learn.images import TEST_FRACTION
from searchfm.tables import show

DIGITS = DataConfig(name="digits")
FASHION = DataConfig(name="fashion-mnist")


@pytest.fixture(scope="module")
def parsed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(parsed_once: Path, fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHFM_CACHE", str(parsed_once))
    monkeypatch.setenv("SEARCHFM_DATA", str(fashion_mnist))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prints(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


def raw(folder: Path, name: str) -> bytes:
    return gzip.decompress((folder / f"{name}.gz").read_bytes())


def test_fashion_mnist_is_what_its_makers_published(fashion_mnist: Path) -> None:
    full, test = load_full(FASHION), load_test(FASHION)
    assert full.val is None
    assert full.classes == tuple(FashionMNIST.classes)
    for part, stem in ((full.train, "train"), (test, "t10k")):
        assert part.images.numpy().tobytes() == raw(fashion_mnist, f"{stem}-images-idx3-ubyte")[16:]
        assert part.labels.numpy().astype(np.uint8).tobytes() == raw(fashion_mnist, f"{stem}-labels-idx1-ubyte")[8:]
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == part.indices.dtype == torch.int64
    assert full.train.images.shape == (60000, *DATASETS["fashion-mnist"][0])
    assert len(test) == 10000
    assert full.fingerprint == full.train.fingerprint != test.fingerprint
    # The figures everybody normalises Fashion-MNIST with.
    assert full.mean.tolist() == pytest.approx([0.2860], abs=1e-4)
    assert full.std.tolist() == pytest.approx([0.3530], abs=1e-4)


def test_validation_is_the_same_fraction_of_every_class_and_apart_from_training() -> None:
    splits, full = load(FASHION), load_full(FASHION)
    assert splits.val is not None
    assert splits.val.labels.bincount().tolist() == [900] * 10
    assert splits.train.labels.bincount().tolist() == [5100] * 10
    both = torch.cat([splits.train.indices, splits.val.indices])
    assert torch.equal(both.sort().values, torch.arange(60000))
    for part in (splits.train, splits.val):
        assert torch.equal(part.images, full.train.images[part.indices])
        assert torch.equal(part.labels, full.train.labels[part.indices])
    scaled = splits.train.images.double() / 255
    assert splits.mean.tolist() == pytest.approx([scaled.mean().item()], rel=1e-6)
    assert splits.std.tolist() == pytest.approx([scaled.std(correction=0).item()], rel=1e-6)
    assert splits.fingerprint == full.fingerprint


def test_subsets_lie_within_each_other_and_leave_validation_alone() -> None:
    whole = load(FASHION)
    inner: set[int] = set()
    for fraction in (0.001, 0.05, 0.6):
        some = load(DataConfig(subset=fraction))
        assert len(some.train) == round(51000 * fraction)
        counts = some.train.labels.bincount()
        assert counts.max() - counts.min() <= 1
        assert some.val is not None
        assert whole.val is not None
        assert torch.equal(some.val.indices, whole.val.indices)
        assert inner < set(some.train.indices.tolist()) < set(whole.train.indices.tolist())
        inner = set(some.train.indices.tolist())
        assert some.fingerprint == whole.fingerprint


def test_the_data_seed_alone_decides() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = load(DataConfig(name="digits", subset=0.5))
    state = torch.get_rng_state()
    again = load(DataConfig(name="digits", subset=0.5))
    assert torch.equal(torch.get_rng_state(), state)
    other = load(DataConfig(name="digits", subset=0.5, seed=2**40))  # any whole number is a seed
    assert first.val is not None
    assert again.val is not None
    assert other.val is not None
    assert torch.equal(first.train.indices, again.train.indices)
    assert torch.equal(first.val.indices, again.val.indices)
    assert not torch.equal(first.train.indices, other.train.indices)
    assert not torch.equal(first.val.indices, other.val.indices)


def test_splits_never_move() -> None:
    # Golden: a study is resumed, and a trial replayed, with the split it began with.
    splits = load(DataConfig(name="digits", subset=0.5))
    assert splits.val is not None
    indices = torch.cat([splits.train.indices, splits.val.indices]).numpy().astype("<i8")
    assert hashlib.sha256(indices.tobytes()).hexdigest()[:16] == "c1c16b29e0b991ec"
    assert splits.fingerprint[:16] == "34f7e45f7dbb0c67"
    assert load_test(DIGITS).fingerprint[:16] == "0c12bbe71cdd6220"


def test_largest_remainders_make_the_shares_exact() -> None:
    labels = np.repeat([0, 1, 2], [7, 12, 31])
    for fraction in (0.05, 0.15, 0.5, 0.9):
        train, held = split(labels, ("a", "b", "c"), DataConfig(validation=fraction))
        assert len(held) == max(3, round(50 * fraction))
        assert sorted([*train, *held]) == list(range(50))
        for label, count in enumerate((7, 12, 31)):
            assert abs((labels[held] == label).sum() - count * fraction) < 1
            assert 1 <= (labels[held] == label).sum() < count


def test_a_class_too_small_to_be_split_is_named() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    with pytest.raises(DataError, match='class "b" has 1 images to train and validate on: must have at least 2'):
        split(labels, ("a", "b", "c"), DIGITS)
    train, held = split(np.append(labels, [1, 1]), ("a", "b", "c"), DataConfig(subset=0.1), own=2)
    assert held.tolist() == [6, 7]
    assert sorted(labels[train]) == [0, 1, 2]  # one of each at least
    with pytest.raises(DataError, match='class "d" has 0 images to train on: must have at least 1'):
        split(np.append(labels, 3), ("a", "b", "c", "d"), DIGITS, own=1)


def test_digits_test_part_is_carved_by_content_and_nothing_moves_it() -> None:
    test, full = load_test(DIGITS), load_full(DIGITS)
    source = load_digits()
    assert len(test) + len(full.train) == len(source.images) == 1797
    assert datasets.ABOUT["digits"][:2] == (len(full.train), len(test))
    assert len(test) / 1797 == pytest.approx(TEST_FRACTION, abs=0.03)
    assert not set(prints(test.images)) & set(prints(full.train.images))
    together = Counter(prints(test.images) + prints(full.train.images))
    expected = np.round(source.images * 255 / 16).astype(np.uint8)
    assert together == Counter(prints(torch.from_numpy(expected)[:, None]))
    assert test.labels.bincount().min() > 20
    moved = load_test(DataConfig(name="digits", seed=5, validation=0.4, subset=0.1))
    assert torch.equal(moved.images, test.images)


def test_training_data_never_need_the_test_part(fashion_mnist: Path, empty_cache: Path, tmp_path: Path) -> None:
    # A Fashion-MNIST whose test files are rubbish: training never notices, testing does and looks further.
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in fashion_mnist.iterdir():
        (folder / path.name).write_bytes(b"rubbish" if path.name.startswith("t10k") else path.read_bytes())
    assert len(load_full(FASHION, data_dir=folder).train) == 60000
    load(FASHION, data_dir=folder)
    assert [path.name for path in empty_cache.rglob("*.safetensors")] == ["train-0.safetensors"]


def test_a_damaged_copy_is_passed_over_aloud(
    fashion_mnist: Path,
    empty_cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "mine" / "FashionMNIST" / "raw"  # as torchvision keeps it, unpacked
    folder.mkdir(parents=True)
    for stem in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        (folder / stem).write_bytes(raw(fashion_mnist, stem))
    labels = bytearray(raw(fashion_mnist, "t10k-labels-idx1-ubyte"))
    labels[100] ^= 1
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.setenv("SEARCHFM_DATA", str(tmp_path / "mine"))
    (empty_cache / "data" / "files").mkdir(parents=True)
    (empty_cache / "data" / "files" / "fashion-mnist").symlink_to(fashion_mnist)
    assert datasets.describe("fashion-mnist").location == folder
    assert len(load(FASHION).train) == 51000
    assert not caplog.messages
    assert torch.equal(load_test(FASHION).labels, torch.tensor(list(raw(fashion_mnist, "t10k-labels-idx1-ubyte")[8:])))
    assert len(caplog.messages) == 1
    assert "t10k-labels-idx1-ubyte is damaged" in caplog.messages[0]


def test_batches_are_the_part_in_order_or_as_ordered() -> None:
    part = load_test(DIGITS)
    plain = list(batches(part, 100))
    assert [len(labels) for _, labels in plain] == [100, 100, 100, 84]
    assert torch.equal(torch.cat([images for images, _ in plain]), part.images)
    assert torch.equal(torch.cat([labels for _, labels in plain]), part.labels)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:250]
    mixed = list(batches(part, 100, order))
    assert [len(labels) for _, labels in mixed] == [100, 100, 50]
    assert torch.equal(torch.cat([images for images, _ in mixed]), part.images[order])
    assert torch.equal(torch.cat([labels for _, labels in mixed]), part.labels[order])


def test_batches_stream_to_the_device_that_wants_them() -> None:
    part = load_test(DIGITS)
    elsewhere = Part(part.images, part.labels, part.indices, torch.device("meta"))
    for images, labels in batches(elsewhere, 100, torch.arange(150)):
        assert images.device.type == labels.device.type == "meta"
        assert images.dtype == torch.uint8


def test_moments_are_exact_per_channel() -> None:
    images = torch.randint(0, 256, (50, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = moments(images)
    scaled = images.double() / 255
    torch.testing.assert_close(mean, scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(std[:2], scaled.std((0, 2, 3), correction=0).float()[:2])
    assert std[2].item() == pytest.approx(1 / 255)  # one may divide by it


@pytest.mark.parametrize("size", [4, 13, 16])
def test_images_are_resized_once_as_torch_would(size: int) -> None:
    own, other = load_full(DIGITS).train, load_full(DataConfig(name="digits", size=size))
    assert other.train.images.shape == (len(own), 1, size, size)
    reference = F.interpolate(own.images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    assert (other.train.images.float() - reference).abs().max() <= 1  # PIL rounds rows and columns apart
    assert torch.equal(other.train.labels, own.labels)
    assert other.fingerprint == own.fingerprint  # the same data still


def test_the_own_size_is_no_resizing() -> None:
    assert datasets.parsed(DataConfig(name="digits", size=8), "train") == datasets.parsed(DIGITS, "train")


@pytest.mark.parametrize("config", [DIGITS, DataConfig(subset=0.01, seed=3)], ids=["digits", "fashion-mnist"])
def test_images_have_the_shape_that_is_known_before_reading(config: DataConfig) -> None:
    assert load(config).train.images.shape[1:] == DATASETS[config.name][0]


@pytest.mark.slow
def test_reading_imports_no_torch(parsed_once: Path) -> None:
    code = (
        "import sys; from searchfm.config import DataConfig; from searchfm.learn import datasets; "
        "[datasets.parsed(DataConfig(name=name), 'train') for name in ('digits', 'fashion-mnist')]; "
        "[datasets.describe(name) for name in ('digits', 'fashion-mnist', 'cifar100')]; "
        "print({'torch', 'torchvision'} & set(sys.modules))"
    )
    shutil.rmtree(parsed_once / "data", ignore_errors=True)  # from nothing
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_cache_cut_off_is_made_again(empty_cache: Path) -> None:
    whole = load(DIGITS)
    path = datasets.parsed(DIGITS, "train").path
    path.write_bytes(path.read_bytes()[:5000])
    (path.parent / f".{path.name}.0123abcd").write_bytes(b"left by a process that was killed")
    assert torch.equal(load(DIGITS).train.images, whole.train.images)
    assert list(path.parent.iterdir()) == [path]


def test_many_at_once_make_one_cache(empty_cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        prints = list(pool.map(lambda _: load(DIGITS).fingerprint, range(8)))
    assert len(set(prints)) == 1
    (folder,) = (empty_cache / "data").glob("parsed-*/digits")
    assert [path.name for path in folder.iterdir()] == ["train-0.safetensors"]


@pytest.mark.parametrize("name", ["fashionmnist", "no/such/folder", "", "a\nb", "~nobody-at-all/x", "x" * 300])
def test_unknown_data_are_refused_in_one_line(name: str, empty_cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(DataConfig(name=name))
    assert str(caught.value) == (
        f"data.name = {show(name)}: must be one of fashion-mnist, mnist, digits, cifar10, cifar100, "
        "an existing folder of images (CLASS/*.png) or of parquet files (train-*.parquet), or an .npz file"
        + ("; did you mean fashion-mnist?" if name == "fashionmnist" else "")
    )
    assert not empty_cache.exists()


def test_a_data_folder_that_is_not_there_is_refused(empty_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: must be an existing folder"):
        load(FASHION, data_dir=tmp_path / "nowhere")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SEARCHFM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/data: Not a directory; SEARCHFM_CACHE may name another folder"):
        load(DIGITS)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_file(empty_cache: Path) -> None:
    # The largest file this process may write is smaller than the parsed digits.
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
        "from searchfm.config import DataConfig; from searchfm.learn import datasets; "
        "datasets.parsed(DataConfig(name='digits'), 'train')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SEARCHFM_CACHE may name another folder" in done.stderr.splitlines()[-1]
    assert "searchfm.errors.DataError" in done.stderr.splitlines()[-1]
    assert not list(empty_cache.rglob("*safetensors*"))


def test_descriptions_agree_with_what_is_read(fashion_mnist: Path) -> None:
    for name, (shape, classes) in DATASETS.items():
        described = datasets.describe(name)
        assert (described.name, described.shape, described.classes) == (name, shape, classes)
    assert datasets.describe("fashion-mnist").location == fashion_mnist
    digits = datasets.describe("digits").location
    assert digits is not None
    assert digits.is_file()
    assert datasets.describe("cifar100").location is None
    assert datasets.fetch("fashion-mnist") == fashion_mnist
