"""Hostile files of users: refused in one line, with at most 200 MB more of memory and of bytes read.

As a program it reads such files, one after the other, and prints what each took.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from searchfm.engines import wire
from searchfm.engines.start import read_options
from searchfm.errors import SearchfmError
from searchfm.learn import images
from searchfm.learn.images import decode, image_files
from searchfm.learn.sources import open_source, read_part
from searchfm.search import files
from searchfm.show.guard import read_token

MORE = 200_000_000  # bytes
HUGE = 10_000_000_000


def sparse(path: Path, size: int, start: bytes = b"", end: bytes = b"") -> Path:
    """A file that takes no space on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
        file.seek(0, 2)
        file.write(end)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def flat(path: Path, side: int) -> Path:
    """A PNG of a few kilobytes."""
    Image.new("1", (side, side)).save(path)
    return path


def tiled(path: Path, width: int = 30000, height: int = 30000, type_: int = 4) -> Path:
    """A TIFF of 16x16 pixels whose one tile, deflated, has 30000x30000. type_: of its width; 4: LONG."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 200, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, type_ if tag == 322 else 4, 1, tags[tag]) for tag in tags)
    path.write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(208, b"\0"))
    return path


def npz(path: Path, shape: tuple[int, ...], size: int | None = None, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An .npz file whose array of images has the shape in its header, but 100 MB of zeros; size: in the directory."""
    with zipfile.ZipFile(path, "w", method) as archive:
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, np.arange(min(abs(shape[0]), 10**6)) % 2)
        with archive.open("images.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(100):
                file.write(bytes(10**6))
        if size is not None:
            archive.filelist[-1].file_size = size + 128  # the header's own bytes
    return path


def directory(path: Path) -> Path:
    """An .npz file whose directory claims to have 3 GB."""
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 3 * 10**9, 0, 0)
    return sparse(path, 3 * 10**9, b"PK\1\2", end)


def repeated(folder: Path, rows: int, size: int) -> Path:
    """A parquet file of one value of `size` bytes, many times."""
    folder.mkdir()
    value = pa.array([os.urandom(size)], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), value)
    table = pa.table({"image": column, "label": np.arange(rows) % 2})
    parquet.write_table(table, folder / "train.parquet", dictionary_pagesize_limit=10 * size, store_schema=False)
    return folder


def many_rows(folder: Path) -> Path:
    """A parquet file of 200 million equal rows, in some kilobytes."""
    folder.mkdir()
    rows = 10**7
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([b"x"], pa.binary()))
    table = pa.table({"image": image, "label": np.zeros(rows, np.int8)})
    with parquet.ParquetWriter(folder / "train.parquet", table.schema, store_schema=False) as writer:
        for _ in range(20):
            writer.write_table(table)
    return folder


def footer(folder: Path) -> Path:
    """A parquet file whose footer claims to have 2 GB."""
    folder.mkdir()
    sparse(folder / "train.parquet", 3 * 10**9, b"PAR1", struct.pack("<I", 2 * 10**9) + b"PAR1")
    return folder


def crowded(folder: Path) -> Path:
    """Two classes, one of them of 20,000 files."""
    for name, count in (("a", 1), ("b", 20_000)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:06}.png").touch()
    return folder


