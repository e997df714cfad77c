"""Three hosts: coordinator, PostgreSQL and MLflow's server on one, workers on two others. A host dies, a cable is cut,
the coordinator is killed; every study ends with exactly its trials, and both stores are equal.
"""

import json
import os
import pwd
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.hosts import Host, Network, Running
from tests.programs import missing, postgres_binaries
from tests.slurm import Cluster

pytestmark = pytest.mark.hosts

TRIALS = 12
NOTICED = 10.0  # seconds within which a dead host or cable is noticed
SEARCHFM = (sys.executable, "-m", "searchfm")
DATABASES = """
import psycopg
with psycopg.connect("postgresql://postgres@127.0.0.1/postgres", autocommit=True) as connection:
    for name in ("optuna", "mlflow"):
        connection.execute(f"CREATE DATABASE {name}")
"""
# Trials of a few seconds, which nothing prunes.
STUDY = """
search = { trials = 12, sampler = "random", pruner = "none" }
data = { name = "digits" }
model = { name = "mlp", mlp = { layers = 2, width = { low = 32, high = 512 } } }
optimizer = { lr = { low = 1e-4, high = 1e-2, log = true } }
train = { epochs = 15, batch_size = 32 }
"""
# Runs of trials in MLflow, by study and number: [[study, number], ...].
RUNS = """
import json, urllib.request
def ask(what, **body):
    request = urllib.request.Request("http://127.0.0.1:5000/api/2.0/mlflow/" + what, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request, timeout=30))
found = ask("experiments/search", max_results=100)["experiments"]
runs = ask("runs/search", experiment_ids=[one["experiment_id"] for one in found], max_results=1000)["runs"]
tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
print(json.dumps([[tag["study"], int(tag["trial"])] for tag in tags if tag["role"] == "trial"]))
"""


