"""Images as arrays: files that Pillow reads, folders of them, and the hashes that identify them. No torch.

A folder of user images is FOLDER/train/CLASS/*.png, with val/ and test/ beside train/ if there are any, or CLASS/*.png.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from searchfm.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
PartName = Literal["train", "val", "test"]

TEST_FRACTION = 0.2  # of data without a test part of their own; a constant, so that no setting ever moves the part
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_CHANNELS = ((), (1,), (3,), (4,))  # of an array, behind height and width
NAMED = 3  # unreadable files that an error names, before it counts


@dataclass(frozen=True)
class Arrays:
    """One part of a data set."""

    images: Pixels  # (N, C, H, W)
    labels: Labels  # (N,)
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of pixels (at their own size), labels and class names
    validation: int = 0  # of the images, the last ones, that are the data's own validation part

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


def decode(path: Path) -> Pixels:
    """An image file, rotated by its EXIF data: (1, H, W) if all pixels are grey, else (3, H, W); transparency is
    dropped. Raises ValueError with the reason.
    """
    try:
        with Image.open(path) as file:
            return as_pixels(file)
    except Exception as error:  # decoders raise anything for a hostile or broken file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(" ".join(reason.replace(str(path), "it").split()) or type(error).__name__) from None


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


@dataclass(frozen=True)
class Listing:
    """The files of one part, by class and name."""

    base: Path
    part: PartName
    carved: bool  # train and test are the two sides of one folder
    classes: tuple[str, ...]  # of the training part, sorted
    files: Mapping[Path, int]  # with their labels
    val: "Listing | None"  # of the training part: the folder's own validation part

    def key(self) -> str:
        """sha256 of names, sizes and times of change: another key, other images."""
        stats = [(path.stat() if path.exists() else path.lstat()) for path in self.files]  # a link may be broken
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.files, stats, strict=True)]
        state = [str(self.base), self.part, self.carved, self.classes, files, self.val and self.val.key()]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def listing(root: Path, part: PartName) -> Listing:
    """Lists a part's files without opening any. Raises DataError for a folder without classes, or with empty ones."""
    split = bool(_folders(root / "train"))
    training = root / "train" if split else root
    carved = part != "val" and not (split and (root / "test").is_dir())
    classes = tuple(path.name for path in _folders(training))
    if len(classes) < 2:
        raise DataError(
            f"{training}: has {len(classes)} folders of images ({', '.join(classes)}): must have one for each of two "
            "classes or more, CLASS/*.png or train/CLASS/*.png"
        )
    files: dict[Path, int] = {}
    base = training if carved else root / part
    for folder in _folders(base):
        if folder.name not in classes:
            raise DataError(f"{folder}: must be one of the classes of {training}: {', '.join(classes)}")
        paths = image_files(folder, root)
        if not paths:
            raise DataError(
                f"{folder}: holds no image; may hold {', '.join(sorted(SUFFIXES))}, not hidden, no links to elsewhere"
            )
        files |= dict.fromkeys(paths, classes.index(folder.name))
    val = listing(root, "val") if part == "train" and split and (root / "val").is_dir() else None
    return Listing(base, part, carved, classes, files, val)


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted; without hidden ones, and without links, which may form a cycle."""
    paths = parent.iterdir() if parent.is_dir() else ()
    return sorted(path for path in paths if path.is_dir() and not path.is_symlink() and not path.name.startswith("."))


def image_files(folder: Path, root: Path) -> list[Path]:
    """The files in a folder, at any depth, with an image's suffix: not hidden, no links to folders or out of `root`."""

    def is_image(path: Path) -> bool:
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            return False
        # A broken link inside the folder counts as an unreadable image.
        return path.resolve().is_relative_to(root.resolve()) if path.is_symlink() else path.is_file()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += filter(is_image, (Path(parent, name) for name in names))
    return sorted(files)


def read_folder(listing: Listing, size: int, channels: int | None = None) -> Arrays:
    """Decodes a part: grey if all its images are, else RGB, or as `channels` (1 or 3) says; resized to `size` unless 0.
    The folder's own validation part, in the channels of the training part, follows that.

    Raises one DataError for all files that cannot be read, or for images of several sizes where `size` is 0.
    """
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        decoded = list(pool.map(lambda path: _decoded(path, listing, size), listing.files))
    broken = [item for item in decoded if isinstance(item, str)]
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise DataError(f"{len(broken)} files cannot be read as images: {'; '.join(broken[:NAMED])}{more}")
    rows = zip(listing.files.items(), decoded, strict=True)
    kept = [(path, label, *item) for (path, label), item in rows if isinstance(item, tuple)]
    if not kept:
        raise DataError(
            f"{listing.base}: has too few images, none of {len(decoded)} falls into the {listing.part} part"
        )
    sides: dict[str, Path] = {}
    for path, _, image, _ in kept:
        sides.setdefault(f"{image.shape[1]}x{image.shape[2]}", path)
    if len(sides) > 1:
        examples = ", ".join(f"{path} {side}" for side, path in [*sides.items()][:2])
        raise DataError(f"{listing.base}: images differ in size ({examples}): set data.size to a side in pixels")
    channels = channels or max(len(image) for _, _, image, _ in kept)
    pixels = np.stack([in_channels(image, channels) for _, _, image, _ in kept])
    labels = np.array([label for _, label, _, _ in kept], dtype=np.int64)
    arrays = Arrays.of(pixels, labels, listing.classes, [hash_ for *_, hash_ in kept])
    if listing.val is None:
        return arrays
    val = read_folder(listing.val, size, channels)
    (height, width), (val_height, val_width) = pixels.shape[2:], val.images.shape[2:]
    if (val_height, val_width) != (height, width):
        sizes = f"images are {val_height}x{val_width}, those of {listing.base} {height}x{width}"
        raise DataError(f"{listing.val.base}: {sizes}: set data.size to a side in pixels")
    return Arrays(
        np.concatenate([pixels, val.images]),
        np.concatenate([labels, val.labels]),
        listing.classes,
        hashlib.sha256((arrays.fingerprint + val.fingerprint).encode()).hexdigest(),
        len(val.labels),
    )


def _decoded(path: Path, listing: Listing, size: int) -> tuple[Pixels, bytes] | str | None:
    """An image at `size` and the hash of its own pixels; why it is unreadable; None if it is of the other part."""
    try:
        image = decode(path)
    except ValueError as error:
        return f"{path} ({error})"
    hash_ = image_hash(image)
    if listing.carved and is_test(hash_) != (listing.part == "test"):
        return None
    return resized(image, size), hash_
