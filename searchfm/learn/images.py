"""Images as arrays: files that Pillow reads, their conversion, and the hashes that identify them. No torch."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from searchfm.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]
Raw: TypeAlias = Path | bytes | Pixels  # an image file, its content, or pixels (H, W) or (H, W, C)
PartName = Literal["train", "val", "test"]

TEST_FRACTION = 0.2  # of data without a test part of their own; a constant, so that no setting ever moves the part
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_CHANNELS = ((), (1,), (3,), (4,))  # of an array, behind height and width
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF key, and its values that exchange height and width


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
    """An image for a `with` block. Whatever a decoder raises, in the block too, becomes ValueError with the reason."""
    try:
        source = io.BytesIO(raw) if isinstance(raw, bytes) else raw
        with Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source) as image:
            yield image
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
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
