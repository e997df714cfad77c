"""Where data sets by name lie, and how they come here. No torch, unless torchvision must say where to download from.

One place is tried after the other, and the first whose content is what it must be is used: the folder the user names
(`data_dir`, or SEARCHFM_DATA), our cache (SEARCHFM_CACHE, or the user's own), Debian's folder, the data set's own
mirrors (or SEARCHFM_MIRROR/NAME/ in their stead), a Debian package.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
from filelock import FileLock

from searchfm.config import DATASETS, Shape
from searchfm.errors import DataError
from searchfm.learn import folder, formats
from searchfm.learn.download import debian_package, download
from searchfm.learn.formats import IDX, Arrays, PartName
from searchfm.tables import show

log = logging.getLogger(__name__)
T = TypeVar("T")

DEBIAN_FOLDER, DEBIAN_PACKAGE = Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist"
# torchvision's classes, which know mirrors and checksums, and the folders they keep their files in.
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FOLDERS = {
    "fashion-mnist": "FashionMNIST/raw",
    "mnist": "MNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
ORIGINS = {
    "fashion-mnist": "Xiao et al. 2017, arXiv 1708.07747",
    "mnist": "LeCun, Cortes & Burges 1998",
    "digits": "Alpaydin & Kaynak 1998, with scikit-learn; the test part is carved out by content",
    "cifar10": "Krizhevsky 2009",
    "cifar100": "Krizhevsky 2009",
}
COUNTS = {
    "fashion-mnist": (60000, 10000),
    "mnist": (60000, 10000),
    "digits": (1413, 384),
    "cifar10": (50000, 10000),
    "cifar100": (50000, 10000),
}


@dataclass(frozen=True)
class Described:
    """A data set as `searchfm data` shows it, found out without reading or downloading it."""

    name: str
    shape: Shape | None  # channels, height, width; None for a folder, which only reading can tell
    classes: int
    train: int  # images, those for validation among them
    test: int | None  # None where it will be carved out of `train`
    origin: str
    found: Path | None  # where it lies on this machine


def describe(name: str, data_dir: Path | None = None) -> Described:
    """What is known of a data set by name, or of a folder of images. Raises DataError for neither."""
    root = folder_of(name)
    if root is not None:
        train = folder.listing(root, "train")
        test = None if train.carved else len(folder.listing(root, "test").files)
        return Described(str(root), None, len(train.classes), len(train.files), test, "a folder of images", root)
    shape, classes = DATASETS[name]
    return Described(name, shape, classes, *COUNTS[name], ORIGINS[name], next(local(name, data_dir), None))


def fetch(name: str, data_dir: Path | None = None) -> Path:
    """Makes a data set's files available, downloading them where need be, and returns where they lie. Files that are
    here already are trusted until they are read. Raises DataError that names every place tried.
    """
    root = folder_of(name)
    return obtain(name, data_dir, lambda place: place) if root is None else root


def folder_of(name: str) -> Path | None:
    """The folder of images that `name` means, None for a data set known by name. Raises DataError for neither."""
    if name in DATASETS:
        return None
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError):  # too long a name; no such user's home
        pass
    raise DataError(
        f"data.name = {show(name)}: must be one of {', '.join(DATASETS)}, or an existing folder of images (CLASS/*.png)"
    )


def cache_dir() -> Path:
    """Where data sets are kept: data/ in SEARCHFM_CACHE, or in the user's own cache folder of searchfm."""
    return Path(os.environ.get("SEARCHFM_CACHE") or platformdirs.user_cache_dir("searchfm")) / "data"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """What a process holds while it writes what belongs to a data set. Raises DataError if the cache forbids it."""
    held = FileLock(cache_dir() / "locks" / f"{name}.lock")
    try:
        Path(held.lock_file).parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise DataError(f"{cache_dir()}: {error.strerror}; SEARCHFM_CACHE may name another folder") from None
    try:
        yield
    finally:
        held.release()


