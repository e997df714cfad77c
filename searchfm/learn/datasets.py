"""Data sets: located, downloaded, read and kept parsed in the cache. No torch, but for torchvision's list of mirrors.

A data set by name is searched in this order: the folder that the user names (`data_dir`, or SEARCHFM_DATA), our cache
(SEARCHFM_CACHE, or the user's own), Debian's folder, the data set's mirrors (or SEARCHFM_MIRROR/NAME/ instead), a
Debian package. The first whose content has the known checksum is used.

By hand, because torchvision (0.28) demands the test files to read the training part, and all files unpacked; unpickles
another read of a file than it checked; and downloads without a timeout.
"""

import gzip
import hashlib
import io
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from searchfm.config import DATASETS, DataConfig, Shape, unknown_data
from searchfm.errors import DataError, StorageError
from searchfm.home import cache_folder, data_folder, write_whole
from searchfm.inputs import read_bytes
from searchfm.learn.images import Arrays, PartName, Pixels, image_hash, is_test, resized
from searchfm.learn.sources import LARGEST, Source, common_side, open_source, read_part
from searchfm.tables import show

log = logging.getLogger(__name__)
T = TypeVar("T")

LARGEST_FILE = 200_000_000  # bytes: the files of no data set by name have more
FORMAT = 1  # of parsed files; those of another format are left alone
TIMEOUT = 5.0  # seconds for a connection, and for each answer on it
APT_TIMEOUT = 300.0  # seconds for each of apt's commands

DEBIAN_FOLDER, DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist"
# torchvision's class, which has mirrors and checksums, and the folder and archive in which it keeps the files.
TORCHVISION = {
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", ""),
    "mnist": ("MNIST", "MNIST/raw", ""),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
}
ABOUT = {  # images for training and validation, images for testing, origin
    "fashion-mnist": (60000, 10000, "Xiao et al. 2017, arXiv 1708.07747"),
    "mnist": (60000, 10000, "LeCun, Cortes & Burges 1998"),
    "digits": (1413, 384, "Alpaydin & Kaynak 1998, with scikit-learn; the test part is carved out by content"),
    "cifar10": (50000, 10000, "Krizhevsky 2009"),
    "cifar100": (50000, 10000, "Krizhevsky 2009"),
}
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
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
class Described:
    """A data set as `searchfm data` lists it, without reading or downloading it."""

    name: str
    shape: Shape | None  # channels, height, width; None for user data, whose images are not opened
    classes: int
    train: int  # images, including those for validation
    test: int | None  # None where the test part will be carved out of `train`
    origin: str
    location: Path | None  # on this machine


@dataclass(frozen=True)
class Parsed:
    """One part of a data set in the cache: a safetensors file with `images` (N, C, H, W) uint8 and `labels` (N,) int64.

    Each part has a file of its own, so that training never opens the test part.
    """

    path: Path
    shape: Shape  # channels, height, width, after `config.size`
    classes: tuple[str, ...]
    fingerprint: str  # as in `Arrays`
    images: int  # N
    validation: int  # as in `Arrays`
    sides: tuple[int, int]  # shortest and longest side of the images before resizing


def describe(name: str, data_dir: Path | None = None) -> Described:
    """A data set by name or path. Raises DataError for neither."""
    root = path_of(name)
    if root is not None:
        train = open_source(root, "train")
        test = None if train.carved else len(open_source(root, "test"))
        return Described(str(root), None, len(train.classes), len(train), test, train.kind, root)
    location = next((each for each in _locations(name, data_dir) if _complete(name, each)), None)
    (shape, classes), (train_images, test_images, origin) = DATASETS[name], ABOUT[name]
    return Described(name, shape, classes, train_images, test_images, origin, location)


def fetch(name: str, data_dir: Path | None = None) -> Path:
    """Downloads a data set unless it is on this machine, and returns its location. Existing files are checked only when
    they are read. Raises DataError that names every location tried.
    """
    return path_of(name) or _obtain(name, data_dir, lambda location: location)


def training_images(config: DataConfig, indices: Sequence[int], fingerprint: str, data_dir: Path | None) -> Pixels:
    """Training and validation images (N, C, H, W) by `data.Part.indices`; never test images.

    fingerprint: of the data of the indices. Raises DataError for data that have changed since, or cannot be read.
    """
    part = parsed(config, "train", data_dir)
    if part.fingerprint != fingerprint:
        raise DataError(f"data.name = {show(config.name)}: the data have changed since the study began")
    with safe_open(part.path, "np") as opened:
        images = opened.get_slice("images")
        return np.stack([images[i] for i in indices])


