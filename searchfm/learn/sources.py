"""User data by path: a folder of images, an .npz file, or a folder of Hugging Face's parquet files. No torch.

A folder of images is FOLDER/train/CLASS/*.png, with val/ and test/ beside train/ if there are any, or CLASS/*.png.
An .npz file has arrays of images and labels, named as in `ARRAYS`. Parquet files are train-*.parquet, with validation-*
and test-* beside them if there are any, in the folder or its data/.
"""

import hashlib
import json
import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchfm.errors import DataError, one_of
from searchfm.format import size as size_text
from searchfm.inputs import free_memory, regular
from searchfm.learn.images import (
    SUFFIXES,
    Arrays,
    Labels,
    PartName,
    Paths,
    Pixels,
    Raw,
    decode,
    image_files,
    image_hash,
    image_size,
    in_channels,
    in_threads,
    is_test,
    listed,
    resized,
)
from searchfm.tables import show

SET_SIZE = "set data.size to a side in pixels, such as --set data.size=64"
MULTIPLE, LARGEST = 16, 224  # pixels: what the default of data.size is a multiple of, and its maximum
ENTRIES = 100_000  # folders of classes, or parquet files, that a folder may have
IMAGE = 1000  # bytes of memory that an image takes besides its pixels, at most
# Of all pixels, at once: as read, decoded, stacked and written. Measured with 0.9 GB: 3.3 of an .npz, 1.6 of a folder.
COPIES = 4
PIECE = 2**20  # bytes that are read at once of an .npz file, its directory included
LABEL = 1000  # characters that a label may have
FOOTER = 2**24  # bytes of a parquet file's footer
# What a parquet file's values may take in memory: so many times what its footer says (an oversampled class repeats
# images), and so many bytes more.
REPEATED, FEW = 4, 50_000_000
BATCH, ROWS = 2**24, 2**16  # bytes and rows of a parquet file that are decoded at once
NAMED = 3  # unreadable images that an error names, before it counts
# Names of parts and of their arrays, in small letters: x_train, train_images, images_train; without a part, training.
PARTS: Mapping[PartName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
ARRAYS = {"images": ("images", "image", "x", "data"), "labels": ("labels", "label", "y", "targets")}
NAMES = ("classes", "class_names", "label_names", "names")  # of the array of class names


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """The images of one part of user data, each read when it is asked for. Errors of all members are DataErrors."""

    kind: ClassVar[str]
    noun: ClassVar[str] = "image"  # what an error counts

    base: Path  # that errors name
    part: PartName
    carved: bool  # training and test part are the two sides of the same images
    val: "Source | None" = None  # of the training part: the data's own validation part

    @abstractmethod
    def key(self) -> str:
        """Changes when the images change: made from names, sizes and modification times."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as the training part has them."""

    @property
    @abstractmethod
    def labels(self) -> Labels:
        """(N,) indices of classes."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, counted without opening any; of both sides where the part is carved."""

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """An image as it is kept. Raises ValueError where there is none."""

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of the images, from headers alone; without those that cannot be read."""
        self.open()
        return [size for size in in_threads(self._size, range(len(self))) if size]

    def open(self) -> None:  # noqa: B027 (files need nothing)
        """Reads the file that holds all images, where there is one: once, before several threads ask for images."""

    def pixel_bytes(self) -> int:
        """What all images take in memory, as far as a header says it."""
        return 0

    def _size(self, index: int) -> tuple[int, int] | None:
        try:
            return image_size(self.raw(index))
        except ValueError:
            return None  # `read_part` names it

    def name(self, index: int) -> str:
        """An image in errors."""
        return f"{self.base} row {index}"

    def holds(self, hash_: bytes) -> bool:
        """Whether an image of this hash is in this part."""
        return not self.carved or is_test(hash_) == (self.part == "test")


def open_source(root: Path, part: PartName) -> Source:
    """A part of user data, listed without opening an image. Raises DataError for what is no data set, or has no such
    part.
    """
    if not root.is_dir():
        return open_npz(root, part)
    return open_parquet(root, part) if _parquet_files(root, "train") else open_folder(root, part)


def common_side(source: Source, own: Sequence[int]) -> int:
    """`data.size` for images that differ in size, or are larger than 224 pixels: the smallest of `own`, the input sides
    of pretrained models, else the median side of the images, as a multiple of 16 from 16 to 224. 0 for others: they
    keep their size.

    From headers alone: of training and validation part, and of a test part only if it is carved out of them.
    """
    sizes = source.sizes() + (source.val.sizes() if source.val else [])
    if len(set(sizes)) < 2 and max((side for size in sizes for side in size), default=0) <= LARGEST:
        return 0
    return min(own) if own else min(max(MULTIPLE * round(np.median(sizes) / MULTIPLE), MULTIPLE), LARGEST)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_part(source: Source, size: int, channels: int | None = None) -> Arrays:
    """Decodes a part: grey if all its images are, else RGB, or as `channels` (1 or 3) says; resized to `size` unless 0.
    The data's own validation part, in the channels of the training part, follows that.

    Raises one DataError for all images that cannot be read, or for images of several sizes where `size` is 0.
    """
    labels, free, taken, wrong = source.labels, free_memory(), 0, 0
    copies = 1 if size else COPIES  # resized, the others are of small images, and are counted below
    check_memory(str(source.base), len(source) * IMAGE + copies * source.pixel_bytes(), free)
    source.open()
    broken: list[str] = []
    kept: list[tuple[int, _Image]] = []
    sizes: dict[tuple[int, ...], int] = {}
    for index, item in enumerate(in_threads(lambda index: _decoded(source, index, size), range(len(source)))):
        if isinstance(item, str):
            wrong += 1
            broken += [item] if wrong <= NAMED else []
        elif item is not None:
            sizes.setdefault(item.pixels.shape[1:], index)
            kept.append((index, item))
            taken += IMAGE + COPIES * item.pixels.nbytes
            if taken > free:
                raise DataError(
                    f"{source.base}: {len(kept)} of {len(source)} images take {size_text(taken)} of memory, "
                    f"{size_text(free)} are free: {SET_SIZE}"
                )
        if wrong or len(sizes) > 1:  # an error follows
            kept, taken = kept[:1], 0
    if wrong:
        more = f"; and {wrong - NAMED} more" if wrong > NAMED else ""
        number = f"{wrong} {source.noun}{'s' * (wrong != 1)}"
        raise DataError(f"{number} cannot be read as images: {'; '.join(broken)}{more}")
    if not kept:
        raise DataError(f"{source.base}: has too few images, none of {len(source)} falls into the {source.part} part")
    _check_sizes(source, sizes)
    channels = channels or max(len(item.pixels) for _, item in kept)
    pixels = np.stack([in_channels(item.pixels, channels) for _, item in kept])
    sides = [side for _, item in kept for side in item.size]
    arrays = Arrays.of(pixels, labels[[index for index, _ in kept]], source.classes, [item.hash for _, item in kept])
    arrays = replace(arrays, sides=(min(sides), max(sides)))
    return arrays if source.val is None else _with_validation(arrays, source, read_part(source.val, size, channels))


def check_memory(where: str, needed: int, free: int | None = None) -> None:
    """Raises DataError where something needs more memory than is free."""
    free = free_memory() if free is None else free
    if needed > free:
        raise DataError(f"{where}: needs {size_text(needed)} of memory, {size_text(free)} are free")


@dataclass(frozen=True)
class _Image:
    pixels: Pixels
    size: tuple[int, int]  # height and width before resizing
    hash: bytes  # of its own pixels


def _decoded(source: Source, index: int, size: int) -> _Image | str | None:
    """An image at `size`; why it is unreadable; None if it is of the other part."""
    try:
        image = decode(source.raw(index))
    except ValueError as error:
        return f"{source.name(index)} ({error})"
    hash_ = image_hash(image)
    return _Image(resized(image, size), image.shape[1:], hash_) if source.holds(hash_) else None


def _check_sizes(source: Source, sizes: Mapping[tuple[int, ...], int]) -> None:
    """sizes: an image for each (height, width). Raises DataError for more than one."""
    if len(sizes) > 1:
        first = sorted((index, f"{height}x{width}") for (height, width), index in sizes.items())[:2]
        examples = ", ".join(f"{source.name(index)} {size}" for index, size in first)
        raise DataError(f"{source.base}: images differ in size ({examples}): {SET_SIZE}")


def _with_validation(train: Arrays, source: Source, val: Arrays) -> Arrays:
    (height, width), (val_height, val_width) = train.images.shape[2:], val.images.shape[2:]
    assert source.val is not None
    assert train.sides is not None
    assert val.sides is not None
    if (val_height, val_width) != (height, width):
        sizes = f"images are {val_height}x{val_width}, those of {source.base} {height}x{width}"
        raise DataError(f"{source.val.base}: {sizes}: {SET_SIZE}")
    return Arrays(
        np.concatenate([train.images, val.images]),
        np.concatenate([train.labels, val.labels]),
        train.classes,
        hashlib.sha256((train.fingerprint + val.fingerprint).encode()).hexdigest(),
        len(val.labels),
        (min(train.sides[0], val.sides[0]), max(train.sides[1], val.sides[1])),
    )


def _key(*values: Any, files: Sequence[Path], val: Source | None) -> str:
    """sha256 of values, and of the files' names, sizes and times of change."""
    # As json.dumps([*values, states, val and val.key()]) writes it, without all states in memory.
    digest = hashlib.sha256(json.dumps(values)[:-1].encode() + b", [")
    for number, path in enumerate(files):
        stat = path.stat() if path.exists() else path.lstat()  # a link may be broken
        state = json.dumps([str(path), stat.st_size, stat.st_mtime_ns])
        digest.update((f", {state}" if number else state).encode())
    digest.update(f"], {json.dumps(val and val.key())}]".encode())
    return digest.hexdigest()


# --- a folder of images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Files in a folder for each class."""

    kind = "folder of images"
    noun = "file"

    names: tuple[str, ...]  # of the classes: the training part's folders, sorted
    files: Paths
    numbers: NDArray[np.int64]  # (N,) the files' labels

    def key(self) -> str:
        """See `Source`."""
        labels = [str(self.base), self.part, self.carved, self.names, self.numbers.tolist()]
        return _key(labels, files=self.files, val=self.val)

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.names

    @property
    def labels(self) -> Labels:
        """See `Source`."""
        return self.numbers

    def __len__(self) -> int:
        return len(self.files)

    def raw(self, index: int) -> Path:
        """See `Source`."""
        return self.files[index]

    def name(self, index: int) -> str:
        """See `Source`."""
        return str(self.files[index])


def open_folder(root: Path, part: PartName) -> Folder:
    """Lists a part's files without opening any. Raises DataError for a folder without classes, or with empty ones."""
    split = bool(_folders(root / "train"))
    training = root / "train" if split else root
    carved = part != "val" and not (split and (root / "test").is_dir())
    classes = tuple(path.name for path in _folders(training))
    if len(classes) < 2:
        raise DataError(
            f"{training}: has {len(classes)} folders of images ({', '.join(classes)}): must have one for each of two "
            "classes or more, CLASS/*.png or train/CLASS/*.png; or train-*.parquet"
        )
    _check_texts(str(training), classes)
    files, counts = Paths(), []
    base = training if carved else root / part
    for folder in _folders(base):
        if folder.name not in classes:
            raise DataError(f"{folder}: must be one of the classes of {training}: {one_of(folder.name, classes)}")
        before = len(files)
        image_files(folder, root, files)
        if len(files) == before:
            raise DataError(
                f"{folder}: holds no image; may hold {', '.join(sorted(SUFFIXES))}, not hidden, no links to elsewhere"
            )
        counts.append((classes.index(folder.name), len(files) - before))
    val = open_folder(root, "val") if part == "train" and split and (root / "val").is_dir() else None
    numbers = np.repeat(*np.array(counts, dtype=np.int64).reshape(-1, 2).T)
    return Folder(base=base, part=part, carved=carved, val=val, names=classes, files=files, numbers=numbers)


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted; without hidden ones, and without links, which may form a cycle."""
    entries = listed(str(parent)) if parent.is_dir() else ()
    return sorted(_bounded(parent, (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))))


def _bounded(parent: Path, names: Iterable[str]) -> Iterator[Path]:
    """Paths in a folder. Raises DataError for more than a data set can have."""
    for number, name in enumerate(names):
        if number == ENTRIES:
            raise DataError(f"{parent}: has more than {ENTRIES:,} folders or parquet files, may have at most that many")
        yield parent / name


# --- labels in an array -----------------------------------------------------------------------------------------------


def _class_names(where: str, labels: NDArray[Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """The classes of a training part: `names`, else the texts among its labels, else the numbers up to the highest."""
    if names is not None:
        classes = tuple(names)
    elif labels.dtype.kind == "U":
        classes = tuple(sorted(set(labels.tolist())))
    else:
        highest = int(labels.max(initial=-1))
        if highest >= len(labels):
            raise DataError(f"{where}: label {highest} of {len(labels)} images: must be 0, 1, ... for each class")
        classes = tuple(map(str, range(highest + 1)))
    if len(classes) < 2:
        raise DataError(f"{where}: has {len(classes)} classes ({', '.join(classes)}): must have two or more")
    _check_texts(where, classes)
    return classes


def _check_texts(where: str, classes: Sequence[str]) -> None:
    """Raises DataError for a name that no record can hold: bytes of a file name, or of an array, that are no UTF-8."""
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: the name of class {name} is no UTF-8 text") from None


def _indices(where: str, labels: NDArray[Any], classes: Sequence[str]) -> Labels:
    """Labels, numbers or texts, as indices of classes."""
    if labels.dtype.kind == "U":
        numbers = {name: number for number, name in enumerate(classes)}
        found = np.array([numbers.get(name, -1) for name in labels.tolist()], dtype=np.int64)
    else:
        found = labels.astype(np.int64)
    wrong = np.flatnonzero((found < 0) | (found >= len(classes)))
    if len(wrong):
        some = f"0 to {len(classes) - 1}" if labels.dtype.kind != "U" else ", ".join(map(show, classes[:12]))
        raise DataError(f"{where}: label {show(labels[wrong[0]].item())} of row {wrong[0]}: must be {some}")
    return found


# --- an .npz file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Npz(Source):
    """Arrays of a NumPy archive, each read when it is needed. Nothing is unpickled."""

    kind = ".npz file"

    images: str  # names of arrays: (N, H, W) or (N, H, W, C) uint8
    targets: str  # (N,) or (N, 1) whole numbers, or texts
    trained: str  # those of the training part, from which the classes are known
    named: str | None  # (K,) texts

    def key(self) -> str:
        """See `Source`."""
        return _key(self.part, self.images, self.targets, files=[self.base], val=self.val)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        names = None
        if self.named is not None:
            texts = _array(self.base, self.named, self.named)
            if texts.ndim != 1 or texts.dtype.kind not in "US":
                raise DataError(f"{self.base}: {self.named} is {_form(texts)}: must be (classes,) texts")
            names = texts.astype(str).tolist()
        return _class_names(f"{self.base}: {self.trained}", _labels(self.base, self.trained), names)

    @cached_property
    def labels(self) -> Labels:
        """See `Source`."""
        labels = _labels(self.base, self.targets)
        if len(labels) != len(self):
            raise DataError(f"{self.base}: {self.targets} has {len(labels)} rows, {self.images} {len(self)}")
        return _indices(f"{self.base}: {self.targets}", labels, self.classes)

    def __len__(self) -> int:
        return self._shape[0]

    def sizes(self) -> list[tuple[int, int]]:
        """See `Source`."""
        return [(self._shape[1], self._shape[2])] * len(self)

    def raw(self, index: int) -> Pixels:
        """See `Source`."""
        pixels: Pixels = self._pixels[index]
        return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"{self.base}: {self.images} row {index}"

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Number, height and width, and channels if there is such a dimension, from the array's header."""
        with _reading(self.base, self.images), _archive(self.base) as archive:
            shape, dtype = _header(archive, self.images)
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,), (4,)):
            raise DataError(
                f"{self.base}: {self.images} is {shape} {dtype}: must be (images, height, width) or (images, height, "
                "width, channels) uint8, with 1, 3 or 4 channels"
            )
        return shape

    def open(self) -> None:
        """See `Source`."""
        assert self._pixels is not None

    def pixel_bytes(self) -> int:
        """See `Source`."""
        return math.prod(self._shape)

    @cached_property
    def _pixels(self) -> Pixels:
        assert self._shape
        pixels: Pixels = _array(self.base, self.images, self.images)
        return pixels


