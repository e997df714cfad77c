"""Folders of user images."""

import hashlib
import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn.data import load, load_full, load_test
from searchfm.learn.datasets import describe

Pixels = np.ndarray


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SEARCHFM_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All digits as DIGIT/NUMBER.png."""
    root, source = tmp_path_factory.mktemp("digits"), load_digits()
    for number, (image, label) in enumerate(zip(source.images, source.target, strict=True)):
        write(root / str(label) / f"{number:04}.png", np.round(image * 255 / 16).astype(np.uint8))
    return root


def write(path: Path, pixels: Pixels, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(seed: int, *shape: int) -> Pixels:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def small(root: Path, *, parts: tuple[str, ...] = ("train",), count: int = 6, side: int = 5) -> Path:
    """PART/{cat,dog}/0.png ..., grey noise, each image another."""
    for p, part in enumerate(parts):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                write(root / part / name / f"{i}.png", noise(100 * p + 10 * c + i, side, side))
    return root


def of(root: Path, **settings: object) -> DataConfig:
    return DataConfig(name=str(root), **settings)


def content(images: Tensor, labels: Tensor) -> Counter[tuple[bytes, int]]:
    pairs = zip(images, labels.tolist(), strict=True)
    return Counter((hashlib.sha256(image.numpy().tobytes()).digest(), label) for image, label in pairs)


@pytest.mark.slow
def test_digits_as_a_folder_are_digits(digits_folder: Path) -> None:
    for settings in ({}, {"size": 12}):
        named, own = DataConfig(name="digits", **settings), of(digits_folder, **settings)
        own_data, named_data = load_full(own), load_full(named)
        assert own_data.classes == named_data.classes
        assert content(own_data.train.images, own_data.train.labels) == content(
            named_data.train.images, named_data.train.labels
        )
        torch.testing.assert_close((own_data.mean, own_data.std), (named_data.mean, named_data.std))
        test, reference = load_test(own), load_test(named)
        assert content(test.images, test.labels) == content(reference.images, reference.labels)
    splits = load(of(digits_folder, subset=0.5))
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (600, 212)


def test_a_folder_is_read_once(digits_folder: Path, tmp_path: Path, cache: Path) -> None:
    root = shutil.copytree(digits_folder, tmp_path / "mine")
    first = load(of(root))
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(written) == 1  # and no test part
    assert load(of(root, seed=1, subset=0.2)).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == written
    # Another image, other data: read again, and what it stands in for is thrown away.
    write(root / "3" / "new.png", noise(0, 8, 8))
    assert load(of(root)).fingerprint != first.fingerprint
    after = list(cache.rglob("*.safetensors"))
    assert len(after) == 1
    assert after[0] not in written


def test_own_parts_are_used_as_they_are(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", parts=("train", "val", "test"))
    splits = load(of(root, validation=0.5))
    assert splits.classes == ("cat", "dog")
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (12, 12)
    assert splits.train.images.shape == (12, 1, 5, 5)
    for part, name, first in ((splits.train, "train", 0), (splits.val, "val", 12)):
        expected = [np.asarray(Image.open(path)) for path in sorted(root.glob(f"{name}/*/*.png"))]
        assert part.images[:, 0].numpy().tolist() == np.stack(expected).tolist()
        assert part.labels.tolist() == [0] * 6 + [1] * 6
        assert part.indices.tolist() == list(range(first, first + 12))
    full = load_full(of(root))
    assert torch.equal(full.train.images, torch.cat([splits.train.images, splits.val.images]))
    assert torch.equal(full.train.indices, torch.arange(24))
    assert full.fingerprint == splits.fingerprint
    test = load_test(of(root))
    assert len(test) == 12
    assert not content(test.images, test.labels) & content(full.train.images, full.train.labels)
    half = load(of(root, subset=0.5))
    assert half.val is not None
    assert (len(half.train), len(half.val), half.fingerprint) == (6, 12, splits.fingerprint)
    described = describe(str(root))
    assert (described.classes, described.train, described.test, described.location) == (2, 12, 12, root.resolve())


def test_training_never_opens_the_test_folder(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", parts=("train", "test"))
    (root / "test" / "cat" / "0.png").write_bytes(b"rubbish")
    assert len(load_full(of(root)).train) == 12
    load(of(root))
    with pytest.raises(DataError, match=r"1 file cannot be read as images: .*test/cat/0.png"):
        load_test(of(root))


def test_a_test_part_is_carved_where_there_is_none(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", parts=("train", "val"), count=40)
    training, test = load(of(root)), load_test(of(root))
    assert training.val is not None
    assert len(training.val) == 80  # its own, whole
    assert len(training.train) + len(test) == 80
    assert 4 <= len(test) <= 30
    assert describe(str(root)).test is None
    # More images move no earlier one.
    before = content(test.images, test.labels)
    small(root, parts=("train",), count=60)
    assert before <= content(load_test(of(root)).images, load_test(of(root)).labels)


def grey(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels)


MODES: dict[str, Callable[[Pixels], Image.Image]] = {
    "L.png": grey,
    "RGB.png": lambda pixels: grey(pixels).convert("RGB"),
    "RGBA.png": lambda pixels: grey(pixels).convert("RGBA"),
    "LA.png": lambda pixels: grey(pixels).convert("LA"),
    "P.gif": lambda pixels: grey(pixels).convert("P"),
    "I16.png": lambda pixels: Image.fromarray(pixels.astype(np.uint16) * 257),
    "BMP.bmp": grey,
    "TIFF.TIF": grey,
    "WEBP.webp": lambda pixels: grey(pixels).convert("RGB"),
    "PGM.pgm": grey,
}


def test_grey_images_are_grey_whatever_their_mode(tmp_path: Path) -> None:
    pixels = noise(0, 9, 7)
    for name, convert in MODES.items():
        for label in ("a", "b"):
            (tmp_path / "train" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "test" / label).mkdir(parents=True, exist_ok=True)
            convert(pixels).save(tmp_path / "train" / label / name, lossless=True)
    splits = load_full(of(tmp_path))
    assert splits.train.images.shape == (20, 1, 9, 7)
    assert (splits.train.images == torch.from_numpy(pixels)).all()


def test_one_coloured_image_makes_all_of_them_coloured(tmp_path: Path) -> None:
    root = small(tmp_path, parts=("train", "val", "test"), side=4)
    colours = noise(1, 4, 4, 3)
    write(root / "train" / "cat" / "0.png", colours)
    full, test = load_full(of(root)), load_test(of(root))
    assert full.train.images.shape == (24, 3, 4, 4)
    assert torch.equal(full.train.images[0], torch.from_numpy(colours).permute(2, 0, 1))
    assert torch.equal(full.train.images[1, 0], full.train.images[1, 2])
    assert test.images.shape == (12, 3, 4, 4)  # grey themselves
    assert full.mean.shape == full.std.shape == (3,)


def test_coloured_test_images_become_grey_if_training_was(tmp_path: Path) -> None:
    root = small(tmp_path, parts=("train", "test"), side=4)
    colours = noise(1, 4, 4, 3)
    write(root / "test" / "cat" / "0.png", colours)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    assert torch.equal(load_test(of(root)).images[0, 0], torch.from_numpy(expected.copy()))


def test_photographs_stand_upright(tmp_path: Path) -> None:
    root = small(tmp_path, parts=("train", "test"), side=6)
    turned = Image.fromarray(np.tile(np.arange(0, 240, 40, dtype=np.uint8), (6, 1)))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    turned.save(root / "train" / "cat" / "0.png", exif=exif)
    upright = load_full(of(root)).train.images[0, 0]
    assert upright[:, 0].tolist() == list(range(0, 240, 40))


def test_sizes_must_agree_or_be_set(tmp_path: Path) -> None:
    root = small(tmp_path, parts=("train", "test"))
    write(root / "train" / "dog" / "wide.jpg", noise(0, 11, 30))
    with pytest.raises(DataError, match=r"images differ in size \(.*0.png 5x5, .*wide.jpg 11x30\): set data.size"):
        load(of(root))
    assert load_full(of(root, size=8)).train.images.shape == (13, 1, 8, 8)


def test_images_of_val_have_the_size_of_those_of_train(tmp_path: Path) -> None:
    root = small(tmp_path, parts=("train",))
    for name in ("cat", "dog"):
        write(root / "val" / name / "0.png", noise(1, 7, 7))
    with pytest.raises(DataError, match=r"val: images are \d+x\d+, those of .*train \d+x\d+: set data.size"):
        load(of(root))
    assert load(of(root, size=8)).val.images.shape == (2, 1, 8, 8)


def test_unreadable_files_are_named_in_one_error(tmp_path: Path, cache: Path) -> None:
    root = small(tmp_path)
    whole = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(whole, "png")
    for i, damage in enumerate((b"", b"no image", whole.getvalue()[:200], whole.getvalue()[:-400], b"GIF89a")):
        (root / "train" / "cat" / f"bad{i}.png").write_bytes(damage)
    (root / "train" / "cat" / "gone.png").symlink_to(root / "train" / "nothing.png")
    with pytest.raises(DataError) as caught:
        load(of(root))
    message = str(caught.value)
    assert message.startswith("6 files cannot be read as images: ")
    assert message.endswith("; and 3 more")
    assert [f"bad{i}.png" in message for i in range(5)] == [True] * 3 + [False] * 2
    assert "\n" not in message
    assert not list(cache.rglob("*.safetensors"))


def test_hidden_files_and_ways_out_are_left_alone(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", parts=("train", "test"))
    elsewhere = write(tmp_path / "elsewhere" / "x.png", noise(99, 5, 5))
    cats = root / "train" / "cat"
    (cats / "out.png").symlink_to(elsewhere)
    (root / "train" / "outside").symlink_to(elsewhere.parent)
    (cats / "up").symlink_to(root / "train" / "..")  # round in circles
    (cats / ".hidden.png").write_bytes(b"rubbish")
    (cats / "notes.txt").write_text("rubbish")
    (root / "train" / ".git").mkdir()
    (cats / "inside.png").symlink_to(root / "train" / "dog" / "0.png")
    write(cats / "more" / "deeper.PNG", noise(98, 5, 5))
    splits = load_full(of(root))
    assert splits.classes == ("cat", "dog")
    assert splits.train.labels.bincount().tolist() == [6 + 2, 6]


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has 0 folders of images .*: must have one for each of two classes or more"):
        load(of(tmp_path / "empty"))
    write(tmp_path / "one" / "cat" / "0.png", noise(0, 5, 5))
    with pytest.raises(DataError, match=r"has 1 folders of images \(cat\)"):
        load(of(tmp_path / "one"))
    hollow = small(tmp_path / "hollow")
    (hollow / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=r"train/eel: holds no image; may hold .bmp, "):
        load(of(hollow))
    strange = small(tmp_path / "strange", parts=("train", "val"))
    write(strange / "val" / "eel" / "0.png", noise(0, 5, 5))
    with pytest.raises(DataError, match=r"val/eel: must be one of the classes of .*train: cat, dog"):
        load(of(strange))
    tiny = small(tmp_path / "tiny", parts=("train", "test"), count=1)
    with pytest.raises(DataError, match='class "cat" has 1 images to train and validate on: must have at least 2'):
        load(of(tiny))
    assert len(load_full(of(tiny)).train) == 2


def test_a_carved_test_part_without_images_is_refused(tmp_path: Path) -> None:
    root = small(tmp_path, count=1)
    with pytest.raises(DataError, match="too few images, none of 2 falls into the test part"):
        load_test(of(root))
