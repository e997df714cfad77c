"""`searchfm dashboard`: optuna-dashboard and MLflow's pages behind one guard, until Ctrl-C; no process stays behind.

Each server is a process (`python -m searchfm.show.dashboard SPEC`) in a session of its own. It inherits the addresses
of the databases and the token from the environment, since every user can read a command line in `ps`. Its standard
input is a pipe whose other end this process holds: when that closes, even after a kill, the server ends its whole
process group.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import uvicorn
from starlette.datastructures import URL
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from searchfm.errors import UserError, WorldError
from searchfm.home import HOME, TRACKING, Home, without_passwords
from searchfm.records import StudyRecord
from searchfm.search.notes import HERE, OPEN, artifact_folder, opened, web_address
from searchfm.search.storage import load_study, no_study, open_storage, read_again, study_names
from searchfm.show.guard import HEALTH, LOOPBACK, TOKEN, Access, Guard, read_token, with_token
from searchfm.stopping import exit_at_second

Only = Literal["optuna", "mlflow"]
TRIED = 20  # ports in a row
START_SECONDS = 90.0
STOP_SECONDS = 5.0  # for a server to end after SIGTERM
GROUP_SECONDS = 3.0  # for the rest of its group, once the parent is gone
REQUEST_SECONDS = 2  # for open requests to end after SIGTERM
DRAW_SECONDS = 10.0  # between two looks for pictures that are not drawn yet
THREADS = 10  # requests that optuna-dashboard answers at once: a plot may take seconds, and a page needs several


@dataclass(frozen=True)
class ServerSpec:
    """A server, as its process receives it: everything but the token."""

    name: str  # optuna-dashboard or MLflow
    host: str
    names: tuple[str, ...]
    port: int
    mlflow: str | int  # where links into MLflow lead: an address, or a port of the same host
    serve_artifacts: bool = False  # see tracking/server.py

    @property
    def access(self) -> Access:
        """With the token of this process's environment."""
        return Access(self.host, self.names, read_token(None))


def serve(
    home: Home, study: StudyRecord | None, access: Access, ports: tuple[int, int], ready: Callable[[str, str], None]
) -> None:
    """Starts both servers, calls `ready` once both answer, and returns after SIGINT or SIGTERM, once both have ended.
    `ready` receives the address of the study in optuna-dashboard and that of its table in MLflow.

    study: to open at; None: the latest. ports: of optuna-dashboard and of MLflow; the next free one is taken
    where one is in use. A server that MLFLOW_TRACKING_URI names is linked to, not started. Raises StudyError without
    any study, WorldError if a server does not start or ends by itself.
    """
    from searchfm.tracking.mirror import make_schema, run_links  # here: the servers import this module without it

    study = study or _latest(home)
    stop = threading.Event()
    exit_at_second(lambda *_: stop.set())  # for good: the command ends with this function
    remote = web_address(home.tracking_uri)
    first = free_port(ports[0], host=access.host)
    second = 0 if remote else free_port(ports[1], taken=first, host=access.host)
    servers: list[Server] = []
    drawing = threading.Thread(target=draw_pictures, args=(home, stop), daemon=True)
    try:
        for name, port in [("optuna-dashboard", first), ("MLflow", second)][: 1 if remote else 2]:
            if name == "MLflow":
                make_schema(home)  # first: two processes that create it at once leave an unreadable file
            servers.append(
                Server(home, ServerSpec(name, access.host, access.names, port, remote or second), access.token)
            )
        links = run_links(home, study)
        for server in servers:
            server.wait(stop)
        if not stop.is_set():
            table = links.table() if links.experiment else ""
            dashboard = f"{access.address(first)}/dashboard/studies/{study.number}"
            local = f"{access.address(second)}{opened(table)}"
            mlflow = f"{remote}{table}" if remote else with_token(local, access.token)
            ready(with_token(dashboard, access.token), mlflow)
            drawing.start()
        while not stop.wait(0.5):
            for server in servers:
                server.check()
    finally:
        stop.set()
        for server in servers:
            server.stop()
        if drawing.is_alive():
            drawing.join(STOP_SECONDS)


def draw_pictures(home: Home, stop: threading.Event) -> None:
    """Draws the trials of all studies that have no pictures yet, and sends them to MLflow, until `stop`; it gives way
    to a search. In a thread of its own.
    """
    from searchfm.tracking.follow import draw_missing

    with contextlib.suppress(OSError):
        os.nice(5)  # on Linux of this thread alone: pages go first
    studies = read_again(home)
    while not stop.is_set():
        try:
            for study in next(studies):
                draw_missing(home, study, lambda: not stop.is_set())
        except Exception:  # a database or a server that does not answer now is tried again
            studies = read_again(home)
        stop.wait(DRAW_SECONDS)