def read(name: str, part: PartName, data_dir: Path | None = None) -> Arrays:
    """Reads a part of a data set known by name, from wherever it comes. Raises DataError."""
    if name == "digits":
        return formats.read_digits(part)
    if name in IDX:
        return obtain(name, data_dir, lambda place: formats.read_idx(place, part, name))
    return obtain(name, data_dir, lambda place: formats.read_cifar(place, part, _torchvision(name)))


def local(name: str, data_dir: Path | None = None) -> Iterator[Path]:
    """The folders or archives on this machine that hold a data set, by their looks, in the order of search."""
    if name == "digits":
        package = find_spec("sklearn")  # imports nothing
        assert package is not None
        assert package.origin is not None
        yield Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        return
    for place in _looked(name, data_dir):
        files = [place / stem for stem in IDX.get(name, ())]
        if place.exists() and all(file.exists() or file.with_suffix(".gz").exists() for file in files):
            yield place


def obtain(name: str, data_dir: Path | None, use: Callable[[Path], T]) -> T:
    """What `use` makes of the first place where it raises no DataError; places that need the network come last."""
    if name == "digits":
        return use(next(local(name)))
    problems: dict[Path | None, str] = {}
    for place in local(name, data_dir):
        try:
            return use(place)
        except DataError as error:
            log.warning("%s", error)
            problems[place] = str(error)
    with lock(f"{name}-files"):
        # Another process may have brought them while this one waited for the lock.
        late = (place for place in local(name, data_dir) if place not in problems)
        ways: Iterator[Callable[[], Path]] = chain((partial(Path, place) for place in late), _remote(name))
        for bring in ways:
            try:
                return use(bring())
            except DataError as error:
                problems[None] = "; ".join(filter(None, (problems.get(None), str(error))))
    looked = ", ".join(str(place) for place in _looked(name, data_dir))
    raise DataError(f'data.name = "{name}" is nowhere to be had: not in {looked}; {"; ".join(problems.values())}')


def _looked(name: str, data_dir: Path | None) -> list[Path]:
    given = data_dir or (Path(os.environ["SEARCHFM_DATA"]) if os.environ.get("SEARCHFM_DATA") else None)
    if given is not None and not given.is_dir():
        raise DataError(f"data folder {given}: must be an existing folder (--data-dir, SEARCHFM_DATA)")
    bases = [given, given / name] if given else []
    bases.append(cache_dir() / "files" / name)
    own = [[base / FOLDERS[name], base / ARCHIVES[name] if name in ARCHIVES else base] for base in bases]
    return [place for pair in own for place in pair] + ([DEBIAN_FOLDER] if name == "fashion-mnist" else [])


def _remote(name: str) -> Iterator[Callable[[], Path]]:
    """Downloads into the cache, to be tried in this order. Callers hold the lock."""
    source, place = _torchvision(name), cache_dir() / "files" / name
    mirror = os.environ.get("SEARCHFM_MIRROR")
    if name in ARCHIVES:
        url = f"{mirror.rstrip('/')}/{name}/{source.filename}" if mirror else source.url
        yield partial(_download, {url: (place / source.filename, source.tgz_md5)}, place / source.filename)
        return
    for base in [f"{mirror.rstrip('/')}/{name}/"] if mirror else source.mirrors:
        yield partial(_download, {base + file: (place / file, md5) for file, md5 in source.resources}, place)
    if name == "fashion-mnist":
        yield partial(_debian, place)


def _download(files: dict[str, tuple[Path, str]], place: Path) -> Path:
    for url, (path, md5) in files.items():
        log.info("downloading %s", url)
        download(url, path, md5)
    return place


def _debian(place: Path) -> Path:
    log.warning("no mirror answers: trying apt-get download %s", DEBIAN_PACKAGE)
    folder = str(DEBIAN_FOLDER.relative_to("/"))
    debian_package(DEBIAN_PACKAGE, folder, [f"{stem}.gz" for stem in IDX["fashion-mnist"]], place)
    return place


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # seconds, and torch: only for what must be downloaded, or is CIFAR's

    return getattr(datasets, TORCHVISION[name])
