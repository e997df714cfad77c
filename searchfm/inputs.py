"""Files that users name: regular ones only, read up to a bound. What a file would take is compared with free memory."""

import errno
import os
import stat
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

TEXT_BYTES = 1_000_000  # bytes of a file of TOML, of a token or a key
SPEC_BYTES = 4_000_000  # bytes of a model's JSON, which names its classes
DEPTH = 32  # of tables and arrays in TOML, and of the parts of a dotted key; ours have at most six


def regular(path: Path) -> int:
    """Bytes in a file. Raises OSError where there is none; for a FIFO, socket or device, whose reading may never end;
    and for a folder.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return status.st_size


def check_size(path: Path, most: int) -> None:
    """Raises OSError for what is no regular file, and for one of more than `most` bytes."""
    if (size := regular(path)) > most:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, may have at most {most:,}", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError."""
    check_size(path, most)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or is a file of the kernel, of size 0
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
    return content


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """As `read_bytes`, as text. Raises UnicodeDecodeError too."""
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n")


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a text. Raises ValueError with the reason: `tomllib.TOMLDecodeError`, or for tables and arrays
    deeper than `DEPTH` and whole numbers beyond 64 bits, which TOML excludes and the standard library reads.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError("its arrays or tables are too deep") from None
    except ValueError:  # of `int`
        raise ValueError("a whole number has more than 64 bits") from None
    level: list[Any] = [table]
    for _ in range(DEPTH):
        entries = [entry for each in level for entry in (each.values() if isinstance(each, dict) else each)]
        if any(isinstance(entry, int) and not -(2**63) <= entry < 2**63 for entry in entries):
            raise ValueError("a whole number has more than 64 bits")
        level = [entry for entry in entries if isinstance(entry, dict | list)]
    if level:
        raise ValueError("its arrays or tables are too deep")
    return table


def free_memory() -> int:
    """Bytes of memory that this process may still take: the machine's free memory; in a container with cgroup v2, at
    most what its limit leaves.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no cgroup, or no limit
        folder = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        limit, current = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Of these the kernel gives back what it needs.
        back = sum(int(used[name]) for name in ("inactive_file", "active_file", "slab_reclaimable"))
        free = min(free, limit - current + back)
    return max(free, 0)
