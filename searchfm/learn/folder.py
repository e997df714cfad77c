"""A person's own images: FOLDER/train/CLASS/*.png, with val/ and test/ beside train/ if there are any, or CLASS/*.png
alone. Read into arrays at one size. No torch.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from searchfm.errors import DataError
from searchfm.learn.formats import Arrays, PartName, arrays, resized
from searchfm.learn.splits import Pixels, fingerprint, is_test

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NAMED = 3  # unreadable files that an error names, before it counts


@dataclass(frozen=True)
class Listing:
    """The files of one part, by class and name. Hidden files, links to folders, and links out are left alone."""

    base: Path
    part: PartName
    carved: bool  # train and test are the two sides of one folder
    classes: tuple[str, ...]  # of the training part, sorted
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def key(self) -> str:
        """sha256 of names, sizes and times of change: another key, other images."""
        stats = [(path.stat() if path.exists() else path.lstat()) for path in self.files]  # links may lead nowhere
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.files, stats, strict=True)]
        return sha256(json.dumps([str(self.base), self.part, self.carved, self.classes, files]).encode()).hexdigest()


def has_validation(root: Path) -> bool:
    """Whether the folder brings a validation part of its own."""
    return bool(_folders(root / "train", root)) and (root / "val").is_dir()


def listing(root: Path, part: PartName) -> Listing:
    """Finds a part's files without opening any. Raises DataError for a folder without classes, or with empty ones."""
    if not root.is_dir():
        raise DataError(f"{root}: must be a folder of images")
    split = bool(_folders(root / "train", root))
    training = root / "train" if split else root
    carved = part != "val" and not (split and (root / "test").is_dir())
    classes = tuple(path.name for path in _folders(training, root))
    if len(classes) < 2:
        raise DataError(
            f"{training}: has {len(classes)} folders of images ({', '.join(classes)}): must have one for each of two "
            "classes or more, CLASS/*.png or train/CLASS/*.png"
        )
    files: list[Path] = []
    labels: list[int] = []
    base = training if carved else root / part
    for folder in _folders(base, root):
        if folder.name not in classes:
            raise DataError(f"{folder}: must be one of the classes of {training}: {', '.join(classes)}")
        found = sorted(images(folder, root))
        if not found:
            raise DataError(
                f"{folder}: holds no image; may hold {', '.join(sorted(SUFFIXES))}, not hidden, no links to elsewhere"
            )
        files += found
        labels += [classes.index(folder.name)] * len(found)
    return Listing(base, part, carved, classes, tuple(files), tuple(labels))


def _folders(parent: Path, root: Path) -> list[Path]:
    return sorted(path for path in _inside(parent, root) if path.is_dir())


def images(folder: Path, root: Path) -> Iterator[Path]:
    """The files of a folder, and of folders in it, that are called as images are. Hidden files, links to folders, and
    links out of `root` are left alone.
    """
    for path in _inside(folder, root):
        if path.is_dir():
            yield from images(path, root)
        # A link to nothing inside the folder is no file, but an image that cannot be read.
        elif path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink()):
            yield path


def _inside(folder: Path, root: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in folder.iterdir():
            link = path.is_symlink()
            # A link to a folder may lead round in circles, and one out of `root` to what is nobody's image.
            away = link and (path.is_dir() or not path.resolve().is_relative_to(root.resolve()))
            if not (away or path.name.startswith(".")):
                yield path


@dataclass(frozen=True)
class _Image:
    pixels: Pixels  # (1 or 3, H, W), at the size asked for
    print: bytes  # of the pixels at their own size
    path: Path
    label: int


def read(listing: Listing, size: int, channels: int | None = None) -> Arrays:
    """Decodes a part: grey if all its images are, else RGB, or as `channels` (1 or 3) says; resized to `size` unless 0.

    Raises one DataError for all files that cannot be read, or for images of several sizes where `size` is 0.
    """
    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        decoded = list(pool.map(lambda path, label: _decode(path, label, listing, size), listing.files, listing.labels))
    broken = [item for item in decoded if isinstance(item, str)]
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise DataError(f"{len(broken)} files cannot be read as images: {'; '.join(broken[:NAMED])}{more}")
    kept = [item for item in decoded if isinstance(item, _Image)]
    if not kept:
        raise DataError(
            f"{listing.base}: has too few images, none of {len(decoded)} falls into the {listing.part} part"
        )
    first = kept[0]
    other = next((item for item in kept if item.pixels.shape[1:] != first.pixels.shape[1:]), None)
    if other is not None:
        sides = [f"{item.path} {item.pixels.shape[1]}x{item.pixels.shape[2]}" for item in (first, other)]
        raise DataError(
            f"{listing.base}: images differ in size ({', '.join(sides)}): set data.size to a side in pixels"
        )
    channels = channels or max(len(item.pixels) for item in kept)
    pixels = np.empty((len(kept), channels, *first.pixels.shape[1:]), np.uint8)
    for i, item in enumerate(kept):
        pixels[i] = in_channels(item.pixels, channels)
    labels = np.array([item.label for item in kept], dtype=np.int64)
    return arrays(pixels, labels, listing.classes, [item.print for item in kept])


def _decode(path: Path, label: int, listing: Listing, size: int) -> _Image | str | None:
    """The image, or why there is none, or nothing for one that belongs to the other side of a carved folder."""
    try:
        pixels = decode(path)
    except ValueError as error:
        return f"{path} ({error})"
    print = fingerprint(pixels)
    if listing.carved and is_test(print) != (listing.part == "test"):
        return None
    return _Image(resized(pixels, size), print, path, label)


def decode(path: Path) -> Pixels:
    """An image file, turned as its EXIF data say: (1, H, W) if it is grey, whatever its mode, else (3, H, W);
    transparency is dropped. Raises ValueError with the reason.
    """
    try:
        with Image.open(path) as file:
            return _pixels(ImageOps.exif_transpose(file))
    except Exception as error:  # a decoder meets anything in a hostile or broken file, and each raises as it likes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(" ".join(reason.replace(str(path), "it").split()) or type(error).__name__) from None


def in_channels(image: Pixels, channels: int) -> Pixels:
    """An image (1 or 3, H, W) in so many channels: colours as their luminance, grey in each channel."""
    if channels < len(image):
        return np.asarray(Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1))).convert("L"))[None]
    return np.broadcast_to(image, (channels, *image.shape[1:]))


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits, which PIL's own conversion would cut off at 255
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        return np.round(deep / 257).astype(np.uint8)[None]
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    colours = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    if (colours[0] == colours[1]).all() and (colours[0] == colours[2]).all():
        colours = colours[:1]
    return np.ascontiguousarray(colours)