def picture_file(name: str) -> Path:
    """Where the picture of a data set's samples is kept unless the user names a file."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return cache_dir() / "pictures" / f"{Path(name).stem}-{digest}.png"


def side(config: DataConfig, own: Sequence[int] = ()) -> int:
    """`data.size` for user images that differ in size or are large, as `common_side` gives it; 0 for others.

    own: input sides of pretrained models. Raises DataError as `parsed` does.
    """
    root = path_of(config.name)
    if root is None:
        return 0
    source = open_source(root, "train")
    kept = _open(_user_path(root, source, 0, None))
    if kept is not None and max(kept.shape[1:]) <= LARGEST:  # such a file holds images of one size
        return 0
    return common_side(source, own)


def count_test(config: DataConfig, data_dir: Path | None = None) -> int:
    """Number of images in the test part, which is not opened: of user data its files or rows are counted, and of one
    that is carved out, the images that training leaves. Raises DataError as `parsed` does.
    """
    root = path_of(config.name)
    if root is None:
        return ABOUT[config.name][1]
    source = open_source(root, "test")
    if not source.carved:
        return len(source)
    train = parsed(config, "train", data_dir)
    return len(source) - (train.images - train.validation)


def parsed(config: DataConfig, part: PartName, data_dir: Path | None = None) -> Parsed:
    """One part at `config.size`. The first call parses it; later ones open the cached file in milliseconds.

    Raises DataError for data that are unknown, unreachable or unreadable.
    """
    root, size = path_of(config.name), config.size
    read: Callable[[], Arrays]
    if root is None:
        size = 0 if DATASETS[config.name][0][1:] == (size, size) else size
        path = cache_dir() / f"parsed-{FORMAT}" / config.name / f"{part}-{size}.safetensors"
        read = partial(read_named, config.name, part, size, data_dir)
    else:
        channels = None if part == "train" else parsed(config, "train").shape[0]  # training decides: grey or colour
        source = open_source(root, part)
        path, read = _user_path(root, source, size, channels), partial(read_part, source, size, channels)
    opened = _open(path)
    if opened is None:
        with lock(path.parent.name):
            opened = _open(path) or _write(path, read(), f"{part}-{size}-*")
    return opened


def _user_path(root: Path, source: Source, size: int, channels: int | None) -> Path:
    """The parsed file of a part of user data; another state of the data, another name."""
    folder = f"folder-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"
    name = f"{source.part}-{size}-{channels or 0}-{source.key()[:32]}.safetensors"
    return cache_dir() / f"parsed-{FORMAT}" / folder / name


def _write(path: Path, arrays: Arrays, replaced: str) -> Parsed:
    """Writes a parsed file; removes those of an earlier state of the folder, and what killed processes left."""
    classes, validation = json.dumps(arrays.classes), str(arrays.validation)
    sides = json.dumps(arrays.sides or _sides(*arrays.images.shape[2:]))
    about = {"classes": classes, "fingerprint": arrays.fingerprint, "validation": validation, "sides": sides}
    write_whole(path, save({"images": np.ascontiguousarray(arrays.images), "labels": arrays.labels}, about))
    for old in {*path.parent.glob(replaced), *path.parent.glob(".*")} - {path}:
        old.unlink(missing_ok=True)  # `clean --cache` may have deleted it
    opened = _open(path)
    assert opened is not None, path
    return opened


def _open(path: Path) -> Parsed | None:
    """A parsed file; None if it is missing or truncated (by a full disk, say)."""
    try:
        with safe_open(path, "np") as opened:
            about = opened.metadata()
            images, channels, height, width = opened.get_slice("images").get_shape()
    except (OSError, SafetensorError):
        return None
    sides = tuple(json.loads(about["sides"])) if "sides" in about else _sides(height, width)  # 0.3 wrote none
    classes, validation = tuple(json.loads(about["classes"])), int(about.get("validation", 0))
    return Parsed(path, (channels, height, width), classes, about["fingerprint"], images, validation, sides)


def _sides(height: int, width: int) -> tuple[int, int]:
    return min(height, width), max(height, width)


# --- data sets by name ------------------------------------------------------------------------------------------------


def path_of(name: str) -> Path | None:
    """The path of user data called `name`; None for a built-in data set. Raises DataError for neither."""
    if name in DATASETS:
        return None
    with suppress(OSError, RuntimeError):  # too long a name; no such user's home
        path = Path(name).expanduser()
        if name and (path.is_dir() or (path.exists() and path.suffix == ".npz")):
            return path.resolve()
    raise DataError(f"data.name {unknown_data(name)}")


def read_named(name: str, part: PartName, size: int = 0, data_dir: Path | None = None) -> Arrays:
    """Reads a part of a built-in data set, which is downloaded where necessary. Raises DataError."""
    if name == "digits":
        arrays = _read_digits(part)
    else:
        read = _read_idx if name in IDX else _read_cifar
        arrays = _obtain(name, data_dir, lambda location: read(location, part, name))
    return replace(arrays, images=np.stack([resized(image, size) for image in arrays.images])) if size else arrays


def _read_digits(part: PartName) -> Arrays:
    """scikit-learn's digits (Alpaydin & Kaynak 1998): 8x8 pixels of 0 to 16, here 0 to 255; its test part is carved."""
    from sklearn.datasets import load_digits  # seconds, and once only

    raw = load_digits()
    images = np.round(raw.images[:, None] * (255 / 16)).astype(np.uint8)
    indices = [i for i, image in enumerate(images) if is_test(image_hash(image)) == (part == "test")]
    return Arrays.of(images[indices], raw.target[indices].astype(np.int64), [str(name) for name in raw.target_names])


