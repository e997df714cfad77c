"""On a real, small file system: `tune` warns where the disk has less room than its forecast; `backup` into its root."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from searchfm.home import Home
from tests import rows
from tests.programs import missing

# In a namespace of its own, so that the mount ends with the command.
SMALL = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
SEARCH = ("mlp", "--dataset", "digits", "--epochs", "1", "--trials", "2", "--workers", "1")


def on_small_disk(room: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command whose home is a file system of that size."""
    home.mkdir(exist_ok=True)
    shell = ["unshare", "--mount", "sh", "-c", SMALL, "sh", room, str(home)]
    command = [*shell, sys.executable, "-m", "searchfm", *words, "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(autouse=True)
def mounts() -> None:
    """Skips, outside of `.ci/run`, where no file system can be mounted."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        missing("this test mounts a file system, which needs root")


@pytest.mark.slow(seconds=12)
def test_a_search_warns_before_its_first_trial_where_the_disk_is_too_small_and_goes_on(tmp_path: Path) -> None:
    done = on_small_disk("16m", tmp_path / "small", "tune", *SEARCH)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (warning,) = (line for line in lines if "of free disk space" in line)
    assert warning.startswith(f"{tmp_path / 'small'}: has 1")
    assert "searchfm clean" in done.stdout
    assert lines.index(warning) < min(number for number, line in enumerate(lines) if "trial 0" in line)


@pytest.mark.nightly
def test_a_dry_run_does_not_warn_where_there_is_room(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    large = on_small_disk("1g", tmp_path / "large", "tune", *SEARCH, "--dry-run")
    assert (large.returncode, "free disk space" in large.stderr + large.stdout) == (0, False)
    assert "checkpoints while it searches" in large.stdout
    record_property("figures", "a disk of 1 GB")


@pytest.mark.slow(seconds=4)
def test_no_backup_is_written_into_the_root_of_a_file_system(new_home: Callable[[Path], Home], tmp_path: Path) -> None:
    home, disk = new_home(tmp_path / "home"), tmp_path / "disk"
    rows.begin(home)
    rows.forget(home)
    disk.mkdir()
    shell = ["unshare", "--mount", "sh", "-c", SMALL, "sh", "16m", str(disk)]
    command = [*shell, sys.executable, "-m", "searchfm", "backup", str(disk), "--home", str(home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (2, f"searchfm: {disk}: is a mount point; name a new folder in it\n")


@pytest.mark.slow(seconds=15)
def test_a_dry_run_warns_likewise(tmp_path: Path) -> None:
    small = on_small_disk("16m", tmp_path / "small", "tune", *SEARCH, "--dry-run", "--json")
    forecast = json.loads(small.stdout)["forecast"]
    assert forecast["disk"] + forecast["checkpoints"] > 16 * 2**20
    assert "has 17 MB of free disk space, and the search is forecast to take up to " in " ".join(small.stderr.split())
