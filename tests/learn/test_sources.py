"""User data as .npz and parquet files, and the size that images of different sizes get."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

from searchfm.config import DataConfig
from searchfm.errors import DataError
from searchfm.learn.data import load, load_full, load_test
from searchfm.learn.datasets import count_test, describe, parsed, side
from searchfm.learn.models.transfer import input_sides
from tests.learn.test_images import content, noise, small, write

COUNT = 400  # digits
RAW = load_digits()
IMAGES = np.round(RAW.images[:COUNT] * (255 / 16)).astype(np.uint8)
LABELS = RAW.target[:COUNT].astype(np.int64)
TRAIN, VAL, TEST = slice(0, 240), slice(240, 300), slice(300, COUNT)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SEARCHFM_CACHE", str(path))
    return path


def of(path: Path, **settings: object) -> DataConfig:
    return DataConfig(name=str(path), **settings)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def rows(path: Path, part: slice, *, names: list[str] | None = None, column: str = "image", flat: bool = False) -> Path:
    """Writes digits as Hugging Face does; `flat`: bytes alone, without the description of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [png(image) for image in IMAGES[part]]
    images = pa.array(encoded if flat else [{"bytes": each, "path": "x.png"} for each in encoded])
    table = pa.table({column: images, "id": pa.array(["x"] * len(encoded)), "label": LABELS[part]})
    features = {column: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)
    return path


def keras(folder: Path) -> Path:
    return npz(
        folder / "keras.npz", x_train=IMAGES[:300], y_train=LABELS[:300], x_test=IMAGES[TEST], y_test=LABELS[TEST]
    )


def medmnist(folder: Path) -> Path:
    arrays: dict[str, Any] = {}
    for name, part in {"train": TRAIN, "val": VAL, "test": TEST}.items():
        arrays |= {f"{name}_images": IMAGES[part][..., None].repeat(3, 3), f"{name}_labels": LABELS[part][:, None]}
    return npz(folder / "medmnist.npz", **arrays)


def hugging_face(folder: Path) -> Path:
    root, names = folder / "hf", [str(digit) for digit in range(10)]
    rows(root / "data" / "train-00000-of-00002.parquet", slice(0, 100), names=names)
    rows(root / "data" / "train-00001-of-00002.parquet", slice(100, 240), names=names)
    rows(root / "data" / "validation-00000-of-00001.parquet", VAL, names=names)
    rows(root / "data" / "test-00000-of-00001.parquet", TEST, names=names)
    return root


def flat(folder: Path) -> Path:
    rows(folder / "flat" / "train.parquet", slice(0, 300), flat=True, column="img")
    return rows(folder / "flat" / "test.parquet", TEST, flat=True, column="img").parent


def plain(images: Any, labels: Any) -> Counter[tuple[bytes, int]]:
    return content(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels))


@pytest.mark.parametrize(
    ("make", "validation"), [(keras, False), (medmnist, True), (hugging_face, True), (flat, False)]
)
def test_every_form_holds_the_same_images_and_parts(
    make: Callable[[Path], Path], validation: bool, tmp_path: Path
) -> None:
    path = make(tmp_path)
    splits, full, test = load(of(path)), load_full(of(path)), load_test(of(path))
    assert splits.classes == tuple("0123456789")
    assert splits.val is not None
    assert len(splits.train) + len(splits.val) == len(full.train) == 300
    if validation:
        assert content(splits.val.images, splits.val.labels) == plain(IMAGES[VAL], LABELS[VAL])
    assert content(full.train.images, full.train.labels) == plain(IMAGES[:300], LABELS[:300])
    assert content(test.images, test.labels) == plain(IMAGES[TEST], LABELS[TEST])
    assert count_test(of(path)) == describe(str(path)).test == 100
    assert load_full(of(path, size=12)).train.images.shape == (300, 1, 12, 12)
    assert load(of(path, size=12)).fingerprint == splits.fingerprint


