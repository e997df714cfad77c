"""The wheel, built, installed in a fresh environment and run away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import searchfm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.relative_to(ROOT / "studies") for path in (ROOT / "studies").rglob("*.toml"))
Command = Callable[..., subprocess.CompletedProcess[str]]


def uv(*arguments: str | Path) -> None:
    program = os.environ.get("UV") or shutil.which("uv")
    assert program, "uv is not there; CONTRIBUTING.md says how to get it"
    subprocess.run([program, *arguments], check=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a program of a fresh environment that holds the wheel, in an empty folder, and returns its output."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    uv("venv", "--quiet", "--python", sys.executable, environment)
    uv("pip", "install", "--quiet", "--no-deps", "--python", environment / "bin" / "python", wheel)
    # A .pth file shares the dependencies, which are gigabytes, without the checkout's own editable install.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SEARCHFM"))}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("anywhere")
        command = [str(environment / "bin" / program), *arguments]
        return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300, check=True)

    return run


def test_the_wheel_holds_the_package_its_studies_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"searchfm-{searchfm.__version__}-py3-none-any.whl"
    assert STUDIES
    assert {f"searchfm/_studies/{path}" for path in STUDIES} <= names
    assert "searchfm/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"searchfm", f"searchfm-{searchfm.__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_installed_command_lists_every_study_and_the_module_is_the_same_command(installed: Command) -> None:
    printed = installed("searchfm", "studies", "--json").stdout
    assert sorted(row["study"] for row in json.loads(printed)) == sorted(str(path.with_suffix("")) for path in STUDIES)
    assert installed("python", "-m", "searchfm", "studies", "--json").stdout == printed


@pytest.mark.parametrize("path", {path.parent: path for path in STUDIES}.values(), ids=str)  # one of each folder
def test_a_shipped_study_is_found_from_any_folder(installed: Command, path: Path) -> None:
    output = installed("searchfm", "studies", str(path.with_suffix("")))
    assert path.stem in output.stdout + output.stderr


def test_the_installed_package_runs_and_not_the_checkout(installed: Command) -> None:
    where = installed("python", "-c", "import searchfm; print(searchfm.__file__)").stdout.strip()
    assert not Path(where).is_relative_to(ROOT)
