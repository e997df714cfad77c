"""optuna-dashboard and MLflow's pages together, on loopback, until Ctrl-C; no process stays behind.

Each server is a child (`python -m searchfm.show.child`) in a session of its own. It inherits the addresses of the
databases from the environment, since a command line is open to everybody in `ps`, and holds one end of a pipe of ours:
when that breaks, be it because we were killed, it takes its whole group down.
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from searchfm.errors import StudyError, WorldError
from searchfm.home import HOME, Home
from searchfm.search.history import StudyRow
from searchfm.search.notes import web_address
from searchfm.search.storage import load_study, open_storage, study_names
from searchfm.tracking import make_schema, run_links

HOST = "127.0.0.1"
PORTS = (8080, 5000)  # where people look for optuna-dashboard and for MLflow
TRIED = 20  # ports in a row, before we give up
START_SECONDS = 90.0
LEAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Addresses:
    """Where a person looks: the study in optuna-dashboard, and its table in MLflow."""

    dashboard: str
    mlflow: str


def serve(
    home: Home,
    study: StudyRow | None = None,
    *,
    ports: tuple[int, int] = PORTS,
    ready: Callable[[Addresses], None],
) -> None:
    """Starts both servers, calls `ready` once both answer, and returns after SIGINT or SIGTERM, both being gone.

    `study`: to open at; the latest unless given. `ports`: of optuna-dashboard and of MLflow; the next free one is
    taken where one is in use. A server that MLFLOW_TRACKING_URI names is linked to, not started. Raises StudyError
    without any study, WorldError if a server does not start or ends by itself.
    """
    study = study or _latest(home)
    stop = threading.Event()
    with _signals(stop), contextlib.ExitStack() as stack:
        remote = web_address(home.tracking_uri)
        first = free_port(ports[0])
        second = 0 if remote else free_port(ports[1], taken=first)
        base = remote or f"http://{HOST}:{second}"
        if remote is None:
            make_schema(home)  # two processes that do so at once leave a file that none can open
        children = [_start(stack, home, "optuna-dashboard", "optuna", first, "/api/meta", base)]
        if remote is None:
            children.append(_start(stack, home, "MLflow", "mlflow", second, "/health", base))
        links = run_links(home, study)
        for child in children:
            child.wait(stop)
        if not stop.is_set():
            here = f"http://{HOST}:{first}/dashboard/studies/{study.number}"
            ready(Addresses(here, base + links.table() if links.experiment else base))
        while not stop.wait(0.5):
            for child in children:
                child.check()


def free_port(first: int, taken: int = 0) -> int:
    """The first port from `first` on that nobody on loopback uses. Raises WorldError after twenty."""
    for port in range(first, first + TRIED):
        if port != taken:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, port))
                return port
    raise WorldError(f"ports {first} to {first + TRIED - 1} on {HOST} are all in use; name another with --port")


@dataclass
class Child:
    """A server in a process group of its own."""

    name: str
    process: subprocess.Popen[bytes]
    health: str  # address that answers once the server is up
    errors: IO[bytes]

    def wait(self, stop: threading.Event) -> None:
        """Until it answers. Raises WorldError if it ends, or does not answer in time."""
        # Whatever proxy is set is not for loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + START_SECONDS
        while not stop.wait(0.1):
            self.check()
            with contextlib.suppress(urllib.error.URLError, OSError), opener.open(self.health, timeout=5):
                return
            if time.monotonic() > end:
                raise WorldError(f"{self.name} did not answer within {START_SECONDS:.0f} s")

    def check(self) -> None:
        """Raises WorldError if it has ended."""
        if self.process.poll() is not None:
            raise WorldError(f"{self.name} ended with exit code {self.process.returncode}: {self._last_words()}")

    def stop(self) -> None:
        """SIGTERM to the group, and SIGKILL to what is left of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVE_SECONDS)
        self.errors.close()

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        # An address in it may hold a password.
        return re.sub(r"://[^/@\s]*@", "://", lines[-1].strip()) if lines else "it said nothing"


def _start(stack: contextlib.ExitStack, home: Home, name: str, kind: str, port: int, health: str, mlflow: str) -> Child:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
    process = subprocess.Popen(
        [sys.executable, "-m", "searchfm.show.child", kind, str(port), mlflow],
        env={**os.environ, HOME: str(home.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    child = Child(name, process, f"http://{HOST}:{port}{health}", errors)
    stack.callback(child.stop)
    return child


def _latest(home: Home) -> StudyRow:
    storage = open_storage(home)
    names = study_names(storage)
    if not names:
        raise StudyError(f"{home.path}: holds no study yet; begin one with `searchfm tune`, or name another --home")
    return load_study(storage, home, names[-1])


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
