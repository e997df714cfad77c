"""Homes, databases and workers that tests share. All of them are real."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from filelock import FileLock

from searchfm.errors import DataError
from searchfm.home import HOME, STORAGE, TRACKING, Home
from searchfm.learn import datasets
from tests.programs import missing
from tests.serving import Postgres

# As in a worker. Two test processes of two threads each on two cores take up to 2.7 times as long (TestTransferWhole).
os.environ["OMP_NUM_THREADS"] = "1"
# A final training of two threads beside another test: with threads that spin while they wait, retraining an older home
# takes 69 s (82 of CPU), without 38 s (47).
os.environ["OMP_WAIT_POLICY"] = "passive"
# Every commit of SQLite waits for the disk. In memory the coordinator's tests take two thirds of the time (33 s of 49).
MEMORY, NEEDED = Path("/dev/shm"), 4e9  # bytes; a whole suite leaves less than 1e9
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > NEEDED:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # where pytest keeps its temporary folders
# Processes that tests kill leave their temporary folders; multiprocessing makes one for its sockets. Here they go with
# the tests. The path stays short: that of a socket has at most 107 characters.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    Path(os.environ["TMPDIR"]).chmod(0o755)  # PostgreSQL runs as another user
    atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """No garbage collection looks again at what the tests' modules have imported."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind reports these objects as leaks


ABOUT = {"hosts": 40.0, "slow": 6.0}  # seconds a test with this mark takes, on average; `seconds` of a mark go before
OTHERS = 0.2


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most work first: a long file that begins last leaves the other workers idle."""
    work: Counter[str] = Counter()
    for item in items:
        seconds = [mark.kwargs.get("seconds", ABOUT.get(mark.name, 0.0)) for mark in item.iter_markers()]
        work[_file(item.nodeid)] += max([OTHERS, *seconds])
    items.sort(key=lambda item: (-work[_file(item.nodeid)], _file(item.nodeid)))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


SECONDS: Counter[str] = Counter()  # of each test file, the fixtures included


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    SECONDS[_file(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds by test file, so that growth is seen; under xdist the workers' seconds add up."""
    if not SECONDS.total():
        return
    terminalreporter.section("seconds by test file")
    for file, seconds in SECONDS.most_common():
        if seconds >= 1:
            terminalreporter.write_line(f"{seconds:7.1f}  {file}")
    terminalreporter.write_line(f"{SECONDS.total():7.1f}  in all")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own home or databases."""
    for name in (HOME, STORAGE, TRACKING, "SEARCHFM_UI_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def migrations_read_once() -> Iterator[None]:
    """Whenever a database is opened, Optuna runs all its migration scripts to find the newest: 0.05 s of CPU."""
    read = ScriptDirectory.from_config
    directories: dict[str | None, ScriptDirectory] = {}

    def from_config(config: Config) -> ScriptDirectory:
        folder = config.get_main_option("script_location")
        if folder not in directories:
            directories[folder] = read(config)
        return directories[folder]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", from_config)
        yield


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


MAKE_TABLES = """
import sys
from pathlib import Path
from searchfm.home import Home
from searchfm.search.storage import open_storage
from searchfm.tracking.mirror import make_schema
home = Home(Path(sys.argv[1]))
open_storage(home, create=True)
make_schema(home)
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose two databases have their tables, made once for all workers: MLflow's take 1700 statements, 2 to 4 s.

    Made in a separate process: this one may have to stay without mlflow, or without threads.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each worker has its own folder below that of the session
    folder, unfinished = shared / "template", shared / "template.new"
    with FileLock(shared / "template.lock"):
        if not folder.exists():
            clean = {name: value for name, value in os.environ.items() if name not in (HOME, STORAGE, TRACKING)}
            subprocess.run([sys.executable, "-c", MAKE_TABLES, unfinished], env=clean, check=True)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def new_home(template: Path) -> Callable[[Path], Home]:
    """Makes a home at a path, with all tables and nothing in them, in milliseconds."""
    return lambda path: Home(shutil.copytree(template, path))


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of Fashion-MNIST's four packed files: Debian's, else the cache of downloads."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SEARCHFM_CACHE", "SEARCHFM_DATA"):  # the module under test may have set them
            patch.delenv(name, raising=False)
        try:
            return datasets.fetch("fashion-mnist")
        except DataError:
            missing("this test reads Fashion-MNIST: apt-get install dataset-fashion-mnist")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A temporary PostgreSQL server."""
    folder = Path(tempfile.mkdtemp(prefix="searchfm-pg-"))
    server = Postgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres(postgres_server: Postgres) -> str:
    """The URL of a temporary PostgreSQL server, to append database names to."""
    return postgres_server.url


@pytest.fixture
def database(postgres: str, tmp_path: Path) -> str:
    """The URL of an empty PostgreSQL database."""
    name = f"test_{abs(hash(tmp_path))}"
    with psycopg.connect(postgres + "postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres + name


@pytest.fixture(params=["sqlite", "postgresql"])
def any_home(request: pytest.FixtureRequest, home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with its studies in a SQLite file, and one with its studies on a PostgreSQL server."""
    if request.param == "postgresql":
        monkeypatch.setenv(STORAGE, request.getfixturevalue("database"))
    return home


@pytest.fixture
def unfollowed() -> Iterator[None]:
    """For tests that are not about MLflow; see `without_following`."""
    from tests.driving import without_following  # not for tests of learn/ alone

    with without_following():
        yield


@pytest.fixture(scope="module")
def own_forkserver() -> Iterator[None]:
    """For modules whose workers need no torch, or an environment of their own: a forkserver for the module. It has its
    imports and its environment from its start. The process-wide one goes on afterwards: to start it takes 5 s of CPU.
    """
    server = forkserver.ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("searchfm.forkserver._server", server)  # first: its import reads the process-wide one
        patch.setattr(forkserver, "_forkserver", server)
        for name in ("ensure_running", "get_inherited_fds", "connect_to_new_process", "set_forkserver_preload"):
            patch.setattr(forkserver, name, getattr(server, name))
        yield
        with suppress(psutil.NoSuchProcess):
            # It ends after its workers, and a test that failed may have left some.
            for worker in psutil.Process(server._forkserver_pid or 0).children():
                worker.kill()
        server._stop()
