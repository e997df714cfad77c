"""The Ray engine on a real cluster: the contract, and what only it does."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.engines import EngineOptions
from searchfm.engines.ray import Ray
from searchfm.engines.remote import RemoteEngine
from searchfm.engines.wire import KEY
from searchfm.errors import UserError, WorldError
from searchfm.home import STORAGE, TRACKING, Home
from searchfm.jobs import EpochDone, Interrupted, Lost
from tests.commands import after_imports, header, searchfm
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
TUNE = [
    "tune",
    "mlp",
    "--set",
    "search.pruner=none",
    "--dataset",
    "digits",
    "--trials",
    "6",
    "--epochs",
    "2",
    "--engine",
    "ray",
    "--workers",
    "2",
    "--home",
]
ENTRIES: dict[str, tuple[str, ...]] = {"tests.toys:work": ()}


class Cluster:
    """A cluster of one node, and engines of toy jobs on it."""

    def __init__(self, process: "subprocess.Popen[str]", home: Path) -> None:
        self.process, self.home = psutil.Process(process.pid), home
        self.launchers: dict[RemoteEngine, Ray] = {}
        self.lines: dict[RemoteEngine, list[str]] = {}  # for the user
        self._shared: dict[int, RemoteEngine] = {}

    def engine(
        self, workers: int, joined: int | None = None, after: Callable[[], object] = lambda: None, **options: Any
    ) -> RemoteEngine:
        """A new engine with so many workers, of which `joined` have joined. after: is called once it has started."""
        lines: list[str] = []
        values = EngineOptions.from_table({"name": "ray", "device": "cpu", "workers": workers, **options})
        launcher = Ray(values, self.home, lines.append, warm="tests.toys", entries=ENTRIES)
        engine = RemoteEngine(
            self.home, launcher.host(), 0, options=values, launcher=launcher, notify=lines.append, entries=ENTRIES
        )
        self.launchers[engine], self.lines[engine] = launcher, lines
        after()
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
        """Closes all engines."""
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
    home = tmp_path_factory.mktemp("ray") / "home"
    home.mkdir()
    # The path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_raylet_start_wait_time_s": "180",
            STORAGE: "postgresql://user:secret@127.0.0.1/optuna",
            TRACKING: "http://127.0.0.1:1",
            "MLFLOW_TRACKING_PASSWORD": "secret",
        }
        command = [sys.executable, "-c", START, folder, str(CORES)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin
            assert process.stdout
            address = next((line.split()[1] for line in process.stdout if line.startswith("up ")), "")
            assert address, "the cluster did not start"
            patch.setenv("RAY_ADDRESS", address)
            cluster = Cluster(process, home)
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
        engine.submit(job("1", folder / "1", epochs=1, ticks_for=600))
        assert isinstance(end(engine), EpochDone)
        (worker,) = cluster.workers()
        worker.parent().parent().kill()
        lost = end(engine)
        assert isinstance(lost, Lost)
        assert "is lost (the connection broke" in lost.reason, "not silent for seconds"
        engine.submit(job("1", folder / "1", attempt=2))  # elsewhere, after what the first attempt left
        assert result(end(engine))["earlier"] == ["attempt-1"]
        wait_until(lambda: not worker.is_running())
        wait_for_workers(engine, 2)

    def test_a_terminated_actor_hands_its_job_back_and_another_actor_comes(
        self, engine: RemoteEngine, cluster: Cluster, folder: Path
    ) -> None:
        engine.submit(job("1", folder / "1", ticks_for=600))
        wait_until((folder / "1" / "attempt-1" / "tick").exists)
        (worker,) = cluster.workers()
        worker.parent().parent().terminate()
        assert end(engine) == Interrupted("1", 1)
        wait_for_workers(engine, 2)

    def test_workers_have_no_passwords_and_no_key(self, engine: RemoteEngine, cluster: Cluster) -> None:
        for name in ("1", "2"):
            engine.submit(job(name, ticks_for=1))
        wait_until(lambda: len(cluster.workers()) == 2)
        for worker in cluster.workers():
            assert worker.environ()
            assert not [name for name in worker.environ() if name.startswith((STORAGE, "MLFLOW_"))]
            assert not {KEY, "RAY_AUTH_TOKEN"} & worker.environ().keys()
        assert all("secret" in actor.environ()[STORAGE] for actor in cluster.actors())  # they could have had them
        events(engine, 2)


def test_a_worker_without_room_waits_and_the_others_work(cluster: Cluster) -> None:
    cluster.close()
    engine = cluster.engine(2, joined=1, ray={"cpus_per_worker": 2.0})
    engine.submit(job())
    assert result(end(engine))["device"] == "cpu"
    line = "waiting for 1 of 2 workers: the cluster has no room yet"
    wait_until(lambda: engine.next_event(0.1) or line in cluster.lines[engine])
    assert engine.free == 1
    engine.close()


def test_a_cluster_without_a_gpu_has_none_for_workers(cluster: Cluster) -> None:
    with pytest.raises(UserError, match="--device cuda: the cluster has no GPU; --gpus-per-worker 1 waits for one"):
        cluster.engine(1, device="cuda")


def test_a_worker_that_cannot_have_the_key_is_refused_in_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "home", tmp_path)
    with pytest.raises(WorldError, match=r"RAY_ADDRESS .*: node .*: .*worker.key: has mode 644, must be 600"):
        cluster.engine(1, after=lambda: (tmp_path / "worker.key").chmod(0o644))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"device": "cuda:1"}, "--device cuda:1: with --engine ray must be auto, cpu or cuda; Ray chooses the GPU"),
        ({"workers_per_gpu": 2}, "--workers-per-gpu 2: with --engine ray, --gpus-per-worker shares a GPU: 0.25"),
    ],
)
def test_what_ray_cannot_do_is_refused(options: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Ray(EngineOptions.from_table({"name": "ray", **options}), tmp_path, print)
    assert str(caught.value) == line


def test_where_no_cluster_answers_one_line_says_so(tmp_path: Path) -> None:
    done = searchfm(*TUNE, str(tmp_path / "home"), RAY_ADDRESS="127.0.0.1:1")
    line = "searchfm: RAY_ADDRESS 127.0.0.1:1: no Ray cluster answers (Connection refused)\n"
    assert (done.returncode, after_imports(done.stdout), done.stderr) == (1, header("mlp", "digits"), line)


def test_without_ray_one_line_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from searchfm import cli; cli.main()"
    command = [sys.executable, "-c", code, *TUNE, str(tmp_path / "home")]
    wide = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=wide)
    line = "searchfm: --engine ray: Ray is not installed; pip install 'searchfm[ray]'\n"
    assert (done.returncode, after_imports(done.stdout), done.stderr) == (2, header("mlp", "digits"), line)


def test_a_search_starts_a_cluster_once_more_if_it_must_and_leaves_nothing(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home").path
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {STORAGE: f"sqlite:///{tmp_path}/optuna.db", KEY: "k" * 32}
    command = [sys.executable, "-m", "searchfm", *TUNE, str(home)]
    killed, family, folders, seen, exposed = False, set[psutil.Process](), set[str](), 0, set[str]()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        while process.poll() is None:
            for child in children(psutil.Process(process.pid), recursive=True):
                family.add(child)
                with suppress(psutil.Error):
                    if child.name() == "raylet":
                        folders |= set(re.findall(r"/tmp/searchfm-ray-\w+", " ".join(child.cmdline())))
                        if not killed:
                            child.kill()  # as if it had given up at its start
                        killed = True
                    # Before a child runs its own program, it shows the environment that its parent began with.
                    own = not "".join(child.cmdline()[:1]).startswith("ray::")
                    if own and child.parent().name().startswith("ray::Worker"):
                        seen += 1
                        exposed |= child.environ().keys() & {STORAGE, KEY}
            time.sleep(0.1)
        output, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, errors
    first = "searchfm: starting a Ray cluster on this machine\n"
    again = r"searchfm: the Ray cluster did not start \(its raylet died\); trying again\n"
    assert re.fullmatch(first + again + "(searchfm: node .* joined: cpu\n){2}", errors), errors
    assert "6 complete of 6" in output
    assert seen
    assert not exposed
    assert not psutil.wait_procs(family, 5)[1]
    assert folders
    assert not any(map(os.path.exists, folders))