# What reads a file, the file, and what its one line must say.
CASES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "144 megapixels": ("image", lambda path: flat(path, 12_000), "12000x12000, may have at most 50,000,000 pixels"),
    "64 megapixels": ("image", lambda path: flat(path, 8_000), "8000x8000, may have at most 50,000,000 pixels"),
    "900 megapixels": ("image", lambda path: flat(path, 30_000), "900,000,000 pixels, may have at most 50,000,000"),
    "tile": ("image", tiled, "30000x30000, may have at most 50,000,000 pixels"),
    "tile of text": ("image", lambda path: tiled(path, 65, 3 * 10**8, 2), "sides of its tiles are no whole numbers"),
    "tile of bytes": ("image", lambda path: tiled(path, 240, 2 * 10**6, 1), "sides of its tiles are no whole numbers"),
    "sparse image": (
        "image",
        lambda path: sparse(path, HUGE, b"RIFF    WEBPVP8 "),
        "has 10,000,000,000 bytes, may have",
    ),
    "FIFO as image": ("image", fifo, "is not a regular file"),
    "device as image": ("image", device, "is not a regular file"),
    "header beyond its array": (
        "npz",
        lambda path: npz(path, (10**6, 1000, 1000)),
        "takes 1,000,000,000,128 bytes, the",
    ),
    "array beyond memory": ("npz", lambda path: npz(path, (10**6, 1000, 1000), 10**12), "needs 4001.0 GB of memory, "),
    "bzip2": (
        "npz",
        lambda path: npz(path, (10, 1000, 10_000), None, zipfile.ZIP_BZIP2),
        "packed otherwise than numpy",
    ),
    "negative": (
        "npz",
        lambda path: npz(path, (-10, -10_000_000)),
        "cannot be read: its shape is (-10, -10000000)",
    ),
    "directory": ("npz", directory, "has 3,000,000,000 bytes in one piece, may have 1,048,576"),
    "FIFO as array": ("npz", fifo, "is not a regular file"),
    "repeated image": ("folder", lambda path: repeated(path, 2_000, 5 * 10**6), "bytes there, more than"),
    "many rows": ("folder", many_rows, "200,000,000 rows: needs 200.0 GB of memory, "),
    "footer": ("folder", footer, "its footer has 2,000,000,000 bytes of 3,000,000,008, may have 16,777,216"),
    "many files": (
        "folder",
        crowded,
        "images and folders, whose names take more than 1 MB: must be fewer, or as parquet",
    ),
    "study": ("study", fifo, "cannot be read (is not a regular file)"),
    "device as study": ("study", device, "cannot be read (is not a regular file)"),
    "sparse study": ("study", lambda path: sparse(path, HUGE), "has 10,000,000,000 bytes, may have at most 1,000,000"),
    "deep study": (
        "study",
        lambda path: path.write_text("a = " + "[" * 10**5) and path,
        "arrays or tables are too deep",
    ),
    "first": ("first", fifo, "cannot be read (is not a regular file)"),
    "engine": ("engine", fifo, "is not a regular file"),
    "sparse engine": (
        "engine",
        lambda path: sparse(path, HUGE),
        "has 10,000,000,000 bytes, may have at most 1,000,000",
    ),
    "token": ("token", fifo, "cannot be read: is not a regular file"),
    "listener's certificate": ("server", fifo, "is not a regular file"),
    "certificate": ("client", device, "is not a regular file"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "image": decode,
    "npz": lambda path: read_part(open_source(path, "train"), 0),
    "folder": lambda path: read_part(open_source(path, "train"), 0),
    "study": files.read,
    "first": files.read_first,
    "engine": lambda path: read_options(str(path), {}),
    "token": read_token,
    "server": lambda path: wire.server_tls(str(path), str(path)),
    "client": lambda path: wire.client_tls(str(path)),
}


@pytest.mark.slow(seconds=30)
def test_hostile_files_are_one_line_and_take_little(tmp_path: Path) -> None:
    suffixes = {"image": ".png", "npz": ".npz", "study": ".toml", "first": ".toml", "engine": ".toml"}
    paths = {
        name: make(tmp_path / f"{number}{suffixes.get(kind, '')}")
        for number, (name, (kind, make, _)) in enumerate(CASES.items())
    }
    work = json.dumps([(CASES[name][0], str(path)) for name, path in paths.items()])
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_inputs"],
        input=work,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    problems = []
    for line, (name, (_, _, expected)) in zip(done.stdout.splitlines(), CASES.items(), strict=True):
        took = json.loads(line)
        if expected not in took["error"] or "\n" in took["error"] or max(took["memory"], took["read"]) > MORE:
            problems.append((name, took))
    assert problems == []


def main() -> None:
    images.NAMES = 10**6  # instead of two million files
    for kind, path in json.load(sys.stdin):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the maximum, from now on
        before, read = status("VmRSS"), read_bytes()
        try:
            READERS[kind](Path(path))
            error = ""
        except (SearchfmError, ValueError) as refused:
            error = str(refused)
        print(json.dumps({"error": error, "memory": status("VmHWM") - before, "read": read_bytes() - read}), flush=True)


def status(name: str) -> int:
    """Bytes of memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def read_bytes() -> int:
    """Bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_folders_of_the_kernel_hold_no_images() -> None:
    assert list(image_files(Path("/proc"), Path("/proc"))) == []
    assert list(image_files(Path("/sys"), Path("/sys"))) == []


def test_an_image_at_the_limit_is_read(tmp_path: Path) -> None:
    assert decode(flat(tmp_path / "large.png", 7071)).shape == (1, 7071, 7071)


def test_files_in_order_of_their_parts(tmp_path: Path) -> None:
    names = ["b.png", "a/c.png", "a-b/x.png", "a.png", "a/b/deep.png", "c/.hidden.png", "c/text.txt", "c/z.GIF"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    found = image_files(tmp_path, tmp_path)
    assert list(found) == sorted(tmp_path / name for name in names if "c/." not in name and "txt" not in name)
    assert (len(found), found[-1], found[1:3]) == (6, tmp_path / "c" / "z.GIF", list(found)[1:3])
    with pytest.raises(IndexError):
        found[6]


if __name__ == "__main__":
    main()
