"""A server of `searchfm dashboard`, in a process of its own: `python -m searchfm.show.child optuna|mlflow PORT MLFLOW`.

Reads the home and the databases' addresses from the environment. Ends, with its whole process group, when its standard
input does: that is a pipe whose other end the parent holds, whatever becomes of the parent.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from searchfm.home import Home
from searchfm.search.notes import HERE, artifact_folder
from searchfm.search.storage import open_storage

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")  # what a browser on this machine calls us
LEAVE_SECONDS = 3.0


def main(kind: str, port: int, mlflow: str) -> int:
    """Serves until the parent is gone."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    if kind == "optuna":
        return serve_optuna(Home.find(), port, mlflow)
    return serve_mlflow(Home.find(), port)


def serve_optuna(home: Home, port: int, mlflow: str) -> int:
    """optuna-dashboard behind a `Guard`. It checks nobody itself, and anybody who reaches it may delete studies."""
    import optuna_dashboard
    from optuna.artifacts import FileSystemArtifactStore

    folder = artifact_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    app = optuna_dashboard.wsgi(open_storage(home), artifact_store=FileSystemArtifactStore(folder))
    with make_server(HOST, port, Guard(app, port, mlflow), _Server, _Handler) as server:
        server.serve_forever()
    return 0


def serve_mlflow(home: Home, port: int) -> int:
    """MLflow's own server, which guards itself, as a child: two processes, no job runners, nothing sent anywhere."""
    settings = {
        "MLFLOW_BACKEND_STORE_URI": home.tracking_uri,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": home.artifacts.as_uri(),
        "MLFLOW_SERVE_ARTIFACTS": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name}:{port}" for name in NAMES),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | settings
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # we outlive it, to say how it ended
    return process.wait()


class Guard:
    """Lets through what a browser on this machine asks of us by our own name, and nothing else: a page from elsewhere
    could otherwise have the browser delete studies (a foreign Origin), or read them (a foreign name for our address).

    Also leads `/mlflow/...` on to MLflow's pages, whose port the links in the notes cannot know.
    """

    def __init__(self, app: Any, port: int, mlflow: str) -> None:
        self.app, self.mlflow = app, mlflow
        self.hosts = {f"{name}:{port}" for name in NAMES}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """WSGI (PEP 3333)."""
        origin = environ.get("HTTP_ORIGIN")
        if environ.get("HTTP_HOST") not in self.hosts or (origin and urlsplit(origin).netloc not in self.hosts):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"Only from this machine, and by its own name.\n"]
        path, query = environ.get("PATH_INFO", ""), environ.get("QUERY_STRING", "")
        if path.startswith(f"{HERE}/"):
            target = f"{self.mlflow}/#{path.removeprefix(HERE)}{'?' if query else ''}{query}"
            start_response("302 Found", [("Location", target)])
            return [b""]
        response: Iterable[bytes] = self.app(environ, start_response)
        return response


class _Server(ThreadingMixIn, WSGIServer):
    """A plot may take seconds to compute; the page asks for several at once."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: standard error is for what goes wrong."""


def _follow_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(LEAVE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
