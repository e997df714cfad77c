"""Data sets as their makers wrote them, read into arrays and checked: digits, idx files, CIFAR's archives. No torch."""

import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from searchfm.errors import DataError
from searchfm.learn.splits import Labels, Pixels, fingerprint, is_test

PartName = Literal["train", "val", "test"]

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# Checksums of the files when unpacked, for copies differ in how they are packed: Debian's Fashion-MNIST is the mirror's
# to the bit but for gzip's header (tried: with name and time put back, its MD5 is the published one).
IDX = {
    "fashion-mnist": {  # sha256
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {  # MD5
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
}


@dataclass(frozen=True)
class Arrays:
    """One part of a data set."""

    images: Pixels  # (N, C, H, W)
    labels: Labels  # (N,)
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of pixels (at their own size), labels and class names


def arrays(images: Pixels, labels: Labels, classes: Sequence[str], prints: Sequence[bytes] | None = None) -> Arrays:
    """Arrays with their fingerprint; `prints` are the images' own where they are known already."""
    digest = hashlib.sha256(b"".join(fingerprint(image) for image in images) if prints is None else b"".join(prints))
    digest.update(labels.astype("<i8").tobytes() + "\0".join(classes).encode())
    return Arrays(images, labels, tuple(classes), digest.hexdigest())


def resized(image: Pixels, size: int | tuple[int, int]) -> Pixels:
    """An image (C, H, W) as (C, size, size), or at another height and width: bilinear, and antialiased where it
    shrinks. 0 leaves it.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not size or image.shape[1:] == (height, width):
        return image
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


# --- digits -----------------------------------------------------------------------------------------------------------


def read_digits(part: PartName) -> Arrays:
    """scikit-learn's digits (Alpaydin & Kaynak 1998): 8x8 pixels of 0 to 16, here 0 to 255; its test part is carved."""
    from sklearn.datasets import load_digits  # seconds, and once only

    raw = load_digits()
    images = np.round(raw.images[:, None] * (255 / 16)).astype(np.uint8)
    mine = [i for i, image in enumerate(images) if is_test(fingerprint(image)) == (part == "test")]
    return arrays(images[mine], raw.target[mine].astype(np.int64), [str(name) for name in raw.target_names])


# --- idx files: MNIST and Fashion-MNIST -------------------------------------------------------------------------------


def read_idx(place: Path, part: PartName, name: str) -> Arrays:
    """Reads a part of `name` (a key of IDX) from a folder of idx files, packed with gzip or not.

    Raises DataError for files that are missing or damaged.
    """
    stem = "train" if part == "train" else "t10k"
    images = _idx(place, f"{stem}-images-idx3-ubyte", name)
    labels = _idx(place, f"{stem}-labels-idx1-ubyte", name)
    classes = FASHION_CLASSES if name == "fashion-mnist" else [str(digit) for digit in range(10)]
    return arrays(images[:, None], labels.astype(np.int64), classes)


def _idx(place: Path, stem: str, name: str) -> Pixels:
    packed, plain = place / f"{stem}.gz", place / stem
    path = packed if packed.is_file() else plain
    try:
        data = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    check(path, data, IDX[name][stem])
    # Header (http://yann.lecun.com/exdb/mnist/): 0, 0, 8 for unsigned bytes, how many dimensions, then each as 4 bytes.
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).astype(np.int64)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def check(path: Path, data: bytes, expected: str) -> None:
    """Raises DataError if the MD5 or sha256 of what a file holds is not `expected`."""
    method = "md5" if len(expected) == 32 else "sha256"
    if (found := hashlib.new(method, data, usedforsecurity=False).hexdigest()) != expected:
        raise DataError(f"{path} is damaged: its content has {method} {found}, must have {expected}")


# --- CIFAR ------------------------------------------------------------------------------------------------------------


class CifarSource(Protocol):
    """What torchvision's class knows of such a data set."""

    base_folder: str
    url: str
    filename: str
    tgz_md5: str
    train_list: Sequence[Sequence[str]]  # file name, md5
    test_list: Sequence[Sequence[str]]
    meta: dict[str, str]


class _ArraysOnly(pickle.Unpickler):
    """Admits what CIFAR's pickles hold, NumPy arrays in plain containers, so that a hostile file runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # the published files are older than NumPy 2
        if (module, name) not in (("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


def read_cifar(place: Path, part: PartName, source: CifarSource) -> Arrays:
    """Reads a part from CIFAR's archive (`place` is a file), checked as a whole, or from its unpacked folder, checked
    file by file. Raises DataError for what is missing, damaged, or not CIFAR.
    """
    try:
        if place.is_dir():
            return _cifar(lambda name, checksum: _checked(place / name, checksum), part, source)
        raw = place.read_bytes()
        check(place, raw, source.tgz_md5)
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            return _cifar(lambda name, _: _member(archive, f"{source.base_folder}/{name}"), part, source)
    except (OSError, EOFError, tarfile.TarError, pickle.UnpicklingError, LookupError, ValueError, TypeError) as error:
        raise DataError(f"{place} cannot be read: {error}") from None


def _cifar(read: Callable[[str, str], bytes], part: PartName, source: CifarSource) -> Arrays:
    meta = _unpickle(read(source.meta["filename"], source.meta["md5"]))
    classes = [str(name) for name in meta[source.meta["key"]]]
    entries = [_unpickle(read(*item)) for item in (source.train_list if part == "train" else source.test_list)]
    images = np.concatenate([np.asarray(entry["data"], dtype=np.uint8) for entry in entries]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(entry.get("labels", entry.get("fine_labels"))) for entry in entries])
    if labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"{len(images)} images, but labels {labels.shape} of {len(classes)} classes")
    return arrays(images, labels.astype(np.int64), classes)


def _unpickle(data: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    return loaded


def _checked(path: Path, checksum: str) -> bytes:
    data = path.read_bytes()
    check(path, data, checksum)
    return data


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    return file.read()
