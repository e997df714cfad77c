"""Real servers that tests start and kill: MLflow, PostgreSQL, `searchfm dashboard`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from searchfm.home import HOME, Home
from tests.programs import postgres_binaries, worker_port


class Server:
    """MLflow's own, over HTTP, which keeps its own artifacts.

    password: that of the user "admin", if it demands one. database: its URL, else a file in the folder.
    """

    def __init__(self, folder: Path, port: int, *, password: str = "", database: str = "") -> None:
        self.folder, self.port, self.password = folder, port, password
        self.database = database or f"sqlite:///{folder / 'mlflow.db'}"

    def start(self) -> None:
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": self.database,
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.folder / "artifacts"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        if self.password:
            (self.folder / "auth.ini").write_text(
                f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{self.folder / 'auth.db'}\n"
                f"admin_username = admin\nadmin_password = {self.password}\n"
                "auth_cache_ttl_seconds = 60\n"  # else each request computes a slow hash
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            environment |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "of these tests",
            }
            command += ["--app-name", "basic-auth"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
        )
        end = time.monotonic() + 120  # its tables take 1700 statements
        while not self.answers():
            assert time.monotonic() < end
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Postgres:
    """PostgreSQL in a folder, on a free port. `url`: to append database names to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._binaries, self._user = folder, postgres_binaries(folder), None
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = "nobody"
            shutil.chown(folder, self._user)
        self._port = worker_port(6100)
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/"
        self._data = str(folder / "data")
        self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        options = f"-c port={self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder}"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-o", f"{options} -c fsync=off", "-l", log)

    def stop(self) -> None:
        """Ends all connections at once; the next start recovers."""
        self._run("pg_ctl", "stop", "-D", self._data, "-m", "immediate")

    def _run(self, name: str, *arguments: str) -> None:
        command = [self._binaries / name, *arguments]
        subprocess.run(command, user=self._user, cwd=self._folder, check=True, stdout=subprocess.DEVNULL)


class Served:
    """`searchfm dashboard`, started from a command line."""

    def __init__(self, home: Home, *options: str, lines: int = 2, **environment: str) -> None:
        self.ports = (worker_port(8300), worker_port(8400))
        ports = ["--port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "searchfm", "dashboard", *ports, *options],
            env={**os.environ, HOME: str(home.path), "COLUMNS": "300", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.printed = [self.process.stdout.readline() for _ in range(lines)]  # only once all answer
        if not all(self.printed):
            _, errors = self.process.communicate(timeout=120)
            raise AssertionError(f"searchfm dashboard ended with {self.process.returncode}: {errors}")
        self.addresses = [re.findall(r"http\S+", line)[0] for line in self.printed]

    @property
    def dashboard(self) -> str:
        return self.addresses[0]

    @property
    def mlflow(self) -> str:
        return self.addresses[-1]

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
        _, errors = self.process.communicate(timeout=120)
        assert "Warning" not in errors
        return self.process.returncode
