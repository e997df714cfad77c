"""The project as a whole: what lies where, what it depends on, and that the README's commands are real."""

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import searchfm

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *(".ci", ".dockerignore", ".gitattributes", ".github", ".gitignore", ".pre-commit-config.yaml", ".python-version"),
    *("LICENSE", "README.md", "docker", "pyproject.toml", "searchfm", "studies", "tests"),
}
# In pieces, because this file is read too. A file that names a registry binds whoever has a mirror of their own.
REGISTRIES = tuple(
    bytes(name + end, "ascii")
    for name, end in (
        *(("pypi", ".org"), ("pythonhosted", ".org"), ("download.pytorch", ".org"), ("anaconda", ".org")),
        *(("conda", ".io"), ("npmjs", ".org"), ("npmjs", ".com"), ("yarnpkg", ".com"), ("jsdelivr", ".net")),
        *(("unpkg", ".com"), ("crates", ".io"), ("docker", ".io"), ("docker", ".com"), ("ghcr", ".io")),
        *(("quay", ".io"), ("nvcr", ".io"), ("gcr", ".io"), ("rubygems", ".org"), ("proxy.golang", ".org")),
        *(("deb.debian", ".org"), ("archive.ubuntu", ".com"), ("security.debian", ".org")),
    )
)


@cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def requirements() -> list[str]:
    project = pyproject()["project"]
    groups = [*project["optional-dependencies"].values(), *pyproject()["dependency-groups"].values()]
    return [*project["dependencies"], *(line for group in groups for line in group)]


def commands(document: str) -> list[str]:
    """The lines of a document's first code block."""
    block = re.search(r"^```\w*\n(.*?)^```", (ROOT / document).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return block[1].strip().splitlines() if block else []


def test_the_top_level_holds_only_what_was_agreed() -> None:
    assert {name.partition("/")[0] for name in tracked()} <= TOP_LEVEL


def test_no_lock_file_is_tracked() -> None:
    assert not [name for name in tracked() if Path(name).name == "uv.lock"]


def test_no_file_names_a_registry() -> None:
    named = [(name, host.decode()) for name in tracked() for host in REGISTRIES if host in (ROOT / name).read_bytes()]
    assert not named


@pytest.mark.parametrize("requirement", requirements())
def test_a_dependency_has_a_lower_bound_and_a_reason(requirement: str) -> None:
    assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=\d+(\.\d+)*", requirement)
    lines = [line for line in (ROOT / "pyproject.toml").read_text("utf-8").splitlines() if f'"{requirement}"' in line]
    assert lines
    assert all(re.search(r"[,\]]\s+# \w", line) for line in lines), lines


def test_the_places_that_pyproject_names_are_there() -> None:
    comments = re.findall(r"# (.*)", (ROOT / "pyproject.toml").read_text("utf-8"))
    places = {place for comment in comments for place in re.findall(r"[\w/]+(?:\.py|/(?![\w/]))", comment)}
    assert len(places) > 5
    assert not [place for place in places if not ((ROOT / "searchfm" / place).exists() or (ROOT / place).exists())]


def test_the_readme_opens_with_two_commands() -> None:
    search, *rest = commands("README.md")
    assert search.startswith("pip install uv && uv run searchfm tune ")
    assert "uv run pytest" in rest


def test_the_readmes_search_is_one_that_can_be_asked_for(tmp_path: Path) -> None:
    words = commands("README.md")[0].partition("uv run searchfm ")[2].split()
    asked = [sys.executable, "-m", "searchfm", *words, "--home", str(tmp_path / "home"), "--dry-run"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing behind


def test_what_ci_checks_stands_in_contributing() -> None:
    checked = re.findall(r"^check (uv run .*)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    told = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    assert "bash .ci/run" in told
    assert len(checked) >= 5
    assert not [command for command in checked if command not in told]


def test_the_house_as_built_names_every_room() -> None:
    told = (ROOT / ".github" / "ARCHITECTURE.md").read_text("utf-8")
    files = [path for path in (ROOT / "searchfm").rglob("*.py") if not path.stem.startswith("__")]
    architectures = {
        path for path in files if path.parent.name == "models"
    }  # one file each, which is all there is to say
    names = {path.name for path in {*files} - architectures} | {f"{path.parent.name}/" for path in files}
    assert len(names) > 50
    assert not [name for name in names if not re.search(rf"\b{name}", told)]


def test_the_version_stands_in_one_place() -> None:
    assert pyproject()["project"]["dynamic"] == ["version"]
    assert pyproject()["tool"]["hatch"]["version"]["path"] == "searchfm/__init__.py"
    said = subprocess.run([sys.executable, "-m", "searchfm", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == searchfm.__version__
