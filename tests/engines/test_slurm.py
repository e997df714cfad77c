"""The SLURM launcher: the contract on a real slurmctld with two slurmd, tasks that end, and what sbatch refuses."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from searchfm.engines import EngineOptions, slurm
from searchfm.engines.remote import RemoteEngine
from searchfm.engines.slurm import Slurm
from searchfm.engines.start import read_options
from searchfm.errors import WorldError
from searchfm.jobs import Finished, Interrupted, Lost
from tests.agents import ENTRIES, await_free
from tests.commands import header, searchfm_here
from tests.engines.contract import EngineContract, end, events, job, result, wait_until
from tests.slurm import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), {"n1": "127.0.0.1", "n2": "127.0.0.1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    assert not cluster.left()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def lines() -> list[str]:
    """What the engine reported to the user."""
    return []


Launch = Callable[..., RemoteEngine]


def start_engine(home: Path, workers: int, notify: Callable[[str], None], **flags: object) -> RemoteEngine:
    """An engine of so many toy agents, each with one worker."""
    options = EngineOptions.from_table({"name": "slurm", "workers": workers, "slurm": flags})

    def command(address: str) -> list[str]:
        return [sys.executable, "-m", "tests.agents", address, str(home), "node", "1"]

    launcher = Slurm(options, home, notify, command)
    return RemoteEngine(home, launcher.host(), 0, launcher=launcher, notify=notify, entries=ENTRIES)


@pytest.fixture
def start(cluster: Cluster, home: Path, lines: list[str]) -> Iterator[Launch]:
    """Starts an engine, and closes it at the end."""
    engines = []

    def start(workers: int, wait: int | None = None, **flags: object) -> RemoteEngine:
        engines.append(start_engine(home, workers, lines.append, **flags))
        await_free(engines[-1], workers if wait is None else wait)
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="class")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract") / "home"


@pytest.fixture(scope="class")
def fresh(cluster: Cluster, shared: Path) -> Iterator[Launch]:
    engines: dict[int, RemoteEngine] = {}

    def fresh(workers: int) -> RemoteEngine:
        if workers not in engines:
            engines[workers] = start_engine(shared, workers, lambda line: None)
            await_free(engines[workers], workers)
        for agent in [process for process in cluster.left() if "tests.agents" in process.cmdline()]:
            for server in agent.children():
                for worker in server.children():
                    worker.kill()
                    worker.wait(10)
        while engines[workers].next_event(0.2):  # until the agents have seen it too
            pass
        return engines[workers]

    yield fresh
    for engine in engines.values():
        engine.close()


class TestSlurm(EngineContract):
    """An array job of each size serves all tests. Its workers are killed between two tests: tests count jobs."""

    @pytest.fixture
    def engine(self, fresh: Launch) -> RemoteEngine:
        return fresh(2)

    @pytest.fixture
    def single(self, fresh: Launch) -> RemoteEngine:
        return fresh(1)

    @pytest.fixture
    def folder(self, shared: Path, request: pytest.FixtureRequest) -> Path:
        return shared / request.node.name


# --- what SLURM does to its tasks -------------------------------------------------------------------------------------


def work_on(engine: RemoteEngine, folder: Path, *names: str) -> None:
    """Gives each worker a job that ticks, and returns once all do."""
    for name in names:
        engine.submit(job(name, folder / name, ticks_for=600))
    for name in names:
        wait_until((folder / name / "attempt-1" / "tick").exists)


def task(cluster: Cluster, index: int) -> str:
    """A running task of the one job there is, as SLURM names it."""
    lines = cluster.run("squeue", "--noheader", "--array", "--states=running", "--format=%i").split()
    return next(name for name in lines if name.endswith(f"_{index}"))


def test_a_cancelled_task_hands_its_job_back_and_the_other_goes_on(
    cluster: Cluster, start: Launch, home: Path, lines: list[str]
) -> None:
    engine = start(2)
    work_on(engine, home / "jobs", "1", "2")
    cluster.run("scancel", task(cluster, 0))
    interrupted = end(engine, 10)
    assert isinstance(interrupted, Interrupted)
    # It may come after the job's end.
    wait_until(lambda: engine.next_event(0.1) is None and "node node leaves" in lines)
    engine.stop({"1": "2", "2": "1"}[interrupted.job])
    assert isinstance(end(engine), Interrupted)
    engine.submit(job("3"))
    assert isinstance(end(engine), Finished)


def test_a_preempted_task_hands_its_job_back_is_requeued_and_comes_again(
    cluster: Cluster, start: Launch, home: Path
) -> None:
    engine = start(1)
    work_on(engine, home / "jobs", "1")
    number, node = cluster.run("squeue", "--noheader", "--array", "--states=running", "--format=%i %N").split()
    urgent = ("--parsable", "--partition=urgent", "--nodes=1", "--ntasks=2", f"--nodelist={node}", "--output=/dev/null")
    other = cluster.run("sbatch", *urgent, "--wrap=sleep 60").strip()
    assert isinstance(end(engine, 20), Interrupted)
    cluster.run("scancel", other)
    wait_until(lambda: "(BeginTime)" in cluster.run("squeue"))
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")  # else it waits for its credential to expire
    await_free(engine, 1)
    engine.submit(job("1", home / "jobs" / "1", attempt=2))
    assert result(end(engine))["earlier"] == ["attempt-1"]
    (output,) = (home / "slurm").iterdir()
    assert "DUE TO PREEMPTION" in output.read_text()
    assert output.read_text().count("joined") == 2


def test_waiting_tasks_are_shown_once_with_slurms_reason(
    cluster: Cluster, start: Launch, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(slurm, name, 0.5)
    engine = start(2, wait=0, args=("--begin=now+1hour",))
    wait_until(lambda: engine.next_event(0.1) is None and len(lines) > 1)
    for _ in range(10):  # several looks at the queue
        assert engine.next_event(0.1) is None
    number = lines[0].split()[2].rstrip(":")
    assert lines[1:] == [f"slurm: job {number}: 2 of 2 workers wait for SLURM: BeginTime"]
    engine.close()
    assert not cluster.run("squeue", "--noheader")


def test_a_killed_task_loses_its_job_and_without_any_task_left_the_search_ends(
    cluster: Cluster, start: Launch, home: Path
) -> None:
    engine = start(1)
    work_on(engine, home / "jobs", "1")
    (agent,) = [process for process in cluster.left() if "tests.agents" in process.cmdline()]
    agent.kill()  # as the out-of-memory killer does; SLURM itself sends SIGTERM first
    lost = end(engine, 10)
    assert isinstance(lost, Lost)
    assert lost.reason.startswith("node node is lost")
    with pytest.raises(WorldError) as ended:
        events(engine, 1)
    (output,) = (home / "slurm").iterdir()
    number, last = output.name.partition("_")[0], output.read_text().strip().splitlines()[-1]
    assert str(ended.value) == f"slurm: job {number}: no worker is left; {output} ends with: {last}"


def test_no_password_reaches_slurm_or_a_worker(
    cluster: Cluster, start: Launch, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SEARCHFM_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("HF_HOME", "kept")
    engine = start(1)
    engine.submit(job())
    worker = psutil.Process(result(end(engine))["pid"])
    assert worker.environ()["HF_HOME"] == "kept"
    family = [worker, *worker.parents()[:3]]  # the forkserver, the agent, slurmstepd
    assert any("slurmstepd" in process.name() for process in family)
    for process in family:
        assert b"sesame" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    kept = [path.read_bytes() for path in cluster.folder.rglob("*") if path.is_file()]
    assert any(b"HF_HOME" in content for content in kept)
    assert not any(b"sesame" in content for content in kept)


# --- options and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "flags"),
    [
        ({}, "--device auto --workers 1"),
        ({"device": "cpu"}, "--device cpu --workers 1"),
        ({"slurm": {"gres": "gpu:1"}}, "--device cuda --workers 1"),
        ({"slurm": {"gres": "nvme:1,gpu:a100:4"}}, "--device cuda"),
        ({"slurm": {"gres": "gpu"}, "workers_per_gpu": 3}, "--device cuda --workers-per-gpu 3"),
        ({"data_dir": "/a b", "tls_cert": "/c"}, "--data-dir /a b --tls-cert /c --device auto --workers 1"),
    ],
)
def test_a_task_has_one_worker_or_one_a_gpu(table: dict[str, Any], flags: str, home: Path) -> None:
    command = Slurm(EngineOptions.from_table({"name": "slurm", **table}), home)._worker("10.0.0.1:27001")
    before = [sys.executable, "-m", "searchfm", "worker", "10.0.0.1:27001", "--home", str(home)]
    assert command[: len(before)] == before
    assert " ".join(command[len(before) :]) == flags


def test_a_file_holds_the_options_and_flags_go_over_it(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[engine]\nname = "slurm"\nworkers = 8\n[engine.slurm]\npartition = "a"\nargs = ["--qos=low"]\n')
    options = read_options(str(file), {"slurm.partition": "b", "slurm.gres": "gpu:1"})
    assert (options.name, options.workers) == ("slurm", 8)
    assert (options.slurm.partition, options.slurm.gres, options.slurm.args) == ("b", "gpu:1", ("--qos=low",))


def tune(home: Path, *flags: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of a search that must not begin."""
    done = searchfm_here("tune", "mlp", "--home", str(home), "--engine", "slurm", *flags, **environment)
    assert done.stdout == header("mlp", "fashion-mnist")  # it is printed before an engine starts
    assert not (home / "optuna.db").exists()
    return done.returncode, done.stderr.splitlines()


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing_running(cluster: Cluster, home: Path) -> None:
    code, lines = tune(home, "--partition", "nowhere")
    refusal = "invalid partition specified: nowhere; Batch job submission failed: Invalid partition name specified"
    assert (code, lines) == (2, [f"searchfm: slurm: sbatch: {refusal}"])
    code, lines = tune(home, "--slurm-args", "--nonsense=1")
    assert (code, lines) == (2, ["searchfm: slurm: sbatch: unrecognized option '--nonsense=1'"])
    assert not cluster.run("squeue", "--noheader")


def test_no_sbatch_and_no_controller_are_one_line(home: Path, tmp_path: Path) -> None:
    code, lines = tune(home, PATH=str(tmp_path))
    assert (code, len(lines)) == (2, 1)
    assert "there is no sbatch here" in lines[0]
    absent = Cluster(tmp_path / "absent", {"n1": "127.0.0.1"})
    absent.conf.write_text(absent.conf.read_text() + "MessageTimeout=1\n")
    code, lines = tune(home, SLURM_CONF=str(absent.conf))
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("searchfm: slurm: sinfo: Unable to contact slurm controller")