class Site:
    """Three hosts with a PostgreSQL and an MLflow server on the first, and a home that all share."""

    def __init__(self, folder: Path, network: Network, database: Path) -> None:
        self.network, self.head, self.home = network, network.head, folder / "home"
        self.folder, self.database = folder, database
        self.server = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
        self.server["SEARCHFM_STORAGE"] = "postgresql+psycopg://postgres@127.0.0.1/optuna"

    def start_services(self) -> None:
        """Returns once PostgreSQL answers; the first search need not wait for MLflow's server."""
        binaries = postgres_binaries(self.database)
        nobody = pwd.getpwnam("nobody")
        shutil.chown(self.database, "nobody")
        user = (f"--setuid={nobody.pw_uid}", f"--setgid={nobody.pw_gid}")
        data = str(self.database / "data")
        initdb = [str(binaries / "initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8"]
        assert Running(self.head.enter(initdb, *user), {}).wait(60) == 0
        sockets = f"-c unix_socket_directories={self.database} -c fsync=off -c listen_addresses=127.0.0.1"
        control = [str(binaries / "pg_ctl"), "start", "-w", "-D", data, "-o", sockets, "-l", f"{self.database}/log"]
        assert Running(self.head.enter(control, *user), {}).wait(60) == 0
        self.head.run(sys.executable, "-c", DATABASES)
        self.head.start(
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", "5000"),
            MLFLOW_BACKEND_STORE_URI="postgresql+psycopg://postgres@127.0.0.1/mlflow",
            MLFLOW_ARTIFACTS_DESTINATION=str(self.folder / "artifacts"),
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            MLFLOW_DISABLE_TELEMETRY="true",
        )

    def tune(self, name: str, *flags: str, **environment: str) -> Running:
        """A search of small trials, on the head."""
        file = self.folder / f"{name}.toml"
        file.write_text(STUDY)
        command = (*SEARCHFM, "tune", str(file), "--home", str(self.home), *flags)
        return self.head.start(*command, COLUMNS="200", **self.server, **environment)

    def worker(self, node: str, port: int = 27001) -> Running:
        """A worker that dials the head."""
        command = (*SEARCHFM, "worker", f"{self.head.address}:{port}", "--home", str(self.home), "--workers", "1")
        return self.network.workers[node].start(*command)

    def check(self, name: str) -> None:
        """Checks that a study has exactly its trials, and that both stores are equal."""
        (study,) = json.loads(
            self.head.run(*SEARCHFM, "status", name, "--json", "--home", str(self.home), **self.server)
        )
        assert study["trials"] == {"complete": TRIALS, "pruned": 0, "failed": 0, "total": TRIALS}
        assert (
            json.loads(self.head.run(*SEARCHFM, "sync", name, "--json", "--home", str(self.home), **self.server)) == []
        )
        runs = json.loads(self.head.run(sys.executable, "-c", RUNS))
        assert sorted(number for study, number in runs if study == name) == list(range(TRIALS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if os.geteuid() != 0:
        missing("this test makes network namespaces, which needs root")
    for program, package in (("ip", "iproute2"), ("slurmctld", "slurm-wlm")):
        if not (shutil.which(program) or Path("/usr/sbin", program).exists()):
            missing(f"this test needs {program}: apt-get install {package}")
    folder = tmp_path_factory.mktemp("hosts")
    network, database = Network(folder), Path(tempfile.mkdtemp(prefix="searchfm-pg-"))
    try:
        site = Site(folder, network, database)
        site.start_services()
        yield site
    finally:
        network.close()
        shutil.rmtree(database)


@pytest.fixture
def nodes(site: Site) -> dict[str, Host]:
    """Two workers' hosts, in order again."""
    for name in ("node1", "node2"):
        if name not in site.network.workers:
            site.network.add(name)
        site.network.mend(name)
    return site.network.workers


def ends(search: Running, seconds: float = 400.0) -> None:
    """The search ends well."""
    assert search.wait(seconds) == 0, search.text
    assert f"{TRIALS} complete of {TRIALS} in" in search.text


def test_dial_in_a_cable_is_cut_then_the_coordinator_killed(
    site: Site, nodes: dict[str, Host], record_property: Callable[[str, object], None]
) -> None:
    # Long enough for the node to be back before the other one has trained all trials.
    listen = ("--engine", "listen", "--listen", f"{site.head.address}:27001", "--epochs", "50")
    search = site.tune("dial", *listen)
    search.wait_for("listening")
    workers = [site.worker(node) for node in nodes]
    search.wait_for(" complete ", count=3)
    began = time.monotonic()
    site.network.cut("node1")
    noticed = search.wait_for("node node1 is gone", since=began) - began
    assert noticed < NOTICED
    site.network.mend("node1")
    search.wait_for("node node1 joined", since=began)  # the same worker
    search.wait_for(" complete ", count=5)
    search.kill()
    search.wait()
    search = site.tune("dial", *listen)
    ends(search)
    assert "resumes after epoch" in search.text
    assert [worker.wait(20) for worker in workers] == [0, 0], "they served both coordinators, and left with the second"
    site.check("dial")
    record_property("figures", f"a cut cable noticed after {noticed:.1f} s; exactly {TRIALS} trials")


@pytest.fixture
def slurm(site: Site, nodes: dict[str, Host], tmp_path: Path) -> Iterator[Cluster]:
    """slurmctld on the head, and a slurmd on each worker's host."""

    def enter(host: str, command: Sequence[str]) -> list[str]:
        return (nodes[host] if host else site.head).enter(command)

    addresses = {name: host.address for name, host in nodes.items()}
    cluster = Cluster(tmp_path / "slurm", addresses, controller=site.head.address, enter=enter)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def passwords(cluster: Cluster) -> tuple[int, list[str]]:
    """Processes of SLURM's tasks, and those of them with the address of a database in their environment."""
    tasks = [process for process in cluster.left() if "SLURM_JOB_ID" in process.environ()]
    return len(tasks), [str(one) for one in tasks if any("127.0.0.1" in value for value in one.environ().values())]


def test_slurm_without_a_shared_home_is_one_line(site: Site, slurm: Cluster, nodes: dict[str, Host]) -> None:
    home = site.folder / "unshared"
    home.mkdir()
    for host in nodes.values():
        host.run("mount", "-t", "tmpfs", "none", str(home))
    command = ("tune", "mlp", "--dataset", "digits", "--engine", "slurm", "--home", str(home))
    search = site.head.start(*SEARCHFM, *command, COLUMNS="200", **slurm.environment)
    assert search.wait() == 1
    assert search.lines[-1][1].endswith(
        f"no worker is left; no node wrote into {home / 'slurm'}; do all nodes mount it?"
    )
    assert not slurm.run("squeue", "--noheader")
    assert not (home / "optuna.db").exists()


# --- minutes by nature ------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_slurm_a_host_dies(
    site: Site, slurm: Cluster, nodes: dict[str, Host], record_property: Callable[[str, object], None]
) -> None:
    search = site.tune("slurm", "--engine", "slurm", "--workers", "4", "--partition", "main", **slurm.environment)
    search.wait_for("joined", count=4)
    search.wait_for(" complete ", count=3)
    tasks, guilty = passwords(slurm)
    assert tasks >= 8  # four agents, each with a forkserver and a worker
    assert not guilty
    began = time.monotonic()
    site.network.power_off("node1")
    noticed = search.wait_for("node node1 is gone", count=2, since=began) - began
    assert noticed < NOTICED
    ends(search)
    assert not slurm.run("squeue", "--noheader", "--states=running,pending")
    site.check("slurm")
    record_property("figures", f"a dead host noticed after {noticed:.1f} s; exactly {TRIALS} trials")


@pytest.mark.nightly
def test_slurm_a_cable_is_cut(
    site: Site, slurm: Cluster, nodes: dict[str, Host], record_property: Callable[[str, object], None]
) -> None:
    search = site.tune("slurm-cable", "--engine", "slurm", "--workers", "4", **slurm.environment)
    search.wait_for("joined", count=4)
    search.wait_for(" complete ", count=3)
    began = time.monotonic()
    site.network.cut("node1")
    noticed = search.wait_for("node node1 is gone", count=2, since=began) - began
    assert noticed < NOTICED
    time.sleep(15)  # SLURM has taken the node down, and requeued its tasks
    site.network.mend("node1")
    ends(search)
    assert not slurm.run("squeue", "--noheader", "--states=running,pending")
    site.check("slurm-cable")
    record_property("figures", f"a cut cable noticed after {noticed:.1f} s; exactly {TRIALS} trials")


@pytest.mark.nightly
def test_dial_in_a_host_dies(
    site: Site, nodes: dict[str, Host], record_property: Callable[[str, object], None]
) -> None:
    search = site.tune("dial-host", "--engine", "listen", "--listen", f"{site.head.address}:27001")
    search.wait_for("listening")
    for node in nodes:
        site.worker(node)
    search.wait_for("joined", count=2)
    search.wait_for(" complete ", count=3)
    began = time.monotonic()
    site.network.power_off("node1")
    noticed = search.wait_for("node node1 is gone", since=began) - began
    assert noticed < NOTICED
    ends(search)
    site.check("dial-host")
    record_property("figures", f"a dead host noticed after {noticed:.1f} s; exactly {TRIALS} trials")


@pytest.fixture
def ray(site: Site, nodes: dict[str, Host]) -> dict[str, str]:
    """A Ray cluster with two cores on each worker's host and none on the head: what the search's environment needs."""
    token = site.folder / "ray.token"
    token.touch(0o600)
    token.write_text("a" * 64)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_agent_register_timeout_ms": "180000",
    }
    # With fixed ports a raylet need not wait for files that name them, which a busy machine writes too late.
    agents = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
    ports = [f"--{name}-port={port}" for port, name in enumerate(agents, 21001)]
    ray = (str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats", *ports)
    head = ("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
    site.head.run(*ray, *head, f"--node-ip-address={site.head.address}", **environment)
    address = f"{site.head.address}:6379"
    for host in nodes.values():  # one after another: together they are too slow for Ray's limits
        host.run(*ray, f"--address={address}", f"--node-ip-address={host.address}", "--num-cpus=2", **environment)
    return environment | {"RAY_ADDRESS": address}


@pytest.mark.nightly
def test_ray_a_cable_is_cut_then_a_host_dies(
    site: Site, ray: dict[str, str], nodes: dict[str, Host], record_property: Callable[[str, object], None]
) -> None:
    search = site.tune("ray", "--engine", "ray", "--workers", "4", **ray)
    search.wait_for("joined", count=4)
    search.wait_for(" complete ", count=3)
    began = time.monotonic()
    site.network.cut("node2")
    cable = search.wait_for("node node2 is gone", count=2, since=began) - began
    site.network.mend("node2")
    search.wait_for("node node2 joined", count=2, since=began)
    search.wait_for(" complete ", count=6)
    began = time.monotonic()
    site.network.power_off("node1")
    host = search.wait_for("node node1 is gone", count=2, since=began) - began
    assert max(cable, host) < NOTICED
    ends(search)
    site.check("ray")
    record_property(
        "figures", f"noticed: a cut cable after {cable:.1f} s, a dead host after {host:.1f} s; exactly {TRIALS} trials"
    )
