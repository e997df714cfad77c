"""No password of PostgreSQL or MLflow is anywhere but in the environment of searchfm's own commands.

Every command runs on real servers that demand the passwords, and fails on them in several ways; then all that was
printed, written, stored, served and listed by `ps` is searched for them, as they are typed and decoded.
"""

import base64
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
import typer
from mlflow.tracking import MlflowClient
from PIL import Image

from searchfm import cli
from searchfm.home import STORAGE, TRACKING, Home
from tests.commands import searchfm_here
from tests.programs import worker_port
from tests.serving import Postgres, Server
from tests.test_project import ROOT

pytestmark = [
    pytest.mark.slow(seconds=18),
    pytest.mark.usefixtures("own_forkserver"),
    # Commands leave their connections to the end of their process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

# "@", "%" and "+" are %40, %25 and %2B in an address.
DATABASE, MLFLOW, QUERY = "data-c4n@ry-%1+", "mlflow-c4n@ry-%2+", "query-c4n@ry-3"
CANARY = re.compile(
    b"c4n@ry|c4n%40ry|c4n%2540ry|" + re.escape(base64.b64encode(f"admin:{MLFLOW}".encode())), re.IGNORECASE
)
NETS = """import os, signal, sys
from torch import nn

class Net(nn.Sequential):
    def forward(self, images):
        if self.training and os.path.exists("crash"):
            print("this worker crashes", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)

def net(shape, classes):
    print("the environment of code:", dict(os.environ), open("/proc/self/environ").read(), flush=True)
    return Net(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""
OWN = """# Question: what does code of a user see?
[search]
trials = 1
retries = 1
[data]
name = "digits"
[model]
name = "custom"
[model.custom]
factory = "canary_nets:net"
[train]
epochs = 1
"""
BUG = """
import sys
from searchfm import cli
from searchfm.search import storage
def load_study(*_):
    raise RuntimeError("a bug on purpose")
storage.load_study = load_study
cli.main()
"""


# MLflow prints addresses of runs: a user's setting does not bring that back.
PRINTING = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "false"}


def quoted(password: str) -> str:
    return sqlalchemy.URL.create("x", "u", password, "h").render_as_string(hide_password=False)[6:-2]


class Listed:
    """Reads the command lines of all processes of this machine, and the environments of workers, as `ps` does.

    Commands and workers are those with this folder in their environment: other tests have some too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = bytes(folder)
        self.guilty: set[str] = set()
        self.commands: set[str] = set()
        self.workers: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Listed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._over.wait(0.03):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has ended
                    command = (folder / "cmdline").read_bytes()
                    if CANARY.search(command):
                        self.guilty.add(command.decode(errors="replace"))
                    if b"searchfm" not in command:
                        continue
                    environment = (folder / "environ").read_bytes()
                    ours, worker = self.folder in environment, b"multiprocessing.forkserver" in command
                    if ours:
                        self.commands.add(command.decode(errors="replace"))
                    if ours and worker:
                        self.workers.add(int(folder.name))
                    if worker and CANARY.search(environment):
                        self.guilty.add(f"environment of {command.decode(errors='replace')}")


@dataclass
class Place:
    """A folder with a home, both servers, and all that commands printed."""

    folder: Path
    server: Server
    storage: str
    pages: str  # a database for MLflow's pages
    covered: set[str] = field(default_factory=set)
    printed: list[str] = field(default_factory=list)

    @property
    def home(self) -> Home:
        return Home(self.folder / "runs")

    @property
    def variables(self) -> dict[str, str]:
        return {
            "SEARCHFM_CACHE": str(self.folder / "cache"),
            STORAGE: self.storage,
            TRACKING: f"http://admin:{quoted(MLFLOW)}@127.0.0.1:{self.server.port}",
        }

    @property
    def apart(self) -> dict[str, str]:
        """The environment with MLflow's user and password in variables of their own."""
        address = {TRACKING: f"http://127.0.0.1:{self.server.port}"}
        return {**address, "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": MLFLOW}

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        self.covered.add(arguments[0])
        return subprocess.Popen(
            [sys.executable, "-m", "searchfm", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **PRINTING, **self.variables, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: "subprocess.Popen[str]") -> str:
        out, err = process.communicate(timeout=300)
        self.printed.append(f"{process.args}: {process.returncode}\n{out}\n{err}")
        return out + err

    def run(self, *arguments: str, codes: Sequence[int] = (0,), **environment: str) -> str:
        """In this process: the imports of some sixty commands take most of their time."""
        self.covered.add(arguments[0])
        done = searchfm_here(*arguments, cwd=self.folder, **{**self.variables, **environment})
        text = done.stdout + done.stderr
        self.printed.append(f"{arguments}: {done.returncode}\n{text}")
        assert done.returncode in codes, (done.returncode, text)
        return text

    def fetch(self, address: str, data: bytes | None = None) -> str:
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode(errors="replace") + str(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace") + str(error.headers)
        self.printed.append(f"{address}\n{text}")
        return text


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What warns of its end warns here, where it is ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def listed(place: Place) -> Iterator[Listed]:
    with Listed(place.folder) as listed:
        yield listed


@pytest.fixture(scope="module")
def place(
    new_home: Callable[[Path], Home], postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("canary")
    with psycopg.connect(postgres_server.url + "postgres", autocommit=True) as connection:
        connection.execute(f"CREATE ROLE canary LOGIN PASSWORD '{DATABASE}'")
        for name in ("canary", "canary_mlflow"):
            connection.execute(f"CREATE DATABASE {name} OWNER canary")
        (rules,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        old = Path(rules).read_text()
        Path(rules).write_text("host all canary 127.0.0.1/32 scram-sha-256\n" + old)
        connection.execute("SELECT pg_reload_conf()")
    address = f"{postgres_server.url.replace('postgres@', f'canary:{quoted(DATABASE)}@')}"
    server = Server(new_home(folder / "server").path, worker_port(5400), password=MLFLOW.replace("%", "%%"))
    server.start()
    values = f"application_name={quoted(QUERY)}&sslpassword={quoted(QUERY)}"
    yield Place(folder, server, f"{address}canary?{values}", f"{address}canary_mlflow?{values}")
    server.kill()


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def ended(client: MlflowClient) -> list[str]:
    """The ids of all runs that ended: MLflow prints the address of each when it ends."""
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [run.info.run_id for run in runs if run.info.status == "FINISHED"]


TINY = ("--dataset", "digits", "--epochs", "1", "--workers", "1")


def test_every_command_works_with_both_passwords(place: Place, listed: Listed) -> None:
    """What later tests search is only worth it if all of this succeeds."""
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(place.storage.partition("?")[0].replace(quoted(DATABASE), "wrong"))
    Image.new("L", (8, 8)).save(place.folder / "black.png")
    place.run("tune", "mlp", "--trials", "2", *TINY)
    place.run("tune", "mlp", "--trials", "3", "--json", "--workers", "1", **place.apart)
    client = MlflowClient(place.variables[TRACKING])
    runs = ended(client)
    assert len(runs) == 4  # three trials, and the study's own
    assert sum(any("curves.png" in item.path for item in client.list_artifacts(run)) for run in runs) == 3
    client.update_run(runs[0], "RUNNING")
    place.run("sync", "mlp", "--apply", **place.apart)
    client.update_run(runs[1], "RUNNING")
    for command in (  # in processes: this one has imported MLflow, whose settings stay
        ("sync", "mlp", "--apply", "--json"),
        ("retrain", "mlp", "--trial", "0", "--workers", "1", "--json"),
    ):
        assert json.loads(place.end(place.start(*command)).partition("\n")[0])
    assert set(ended(client)) > set(runs)  # sync has put the two right, retrain has added its own
    place.run("tune", "mlp", "--name", "forecast", "--dry-run", *TINY)
    for command in (
        ("status",),
        ("status", "mlp", "--json"),
        ("status", "mlp", "--csv"),
        ("trial", "mlp", "0"),
        ("studies", "mlp"),
        ("keys", "optimizer"),
        ("data", "digits"),
        ("sync", "mlp"),
        ("compare", "mlp", "--html", "compared.html"),
        ("report", "mlp"),
        ("models", "--json"),
        ("export", "mlp", "--format", "safetensors"),
        ("predict", "mlp", "black.png", "--json"),
        ("check", "--json"),
        ("clean", "--apply", "--json"),
        ("backup", "copied", "--json"),
    ):
        place.run(*command)
    assert json.loads(place.end(place.start("compare", "mlp", "--json")))
    place.run("stop", "mlp", codes=(2,))  # nothing runs


def test_workers_have_no_password_even_where_they_crash(place: Place, listed: Listed) -> None:
    (place.folder / "canary_nets.py").write_text(NETS)
    (place.folder / "own.toml").write_text(OWN)
    place.run("tune", "own.toml", "--allow-code", "--workers", "1")
    (place.folder / "crash").touch()
    place.run("tune", "own.toml", "--name", "crashed", "--allow-code", "--workers", "1", codes=(1,))
    logs = [path.read_text() for path in place.home.path.rglob("log*.txt")]
    assert any("the environment of code" in log for log in logs)
    assert any("this worker crashes" in log for log in logs)
    assert listed.workers


def test_workers_that_dial_in(place: Place, listed: Listed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"127.0.0.1:{free.getsockname()[1]}"
    tune = place.start(
        "tune", "mlp", "--name", "dialled", "--trials", "2", *TINY[:4], "--engine", "listen", "--listen", where
    )
    until(lambda: (place.home.path / "worker.key").is_file())
    worker = place.start("worker", where, "--workers", "1", "--retry", "300")
    place.end(tune)
    place.end(worker)
    assert (tune.returncode, worker.returncode) == (0, 0)


@contextmanager
def serving(place: Place, *options: str, lines: int, **environment: str) -> Iterator[list[str]]:
    process = place.start("dashboard", *options, **environment)
    assert process.stdout is not None
    printed = [process.stdout.readline() for _ in range(lines)]
    place.printed += printed
    try:
        yield re.findall(r"http\S+", "".join(printed))
    finally:
        process.send_signal(signal.SIGTERM)
        place.end(process)


def test_both_user_interfaces(place: Place, listed: Listed) -> None:
    ports = ("--port", str(worker_port(8500)), "--mlflow-port", str(worker_port(8600)))
    with serving(place, *ports, lines=2) as (dashboard, mlflow):
        assert mlflow.startswith(f"http://127.0.0.1:{place.server.port}/")  # without user and password
        base = f"http://127.0.0.1:{ports[1]}"
        studies = json.loads(place.fetch(f"{base}/api/studies").partition("}server")[0].rpartition("}")[0] + "}")
        assert studies["study_summaries"]
        for path in (
            "/dashboard",
            "/api/meta",
            "/api/studies/1",
            "/api/studies/1/param_importances",
            "/api/x",
            "/mlflow/x",
        ):
            place.fetch(base + path)
        assert dashboard.startswith(base)
    with serving(place, "--only", "mlflow", *ports, lines=1, **{TRACKING: place.pages}) as (address,):
        for path in ("/", "/version", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/api/2.0/mlflow/x", "/x"):
            place.fetch(address.rstrip("/") + path)
        found = place.fetch(f"{address.rstrip('/')}/api/2.0/mlflow/experiments/search", b'{"max_results": 10}')
        assert "Default" in found


def failing(place: Place) -> dict[str, dict[str, str]]:
    """Environments in which databases and servers fail."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = str(free.getsockname()[1])
    storage, tracking = place.variables[STORAGE], place.variables[TRACKING]
    port = re.findall(r":(\d+)/", storage)[0]
    return {
        "wrong passwords": {
            STORAGE: storage.replace("data-", "wrong-"),
            TRACKING: tracking.replace("mlflow-", "wrong-"),
        },
        "the database is down": {STORAGE: storage.replace(f":{port}/", f":{closed}/")},
        "no database of this name": {STORAGE: storage.replace("/canary?", "/none?")},
        "a wrong value": {STORAGE: f"{storage}&sslmode={quoted(QUERY)}"},
        "an @ that is not encoded": {STORAGE: storage.replace("c4n%40ry", "c4n@ry", 1)},
        "no such driver": {STORAGE: storage.replace("postgresql", "mysql", 1)},
        "MLflow with a wrong password apart": {**place.apart, "MLFLOW_TRACKING_PASSWORD": f"wrong-{MLFLOW}"},
        "MLflow is down": {TRACKING: tracking.replace(f":{place.server.port}", f":{closed}")},
        "MLflow with an @, which it accepts": {TRACKING: tracking.replace("c4n%40ry", "c4n@ry")},
        "MLflow by no scheme": {TRACKING: tracking.replace("http://", "")},
        "MLflow by an unknown scheme": {TRACKING: tracking.replace("http://", "canary://")},
    }


FAILING = (
    *(("tune", "mlp", "--trials", "4", "--workers", "1"), ("status",), ("retrain", "mlp", "--again", "--workers", "1")),
    *(("trial", "mlp", "0"), ("sync", "mlp", "--apply"), ("report", "mlp"), ("compare", "mlp"), ("models",)),
    *(("predict", "mlp", "black.png"), ("export", "mlp", "--force"), ("stop", "mlp"), ("remove", "none", "--yes")),
    *(("dashboard", "none"), ("check",), ("clean",), ("backup", "nowhere")),
)


def test_every_failure_is_one_line(place: Place, listed: Listed) -> None:
    """Of the commands that it concerns."""
    for name, environment in failing(place).items():
        concerned = FAILING[:2] if STORAGE in environment else (("sync", "mlp"), ("models",))
        for command in FAILING if name == "wrong passwords" else concerned:
            accepted = "accepts" in name
            text = place.run(*command, codes=(0,) if accepted else (1, 2), **environment)
            if not accepted:
                assert text.count("\n") == 1, (name, command, text)
                assert text.startswith("searchfm: "), (name, command, text)
    place.run("status", "unknown", codes=(2,))
    place.run("status", "mlp", "--unknown", codes=(2,))


def test_a_bug_shows_its_traceback(place: Place, listed: Listed) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUG, "status", "mlp"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **place.variables},
        cwd=place.folder,
        capture_output=True,
        text=True,
    )
    place.printed.append(done.stdout + done.stderr)
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: a bug on purpose" in done.stderr


def found(content: bytes) -> bytes:
    match = CANARY.search(content)
    return content[max(0, match.start() - 100) : match.end() + 100] if match else b""


def stored(place: Place) -> Iterator[tuple[str, str]]:
    """Every row of both databases, as text."""
    for address in (place.storage, place.pages):
        with psycopg.connect(address.partition("?")[0]) as connection:
            tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
            for (table,) in tables:
                for (row,) in connection.execute(f'SELECT t::text FROM "{table}" t').fetchall():  # type: ignore[arg-type]
                    yield table, row


def search(place: Place) -> list[Any]:
    ours = (place.server.folder / "auth.ini", place.server.folder / "auth.db")  # the server's own, of its password
    files = [path for path in place.folder.rglob("*") if path.is_file() and path not in ours]
    assert {path.name for path in files} >= {"report.html", "epochs.csv", "log.txt", "mlflow.db"}
    wrong: list[Any] = [(path, found(path.read_bytes())) for path in files]
    rows = list(stored(place))
    assert len(rows) > 40
    wrong += [(table, found(row.encode())) for table, row in rows]
    wrong += [(text.partition("\n")[0], found(text.encode())) for text in place.printed]
    return [(where, what) for where, what in wrong if what]


def test_no_password_is_anywhere(place: Place, listed: Listed) -> None:
    """The last but one: then `remove` removes what was searched."""
    assert search(place) == []
    assert listed.guilty == set()
    assert any("searchfm.tracking" in command for command in listed.commands)
    assert any("searchfm.show.dashboard" in command for command in listed.commands)
    place.run("remove", "mlp", "--yes", "--models")
    assert search(place) == []


def test_every_command_was_run(place: Place) -> None:
    group: Any = typer.main.get_command(cli.app)
    assert place.covered == set(group.commands)
