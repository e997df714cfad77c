"""Images as arrays: files that Pillow reads, their conversion, and the hashes that identify them. No torch."""

import hashlib
import io
import os
import re
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from searchfm.errors import DataError
from searchfm.inputs import check_size

Pixels: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
Raw: TypeAlias = Path | bytes | Pixels  # an image file, its content, or pixels (H, W) or (H, W, C)
PartName = Literal["train", "val", "test"]
T = TypeVar("T")
R = TypeVar("R")

TEST_FRACTION = 0.2  # of data without a test part of their own; a constant, so that no setting ever moves the part
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # that Pillow may try
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_CHANNELS = ((), (1,), (3,), (4,))  # of an array, behind height and width
PIXELS = 50_000_000  # of an image, at most: 150 MB as RGB
ENCODED = 4 * PIXELS  # bytes of an image file, at most: some decoders read it whole
NAMES = 150_000_000  # bytes that the names in a folder may take in memory: about two million names
AHEAD = 1024  # items that threads work on, whose results are held
TILE = (0x0142, 0x0143)  # the TIFF keys of a tile's width and height
# Of file systems that hold no user files; reading some of theirs never ends.
SPECIAL = {"proc", "sysfs", "devtmpfs", "devpts", "devfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs"}
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF key, and its values that exchange height and width


# Pillow warns above 89 megapixels, and raises above 178. `opened` refuses both, and all above `PIXELS`, in one line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Arrays:
    """One part of a data set."""

    images: Pixels  # (N, C, H, W)
    labels: Labels  # (N,)
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of pixels (at their own size), labels and class names
    validation: int = 0  # of the images, the last ones, that are the data's own validation part
    sides: tuple[int, int] | None = None  # shortest and longest side before resizing; None: as `images`

    @classmethod
    def of(cls, images: Pixels, labels: Labels, classes: Sequence[str], hashes: Sequence[bytes] | None = None) -> Self:
        """Arrays with their fingerprint; `hashes` are those of the images where they are known already."""
        digest = hashlib.sha256(b"".join(map(image_hash, images) if hashes is None else hashes))
        digest.update(labels.astype("<i8").tobytes() + "\0".join(classes).encode())
        return cls(images, labels, tuple(classes), digest.hexdigest())


def image_hash(image: Pixels) -> bytes:
    """sha256 (32 bytes) of the shape and pixels of one image (C, H, W)."""
    return hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()


def is_test(hash_: bytes) -> bool:
    """Whether an image belongs to the test part that is carved out of data without one.

    The image's own pixels decide, so equal images are never on both sides, and more images never move earlier ones.
    """
    return int.from_bytes(hash_[:8], "big") < TEST_FRACTION * 2**64


def resized(image: Pixels, size: int | tuple[int, int]) -> Pixels:
    """An image (C, H, W) with another side, or (height, width): bilinear, antialiased where it shrinks. 0 leaves it."""
    height, width = (size, size) if isinstance(size, int) else size
    if not size or image.shape[1:] == (height, width):
        return image
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def in_channels(image: Pixels, channels: int) -> Pixels:
    """An image (1 or 3, H, W) with `channels` channels: colours become luminance, grey is repeated."""
    if channels < len(image):
        return np.asarray(Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1))).convert("L"))[None]
    return np.broadcast_to(image, (channels, *image.shape[1:]))


@contextmanager
def opened(raw: Raw) -> Iterator[Image.Image]:
    """An image for a `with` block, of at most `PIXELS` pixels by its header. Whatever a decoder raises, in the block
    too, becomes ValueError with the reason.
    """
    try:
        if isinstance(raw, Path):
            check_size(raw, ENCODED)
        source = io.BytesIO(raw) if isinstance(raw, bytes) else raw
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source, "r", FORMATS) as image:
            tags = getattr(image, "tag_v2", {})
            sides = [tags.get(key, 0) for key in TILE]  # of a tile, which is decoded whole
            if not all(isinstance(side, int) for side in sides):  # a number times a text repeats it
                raise ValueError("the sides of its tiles are no whole numbers")
            for width, height in (image.size, sides):
                if width * height > PIXELS:
                    raise ValueError(f"{height}x{width}, may have at most {PIXELS:,} pixels")
            yield image
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # as in "Image size (9 pixels)"
        (pixels,) = re.findall(r"\((\d+) pixels\)", str(error))
        raise ValueError(f"{int(pixels):,} pixels, may have at most {PIXELS:,}") from None
    except Exception as error:  # decoders raise anything for a hostile or broken file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(" ".join(reason.split()) or type(error).__name__) from None