def _read_idx(location: Path, part: PartName, name: str) -> Arrays:
    """MNIST or Fashion-MNIST, from a folder of idx files, packed with gzip or not."""
    stem, (channels, height, width) = "train" if part == "train" else "t10k", DATASETS[name][0]
    images, labels = (_idx(location, f"{stem}-{kind}-ubyte", name) for kind in ("images-idx3", "labels-idx1"))
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, channels, height, width)  # 16 and 8: the headers
    classes = CLOTHES if name == "fashion-mnist" else [str(digit) for digit in range(10)]
    return Arrays.of(pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64), classes)


def _idx(location: Path, stem: str, name: str) -> bytes:
    packed = location / f"{stem}.gz"
    path = packed if packed.is_file() else location / stem
    most = 16 + max(ABOUT[name][:2]) * math.prod(DATASETS[name][0])
    try:
        data = read_bytes(path, most)
        if path == packed:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(most + 1)  # one more than the checksum can be of
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return _checked(path, data, IDX[name][stem])


def _read_cifar(location: Path, part: PartName, name: str) -> Arrays:
    """CIFAR-10 or CIFAR-100, from the archive or its unpacked folder. These files are pickles, so nothing of a file is
    unpickled unless it has the published MD5.
    """
    source = _torchvision(name)
    batches = source.train_list if part == "train" else source.test_list
    files = [(source.meta["filename"], source.meta["md5"]), *batches]
    try:
        if location.is_dir():
            contents = [read_bytes(location / file, LARGEST_FILE) for file, _ in files]
        else:
            content = _checked(location, read_bytes(location, LARGEST_FILE), source.tgz_md5)
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = [archive.extractfile(f"{source.base_folder}/{file}") for file, _ in files]
                contents = [member.read() for member in members if member]
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from None
    meta, *parts = [
        pickle.loads(_checked(location / file, content, md5), encoding="latin1")
        for (file, md5), content in zip(files, contents, strict=True)
    ]
    images = np.concatenate([part["data"] for part in parts]).reshape(-1, *DATASETS[name][0])
    labels = np.concatenate([part["labels" if name == "cifar10" else "fine_labels"] for part in parts])
    return Arrays.of(images, labels.astype(np.int64), meta[source.meta["key"]])


def _checked(path: Path | str, content: bytes, expected: str) -> bytes:
    """The content of a file. Raises DataError if its MD5 or sha256 is not `expected`."""
    method = "md5" if len(expected) == 32 else "sha256"
    if (actual := hashlib.new(method, content, usedforsecurity=False).hexdigest()) != expected:
        raise DataError(f"{path} is damaged: its content has {method} {actual}, must have {expected}")
    return content


# --- where the files are, and how they are downloaded -----------------------------------------------------------------


def cache_dir() -> Path:
    """Where data sets are kept."""
    return cache_folder() / "data"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """The lock for writing into the cache. Raises DataError if the cache cannot be written."""
    path = cache_dir() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
    except (OSError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{cache_dir()}: {reason}; SEARCHFM_CACHE may name another folder") from None


def _obtain(name: str, data_dir: Path | None, use: Callable[[Path], T]) -> T:
    """The result of `use` for the first location for which it raises no DataError; downloads are tried last."""
    locations, problems = _locations(name, data_dir), []
    with lock(f"{name}-files"):
        for locate in _sources(name, locations):
            try:
                return use(locate())
            except DataError as error:
                log.warning("%s", error)
                problems.append(str(error))
    searched = ", ".join(map(str, locations))
    raise DataError(f'data.name = "{name}" is not available: not in {searched}; {"; ".join(problems)}')


def _locations(name: str, data_dir: Path | None) -> list[Path]:
    """Possible locations on this machine, in the order of search: folders, files, CIFAR's archive."""
    if name == "digits":
        return [Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))]
    user = data_folder(data_dir)
    if user is not None and not user.is_dir():
        raise DataError(f"data folder {user}: must be an existing folder (--data-dir, SEARCHFM_DATA)")
    _, folder, archive = TORCHVISION[name]
    bases = [*([user, user / name] if user else []), cache_dir() / "files" / name]
    locations = [base / each for base in bases for each in (folder, archive)]
    return [*locations, DEBIAN_FOLDER] if name == "fashion-mnist" else locations