def test_one_array_of_images_is_divided_as_a_folder_is(tmp_path: Path) -> None:
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    path = npz(tmp_path / "digits.npz", images=IMAGES, labels=LABELS, classes=names)
    root = tmp_path / "folder"
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        write(root / str(label) / f"{i:03}.png", image)
    for read in (load_full, load_test):
        own, reference = (read(of(each)) for each in (path, root))
        pair = [getattr(data, "train", data) for data in (own, reference)]
        assert content(pair[0].images, pair[0].labels) == content(pair[1].images, pair[1].labels)
    assert load(of(path)).classes == tuple(names)
    assert count_test(of(path)) == len(load_test(of(path)))


def test_labels_may_be_texts(tmp_path: Path) -> None:
    texts = np.where(LABELS < 5, "low", "high")
    splits = load(of(npz(tmp_path / "texts.npz", images=IMAGES, labels=texts)))
    assert splits.classes == ("high", "low")
    assert splits.train.labels.bincount().min() > 50


def test_training_reads_no_array_and_no_row_of_the_test_part(tmp_path: Path) -> None:
    path, root = keras(tmp_path), hugging_face(tmp_path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("x_test.npy").header_offset
    whole = bytearray(path.read_bytes())
    whole[place + 1000] ^= 255  # in the pixels
    path.write_bytes(whole)
    test = root / "data" / "test-00000-of-00001.parquet"
    whole = bytearray(test.read_bytes())
    whole[4:2000] = bytes(1996)  # the footer stays
    test.write_bytes(whole)
    for each in (path, root):
        assert count_test(of(each)) == 100
        assert len(load_full(of(each)).train) == 300
        with pytest.raises(DataError, match="cannot be read"):
            load_test(of(each))


def test_a_file_that_changed_is_read_again(tmp_path: Path, cache: Path) -> None:
    path = npz(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    first = load(of(path))
    written = list(cache.rglob("*.safetensors"))
    assert load(of(path, subset=0.5)).fingerprint == first.fingerprint
    assert list(cache.rglob("*.safetensors")) == written
    npz(path, images=IMAGES[:-1], labels=LABELS[:-1])
    assert load(of(path)).fingerprint != first.fingerprint
    after = list(cache.rglob("*.safetensors"))
    assert len(after) == 1, "of the earlier state nothing is kept"
    assert after != written


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"images": IMAGES}, "has images, but no labels to it; has arrays images"),
    "names": ({"a": IMAGES, "b": LABELS}, "has arrays a, b: must have images and labels, x_train and y_train, or "),
    "type": ({"images": IMAGES / 255, "labels": LABELS}, "images is (400, 8, 8) float64: must be (images, height, wid"),
    "shape": ({"images": IMAGES[:, None], "labels": LABELS}, "images is (400, 1, 8, 8) uint8: must be (images, heigh"),
    "rows": ({"images": IMAGES, "labels": LABELS[:-1]}, "labels has 399 rows, images 400"),
    "matrix": ({"images": IMAGES, "labels": np.eye(400)}, "labels is (400, 400) float64: must be (images,) whole num"),
    "negative": ({"images": IMAGES, "labels": LABELS - 1}, "label -1 of row 0: must be 0 to 8"),
    "high": (
        {"images": IMAGES, "labels": LABELS, "classes": np.array(["a", "b"])},
        "labels: label 2 of row 2: must be 0 to 1",
    ),
    "huge": ({"images": IMAGES, "labels": LABELS + 10**9}, "label 1000000009 of 400 images: must be 0, 1, ... for"),
    "objects": ({"images": IMAGES, "labels": np.array([None] * 400)}, "labels cannot be read: Object arrays cannot be"),
    "one class": ({"images": IMAGES, "labels": LABELS * 0}, "has 1 classes (0): must have two or more"),
    "names' type": (
        {"images": IMAGES, "labels": LABELS, "classes": np.eye(3)},
        "classes is (3, 3) float64: must be (",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_arrays_that_are_no_data_set_are_one_line(case: str, tmp_path: Path, cache: Path) -> None:
    arrays, message = BROKEN[case]
    path = npz(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError) as caught:
        load(of(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.safetensors"))


def test_files_that_are_damaged_or_incomplete_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: cannot be read: File is not a zip file"):
        load(of(path))
    root = hugging_face(tmp_path)
    (root / "data" / "train-00001-of-00002.parquet").rename(root / "elsewhere.parquet")
    with pytest.raises(DataError, match=r"data: has 1 files of 2, train-00000-of-00002\.parquet and others"):
        load(of(root))
    (root / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: .*cannot be read: "):
        load(of(root))


def table(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    parquet.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def test_rows_that_are_no_data_set_are_one_line(tmp_path: Path) -> None:
    pictures = [png(image) for image in IMAGES[:20]]
    labels = LABELS[:20]
    with pytest.raises(DataError, match="has columns label, x: none of them holds images"):
        load(of(table(tmp_path / "a", label=labels, x=labels)))
    with pytest.raises(DataError, match="has columns image, x: none of them holds labels"):
        load(of(table(tmp_path / "b", image=pictures, x=labels / 2)))
    damaged = [*pictures[:7], b"rubbish", *pictures[8:19], None]
    with pytest.raises(DataError) as caught:
        load(of(table(tmp_path / "c", image=damaged, label=labels)))
    message = "2 images cannot be read as images: {0} row 7 (not an image of a known format); {0} row 19 (has no bytes)"
    assert str(caught.value) == message.format(tmp_path / "c")
    with pytest.raises(DataError, match="label of row 19 is missing"):
        load(of(table(tmp_path / "d", image=pictures, label=[*labels[:19].tolist(), None])))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "own", "expected"),
    [
        ((40, 40, 40), (), 0),
        ((224, 224), (160,), 0),
        ((225, 225), (), 224),
        ((225, 225), (160,), 160),
        ((50, 50, 51), (), 48),
        ((9, 10, 11), (), 16),
        ((60, 61, 90), (), 64),
        ((1000, 2000, 3000), (), 224),
        ((60, 61, 90), (224, 160), 160),
    ],
)
def test_images_of_different_or_large_sizes_get_the_models_size_or_their_median(
    sides: tuple[int, ...], own: tuple[int, ...], expected: int, tmp_path: Path
) -> None:
    for number, length in enumerate(sides):
        for name in ("cat", "dog"):
            write(tmp_path / "pets" / name / f"{number}.png", np.zeros((length, length), np.uint8))
    assert side(of(tmp_path / "pets"), own) == expected


def test_large_images_of_one_size_that_were_read_as_they_are_get_a_size_too(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", side=240)
    assert parsed(of(root), "train").shape[1:] == (240, 240)
    assert side(of(root)) == 224


def test_the_sizes_of_a_test_part_of_its_own_are_not_looked_at(tmp_path: Path) -> None:
    root = small(tmp_path / "pets", parts=("train", "val", "test"), side=20)
    write(root / "test" / "cat" / "0.png", noise(0, 90, 90))
    assert side(of(root)) == 0
    write(root / "val" / "cat" / "0.png", noise(0, 90, 90))
    assert side(of(root)) == 16
    assert side(DataConfig(name="digits")) == 0


def test_a_turned_photograph_has_the_sides_that_it_is_shown_with(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        write(tmp_path / name / "0.png", noise(0, 30, 20))
        write(tmp_path / name / "1.jpg", noise(1, 20, 30), exif=exif)
    assert side(of(tmp_path)) == 0


def test_timm_knows_the_input_sizes_of_its_models() -> None:
    assert input_sides(["resnet18", "vit_tiny_patch16_384", "nothing", "hf-hub:a/b"]) == [224, 384]
