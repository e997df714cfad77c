"""Files from elsewhere: checked while they arrive, and seen under their own name only when they are whole. No torch."""

import hashlib
import os
import secrets
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from searchfm.errors import DataError

TIMEOUT = 5.0  # seconds for a connection, and for each answer on it
APT_TIMEOUT = 300.0  # seconds for each of apt's commands


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which gets that name, all at once and on the disk, if nothing is raised; else it
    goes, and so does what a killed process left. Callers hold a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*"):
        stale.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def download(url: str, path: Path, md5: str) -> None:
    """Fetches one file. One that breaks off, or whose MD5 is another, leaves nothing behind. Raises DataError."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "searchfm"})
        with whole(path) as temporary:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
                while piece := answer.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != md5:
                raise DataError(f"{url}: refused, its MD5 is {digest.hexdigest()}, must be {md5}")
    except (OSError, HTTPException, ValueError) as error:  # time-outs are OSErrors; ValueError: that is no URL
        raise DataError(f"{url}: {getattr(error, 'reason', '') or error}") from None


def debian_package(package: str, folder: str, wanted: Sequence[str], place: Path) -> None:
    """Puts files of a Debian package's `folder` into `place`: apt downloads and checks the package, dpkg-deb unpacks
    it, and neither needs root. Where the machine has no package lists, lists of our own are fetched and thrown away.
    Callers hold a lock.

    Raises DataError where that is no Debian, no network, or no such package.
    """
    ours = place.parent / ".apt"
    shutil.rmtree(ours, ignore_errors=True)  # what a killed process left
    lists = ["-o", f"Dir::State::Lists={ours}/lists", "-o", f"Dir::Cache={ours}", "-o", "Debug::NoLocking=1"]
    try:
        (ours / "lists" / "partial").mkdir(parents=True)
        try:
            _run(ours, "apt-get", "-qq", "download", package)
        except DataError:
            _run(ours, "apt-get", *lists, "-qq", "update")
            _run(ours, "apt-get", *lists, "-qq", "download", package)
        for archive in ours.glob("*.deb"):
            _run(ours, "dpkg-deb", "-x", archive.name, "unpacked")
        place.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            (ours / "unpacked" / folder / name).replace(place / name)
    except OSError as error:
        raise DataError(f"apt-get download {package}: {error}") from None
    finally:
        shutil.rmtree(ours, ignore_errors=True)


def _run(folder: Path, *command: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=APT_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{' '.join(command)}: no answer within {APT_TIMEOUT:g} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        raise DataError(f"{command[0]} {' '.join(command[-2:])}: {' '.join(lines) or f'exit {done.returncode}'}")