def serve_one(home: Home, only: Only, access: Access, ports: tuple[int, int], ready: Callable[[str], None]) -> None:
    """Serves one of both in this process, for containers and services: any study or none, this port or none, errors on
    standard error. Calls `ready` with the address once it answers. Returns after SIGINT or SIGTERM. Clients of MLflow
    send their artifacts through it. Raises UserError, StorageError, WorldError.
    """
    remote = web_address(home.tracking_uri)
    if only == "mlflow" and remote:
        raise UserError(f"--only mlflow: {TRACKING} must name a database, not the server {remote}")
    name, port = ("optuna-dashboard", ports[0]) if only == "optuna" else ("MLflow", ports[1])
    free_port(port, host=access.host, tried=1)
    spec = ServerSpec(name, access.host, access.names, port, remote or ports[1], serve_artifacts=True)
    run(home, spec, access, lambda: ready(with_token(access.address(port), access.token)))


def free_port(first: int, taken: int = 0, host: str = LOOPBACK, tried: int = 0) -> int:
    """The first port from `first` on that is free at that address. tried: 20 by default. Raises WorldError."""
    last = min(first + (tried or TRIED) - 1, 65_535)  # no host has more
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, last + 1):
        if port != taken:
            with socket.socket(family) as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return port
    if tried == 1:
        raise WorldError(f"port {first} on {host} cannot be bound: in use, or {host} is not of this machine")
    raise WorldError(f"ports {first} to {last} on {host} are all in use; name another with --port")


class Server:
    """A server in a process group of its own, until `stop`."""

    def __init__(self, home: Home, spec: ServerSpec, token: str | None) -> None:
        self.name, self.health = spec.name, f"{Access(spec.host, (), token).address(spec.port)}{HEALTH}"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "searchfm.show.dashboard", json.dumps(asdict(spec))],
            env={**os.environ, HOME: str(home.path)} | ({TOKEN: token} if token else {}),
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
        return without_passwords(lines[-1].strip()) if lines else "without an error message"


def _latest(home: Home) -> StudyRecord:
    storage = open_storage(home)
    names = study_names(storage)
    if not names:
        raise no_study(home)
    return load_study(storage, home, names[-1])


# --- in the process of a server ---------------------------------------------------------------------------------------


def run(home: Home, spec: ServerSpec, access: Access, ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGINT or SIGTERM; calls `ready` once it listens."""
    if spec.name == "MLflow":
        from searchfm.tracking.server import create_app

        app: ASGIApp = without_assistant(create_app(home, serve_artifacts=spec.serve_artifacts))
    else:
        app = links_to(spec.mlflow, optuna_app(home))
    config = uvicorn.Config(
        Guard(app, access),
        host=spec.host,
        port=spec.port,
        http="h11",  # refuses a second Host header
        ws="none",
        proxy_headers=False,  # clients may write them
        server_header=False,
        access_log=False,  # addresses may hold the token
        log_config=None,
        timeout_graceful_shutdown=REQUEST_SECONDS,
    )
    server = _Server(config, ready)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
        server.run()
    if not server.started:
        sys.exit(1)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def optuna_app(home: Home) -> ASGIApp:
    """optuna-dashboard, which is a WSGI app."""
    import optuna_dashboard
    from a2wsgi import WSGIMiddleware
    from optuna.artifacts import FileSystemArtifactStore

    folder = artifact_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    app = optuna_dashboard.wsgi(open_storage(home, create=True), artifact_store=FileSystemArtifactStore(folder))
    adapted: ASGIApp = WSGIMiddleware(app, workers=THREADS)  # type: ignore[assignment]  # its types are stricter
    return adapted


def links_to(mlflow: str | int, app: ASGIApp) -> ASGIApp:
    """Redirects `/mlflow/...` to MLflow's pages, whose address is not known when the links in the notes are written.
    mlflow: that address, or a port of the host that the request names.
    """

    async def linked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{HERE}/"):
            return await app(scope, receive, send)
        url = URL(scope=scope)
        page = f"/#{scope['path'].removeprefix(HERE)}{'?' if url.query else ''}{url.query}"
        local = f"{url.scheme}://{url.replace(port=mlflow).netloc}" if isinstance(mlflow, int) else ""
        target = f"{local}{opened(page)}" if local else f"{mlflow}{page}"
        return await RedirectResponse(target, 302)(scope, receive, send)

    return linked


# MLflow's pages open their assistant at the first visit. It cannot answer here, and no setting of the server keeps it
# closed; but a browser remembers that it was opened once.
_OPENING = """<!doctype html><title>MLflow</title><script>
try { localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true"); } catch {}
location.replace("./" + location.hash);
</script>"""


def without_assistant(app: ASGIApp) -> ASGIApp:
    """MLflow's app, and a page of our own that leads to the page its fragment names, and keeps the assistant closed."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        page = scope["type"] == "http" and scope["path"] == OPEN
        await (HTMLResponse(_OPENING) if page else app)(scope, receive, send)

    return served


def _follow_parent() -> None:
    """Ends the process group once the parent is gone, and with it the other end of the pipe."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GROUP_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    values = json.loads(sys.argv[1])
    spec = ServerSpec(**values | {"names": tuple(values["names"])})
    run(Home.find(), spec, spec.access)
