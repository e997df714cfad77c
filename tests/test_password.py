"""A password in MLflow's address is printed by no command, on a real server that must be reached with it in the URL."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from mlflow.tracking import MlflowClient

from searchfm.home import TRACKING
from searchfm.show.dashboard import free_port
from tests.serving import Server

pytestmark = pytest.mark.slow

PASSWORD = "canary-5e1f"
TINY = ("--dataset", "digits", "--epochs", "1", "--workers", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), free_port(5300))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def searchfm(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command that uses the server; returns its stdout."""
    home = tmp_path_factory.mktemp("password") / "home"
    environment = {
        **os.environ,
        TRACKING: f"http://user:{PASSWORD}@127.0.0.1:{server.port}",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "false",  # a user's setting does not bring the password back
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "searchfm", *arguments, "--home", str(home)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        return done.stdout

    run("tune", "mlp", "--trials", "2", *TINY)
    return run


def ended(client: MlflowClient) -> set[str]:
    """The ids of all runs that ended: MLflow prints the address of each when it ends."""
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.info.run_id for run in runs if run.info.status == "FINISHED"}


@pytest.mark.parametrize(
    "command",
    [
        ("sync", "mlp", "--apply"),
        ("retrain", "mlp", "--trial", "0", "--workers", "1", "--json"),
        ("compare", "mlp", "--json"),
    ],
    ids=lambda command: command[0],
)
def test_no_command_prints_the_password_of_mlflows_address(
    command: tuple[str, ...], searchfm: Callable[..., str], server: Server
) -> None:
    client = MlflowClient(f"http://127.0.0.1:{server.port}")
    if command[0] == "sync":
        for run in ended(client):
            client.update_run(run, "RUNNING")  # what sync puts right
    before = ended(client)
    text = searchfm(*command)
    assert ended(client) > before, "this command ends a run"
    if "--json" in command:
        json.loads(text)
