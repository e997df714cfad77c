"""The project as a whole: its top level, its dependencies, and the README's pictures."""

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *(".ci", ".dockerignore", ".gitattributes", ".github", ".gitignore", ".pre-commit-config.yaml", ".python-version"),
    *("LICENSE", "README.md", "docker", "pyproject.toml", "searchfm", "studies", "tests"),
}
# In pieces, because the test reads this file too. A file that names a registry fails for users of another mirror.
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


def test_the_top_level_holds_only_the_listed_names() -> None:
    assert {name.partition("/")[0] for name in tracked()} <= TOP_LEVEL


def test_no_lock_file_is_tracked() -> None:
    assert not [name for name in tracked() if Path(name).name == "uv.lock"]


def test_no_file_names_a_registry() -> None:
    named = [(name, host.decode()) for name in tracked() for host in REGISTRIES if host in (ROOT / name).read_bytes()]
    assert not named


def test_every_dependency_has_a_lower_bound_and_no_other() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    groups = [*table["project"]["optional-dependencies"].values(), *table["dependency-groups"].values()]
    requirements = [*table["project"]["dependencies"], *(line for group in groups for line in group)]
    assert [line for line in requirements if not re.fullmatch(r"[\w.-]+(\[\w+\])?>=\d+(\.\d+)*", line)] == []


def test_the_readmes_pictures_are_small_and_load_nothing() -> None:
    """They are made by `python -m tests.pictures`."""
    names = re.findall(r'<img [^>]*src="([^"]+)"', (ROOT / "README.md").read_text("utf-8"))
    assert {Path(name).name for name in names} == {path.name for path in (ROOT / ".github" / "images").iterdir()}
    for name in names:
        assert (ROOT / name).stat().st_size < 150_000, name
        if name.endswith(".svg"):
            assert not re.search(r"@font-face|@import|href=|url\((?!#)", (ROOT / name).read_text("utf-8")), name
