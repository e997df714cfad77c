"""`searchfm dashboard`: optuna-dashboard and MLflow's pages on loopback, until Ctrl-C; no process stays behind.

Each server is a process (`python -m searchfm.show.dashboard NAME PORT MLFLOW`) in a session of its own. It inherits the
addresses of the databases from the environment, since every user can read a command line in `ps`. Its standard input is
a pipe whose other end this process holds: when that closes, even after a kill, the server ends its whole process group.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from searchfm.errors import StudyError, WorldError
from searchfm.home import HOME, TRACKING, Home
from searchfm.records import StudyRecord
from searchfm.search.notes import HERE, artifact_folder, web_address
from searchfm.search.storage import load_study, open_storage, study_names

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")  # host names of this machine in a URL
HEALTH = {"optuna-dashboard": "/api/meta", "MLflow": "/health"}  # paths that answer once a server is up
TRIED = 20  # ports in a row
START_SECONDS = 90.0
STOP_SECONDS = 5.0  # for a server to end after SIGTERM
GROUP_SECONDS = 3.0  # for the rest of its group, once the parent is gone


def serve(home: Home, study: StudyRecord | None, ports: tuple[int, int], ready: Callable[[str, str], None]) -> None:
    """Starts both servers, calls `ready` once both answer, and returns after SIGINT or SIGTERM, once both have ended.
    `ready` receives the address of the study in optuna-dashboard and that of its table in MLflow.

    study: to open at; None: the latest. ports: of optuna-dashboard and of MLflow; the next free one is taken
    where one is in use. A server that MLFLOW_TRACKING_URI names is linked to, not started. Raises StudyError without
    any study, WorldError if a server does not start or ends by itself.
    """
    from searchfm.tracking.mirror import make_schema, run_links  # here: the servers import this module without them

    study = study or _latest(home)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # for good: the command ends with this function
        signal.signal(number, lambda *_: stop.set())
    remote = web_address(home.tracking_uri)
    first = free_port(ports[0])
    second = 0 if remote else free_port(ports[1], taken=first)
    mlflow = remote or f"http://{HOST}:{second}"
    servers: list[Server] = []
    try:
        servers.append(Server(home, "optuna-dashboard", first, mlflow))
        if remote is None:
            make_schema(home)  # first: two processes that create it at once leave an unreadable file
            servers.append(Server(home, "MLflow", second, mlflow))
        links = run_links(home, study)
        for server in servers:
            server.wait(stop)
        if not stop.is_set():
            table = links.table() if links.experiment else ""
            ready(f"http://{HOST}:{first}/dashboard/studies/{study.number}", f"{mlflow}{table}")
        while not stop.wait(0.5):
            for server in servers:
                server.check()
    finally:
        for server in servers:
            server.stop()


def free_port(first: int, taken: int = 0) -> int:
    """The first port from `first` on that is free on loopback. Raises WorldError after twenty."""
    for port in range(first, first + TRIED):
        if port != taken:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, port))
                return port
    raise WorldError(f"ports {first} to {first + TRIED - 1} on {HOST} are all in use; name another with --port")


class Server:
    """A server in a process group of its own, until `stop`. mlflow: address of MLflow's pages."""

    def __init__(self, home: Home, name: str, port: int, mlflow: str) -> None:
        self.name, self.health = name, f"http://{HOST}:{port}{HEALTH[name]}"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "searchfm.show.dashboard", name, str(port), mlflow],
            env={**os.environ, HOME: str(home.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )

    def wait(self, stop: threading.Event) -> None:
        """Waits until it answers. Raises WorldError if it ends, or does not answer in time."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # proxies are not for loopback
        end = time.monotonic() + START_SECONDS
        while not stop.wait(0.1):
            self.check()
            with contextlib.suppress(OSError), opener.open(self.health, timeout=5):
                return
            if time.monotonic() > end:
                raise WorldError(f"{self.name} did not answer within {START_SECONDS:.0f} s")

    def check(self) -> None:
        """Raises WorldError if it has ended."""
        if self.process.poll() is not None:
            raise WorldError(f"{self.name} ended with exit code {self.process.returncode}: {self._last_line()}")

    def stop(self) -> None:
        """SIGTERM to the group, and SIGKILL to what is left of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.errors.close()

    def _last_line(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        # An address in it may hold a password.
        return re.sub(r"://[^/@\s]*@", "://", lines[-1].strip()) if lines else "without an error message"


def _latest(home: Home) -> StudyRecord:
    storage = open_storage(home)
    names = study_names(storage)
    if not names:
        raise StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")
    return load_study(storage, home, names[-1])


# --- in the process of a server ---------------------------------------------------------------------------------------


def serve_optuna(home: Home, port: int, mlflow: str) -> None:
    """optuna-dashboard behind `guard`: it has no check of its own, and each of its clients may delete studies."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    folder = artifact_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    app = optuna_dashboard.wsgi(open_storage(home), artifact_store=FileSystemArtifactStore(folder))
    with make_server(HOST, port, guard(app, port, mlflow), _ThreadedServer, _Handler) as server:
        server.serve_forever()


def serve_mlflow(home: Home, port: int) -> None:
    """MLflow's own server, which has a guard, as a child: two processes, no job runners, no telemetry."""
    settings = {
        "MLFLOW_BACKEND_STORE_URI": home.tracking_uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": home.artifacts.as_uri(),
        "MLFLOW_SERVE_ARTIFACTS": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name}:{port}" for name in NAMES),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    environment = {key: value for key, value in os.environ.items() if key != TRACKING} | settings
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # this process ends after it, with its exit code
    sys.exit(process.wait())


def guard(app: Any, port: int, mlflow: str) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """A WSGI app (PEP 3333) that answers 403 unless Host, and Origin if there is one, name this server. A foreign page
    could otherwise make the browser delete studies (foreign Origin), or read them (foreign Host, by DNS rebinding).

    Also redirects `/mlflow/...` to MLflow's pages, whose port is not known when the links in the notes are written.
    """
    hosts = {f"{name}:{port}" for name in NAMES}

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        origin = environ.get("HTTP_ORIGIN")
        if environ.get("HTTP_HOST") not in hosts or (origin and urlsplit(origin).netloc not in hosts):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"Only from this machine, by its own name.\n"]
        path, query = environ.get("PATH_INFO", ""), environ.get("QUERY_STRING", "")
        if path.startswith(f"{HERE}/"):
            target = f"{mlflow}/#{path.removeprefix(HERE)}{'?' if query else ''}{query}"
            start_response("302 Found", [("Location", target)])
            return [b""]
        response: Iterable[bytes] = app(environ, start_response)
        return response

    return guarded


class _ThreadedServer(ThreadingMixIn, WSGIServer):
    """Answers requests in parallel: a plot may take seconds, and a page needs several."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: standard error is for errors."""


def _follow_parent() -> None:
    """Ends the process group once the parent is gone, and with it the other end of the pipe."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GROUP_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _, name, port, mlflow = sys.argv
    threading.Thread(target=_follow_parent, daemon=True).start()
    if name == "MLflow":
        serve_mlflow(Home.find(), int(port))
    else:
        serve_optuna(Home.find(), int(port), mlflow)
