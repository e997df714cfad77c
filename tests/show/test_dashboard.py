"""The two dashboards, asked over HTTP and looked at in a browser."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
from PIL import Image

from searchfm.errors import StudyError, WorldError
from searchfm.home import HOME, STORAGE, TRACKING, Home
from searchfm.search.storage import open_storage
from searchfm.show import dashboard
from searchfm.tracking.follow import sync
from searchfm.tracking.mirror import run_links
from tests.programs import chromium

BLUE = (31, 95, 168)  # of validation curves, in our own pictures alone


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- without a server -------------------------------------------------------------------------------------------------


def ask(path: str, host: str, origin: str | None = None) -> tuple[str, dict[str, str], bytes]:
    """What the guard before a page that says "inside" answers: status, headers, body."""
    response: list[Any] = []

    def inside(_: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"inside"]

    guard = dashboard.guard(inside, 8080, "http://127.0.0.1:5000")
    environ = {"HTTP_HOST": host, "PATH_INFO": path, "QUERY_STRING": "a=b&c=d"}
    body = guard(environ | ({"HTTP_ORIGIN": origin} if origin else {}), lambda *start: response.extend(start))
    return response[0], dict(response[1]), b"".join(body)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8080", None, "200 OK"),
        ("localhost:8080", "http://localhost:8080", "200 OK"),
        ("[::1]:8080", None, "200 OK"),
        ("evil.example:8080", None, "403 Forbidden"),  # DNS rebinding
        ("127.0.0.1", None, "403 Forbidden"),
        ("", None, "403 Forbidden"),
        ("127.0.0.1:8080", "http://evil.example", "403 Forbidden"),  # a page that has the browser delete a study
        ("127.0.0.1:8080", "http://127.0.0.1:8081", "403 Forbidden"),
        ("127.0.0.1:8080", "null", "403 Forbidden"),
    ],
)
def test_only_this_machine_gets_in(host: str, origin: str | None, status: str) -> None:
    assert ask("/dashboard", host, origin)[0] == status


def test_links_in_notes_lead_to_mlflow_wherever_it_is() -> None:
    status, headers, _ = ask("/mlflow/experiments/1/runs/abc", "localhost:8080")
    assert status == "302 Found"
    assert headers["Location"] == "http://127.0.0.1:5000/#/experiments/1/runs/abc?a=b&c=d"


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert dashboard.free_port(port) > port
    assert dashboard.free_port(port) == port
    assert dashboard.free_port(port, taken=port) == port + 1


def test_no_free_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "TRIED", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(WorldError, match="in use; name another with --port"):
            dashboard.free_port(taken.getsockname()[1])


def test_a_home_without_studies_says_so(home: Home) -> None:
    with pytest.raises(StudyError, match="holds no study yet"):
        dashboard.serve(home, None, (8080, 5000), print)
    assert not home.path.exists()
    open_storage(home, create=True)
    with pytest.raises(StudyError, match="holds no study yet"):
        dashboard.serve(home, None, (8080, 5000), print)


# --- with both servers ------------------------------------------------------------------------------------------------


class Served:
    """`searchfm dashboard`, started from a command line."""

    def __init__(self, home: Home, **environment: str) -> None:
        self.ports = (dashboard.free_port(8300), dashboard.free_port(8400))
        options = ["--port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "searchfm", "dashboard", *options],
            env={**os.environ, HOME: str(home.path), "COLUMNS": "300", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.printed = [self.process.stdout.readline() for _ in range(2)]  # only once both answer
        self.dashboard, self.mlflow = (re.findall(r"http\S+", line)[0] for line in self.printed)

    @property
    def family(self) -> list[int]:
        """The ids of all processes below ours."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
        parents = dict(tuple(map(int, line.split())) for line in listed.splitlines()[1:])
        ids = [self.process.pid]
        for pid in ids:
            ids += [child for child, parent in parents.items() if parent == pid]
        return ids[1:]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode


