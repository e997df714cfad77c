"""Homes, databases and workers that tests share. All of them are real."""

import multiprocessing.forkserver
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from searchfm.home import HOME, STORAGE, TRACKING, Home


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the home or databases of whoever runs it."""
    for name in (HOME, STORAGE, TRACKING):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of the tests' own, as the URL that database names are appended to."""
    found = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    assert found, "these tests need a PostgreSQL server: apt-get install postgresql"
    programs, folder = Path(found).parent, Path(tempfile.mkdtemp(prefix="searchfm-pg-"))
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = "postgres"
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    run(str(programs / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")
    options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(programs / "pg_ctl"), "start", "-w", "-D", str(data), "-o", options, "-l", str(folder / "log"))
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/"
    finally:
        run(str(programs / "pg_ctl"), "stop", "-D", str(data), "-m", "immediate")
        shutil.rmtree(folder)


@pytest.fixture
def database(postgres: str, tmp_path: Path) -> str:
    """The URL of an empty PostgreSQL database."""
    name = f"test_{abs(hash(tmp_path))}"
    with psycopg.connect(postgres + "postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres + name


@pytest.fixture(params=["sqlite", "postgresql"])
def any_home(request: pytest.FixtureRequest, home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home that keeps its studies in a file of its own, and one that keeps them on a server."""
    if request.param == "postgresql":
        monkeypatch.setenv(STORAGE, request.getfixturevalue("database"))
    return home


@pytest.fixture(scope="module")
def cold_forkserver() -> Iterator[None]:
    """For modules whose workers need no torch: what the process-wide forkserver has imported stays in the module."""
    multiprocessing.forkserver._forkserver._stop()
    yield
    multiprocessing.forkserver._forkserver._stop()