def open_npz(path: Path, part: PartName) -> Npz:
    """A part of an .npz file; no array is read. Raises DataError for a file without arrays of training images."""
    with _reading(path, ""), _archive(path) as archive:
        files = [name.removesuffix(".npy") for name in archive.namelist()]
    names = {name.lower(): name for name in reversed(files)}
    pairs = {part: pair for part in PARTS if (pair := _pair(path, names, part))}
    if "train" not in pairs:
        raise DataError(
            f"{path}: has arrays {', '.join(files) or '(none)'}: must have images and labels, x_train and y_train, or "
            "train_images and train_labels"
        )
    carved = part != "val" and "test" not in pairs
    images, targets = pairs["train" if carved else part]
    return Npz(
        base=path,
        part=part,
        carved=carved,
        val=open_npz(path, "val") if part == "train" and "val" in pairs else None,
        images=images,
        targets=targets,
        trained=pairs["train"][1],
        named=next((names[name] for name in NAMES if name in names), None),
    )


def _pair(path: Path, names: Mapping[str, str], part: PartName) -> tuple[str, str] | None:
    """The names of a part's two arrays; None where it has none. names: by their small letters."""
    found: dict[str, str] = {}
    for what, kinds in ARRAYS.items():
        joined = [text for kind in kinds for name in PARTS[part] for text in (f"{name}_{kind}", f"{kind}_{name}")]
        for candidate in [*joined, *(kinds if part == "train" else ())]:
            if candidate in names:
                found.setdefault(what, names[candidate])
    if len(found) == 1:
        ((what, name),) = found.items()
        other = "labels" if what == "images" else "images"
        raise DataError(f"{path}: has {name}, but no {other} to it; has arrays {', '.join(names.values())}")
    return (found["images"], found["labels"]) if found else None