def _complete(name: str, location: Path) -> bool:
    """Whether a location has all files of the data set, by their names."""
    files = [location / stem for stem in IDX.get(name, ())]
    return location.exists() and all(file.exists() or file.with_suffix(".gz").exists() for file in files)


def _sources(name: str, locations: Sequence[Path]) -> Iterator[Callable[[], Path]]:
    """Copies on this machine, then downloads into the cache, to be tried in this order. Callers hold the lock."""
    yield from (partial(Path, location) for location in locations if _complete(name, location))
    source, archive, folder = _torchvision(name), TORCHVISION[name][2], cache_dir() / "files" / name
    files = [(archive, source.tgz_md5)] if archive else source.resources
    mirrors = [source.url.removesuffix(archive)] if archive else source.mirrors
    if own := os.environ.get("SEARCHFM_MIRROR"):
        mirrors = [f"{own.rstrip('/')}/{name}/"]
    for mirror in mirrors:
        yield partial(_download, mirror, files, folder, folder / archive)
    if name == "fashion-mnist":
        yield partial(_debian, folder)


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # seconds, and torch: only for what must be downloaded, or is CIFAR's

    return getattr(datasets, TORCHVISION[name][0])


def _download(mirror: str, files: Sequence[tuple[str, str]], folder: Path, location: Path) -> Path:
    """Downloads files, checked by their MD5 before any is written. Returns `location`. Raises DataError."""
    for name, md5 in files:
        url = mirror + name
        log.info("downloading %s", url)
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "searchfm"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                size = getattr(answer, "length", None)  # None: not stated, or of file://
                content = b"" if size and size > LARGEST_FILE else answer.read(None if size else LARGEST_FILE + 1)
                if max(size or 0, len(content)) > LARGEST_FILE:
                    raise ValueError(f"has more than {LARGEST_FILE:,} bytes")
        except (OSError, HTTPException, ValueError) as error:  # time-outs are OSErrors; ValueError: that is no URL
            raise DataError(f"{url}: {getattr(error, 'reason', '') or error}") from None
        write_whole(folder / name, _checked(url, content, md5))
    return location


def _debian(location: Path) -> Path:
    """Fashion-MNIST's files from its Debian package: apt downloads and checks it, dpkg-deb unpacks it, and neither
    needs root. Where the machine has no package lists, temporary lists are fetched.

    Raises DataError where there is no apt, no network, or no such package.
    """
    log.warning("no mirror responds: trying apt-get download %s", DEBIAN_PACKAGE)
    work = location.parent / ".apt"
    shutil.rmtree(work, ignore_errors=True)  # of a killed process
    lists = ["-o", f"Dir::State::Lists={work}/lists", "-o", f"Dir::Cache={work}", "-o", "Debug::NoLocking=1"]
    run = partial(
        subprocess.run, cwd=work, capture_output=True, text=True, errors="replace", timeout=APT_TIMEOUT, check=True
    )
    try:
        (work / "lists" / "partial").mkdir(parents=True)
        try:
            run(["apt-get", "-qq", "download", DEBIAN_PACKAGE])
        except subprocess.SubprocessError:
            run(["apt-get", *lists, "-qq", "update"])
            run(["apt-get", *lists, "-qq", "download", DEBIAN_PACKAGE])
        for archive in work.glob("*.deb"):
            run(["dpkg-deb", "-x", archive.name, "unpacked"])
        location.mkdir(parents=True, exist_ok=True)
        for stem in IDX["fashion-mnist"]:
            (work / "unpacked" / DEBIAN_FOLDER.relative_to("/") / f"{stem}.gz").replace(location / f"{stem}.gz")
    except (OSError, subprocess.SubprocessError) as error:
        stderr = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        lines = [line for line in stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        raise DataError(f"apt-get download {DEBIAN_PACKAGE}: {' '.join(lines) or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return location
