"""The two dashboards, asked over HTTP and looked at in a browser."""

import asyncio
import io
import itertools
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
from rich.console import Console
from starlette.responses import PlainTextResponse

from searchfm.errors import StudyError, UserError, WorldError
from searchfm.home import HOME, STORAGE, TRACKING, Home
from searchfm.search.storage import open_storage
from searchfm.show import dashboard
from searchfm.show.guard import TOKEN, Access, Guard, read_token, with_token
from searchfm.show.terminal import show_addresses
from searchfm.tracking.follow import sync
from searchfm.tracking.mirror import run_links
from tests.commands import searchfm_here
from tests.programs import screenshot, worker_port
from tests.serving import Served

BLUE = (31, 95, 168)  # of validation curves, in our own pictures alone


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- without a server -------------------------------------------------------------------------------------------------


SECRET = "0123456789abcdef-secret"
COOKIE = re.compile(r"(searchfm-[0-9a-f]{8})=([0-9a-f]{64}); HttpOnly; Path=/; SameSite=strict")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "UNHEARD")


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("inside", headers={"X-Frame-Options": "DENY"})(scope, receive, send)


def ask(
    path: str, hosts: tuple[str, ...], *, method: str = "GET", token: str | None = None, app: Any = inside, **more: str
) -> tuple[int, dict[str, str], str]:
    """What the guard before a page that says "inside" answers: status, headers, body."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"host", host.encode()) for host in hosts]
    headers += [(name.encode(), value.encode()) for name, value in more.items()]
    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    asyncio.run(Guard(app, Access(names=("lab.example",), token=token))(scope | {"scheme": "http"}, receive, send))
    start, *rest = sent
    given = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], given, b"".join(part["body"] for part in rest).decode()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8080", None, 200),
        ("localhost:8080", "http://localhost:8080", 200),
        ("LOCALHOST:9000", "https://localhost:9000", 200),  # through a tunnel, or a proxy with TLS
        ("[::1]:8080", None, 200),
        ("lab.example", "http://lab.example", 200),
        ("evil.example:8080", None, 403),  # DNS rebinding
        ("evil.example", "http://evil.example", 403),
        ("127.0.0.1.evil.example:8080", None, 403),
        ("evil@127.0.0.1:8080", None, 403),
        ("0.0.0.0:8080", None, 403),
        ("", None, 403),
        ("127.0.0.1:8080", "http://evil.example", 403),  # a page that has the browser delete a study
        ("127.0.0.1:8080", "http://127.0.0.1:8081", 403),
        ("127.0.0.1:8080", "http://localhost:8080", 403),
        ("127.0.0.1:8080", "http://[::1", 403),
        ("127.0.0.1:8080", "null", 403),
        ("127.0.0.1:8080", "", 403),
    ],
)
def test_only_allowed_hosts_and_own_pages_get_in(host: str, origin: str | None, status: int) -> None:
    more = {"origin": origin} if origin is not None else {}
    token = {"token": SECRET, "authorization": f"Bearer {SECRET}"}  # does not replace these checks
    for method in METHODS:
        assert ask("/dashboard", (host,), method=method, **more)[0] == status
        assert ask("/dashboard", (host,), method=method, **more, **token)[0] == status


def test_no_host_and_two_hosts_are_refused() -> None:
    assert ask("/", ())[0] == 403
    assert ask("/", ("127.0.0.1:8080", "127.0.0.1:8080"))[0] == 403


def test_pages_are_not_framed_by_others() -> None:
    _, headers, _ = ask("/", ("localhost",))
    assert headers["x-frame-options"] == "DENY"  # the app's own stays
    assert headers["x-content-type-options"] == "nosniff"
    assert ask("/", ("evil.example",))[1]["x-frame-options"] == "SAMEORIGIN"


@pytest.mark.parametrize(
    "credentials",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {SECRET}x"},
        {"authorization": f"Bearer {SECRET[:-1]}"},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": "Bearer \u00e9"},
        {"cookie": f"token={SECRET}"},
        {"cookie": "searchfm-00000000=" + 64 * "0"},
    ],
)
def test_no_token_or_a_wrong_one_is_one_sentence(credentials: dict[str, str]) -> None:
    paths = ("/", "/api/studies", "/?token=", f"/?token={SECRET}x", "/mlflow/experiments/1")
    for path, method in itertools.product(paths, METHODS):
        status, headers, body = ask(path, ("localhost:8080",), method=method, token=SECRET, **credentials)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert re.fullmatch("A token is required: .*\n", body)
        assert "set-cookie" not in headers


def test_the_token_is_taken_in_three_ways() -> None:
    host = ("localhost:8080",)
    for method in METHODS:
        for value in (f"Bearer {SECRET}", f"bearer  {SECRET} "):
            assert ask("/", host, method=method, token=SECRET, authorization=value)[0] == 200
    status, headers, _ = ask(f"/a%20b/c?x=1&token={SECRET}&y=%26", host, token=SECRET)
    assert (status, headers["location"]) == (303, "/a%2520b/c?x=1&y=%26")
    assert headers["cache-control"] == "no-store"
    cookie = COOKIE.fullmatch(headers["set-cookie"])
    assert cookie
    assert SECRET not in cookie[0]  # cookies go to all ports of a host
    for method in METHODS:
        assert ask("/", host, method=method, token=SECRET, cookie=f"other=1; {cookie[1]}={cookie[2]}")[0] == 200
    assert ask("/", host, token=f"{SECRET}-other", cookie=f"{cookie[1]}={cookie[2]}")[0] == 401
    assert ask(f"/?token={SECRET}", host, method="POST", token=SECRET)[0] == 401  # an address is for reading


def test_the_address_with_a_token_leads_to_no_other_server() -> None:
    _, headers, _ = ask(f"//evil.example/?token={SECRET}", ("localhost",), token=SECRET)
    assert headers["location"] == "/evil.example/"


def test_health_answers_anybody_and_says_nothing() -> None:
    for hosts in ((), ("10.0.0.7:8080",)):
        status, _, body = ask("/health", hosts, token=SECRET)
        assert (status, body) == (200, "OK")
    assert ask("/health", ("10.0.0.7:8080",), method="POST", token=SECRET)[0] == 403
    assert ask("/health/", ("localhost",), token=SECRET)[0] == 401


def test_websockets_are_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(inside, Access())({"type": "websocket", "path": "/", "headers": []}, send, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "lab.example", ""])
def test_beyond_loopback_a_token_is_demanded(host: str) -> None:
    with pytest.raises(UserError, match="requires a token; set SEARCHFM_UI_TOKEN, or name its file with --token-file"):
        Access(host)
    assert SECRET not in repr(Access(host, token=SECRET))


def test_names_and_addresses() -> None:
    everywhere = Access("0.0.0.0", ("Lab.Example", "fd00::1"), SECRET)
    assert everywhere.allowed == {"127.0.0.1", "localhost", "[::1]", "lab.example", "[fd00::1]"}
    assert everywhere.address(80) == "http://lab.example:80"
    assert Access("::1", ("lab.example",)).address(80) == "http://[::1]:80"  # behind a proxy
    assert Access("0.0.0.0", (), SECRET).address(80) == "http://127.0.0.1:80"
    assert Access("fd00::2", (), SECRET).address(80) == "http://[fd00::2]:80"
    assert "[fd00::2]" in Access("fd00::2", (), SECRET).allowed
    for name in ("lab.example:80", "*", "http://lab.example", ""):
        with pytest.raises(UserError, match="--allow-host"):
            Access(names=(name,))
    assert with_token("http://a:1/#/x?y", SECRET) == f"http://a:1/?token={SECRET}#/x?y"
    assert with_token("http://a:1/b", None) == "http://a:1/b"


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, SECRET)
    assert read_token(None) == SECRET
    file = tmp_path / "token"
    with pytest.raises(UserError, match=r"--token-file .*token: cannot be read: No such file"):
        read_token(file)
    for content in ("", "short", "sixteen or more, with spaces", "0123456789abcdef\n0123456789abcdef"):
        file.write_text(content)
        with pytest.raises(UserError, match="must be 16 to 512 characters") as caught:
            read_token(file)
        assert not content or content not in str(caught.value)
    file.write_text(f"{SECRET}-2\n")
    assert read_token(file) == f"{SECRET}-2"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_token_is_printed_on_a_terminal_alone(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, highlight=False, soft_wrap=True)
    show_addresses(console, False, with_token("http://a:1/b?c=d", SECRET), with_token("http://a:2/#/x", SECRET))
    assert f"http://a:1/b?c=d&token={SECRET if terminal else 'TOKEN'}\n" in text.getvalue()
    assert f"http://a:2/?token={SECRET if terminal else 'TOKEN'}#/x\n" in text.getvalue()


def test_links_in_notes_lead_to_mlflow_wherever_it_is() -> None:
    path = "/mlflow/experiments/1/runs/abc?a=b&c=d"
    remote = dashboard.links_to("http://10.0.0.1:5000", inside)
    status, headers, _ = ask(path, ("localhost:8080",), app=remote)
    assert (status, headers["location"]) == (302, "http://10.0.0.1:5000/#/experiments/1/runs/abc?a=b&c=d")
    local = dashboard.links_to(5000, inside)
    for host, target in (("localhost:8080", "localhost:5000"), ("[::1]:8080", "[::1]:5000"), ("lab.example", None)):
        headers = ask(path, (host,), app=local)[1]
        assert headers["location"].startswith(f"http://{target or 'lab.example:5000'}/open#/experiments/1")
    assert ask("/dashboard", ("localhost",), app=local)[2] == "inside"


def test_a_port_in_use_is_passed_over() -> None:
    port = worker_port(7000)
    with socket.create_server(("127.0.0.1", port)):
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
    with pytest.raises(WorldError, match="ports 65535 to 65535 on"):
        dashboard.free_port(65_535, taken=65_535)


def test_a_home_without_studies_says_so(home: Home) -> None:
    with pytest.raises(StudyError, match="holds no study yet"):
        dashboard.serve(home, None, Access(), (8080, 5000), print)
    assert not home.path.exists()
    open_storage(home, create=True)
    with pytest.raises(StudyError, match="holds no study yet"):
        dashboard.serve(home, None, Access(), (8080, 5000), print)


# --- with both servers ------------------------------------------------------------------------------------------------


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


def ours(pixels: np.ndarray) -> int:
    """How many pixels have the blue of our own pictures, or nearly so: browsers scale them."""
    return int((np.abs(pixels.astype(int) - BLUE) < 24).all(axis=2).sum())


def look(address: str, folder: Path, name: str, shows: str, *, times: int = 1, blue: int = 0) -> str:
    """The DOM of a page as headless Chromium renders it, with at least so many `shows` and blue pixels of our pictures.

    Where cores are busy, the page's clock may end before all is drawn: then it is drawn again, twice at most.
    With SEARCHFM_SCREENSHOTS the pictures are kept there, for a person to see.
    """
    folder = Path(os.environ.get("SEARCHFM_SCREENSHOTS") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}.png"
    for _ in range(3):
        page, _ = screenshot(address, picture, size=(1800, 1400))
        pixels = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"))
        if page.count(shows) >= times and ours(pixels) >= blue:
            return page
    pytest.fail(f"{shows!r} is {page.count(shows)} times in {page}; {ours(pixels)} pixels are blue")


@pytest.mark.slow
def test_the_study_is_seen_in_optuna_dashboard(served: Served, tmp_path: Path) -> None:
    # history, importance, time line
    page = look(served.dashboard, tmp_path, "dashboard-study", "js-plotly-plot", times=3)
    assert "toy" in page
    assert "validation accuracy" in page
    page = look(f"{served.dashboard}/note", tmp_path, "dashboard-note", "How deep?")
    assert "2 complete, 1 pruned, 1 failed" in page


@pytest.mark.slow
def test_a_trial_is_seen_in_optuna_dashboard_with_its_pictures(served: Served, tmp_path: Path) -> None:
    # the curve is not just named, it is there
    page = look(f"{served.dashboard}/trials?numbers=3", tmp_path, "dashboard-trial", "confusion.png", blue=501)
    assert "of the validation part correct after 4 epochs" in page
    assert "This trial in MLflow" in page
    assert "curves.png" in page
    failed = "loss is nan in epoch 2"
    page = look(f"{served.dashboard}/trials?numbers=2", tmp_path, "dashboard-trial-failed", failed)
    assert "confusion.png" not in page


@pytest.mark.slow
def test_the_table_is_seen_in_mlflow(served: Served, synced: Home, tmp_path: Path) -> None:
    page = look(served.mlflow, tmp_path, "mlflow-table", "toy-0002 (failed)")
    indices = [page.index(name) for name in ("toy-0000", "toy-0003")]
    assert indices == sorted(indices)  # the better one first
    assert "Ask a question" not in page, "the assistant's pane takes a quarter of the page"
    assert "toy-0001 (pruned)" in page
    assert not re.search(r">toy</", page[page.index("Run Name") :]), "the study's own run is no trial"
    columns = re.findall(r'col-id="([^"]*)"[^>]*style="[^"]*left: (\d+)px', page)
    shown = [name for name, left in sorted(set(columns), key=lambda column: int(column[1]))]
    expected = ["metrics.`accuracy`", "tags.`split`", "tags.`state`", "metrics.`seconds`", "params.`model.mlp.layers`"]
    assert [name for name in shown if name in expected] == expected
    page = look(f"{served.mlflow}&compareRunsMode=CHART", tmp_path, "mlflow-curves", "js-plotly-plot", times=2)
    assert "val/accuracy" in page


@pytest.mark.slow
def test_a_trial_is_seen_in_mlflow_with_its_pictures(served: Served, synced: Home, tmp_path: Path) -> None:
    links = run_links(synced, rows.study(synced))
    base = f"http://127.0.0.1:{served.ports[1]}/open#/experiments/{links.experiment}/runs/{links.runs[3]}"
    page = look(base, tmp_path, "mlflow-trial", "get-artifact?path=", times=2)  # pictures of the description
    assert "searchfm tune toy" in page
    assert "of the validation part correct after 4 epochs" in page
    assert page.count("get-artifact?path=") == 2
    assert "fashion-mnist" in page
    look(f"{base}/artifacts/curves.png", tmp_path, "mlflow-trial-curves", "predictions.csv", blue=501)


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
    for origin in ("http://evil.example", f"http://localhost:{served.ports[0]}", "null"):
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            assert status(search, method, Origin=origin, **asked) == 403
    assistant = f"{mlflow}/ajax-api/3.0/mlflow/assistant"  # would run commands
    assert status(f"{assistant}/skills/install", "POST", **asked) == 403
    assert status(f"{assistant}/message", "POST", **asked) == 403
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    ours_ = [
        line.split()[3] for line in listening.splitlines() if int(line.split()[3].rpartition(":")[2]) in served.ports
    ]
    assert sorted(ours_) == sorted(f"127.0.0.1:{port}" for port in served.ports)


@pytest.mark.slow
@pytest.mark.parametrize("request_", ["GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"])
def test_requests_without_a_host_are_refused(served: Served, request_: str) -> None:
    for port in served.ports:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request_.encode())
            assert re.match(rb"HTTP/1.1 40[03] ", connection.recv(1000))


@pytest.mark.slow
def test_no_websocket_is_opened(served: Served) -> None:
    lines = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"]
    for port in served.ports:
        request = "\r\n".join(["GET / HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines, "", ""])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request.encode())
            assert not connection.recv(1000).startswith(b"HTTP/1.1 101")


@pytest.mark.slow
def test_a_server_of_ones_own_is_linked_to(served: Served, synced: Home) -> None:
    address = f"http://anna:secret@127.0.0.1:{served.ports[1]}"
    other = Served(synced, **{TRACKING: address})
    family = other.family
    assert len(family) == 1
    assert other.mlflow == served.mlflow.replace("/open#", "/#")
    assert "secret" not in "".join(other.printed)
    assert other.end(signal.SIGTERM) in (0, 143)
    until(lambda: gone(family), 5)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(served: Served) -> None:
    """The last one with these servers."""
    family = served.family
    assert len(family) == 2
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


# --- with a token -----------------------------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "ui-token"
    file.write_text(f"{SECRET}\n")
    return file


@pytest.mark.slow
def test_both_demand_the_token_and_one_login_opens_both(synced: Home, token_file: Path) -> None:
    served = Served(synced, "--host", "0.0.0.0", "--token-file", str(token_file))
    try:
        commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert SECRET not in commands + "".join(served.printed)  # a pipe may be a log
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        for address in served.addresses:
            assert "?token=TOKEN" in address
            assert status(address) == 401
            assert status(address, "DELETE") == 401
        with opener.open(served.dashboard.replace("TOKEN", SECRET), timeout=30) as page:
            assert page.url == served.dashboard.partition("?")[0]
        for port, path in zip(served.ports, ("/api/studies", "/version"), strict=True):
            base = f"http://127.0.0.1:{port}"
            assert opener.open(f"{base}{path}", timeout=30).status == 200
            assert status(f"{base}{path}", Authorization=f"Bearer {SECRET}") == 200
            assert status(f"{base}{path}", Authorization=f"Bearer {SECRET}x") == 401
            assert status(f"{base}{path}", Authorization=f"Bearer {SECRET}", Host="evil.example") == 403
            assert status(f"{base}/health") == 200
    finally:
        served.end(signal.SIGTERM)
    assert all(closed(port) for port in served.ports)


LOG = """
import sys, mlflow
mlflow.set_experiment("remote")
with mlflow.start_run():
    mlflow.log_metric("value", 0.5)
    mlflow.log_text("from another host", "note.txt")
    print(mlflow.get_artifact_uri())
