"""The Ray engine on a real cluster: the contract, and what only it does."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.engines import EngineOptions
from searchfm.engines.ray import Ray
from searchfm.engines.remote import RemoteEngine
from searchfm.home import STORAGE, TRACKING
from searchfm.jobs import EpochDone, Lost
from tests.engines.contract import EngineContract, end, events, job, result, wait_until

pytestmark = pytest.mark.slow

CORES = 3  # for an engine of two workers and one of one
START = """
import ray, sys
options = {"num_cpus": int(sys.argv[2]), "include_dashboard": False, "object_store_memory": 100_000_000}
context = ray.init(address="local", _temp_dir=sys.argv[1], log_to_driver=False, **options)
print("up", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""
ENTRIES: dict[str, tuple[str, ...]] = {"tests.toys:work": ()}


class Cluster:
    """A cluster of one node, and engines of toy jobs on it."""

    def __init__(self, process: "subprocess.Popen[str]", home: Path) -> None:
        self.process, self.home = psutil.Process(process.pid), home
        self.launchers: dict[RemoteEngine, Ray] = {}
        self.lines: dict[RemoteEngine, list[str]] = {}  # for the user
        self._shared: dict[int, RemoteEngine] = {}

    def engine(self, workers: int, joined: int | None = None, **options: Any) -> RemoteEngine:
        """A new engine with so many workers, of which `joined` have joined."""
        lines: list[str] = []
        values = EngineOptions.from_table({"name": "ray", "device": "cpu", "workers": workers, **options})
        launcher = Ray(values, self.home, lines.append, warm="tests.toys", entries=ENTRIES)
        engine = RemoteEngine(
            self.home, launcher.host(), 0, options=values, launcher=launcher, notify=lines.append, entries=ENTRIES
        )
        self.launchers[engine], self.lines[engine] = launcher, lines
        wait_for_workers(engine, joined or workers)
        return engine

    def fresh(self, workers: int) -> RemoteEngine:
        """An engine of workers that have done nothing. Its actors have: to start them takes seconds."""
        engine = self._shared.get(workers)
        if engine is None or not self.runs(engine):
            engine = self._shared[workers] = self.engine(workers)
        while engine.busy or engine.next_event(0.0):
            engine.next_event(0.1)
        for process in self.workers():
            process.kill()
        wait_until(lambda: not self.workers())
        time.sleep(0.1)  # for the actors to see it too
        return engine

    def runs(self, engine: RemoteEngine) -> bool:
        driver = self.launchers[engine]._driver
        return driver is not None and driver.poll() is None

    def actors(self) -> list[psutil.Process]:
        return [child for child in children(self.process, recursive=True) if name(child).startswith("ray::Worker")]

    def workers(self) -> list[psutil.Process]:
        """The processes that run jobs: forks of forkservers, which are children of actors."""
        return [worker for actor in self.actors() for server in children(actor) for worker in children(server)]

    def close(self) -> None:
        for engine in self.launchers:
            if self.runs(engine):
                engine.close()


def children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive)
    return []


def name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def wait_for_workers(engine: RemoteEngine, free: int) -> None:
    def enough() -> bool:
        engine.next_event(0.05)
        return engine.free == free

    wait_until(enough, 90)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster that RAY_ADDRESS names. Whoever started it had passwords in the environment."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").touch(0o600)
    (folder / "token").write_text("a" * 64)
    (folder / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "180",
            STORAGE: "postgresql://user:secret@127.0.0.1/optuna",
            TRACKING: "http://127.0.0.1:1",
            "MLFLOW_TRACKING_PASSWORD": "secret",
        }
        command = [sys.executable, "-c", START, str(folder), str(CORES)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin
            assert process.stdout
            address = next((line.split()[1] for line in process.stdout if line.startswith("up ")), "")
            patch.setenv("RAY_ADDRESS", address)
            cluster = Cluster(process, folder / "home")
            yield cluster
            cluster.close()
            process.stdin.close()


class TestRayEngine(EngineContract):
    @pytest.fixture
    def engine(self, cluster: Cluster) -> RemoteEngine:
        return cluster.fresh(2)

    @pytest.fixture
    def single(self, cluster: Cluster) -> RemoteEngine:
        return cluster.fresh(1)

    @pytest.fixture
    def folder(self, cluster: Cluster, tmp_path: Path) -> Path:
        return cluster.home / tmp_path.name

    def test_a_killed_actor_loses_its_job_at_once_and_another_actor_comes(
        self, engine: RemoteEngine, cluster: Cluster, folder: Path
    ) -> None:
        engine.submit(job("1", folder / "1", epochs=1, ticks_for=60))
        assert isinstance(end(engine), EpochDone)
        (worker,) = cluster.workers()
        worker.parent().parent().kill()
        began = time.monotonic()
        lost = end(engine)
        assert time.monotonic() - began < 2
        assert isinstance(lost, Lost)
        engine.submit(job("1", folder / "1", attempt=2))  # elsewhere, after what the first attempt left
        assert result(end(engine))["earlier"] == ["attempt-1"]
        wait_until(lambda: not worker.is_running(), 5)
        wait_for_workers(engine, 2)

    def test_workers_have_no_passwords_and_no_key(self, engine: RemoteEngine, cluster: Cluster) -> None:
        for name in ("1", "2"):
            engine.submit(job(name, ticks_for=1))
        wait_until(lambda: len(cluster.workers()) == 2)
        for worker in cluster.workers():
            assert worker.environ()
            assert not [name for name in worker.environ() if name.startswith((STORAGE, "MLFLOW_", "SEARCHFM_WORKER"))]
        assert any("secret" in actor.environ().get(STORAGE, "") for actor in cluster.actors())  # they could have had
        events(engine, 2)
