"""The engine of workers that dial in: the contract, lost nodes, and who is let in."""

import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from searchfm.engines import EngineOptions, remote, wire
from searchfm.engines.remote import RemoteEngine, listen
from searchfm.engines.wire import Link, WireError, find_key
from searchfm.errors import UserError, WorldError
from searchfm.home import Home
from searchfm.jobs import EpochDone, Event, Finished, Interrupted, Job, Lost
from searchfm.pool import WorkerPool
from tests.agents import await_free, listening, make, start, threads
from tests.commands import header, searchfm, searchfm_here
from tests.engines.contract import EngineContract, end, events, job, result, wait_until

pytestmark = pytest.mark.usefixtures("own_forkserver")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def lines() -> list[str]:
    """What the engine reported to the user."""
    return []


@pytest.fixture
def engine(home: Path, lines: list[str]) -> Iterator[RemoteEngine]:
    engine = listening(home, notify=lines.append)
    yield engine
    engine.close()


@pytest.mark.slow
class TestRemoteEngine(EngineContract):
    """Two agents of one worker each. They run in threads; their workers are processes."""

    @pytest.fixture
    def engine(self, home: Path) -> Iterator[RemoteEngine]:
        engine = listening(home)
        with threads(engine, home, "one", "two"):
            yield engine

    @pytest.fixture
    def single(self, home: Path) -> Iterator[RemoteEngine]:
        engine = listening(home)
        with threads(engine, home, "one"):
            yield engine

    @pytest.fixture
    def folder(self, home: Path) -> Path:
        return home / "jobs"


# --- nodes come, go and die -------------------------------------------------------------------------------------------


def reap(agent: "subprocess.Popen[str]", code: int) -> str:
    """What a process wrote, once it ended with this code."""
    _, text = agent.communicate(timeout=300)
    assert agent.returncode == code, text
    return text


@pytest.mark.slow
def test_a_killed_agent_loses_its_jobs_at_once_and_another_node_takes_the_next(
    engine: RemoteEngine, home: Path, lines: list[str]
) -> None:
    first, second = start(engine, home, "first"), start(engine, home, "second")
    await_free(engine, 2)
    for name in ("1", "2"):
        engine.submit(job(name, home / name, ticks_for=600))
        wait_until((home / name / "attempt-1" / "tick").exists)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    began = time.monotonic()
    lost = end(engine)
    assert time.monotonic() - began < 5
    assert isinstance(lost, Lost)
    assert lost.reason.startswith("node first is lost (the connection broke")
    engine.stop({"1": "2", "2": "1"}[lost.job])
    assert isinstance(end(engine), Interrupted)
    engine.submit(job("3"))
    assert isinstance(end(engine), Finished)
    assert not psutil.wait_procs(family, 20)[1], "its workers end with it"
    engine.close()
    reap(first, -signal.SIGKILL)
    reap(second, 0)
    assert [line.partition(":")[0] for line in sorted(lines)] == [
        "node first is gone",
        "node first joined",
        "node second joined",
    ]


def test_a_terminated_agent_hands_its_jobs_back_and_leaves(engine: RemoteEngine, home: Path, lines: list[str]) -> None:
    agent = start(engine, home)
    await_free(engine, 1)
    engine.submit(job("1", home / "1", ticks_for=600))
    wait_until((home / "1" / "attempt-1" / "tick").exists)
    agent.terminate()
    assert end(engine) == Interrupted("1", 1)
    reap(agent, 0)
    assert engine.free == 0
    assert lines[-1] == "node node leaves"


def test_a_node_says_that_it_leaves_before_it_tells_how_its_job_ended(engine: RemoteEngine, home: Path) -> None:
    """Else its worker would be free, and get a job that is lost a moment later."""
    agent = make(f"127.0.0.1:{engine.port}", home)
    running = threading.Thread(target=agent.run)
    running.start()
    await_free(engine, 1)
    engine.submit(job("1", home / "1", ticks_for=0.3))
    wait_until((home / "1" / "attempt-1" / "tick").exists)
    agent.signal = signal.SIGTERM  # it wakes nobody: as a rule the job ends before the agent sees it
    assert end(engine).job == "1"
    assert engine.free == 0
    running.join(30)


