"""MLflow's password is printed by no command, on a real server that demands it, be it in its address or apart."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from searchfm.home import TRACKING, Home
from searchfm.show.dashboard import free_port
from tests.serving import Server

pytestmark = pytest.mark.slow(seconds=9)

USER, PASSWORD = "admin", "canary-5e1f-0c2a"
TINY = ("--dataset", "digits", "--epochs", "1", "--workers", "1")


@pytest.fixture(scope="module")
def server(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = new_home(tmp_path_factory.mktemp("server") / "home").path  # with MLflow's tables
    server = Server(folder, free_port(5300), password=PASSWORD)
    server.start()
    yield server
    server.kill()


@dataclass(frozen=True)
class Searchfm:
    """Runs commands on a home of their own and the server."""

    home: Path
    server: Server

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Runs a command that ends with this exit code; returns its output."""
        printing = {
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "false"
        }  # a user's setting does not bring the password back
        done = subprocess.run(
            [sys.executable, "-m", "searchfm", *arguments, "--home", str(self.home)],
            capture_output=True,
            text=True,
            env={**os.environ, **printing, **environment},
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    @property
    def in_address(self) -> dict[str, str]:
        """The environment with user and password in the address."""
        return {TRACKING: f"http://{USER}:{PASSWORD}@127.0.0.1:{self.server.port}"}

    @property
    def apart(self) -> dict[str, str]:
        """The environment with user and password in variables of their own."""
        address = {TRACKING: f"http://127.0.0.1:{self.server.port}"}
        return {**address, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}


@pytest.fixture(scope="module")
def searchfm(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Searchfm:
    """With a study of two trials."""
    searchfm = Searchfm(tmp_path_factory.mktemp("password") / "home", server)
    searchfm("tune", "mlp", "--trials", "2", *TINY, **searchfm.apart)
    return searchfm


def ended(client: MlflowClient) -> set[str]:
    """The ids of all runs that ended: MLflow prints the address of each when it ends."""
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.info.run_id for run in runs if run.info.status == "FINISHED"}


def test_a_server_that_demands_user_and_password_gets_every_trial(searchfm: Searchfm) -> None:
    client = MlflowClient(searchfm.in_address[TRACKING])
    runs = ended(client)
    assert len(runs) == 3  # two trials, and the study's own
    assert sum(any("curves.png" in item.path for item in client.list_artifacts(run)) for run in runs) == 2


@pytest.mark.parametrize(
    "command",
    [
        ("sync", "mlp", "--apply"),
        ("retrain", "mlp", "--trial", "0", "--workers", "1", "--json"),
        ("compare", "mlp", "--json"),
    ],
    ids=lambda command: command[0],
)
def test_no_command_prints_the_password_of_mlflows_address(command: tuple[str, ...], searchfm: Searchfm) -> None:
    client = MlflowClient(searchfm.in_address[TRACKING])
    if command[0] == "sync":
        for run in ended(client):
            client.update_run(run, "RUNNING")  # what sync puts right
    before = ended(client)
    text = searchfm(*command, **searchfm.in_address)
    assert ended(client) > before, "this command ends a run"
    if "--json" in command:
        json.loads(text)


def test_a_server_that_refuses_the_password_is_one_line(searchfm: Searchfm) -> None:
    text = searchfm("sync", "mlp", code=1, **{**searchfm.apart, "MLFLOW_TRACKING_PASSWORD": "wrong"})
    assert text.count("\n") == 1
    assert text.startswith("searchfm: ")
    assert f"127.0.0.1:{searchfm.server.port}" in text