def decode(raw: Raw) -> Pixels:
    """An image, rotated by its EXIF data: (1, H, W) if all pixels are grey, else (3, H, W); transparency is dropped.

    Raises ValueError with the reason.
    """
    with opened(raw) as image:
        return as_pixels(image)


def image_size(raw: Raw) -> tuple[int, int]:
    """(height, width) as `decode` gives it, from the file's header alone. Raises ValueError."""
    with opened(raw) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION) in TURNED else (height, width)


def as_pixels(image: Image.Image | Pixels) -> Pixels:
    """As `decode`, of an image that is open already, or an array (H, W) or (H, W, C) uint8 with 1, 3 or 4 channels."""
    if isinstance(image, Image.Image):
        return _pixels(ImageOps.exif_transpose(image))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__}: must be a path, a PIL image or an array")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0 or image.shape[2:] not in _CHANNELS:
        raise ValueError(f"{image.dtype} {image.shape}: must be uint8 (H, W) or (H, W, C) with 1, 3 or 4 channels")
    return _pixels(Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image))


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits, which PIL's own conversion would cut off at 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return np.round(deep / 257).astype(np.uint8)[None]
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    colours = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    grey = (colours[0] == colours[1]).all() and (colours[0] == colours[2]).all()
    return np.ascontiguousarray(colours[:1] if grey else colours)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The function's results, in order. Decoders let other threads run. Unlike the executor's own `map`, which holds
    all items and results, it holds `AHEAD` of them.
    """
    rest = iter(items)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(rest, AHEAD)):
            yield from pool.map(function, batch)


class Paths(Sequence[Path]):
    """Files by folder and name: 80 bytes a file, of which a `Path` takes 500. One is made when it is asked for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._folders: list[str] = []
        self._starts: list[int] = []  # the index of a folder's first file
        self.bytes = 0  # that the names take in memory

    def add(self, folder: str, name: str) -> None:
        """Adds a file at the end."""
        if not self._folders or self._folders[-1] != folder:
            self._folders.append(folder)
            self._starts.append(len(self._names))
        self._names.append(name)
        self.bytes += name_bytes(name)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return Path(self._folders[bisect_right(self._starts, index) - 1], self._names[index])


def name_bytes(name: str) -> int:
    """What a name in a list takes in memory."""
    return sys.getsizeof(name) + 16  # and the references to it


def listed(folder: str) -> Iterator["os.DirEntry[str]"]:
    """The entries of a folder, one after the other, without hidden ones. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be listed: {error.strerror}") from None


def image_files(folder: Path, root: Path, files: Paths | None = None) -> Paths:
    """The files in a folder, at any depth, with an image's suffix, sorted: not hidden, no links to folders or out of
    `root`, none on the kernel's file systems. files: those of other folders, to which they are added.

    Raises DataError for a folder that cannot be listed, and for more names than `NAMES` bytes.
    """
    files = Paths() if files is None else files
    real, special = root.resolve(), _special()
    taken = files.bytes

    def is_image(entry: "os.DirEntry[str]") -> bool:
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:  # noqa: PTH122 (a Path for each entry takes long)
            return False
        # A broken link inside the folder counts as an unreadable image, as does a link to itself, for which
        # `Path.resolve` raises RuntimeError before Python 3.13.
        return Path(os.path.realpath(entry.path)).is_relative_to(real) if entry.is_symlink() else entry.is_file()

    def children(parent: str) -> Iterator[tuple[str, str, bool]]:
        nonlocal taken
        names, folders = [], set()
        with suppress(OSError):  # `listed` raises it again
            if os.stat(parent).st_dev in special:  # noqa: PTH116
                return
        for entry in listed(parent):
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif not is_image(entry):
                continue
            names.append(entry.name)
            taken += name_bytes(entry.name)
            if taken > NAMES:
                raise DataError(
                    f"{folder}: has more than {len(files) + len(names) - 1:,} images and folders, whose names take "
                    f"more than {NAMES // 10**6} MB: must be fewer, or as parquet files"
                )
        names.sort()
        yield from ((parent, name, name in folders) for name in names)

    pending = [children(str(folder))]  # instead of recursion: a path may have thousands of parts
    while pending:
        for parent, name, is_folder in pending[-1]:
            if is_folder:
                pending.append(children(os.path.join(parent, name)))  # noqa: PTH118
                break
            files.add(parent, name)
        else:
            pending.pop()
    return files


def _special() -> set[int]:
    """The device numbers of the kernel's file systems."""
    import psutil

    devices = set()
    for each in psutil.disk_partitions(all=True):
        if each.fstype in SPECIAL:
            with suppress(OSError):
                devices.add(os.stat(each.mountpoint).st_dev)  # noqa: PTH116
    return devices