def _labels(path: Path, name: str) -> NDArray[Any]:
    labels = _array(path, name, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise DataError(f"{path}: {name} is {_form(labels)}: must be (images,) whole numbers or texts")
    return labels.astype(str) if labels.dtype.kind == "S" else labels


class _InPieces(FileIO):
    """A file that is read in small pieces. `zipfile` reads as many bytes at once as the file itself asks for: for its
    directory of arrays, and for what bzip2 and LZMA unpack without a bound.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # all
            size = max(regular(Path(str(self.name))) - self.tell(), 0)
        if size > PIECE:
            raise ValueError(f"has {size:,} bytes in one piece, may have {PIECE:,}")
        return super().read(size) or b""


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz file whose directory was read. Raises OSError, zipfile's errors."""
    regular(path)
    with _InPieces(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array. Raises ValueError for one of Python objects, which only pickle could read, and where
    shape and type differ from the size in the archive's directory: nothing unpacks to more than its header says.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is packed otherwise than numpy.savez does")
    with archive.open(entry) as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be read, since that would run code")
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {shape}")
    if size != entry.file_size:
        raise ValueError(f"{shape} {dtype} takes {size:,} bytes, the archive has {entry.file_size:,}")
    return shape, dtype


def _array(path: Path, name: str, what: str) -> NDArray[Any]:
    """An array of the file. Raises DataError, also for one that does not fit into the free memory."""
    with _reading(path, what), _archive(path) as archive:
        shape, dtype = _header(archive, name)
        if dtype.kind in "US" and dtype.itemsize > 4 * LABEL:
            raise ValueError(f"{shape} {dtype}: texts may have at most {LABEL} characters")
        check_memory(f"{path}: {what}", math.prod(shape) * dtype.itemsize)
        with archive.open(f"{name}.npy") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _form(array: NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Whatever reading a damaged file raises becomes one DataError. what: is read, for the message."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and Arrow have classes of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path}: {what + ' ' if what else ''}cannot be read: {' '.join(reason.split())}") from None


# --- parquet files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """Rows of parquet files: a column of encoded images, as bytes or {bytes, path}, and a column of labels."""

    kind = "parquet files"

    files: tuple[Path, ...]
    trained: tuple[Path, ...]  # those of the training part, from which the classes are known

    def key(self) -> str:
        """See `Source`."""
        return _key(str(self.base), self.part, self.carved, files=self.files, val=self.val)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        where = f"{self.trained[0]}: {self._columns[1]}"
        return _class_names(where, self._values(self.trained), self._features.get(self._columns[1], {}).get("names"))

    @cached_property
    def labels(self) -> Labels:
        """See `Source`."""
        return _indices(f"{self.base}: {self._columns[1]}", self._values(self.files), self.classes)

    @cached_property
    def _rows(self) -> int:
        total = 0
        for path in self.files:
            with _reading(path, ""), _parquet(path) as file:
                total += file.metadata.num_rows
        return total

    def __len__(self) -> int:
        return self._rows

    def open(self) -> None:
        """See `Source`."""
        assert self._images is not None

    def raw(self, index: int) -> bytes:
        """See `Source`."""
        content = self._images[index].as_py()
        if not isinstance(content, bytes):
            raise ValueError("has no bytes")  # a path beside them names a file of the machine that wrote the row
        return content

    @cached_property
    def _schema(self) -> Any:
        with _reading(self.trained[0], ""), _parquet(self.trained[0]) as file:
            return file.schema_arrow

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Hugging Face's description of the columns, where the files have it."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            return {}
        return {name: item for name, item in dict(features).items() if isinstance(item, dict)}

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """The columns of images and labels."""
        from pyarrow import types

        kinds = {field.name: field.type for field in self._schema}
        tagged = {name: item.get("_type") for name, item in self._features.items()}
        images = [name for name in kinds if tagged.get(name) == "Image"] or [
            name
            for name, kind in kinds.items()
            if types.is_binary(kind)
            or types.is_large_binary(kind)
            or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        ]
        labels = [name for name in kinds if tagged.get(name) == "ClassLabel"] or [
            name
            for name, kind in kinds.items()
            if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
        ]
        column = {"images": images, "labels": labels}
        for what, names in column.items():
            if not names:
                raise DataError(f"{self.trained[0]}: has columns {', '.join(kinds)}: none of them holds {what}")
            names.sort(key=lambda name: name.lower() not in ARRAYS[what])  # of several, the one that is called so
        return images[0], labels[0]

    @cached_property
    def _images(self) -> Any:
        import pyarrow
        from pyarrow import compute, types

        name = self._columns[0]
        column = self._read(self.files, name)
        if types.is_struct(column.type):
            column = compute.struct_field(column, "bytes")
        return column if isinstance(column, pyarrow.ChunkedArray) else pyarrow.chunked_array([column])

    def _values(self, files: Sequence[Path]) -> NDArray[Any]:
        import pyarrow

        name = self._columns[1]
        text = not pyarrow.types.is_integer(self._schema.field(name).type)
        column = self._read(files, name, text=text)
        if column.null_count:
            missing = column.is_null().to_pylist().index(True)
            raise DataError(f"{self.base}: {name} of row {missing} is missing")
        if not len(column):
            return np.array([], dtype=np.int64)
        if text:  # each text once
            column = column.unify_dictionaries()
            texts = column.chunk(0).dictionary.to_pylist()
            if longest := max((text for text in texts if len(text) > LABEL), key=len, default=""):
                raise DataError(f"{self.base}: {name} has a text of {len(longest):,} characters, may have {LABEL}")
            check_memory(f"{self.base}: {name}", len(column) * 4 * max(map(len, texts)))
            indices: NDArray[Any] = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
            values: NDArray[Any] = np.array(texts)[indices]
            return values
        numbers: NDArray[Any] = column.to_numpy()
        return numbers

    def _read(self, files: Sequence[Path], column: str, *, text: bool = False) -> Any:
        """A column; with `text`, as dictionaries of texts. Raises DataError where it takes more memory than is free by
        the footers, or much more than they say: a value that is repeated takes a few bytes of a file.
        """
        import pyarrow
        from pyarrow import types

        chunks: list[Any] = []
        kind, free, taken, claimed, rows = None, free_memory(), 0, 0, 0
        for path in files:
            with _reading(path, column), _parquet(path, [column] if text else []) as file:
                about = file.metadata
                rows += about.num_rows
                check_memory(f"{path}: {rows:,} rows", rows * IMAGE, free)
                names = [about.schema.column(i).path.split(".")[0] for i in range(about.num_columns)]
                largest = 1
                for group in map(about.row_group, range(about.num_row_groups)):
                    sizes = [group.column(i).total_uncompressed_size for i, name in enumerate(names) if name == column]
                    claimed += sum(sizes)
                    check_memory(f"{path}: {column}", claimed, free)
                    largest = max(largest, sum(sizes))
                kind = file.schema_arrow.field(column).type
                # No value is larger than all that a group holds, but it may be repeated.
                at_once = ROWS if text or types.is_integer(kind) else min(max(BATCH // largest, 1), ROWS)
                for batch in file.iter_batches(at_once, columns=[column]):
                    chunks.append(batch.column(0))
                    taken += batch.nbytes
                    if not types.is_integer(kind) and taken > REPEATED * claimed + FEW:
                        raise ValueError(f"its values take {claimed:,} bytes there, more than {taken:,} in memory")
        with _reading(self.base, column):
            return pyarrow.chunked_array(chunks, kind)


@contextmanager
def _parquet(path: Path, texts: Sequence[str] = ()) -> Iterator[Any]:
    """A parquet file whose footer was read. texts: columns of texts that are read as dictionaries. Raises OSError,
    ValueError, Arrow's errors.
    """
    from pyarrow import parquet

    if (size := regular(path)) >= 8:
        with path.open("rb") as file:
            file.seek(-8, 2)
            footer = int.from_bytes(file.read(4), "little")
        if footer > FOOTER:
            raise ValueError(f"its footer has {footer:,} bytes of {size:,}, may have {FOOTER:,}")
    with parquet.ParquetFile(path, read_dictionary=list(texts), pre_buffer=False, buffer_size=PIECE) as opened:
        yield opened


def open_parquet(root: Path, part: PartName) -> Parquet:
    """A part of a folder of parquet files; no row is read. Raises DataError for a missing file of several."""
    trained, own = (_parquet_files(root, name) for name in ("train", part))
    carved = part != "val" and not _parquet_files(root, "test")
    val = open_parquet(root, "val") if part == "train" and _parquet_files(root, "val") else None
    return Parquet(base=root, part=part, carved=carved, val=val, files=trained if carved else own, trained=trained)


def _parquet_files(root: Path, part: PartName) -> tuple[Path, ...]:
    for folder in (root, root / "data"):
        for name in PARTS[part]:
            pattern = re.compile(rf"{name}(-.*)?\.parquet", re.DOTALL)
            entries = listed(str(folder)) if folder.is_dir() else ()
            files = sorted(_bounded(folder, (entry.name for entry in entries if pattern.fullmatch(entry.name))))
            numbered = re.search(r"-\d+-of-(\d+)", files[0].name) if files else None
            if numbered and len(files) != int(numbered[1]):
                raise DataError(f"{folder}: has {len(files)} files of {int(numbered[1])}, {files[0].name} and others")
            if files:
                return tuple(files)
    return ()