@pytest.mark.slow
def test_a_silent_node_is_lost_within_ten_seconds_and_a_slow_one_is_not(
    engine: RemoteEngine, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen agent sends no heartbeat, as a host without power or with its cable cut. Time in which the coordinator
    itself did not wait is no silence. With half the seconds; test_hosts.py cuts cables with all of them.
    """
    assert wire.LOST_SECONDS < 10
    seconds = wire.LOST_SECONDS / 2
    monkeypatch.setattr(remote, "LOST_SECONDS", seconds)
    agent = start(engine, home)
    await_free(engine, 1)
    engine.submit(job("1", home / "1", ticks_for=600))
    wait_until((home / "1" / "attempt-1" / "tick").exists)
    agent.send_signal(signal.SIGSTOP)
    assert engine.next_event(seconds / 2) is None
    agent.send_signal(signal.SIGCONT)
    time.sleep(seconds + 1)
    until = time.monotonic() + seconds / 2
    while time.monotonic() < until:
        assert engine.next_event(0.5) is None
    agent.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert isinstance(end(engine), Lost)
    assert time.monotonic() - began < 10
    agent.kill()
    reap(agent, -signal.SIGKILL)


@pytest.mark.slow
def test_a_node_whose_first_worker_starts_slowly_is_not_lost(
    engine: RemoteEngine, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the fork server imports torch for longer than a node may be silent."""
    slow = "import sys, time\nif any('forkserver' in one for one in sys.orig_argv): time.sleep(4)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(remote, "LOST_SECONDS", 2.5)
    agent = start(engine, home)
    await_free(engine, 1)
    began = time.monotonic()
    engine.submit(job("1"))
    assert isinstance(end(engine), Finished)
    assert time.monotonic() - began > 4
    engine.close()
    reap(agent, 0)


@pytest.mark.slow
def test_agents_of_a_killed_coordinator_stop_their_jobs_and_join_the_next(
    engine: RemoteEngine, home: Path, lines: list[str]
) -> None:
    agent = start(engine, home)
    await_free(engine, 1)
    engine.submit(job("1", home / "1", ticks_for=600))
    ticks = home / "1" / "attempt-1" / "tick"
    wait_until(ticks.exists)
    port = engine.port
    engine._server.shutdown()  # as the end of its process does, without `Leave`
    engine.close()
    other = RemoteEngine(home, "127.0.0.1", port, entries=engine._entries)
    await_free(other, 1)
    written = ticks.stat().st_mtime
    time.sleep(0.2)
    assert ticks.stat().st_mtime == written, "the job of the first coordinator has stopped"
    other.submit(job("2"))
    assert isinstance(end(other), Finished)
    other.close()
    assert "dialling again" in reap(agent, 0)


def test_every_node_runs_one_job_before_any_other_and_is_refused_where_it_fails(home: Path, lines: list[str]) -> None:
    engine = listening(home, notify=lines.append)
    with threads(engine, home, "a", "a"):
        engine.each(job("prepare", sleeps=0.2))
        assert engine.free == 0
        await_free(engine, 2)  # two agents of one host: one of them ran it
        for name in "12":
            engine.submit(job(name))
        assert sorted(result(event)["jobs"] for event in events(engine, 2)) == [1, 2]
        bad = start(engine, home, "b")
        engine.each(job("prepare", raises=["DataError", "the data differ"]))
        text = reap_while(engine, bad)
        assert text.endswith("searchfm.errors.UserError: the data differ\n")
        assert lines[-1] == "refused node b: the data differ"
        assert engine.free == 2


@pytest.mark.slow
def test_a_node_that_allows_no_code_is_refused_the_first_too_and_its_jobs_wait_for_one_that_does(
    engine: RemoteEngine, home: Path, lines: list[str]
) -> None:
    pool, ends = WorkerPool(engine), list[Event]()
    jobs = pool.run_all([Job("prepare", None, "tests.toys:work", {"code": True})])
    reader = threading.Thread(target=lambda: ends.extend(jobs))
    reader.start()
    assert reap(start(engine, home, "first"), 1).endswith("searchfm.errors.UserError: is code\n")
    assert lines[-1] == "refused node first: is code"
    allowed = start(engine, home, "second", allow_code=True)
    reader.join(30)
    assert [type(event).__name__ for event in ends] == ["Started", "Retried", "Started", "Finished"]
    engine.each(job("prepare", code=True))
    await_free(engine, 1)
    refused = start(engine, home, "second", devices=3)  # a further agent of a host that was admitted
    await_free(engine, 4)
    for name in "12":
        engine.submit(job(name, code=True, sleeps=0.5))  # both go to the agent with most free workers
    assert events(engine, 2) == [Interrupted("1", 1), Interrupted("2", 1)]
    assert lines[-1] == "refused node second: is code"
    assert sum(line.startswith("refused") for line in lines) == 2
    assert engine.free == 1
    engine.submit(job("1", attempt=2, code=True))
    assert isinstance(end(engine), Finished)
    reap(refused, 1)
    engine.close()
    reap(allowed, 0)


def reap_while(engine: RemoteEngine, agent: "subprocess.Popen[str]") -> str:
    """What an agent wrote until it ended, which the engine causes."""
    until = time.monotonic() + 30
    while agent.poll() is None:
        assert time.monotonic() < until
        assert engine.next_event(0.1) is None
    return agent.communicate()[1]


# --- who is let in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(engine: RemoteEngine) -> Iterator[Any]:
    with connect(f"ws://127.0.0.1:{engine.port}", proxy=None) as connection:
        yield connection


def test_without_the_key_nobody_gets_further_than_the_challenge(
    engine: RemoteEngine, stranger: Any, lines: list[str]
) -> None:
    with pytest.raises(UserError, match="the coordinator has another key"):
        wire.introduce(Link(stranger), b"guessed")
    with pytest.raises(ConnectionClosed):
        stranger.recv(10)
    wait_until(lambda: lines == ["refused 127.0.0.1: it has another key"])
    assert engine.next_event(0.1) is None
    assert engine.free == 0


def test_with_the_key_a_node_that_does_not_join_is_refused_in_one_line(
    engine: RemoteEngine, stranger: Any, home: Path, lines: list[str]
) -> None:
    link = Link(stranger)
    wire.introduce(link, find_key(home))
    link.send(wire.Stop("1"))
    wait_until(lambda: lines == ["refused 127.0.0.1: Stop came, must be Joined or Refused"])
    assert engine.free == 0


def test_a_listener_without_the_key_gets_no_worker(home: Path) -> None:
    """It repeats what a node sends, and claims to be a coordinator."""

    def claim(connection: ServerConnection) -> None:
        link = Link(connection)
        link.send(wire.Challenge(wire.PROTOCOL, "0"))
        answer = link.receive(wire.Answer)
        link.send(wire.Welcome(answer.proof, wire.Versions.here(), "probe", ""))

    find_key(home, create=True)
    with serve(claim, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="the listener has another key: it is no coordinator of this home"):
            make(f"127.0.0.1:{server.socket.getsockname()[1]}", home).run()


@pytest.mark.parametrize("data", [b"\x80\x04K\x01.", b'["Joined", {}]', b"[" * 10_000, b'["Answer", {"nonce": 1}]'])
def test_what_is_no_message_ends_the_connection(engine: RemoteEngine, stranger: Any, data: bytes) -> None:
    stranger.recv(10)
    stranger.send(data)
    with pytest.raises(ConnectionClosed):
        stranger.recv(10)
    assert engine.free == 0


def test_a_message_above_the_bound_ends_the_connection(engine: RemoteEngine, stranger: Any) -> None:
    stranger.recv(10)
    with suppress(ConnectionClosed):
        stranger.send(b" " * (wire.MESSAGE_BYTES + 1))
    with pytest.raises(ConnectionClosed):
        stranger.recv(10)
    assert engine.free == 0


def test_a_node_with_another_home_is_refused(
    engine: RemoteEngine, home: Path, tmp_path: Path, lines: list[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(home / "worker.key", other)
    with pytest.raises(UserError, match=f"{other} is not the coordinator's home, or is read-only"):
        make(f"127.0.0.1:{engine.port}", other).run()
    wait_until(
        lambda: (
            lines[-1:]
            == [f"refused node node: {other} is not the coordinator's home, or is read-only: No such file or directory"]
        )
    )


def test_a_node_of_another_version_is_refused(engine: RemoteEngine, home: Path) -> None:
    engine._versions = wire.Versions("2.7", engine._versions.torch, engine._versions.searchfm)
    with pytest.raises(UserError, match=r"^python is 3\.\d+ here, and 2\.7 at the coordinator$"):
        make(f"127.0.0.1:{engine.port}", home).run()


@pytest.mark.parametrize(
    ("entry", "folder", "reason"),
    [
        ("os:system", "1", "entry 'os:system': must be one of tests.toys:work"),
        ("tests.toys:imports", "1", "entry 'tests.toys:imports': must be one of tests.toys:work"),
        ("tests.toys:work", "../outside", "folder '../outside' is outside the home"),
        ("tests.toys:work", "/etc", "folder '/etc' is outside the home"),
        ("tests.toys:work", "", "folder '.' is outside the home"),
        ("tests.toys:work", "link/x", "folder 'link/x' is outside the home"),
    ],
)
def test_an_agent_runs_the_entries_of_its_table_in_folders_of_its_home(
    entry: str, folder: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("/tmp")
    sent = wire.Job("1", Path(folder), entry, {}, attempt=1)
    with pytest.raises(WireError) as caught:
        wire.local(sent, tmp_path, None, {"tests.toys:work": ()})
    assert str(caught.value) == reason


def test_paths_cross_relative_to_the_home(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    entry = "searchfm.learn.entries:test"
    sent = wire.Job("1", here / "studies/x/final", entry, {"model": str(here / "studies/x/m"), "data_dir": "/d"})
    crossed = wire.decode(wire.encode(wire.portable(sent, here)))
    assert str(here) not in wire.encode(crossed).decode()
    ready = wire.local(crossed, there, "/mnt/data", wire.ENTRIES)
    assert ready.folder == there / "studies/x/final"
    assert ready.payload == {"model": str(there / "studies/x/m"), "data_dir": "/mnt/data"}
    bad = wire.Job("1", Path("studies/x"), entry, {"model": "../../etc"})
    with pytest.raises(WireError, match="outside the home"):
        wire.local(bad, there, None, wire.ENTRIES)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.1:27001", "10.0.0.1", 27001), ("node", "node", 0), (":27001", "", 27001), ("[::1]:5", "::1", 5)],
)
def test_an_address_has_a_host_or_a_port_or_both(text: str, host: str, port: int) -> None:
    assert wire.address(text, "--listen") == (host, port)


def test_the_key_is_a_file_that_only_its_owner_reads_or_the_environments(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"worker\.key: the key cannot be read"):
        find_key(home)
    key = find_key(home, create=True)
    assert stat.S_IMODE((home / "worker.key").stat().st_mode) == 0o600
    assert find_key(home) == find_key(home, create=True) == key
    (home / "worker.key").chmod(0o640)
    with pytest.raises(UserError, match=r"worker\.key: has mode 640, must be 600"):
        find_key(home)
    (home / "worker.key").chmod(0o600)
    (home / "worker.key").write_text("")
    with pytest.raises(UserError, match=r"worker\.key: the key has 0 characters, must have 16 or more"):
        find_key(home, create=True)
    monkeypatch.setenv(wire.KEY, "of the environment")
    assert find_key(home) == b"of the environment"


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subprocess.run([*command, "-subj", "/CN=searchfm"], check=True, capture_output=True)
    return cert, key


def test_over_tls_a_worker_trusts_the_listeners_certificate_alone(
    home: Path, certificate: tuple[str, str], tmp_path: Path
) -> None:
    cert, key = certificate
    engine = listening(home, options=EngineOptions.from_table({"tls_cert": cert, "tls_key": key}))
    plain = make(f"127.0.0.1:{engine.port}", home)
    plain.retry = 0.0
    with pytest.raises(WorldError, match="no coordinator answers"):
        plain.run()
    with socket.create_connection(("127.0.0.1", engine.port)) as raw, pytest.raises(ssl.SSLCertVerificationError):
        ssl.create_default_context().wrap_socket(raw, server_hostname="127.0.0.1")
    agent = make(f"127.0.0.1:{engine.port}", home)
    agent.options = EngineOptions.from_table({"tls_cert": cert})
    thread = threading.Thread(target=agent.run)
    thread.start()
    await_free(engine, 1)
    engine.submit(job(epochs=2))
    assert [type(event) for event in events(engine, 3)] == [EpochDone, EpochDone, Finished]
    engine.close()
    thread.join(20)


# --- the command line -------------------------------------------------------------------------------------------------

TUNE = ("tune", "mlp", "--dataset", "digits", "--trials", "2", "--epochs", "1")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((*TUNE, "--engine", "cloud"), 2, "--engine cloud: must be local, listen"),
        ((*TUNE, "--engine", "none.toml"), 2, "--engine none.toml: No such file or directory"),
        ((*TUNE, "--gres", "gpu:1"), 2, "--gres gpu:1: is for --engine slurm"),
        ((*TUNE, "--engine", "slurm", "--slurm-args", "'"), 2, "--slurm-args ': no closing quotation; must be flags"),
        ((*TUNE, "--listen", "127.0.0.1"), 2, "--listen 127.0.0.1: is for --engine listen or slurm or ray"),
        (
            (*TUNE, "--engine", "listen", "--listen", "127.0.0.1", "--device", "cpu"),
            2,
            "--device cpu: with --engine listen, each `searchfm worker` has its own --device",
        ),
        (
            (*TUNE, "--engine", "slurm", "--workers-per-gpu", "auto"),
            2,
            "--workers-per-gpu auto: is for --engine local; with slurm it must be a number",
        ),
        (("worker", "h:1", "--workers-per-gpu", "auto"), 2, "--workers-per-gpu auto: is for --engine local"),
        ((*TUNE, "--workers", "0"), 2, "--engine local: engine.workers = 0: must be a whole number >= 1"),
        ((*TUNE, "--engine", "listen"), 2, "--engine listen: needs --listen HOST:PORT"),
        (
            (*TUNE, "--engine", "listen", "--listen", "127.0.0.1:99999"),
            2,
            "--listen 127.0.0.1:99999: must be HOST:PORT",
        ),
        ((*TUNE, "--engine", "listen", "--listen", "192.0.2.1:0"), 2, "--listen 192.0.2.1:0: Cannot assign"),
        (("worker", "127.0.0.1:9", "--device", "cpu", "--retry", "0"), 2, "the key cannot be read"),
        (("worker", "here"), 2, "HOST:PORT here: must be the address that the search printed, host and port"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], code: int, line: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run = searchfm if arguments[0] == "worker" else searchfm_here  # a worker replaces its process
    done = run(*arguments, "--home", str(home), SEARCHFM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == code, done.stderr
    assert done.stdout in ("", header("mlp", "digits"))  # it is printed before an engine starts
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(home.glob("*.db"))


def test_a_port_in_use_is_one_line(engine: RemoteEngine, home: Path) -> None:
    options = EngineOptions.from_table({"name": "listen", "listen": f"127.0.0.1:{engine.port}"})
    with pytest.raises(UserError, match=rf"^--listen 127\.0\.0\.1:{engine.port}: Address already in use; name "):
        listen(options, home, print)


def test_nobody_listening_is_one_line(home: Path, tmp_path: Path) -> None:
    find_key(home, create=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = searchfm("worker", f"127.0.0.1:{port}", "--device", "cpu", "--retry", "0", "--home", str(home))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"searchfm: 127.0.0.1:{port}: no coordinator answers (")


@pytest.mark.slow
def test_a_search_runs_on_workers_that_dial_in_and_none_has_a_secret(
    new_home: Callable[[Path], Home], tmp_path: Path
) -> None:
    """One is killed in the middle. The final training, and the test part, are read elsewhere too."""
    home, environment = (
        new_home(tmp_path / "home").path,
        {**os.environ, "SEARCHFM_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"},
    )
    secret = {"MLFLOW_TRACKING_PASSWORD": "s3cret-canary"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"127.0.0.1:{free.getsockname()[1]}"
    engine = ("--engine", "listen", "--listen", where, "--home", str(home))

    def run(*arguments: str, **more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "searchfm", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, **more}
        )

    trials = ("--trials", "6", "--epochs", "8", "--set", "search.pruner=none")
    tune = run("tune", "mlp", "--dataset", "digits", *trials, *engine, **secret)
    wait_until((home / "worker.key").exists)
    dial = ("worker", where, "--home", str(home), "--workers", "1", "--retry", "300")
    workers = [run(*dial, **secret) for _ in range(2)]
    wait_until(lambda: (home / "studies" / "mlp" / "0002").exists(), 300)
    for worker in workers:
        agent = psutil.Process(worker.pid)
        for process in (agent, *agent.children(recursive=True)):
            assert "s3cret-canary" not in "".join(process.environ().values()), process
    workers[0].kill()
    out, err = tune.communicate(timeout=600)
    assert tune.returncode == 0, err
    assert "6 complete of 6" in out
    assert f"searchfm worker {where} --home {home}" in err
    assert workers[1].wait(300) == 0
    retrain = run("retrain", "mlp", "--top", "1", "--seeds", "1", "--epochs", "2", *engine)
    workers.append(run(*dial))
    out, err = retrain.communicate(timeout=600)
    assert retrain.returncode == 0, err
    assert "test" in out
    for worker in workers:
        worker.communicate(timeout=300)
    assert json.loads(searchfm_here("sync", "mlp", "--home", str(home), "--json").stdout) == []
    assert not list(home.glob(".nodes-*"))