"""


@pytest.mark.slow
def test_mlflow_clients_log_through_the_guard_with_the_token(
    new_home: Callable[[Path], Home], token_file: Path, tmp_path: Path
) -> None:
    home = new_home(tmp_path / "home")
    options = ["--only", "mlflow", "--host", "0.0.0.0", "--allow-host", "tracking", "--token-file", str(token_file)]
    served = Served(home, *options, lines=1)
    try:
        assert served.printed == [f"serving at http://tracking:{served.ports[1]}/?token=TOKEN\n"]
        assert not served.family  # one process
        environment = {**os.environ, TRACKING: f"http://127.0.0.1:{served.ports[1]}"}
        environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_TRACKING_TOKEN": SECRET}
        done = subprocess.run([sys.executable, "-c", LOG], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "mlflow-artifacts:/" in done.stdout
        (note,) = home.artifacts.rglob("note.txt")  # the server has it
        assert note.read_text() == "from another host"
        del environment["MLFLOW_TRACKING_TOKEN"]
        done = subprocess.run([sys.executable, "-c", LOG], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert "401" in done.stderr
    finally:
        assert served.end(signal.SIGTERM) in (0, -signal.SIGTERM)


@pytest.mark.slow
def test_optuna_dashboard_alone_serves_a_home_without_studies(home: Home, database: str) -> None:
    """With PostgreSQL, as in compose."""
    served = Served(home, "--only", "optuna", lines=1, **{STORAGE: database, TOKEN: SECRET})
    try:
        base = f"http://127.0.0.1:{served.ports[0]}"
        assert status(f"{base}/api/studies") == 401
        assert status(f"{base}/api/studies", Authorization=f"Bearer {SECRET}") == 200
    finally:
        assert served.end(signal.SIGINT) in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "environment", "line", "code"),
    [
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0: a server beyond loopback requires a token", 2),
        (["--only", "optuna", "--host", "::"], {}, "--host ::: a server beyond loopback requires a token", 2),
        ([], {TOKEN: "short"}, "SEARCHFM_UI_TOKEN: must be 16 to 512 characters", 2),
        (["toy", "--only", "mlflow"], {}, "toy: --only serves all studies", 2),
        (["--only", "mlflow"], {TRACKING: "http://a:b@c:1"}, "must name a database, not the server http://c:1", 2),
        (["--only", "mlflow", "--mlflow-port", "{taken}"], {}, "port {taken} on 127.0.0.1 cannot be bound", 1),
    ],
)
def test_mistakes_are_one_line(
    home: Home, options: list[str], environment: dict[str, str], line: str, code: int
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        asked = [option.replace("{taken}", port) for option in options]
        done = searchfm_here("dashboard", *asked, **{HOME: str(home.path), **environment})
    assert line.replace("{taken}", port) in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