def status(address: str, method: str = "GET", **headers: str) -> int:
    request = urllib.request.Request(
        address, method=method, headers=headers, data=b'{"max_results": 10}' if method == "POST" else None
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def gone(pids: list[int]) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    return all(state.startswith("Z") for state in listed.stdout.split())


def closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def synced(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose study of four trials is in both."""
    home = new_home(tmp_path_factory.mktemp("served") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(STORAGE, raising=False)
        patch.delenv(TRACKING, raising=False)
        study = rows.four(home)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy warns of MLflow, but once a process: see test_tracking.py
            sync(home, study, apply=True)
    return home


@pytest.fixture(scope="module")
def served(synced: Home) -> Iterator[Served]:
    served = Served(synced)
    yield served
    if served.process.poll() is None:
        served.end(signal.SIGTERM)


def look(address: str, folder: Path, name: str) -> tuple[str, np.ndarray]:
    """The page as headless Chromium renders it: its DOM and its (height, width, 3) pixels.

    With SEARCHFM_SCREENSHOTS the pictures are kept there, for a person to see.
    """
    folder = Path(os.environ.get("SEARCHFM_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}.png"
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps"]
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{feature}" for feature in quiet),
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1800,1400",
            "--virtual-time-budget=20000",
            f"--screenshot={picture}",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,
    )
    return done.stdout, np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"))


def ours(pixels: np.ndarray) -> int:
    """How many pixels have the blue of our own pictures, or nearly so: browsers scale them."""
    return int((np.abs(pixels.astype(int) - BLUE) < 24).all(axis=2).sum())


@pytest.mark.slow
def test_the_study_is_seen_in_optuna_dashboard(served: Served, tmp_path: Path) -> None:
    page, _ = look(served.dashboard, tmp_path, "dashboard-study")
    assert "toy" in page
    assert "validation accuracy" in page
    assert page.count("js-plotly-plot") >= 3  # history, importance, time line
    page, _ = look(f"{served.dashboard}/note", tmp_path, "dashboard-note")
    assert "How deep?" in page
    assert "2 complete, 1 pruned, 1 failed" in page


@pytest.mark.slow
def test_a_trial_is_seen_in_optuna_dashboard_with_its_pictures(served: Served, tmp_path: Path) -> None:
    page, pixels = look(f"{served.dashboard}/trials?numbers=3", tmp_path, "dashboard-trial")
    assert "of the validation part correct after 4 epochs" in page
    assert "This trial in MLflow" in page
    assert "curves.png" in page
    assert "confusion.png" in page
    assert ours(pixels) > 500  # the curve is not just named, it is there
    page, pixels = look(f"{served.dashboard}/trials?numbers=2", tmp_path, "dashboard-trial-failed")
    assert "loss is nan in epoch 2" in page
    assert "confusion.png" not in page


@pytest.mark.slow
def test_the_table_is_seen_in_mlflow(served: Served, synced: Home, tmp_path: Path) -> None:
    page, _ = look(served.mlflow, tmp_path, "mlflow-table")
    indices = [page.index(name) for name in ("toy-0000", "toy-0003")]
    assert indices == sorted(indices)  # the better one first
    assert "toy-0001 (pruned)" in page
    assert "toy-0002 (failed)" in page
    columns = re.findall(r'col-id="([^"]*)"[^>]*style="[^"]*left: (\d+)px', page)
    shown = [name for name, left in sorted(set(columns), key=lambda column: int(column[1]))]
    expected = ["metrics.`value`", "tags.`state`", "params.`model.mlp.layers`", "params.`optimizer.name`"]
    assert [name for name in shown if name in expected] == expected
    page, _ = look(f"{served.mlflow}&compareRunsMode=CHART", tmp_path, "mlflow-curves")
    assert "val/accuracy" in page
    assert page.count("js-plotly-plot") >= 2


@pytest.mark.slow
def test_a_trial_is_seen_in_mlflow_with_its_pictures(served: Served, synced: Home, tmp_path: Path) -> None:
    links = run_links(synced, rows.study(synced))
    base = f"http://127.0.0.1:{served.ports[1]}/#/experiments/{links.experiment}/runs/{links.runs[3]}"
    page, _ = look(base, tmp_path, "mlflow-trial")
    assert "searchfm tune toy" in page
    assert "fashion-mnist" in page
    page, pixels = look(f"{base}/artifacts/curves.png", tmp_path, "mlflow-trial-curves")
    assert "predictions.csv" in page
    assert ours(pixels) > 500


@pytest.mark.slow
def test_both_answer_to_this_machine_alone(served: Served) -> None:
    dashboard_, mlflow = (f"http://127.0.0.1:{port}" for port in served.ports)
    assert status(f"{dashboard_}/api/studies") == 200
    assert status(f"{dashboard_}/api/studies", Host="evil.example") == 403
    assert status(f"{dashboard_}/api/studies/1", "DELETE", Origin="http://evil.example") == 403
    assert status(f"{dashboard_}/api/studies/1") == 200
    search = f"{mlflow}/api/2.0/mlflow/experiments/search"
    asked = {"Content-type": "application/json"}
    assert status(search, "POST", **asked) == 200
    assert status(search, "POST", Host="evil.example", **asked) == 403
    assert status(search, "POST", Host="192.168.1.1:5000", **asked) == 403
    assert status(search, "POST", Origin="http://evil.example", **asked) == 403
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    ours_ = [
        line.split()[3] for line in listening.splitlines() if int(line.split()[3].rpartition(":")[2]) in served.ports
    ]
    assert sorted(ours_) == sorted(f"127.0.0.1:{port}" for port in served.ports)


@pytest.mark.slow
def test_a_server_of_ones_own_is_linked_to(served: Served, synced: Home) -> None:
    address = f"http://anna:secret@127.0.0.1:{served.ports[1]}"
    other = Served(synced, **{TRACKING: address})
    family = other.family
    assert len(family) == 1
    assert other.mlflow == served.mlflow
    assert "secret" not in "".join(other.printed)
    assert other.end(signal.SIGTERM) in (0, 143)
    until(lambda: gone(family), 5)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(served: Served) -> None:
    """The last one with these servers."""
    family = served.family
    assert len(family) >= 3
    began = time.monotonic()
    assert served.end(signal.SIGINT) in (0, 130)
    assert time.monotonic() - began < 15
    until(lambda: gone(family), 5)
    assert all(closed(port) for port in served.ports)


@pytest.mark.slow
def test_a_killed_dashboard_leaves_no_process_and_no_password_was_seen(
    home: Home, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = database.replace("postgres@", "postgres:very-secret@")
    monkeypatch.setenv(STORAGE, address)
    rows.four(home)
    rows.forget(home)
    served = Served(home, **{STORAGE: address})
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "searchfm.show.dashboard" in commands
    assert "very-secret" not in commands + "".join(served.printed)
    assert status(served.dashboard.replace("/dashboard/", "/api/")) == 200
    family = served.family
    served.process.kill()
    served.process.communicate()
    until(lambda: gone(family), 20)
    assert all(closed(port) for port in served.ports)
