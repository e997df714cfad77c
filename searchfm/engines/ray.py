"""Workers on a Ray cluster: Ray places and supervises them, and they dial in as workers of any other machine do.

Ray lives in a process of its own (`ray_driver.py`). That one replaces signal handlers, starts servers that inherit its
environment, and is ended by Ray's own code when the cluster is lost; the coordinator must meet none of this.
"""

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchfm.engines import EngineOptions
from searchfm.engines.wire import ENTRIES, source_address
from searchfm.engines.wire import address as split_address
from searchfm.errors import UserError, WorldError
from searchfm.forkserver import WARM, without_secrets

ADDRESS = "RAY_ADDRESS"
GCS_PORT = 6379  # of a Ray head, unless its owner chose another
DIAL_SECONDS = 5.0  # for a connection to RAY_ADDRESS
START_SECONDS = 240.0  # for a cluster to come up, or to answer; Ray's own limits on a busy machine are near 180
CLOSE_SECONDS = 20.0  # for actors and servers to end, before they are killed
KILL_SECONDS = 2.0  # for killed ones to be gone
DRIVER = "from searchfm.engines.ray_driver import main; main()"  # nodes import the actor's class from there
SETTINGS = {  # of Ray, unless the user has set them
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, each worker would run uv, which makes an environment anew
    "RAY_raylet_start_wait_time_s": "180",  # else a busy machine is given up after 60
    "RAY_agent_register_timeout_ms": "180000",
}


class Ray:
    """A `Launcher` of actors on the cluster of RAY_ADDRESS, else on one that it starts on this machine and ends.

    home: the folder that all nodes share. notify: receives lines for the user. warm, entries: of the workers.
    Raises UserError.
    """

    def __init__(
        self,
        options: EngineOptions,
        home: Path,
        notify: Callable[[str], None],
        *,
        warm: str = WARM,
        entries: Mapping[str, tuple[str, ...]] = ENTRIES,
    ) -> None:
        _check(options)
        self._cluster = os.environ.get(ADDRESS, "")
        if self._cluster == "local":
            self._cluster = ""
        self._notify = notify
        self._task = {
            "cluster": self._cluster,
            "home": str(home.absolute()),
            "options": options.to_table(),
            "warm": warm,
            "entries": {entry: list(keys) for entry, keys in entries.items()},
        }
        self._up = self._closing = self._mistake = False
        self._tries = 1 if self._cluster else 2
        self._reason = ""
        self._folder: Path | None = None  # of the driver: what it prints, its token, and the files of its cluster
        self._driver: subprocess.Popen[str] | None = None

    def host(self) -> str:
        """The address of this machine that nodes of the cluster can reach. Raises UserError, WorldError."""
        if not self._cluster:
            return "127.0.0.1"
        if self._cluster == "auto":
            return _own_address()
        host, port = split_address(self._cluster.removeprefix("ray://"), ADDRESS)
        try:
            with socket.create_connection((host, port or GCS_PORT), DIAL_SECONDS) as connection:
                own: str = connection.getsockname()[0]
        except OSError as error:
            reason = "timed out" if isinstance(error, TimeoutError) else error.strerror or error
            raise WorldError(f"{ADDRESS} {self._cluster}: no Ray cluster answers ({reason})") from None
        return _own_address() if own.startswith("127.") else own

    def start(self, address: str) -> None:
        """Starts the driver, which starts the actors in its own time."""
        self._task["address"] = address
        if not self._cluster:
            self._notify("starting a Ray cluster on this machine")
        self._start()

    def check(self, nodes: int) -> None:
        """Starts a cluster that did not come up again, once. nodes: workers that are connected. Raises WorldError if no
        actor runs any more and none can come, UserError if the cluster has not what the options ask for.
        """
        assert self._driver is not None
        if nodes:
            return
        if self._driver.poll() is None:
            if self._up or time.monotonic() < self._started + START_SECONDS:
                return
            self._reason = f"it is not up after {START_SECONDS:g} seconds"
        else:
            self._reader.join(5)
        reason = self._explain()
        self._end()
        if self._mistake:
            raise UserError(reason)
        if self._up or self._tries == 0:
            raise WorldError(f"{ADDRESS} {self._cluster}: {reason}" if self._cluster else f"Ray: {reason}")
        self._notify(f"the Ray cluster did not start ({reason}); trying again")
        self._start()

    def close(self) -> None:
        """Ends all actors, and the cluster if it was started here."""
        self._closing = True
        self._end()

    def _start(self) -> None:
        self._tries -= 1
        self._reason, self._started = "", time.monotonic()
        # Not TMPDIR: Ray's sockets lie in it, whose paths have at most 107 characters.
        self._folder = folder = Path(tempfile.mkdtemp(prefix="searchfm-ray-", dir="/tmp"))
        environment = SETTINGS | without_secrets(os.environ)
        if not self._cluster:  # its token lies in a file that no other user reads, and not in ~/.ray
            (folder / "token").touch(0o600)
            (folder / "token").write_text(secrets.token_hex(32))
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
            environment.pop("RAY_AUTH_TOKEN", None)  # it comes before the file
        environment.pop(ADDRESS, None)
        with (folder / "log").open("w") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is the coordinator's to answer
            )
        assert self._driver.stdin is not None
        with suppress(OSError):  # it died; `check` says why
            self._driver.stdin.write(json.dumps({**self._task, "folder": str(folder)}) + "\n")
            self._driver.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(self._driver,), daemon=True)
        self._reader.start()

    def _read(self, driver: "subprocess.Popen[str]") -> None:
        """Receives what the driver reports. Runs in a thread."""
        assert driver.stdout is not None
        for line in driver.stdout:
            message: list[Any] = json.loads(line)
            match message:
                case ["up"]:
                    self._up = True
                case ["waiting", int(waiting), int(workers)] if not self._closing:
                    if waiting:
                        self._notify(f"waiting for {waiting} of {workers} workers: the cluster has no room yet")
                    else:
                        self._notify(f"all {workers} workers have room")
                case ["refused", str(reason)] if not self._closing:
                    self._reason = reason
                    self._notify(f"refused {reason}")
                case ["failed", str(reason)]:
                    self._reason = reason
                case ["mistake", str(reason)]:
                    self._reason, self._mistake = reason, True

    def _explain(self) -> str:
        """Why the driver ended: what it reported, the failed check of a raylet, or the last line that it printed."""
        assert self._folder is not None
        for path in self._folder.glob("session_2*/logs/raylet.*"):
            for line in path.read_text(errors="replace").splitlines():
                if "Check failed" in line or "Timed out waiting for file" in line:
                    return f"the raylet failed: {line.rpartition(' Check failed: ')[2].strip()[:200]}"
        if self._reason:
            return self._reason
        lines = (self._folder / "log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no worker is left")
        return re.sub(r"^\[[^]]*\] \S+:\d+: ", "", last)[:200]  # without the time, process and file of Ray's log

    def _end(self) -> None:
        """Ends the driver and all that it started."""
        driver, folder = self._driver, self._folder
        if driver is None or folder is None:
            return
        assert driver.stdin is not None
        if driver.stdin.closed:
            return
        with suppress(OSError):
            driver.stdin.close()  # asks it to end
        with suppress(subprocess.TimeoutExpired):
            driver.wait(CLOSE_SECONDS)
        until = time.monotonic() + KILL_SECONDS
        with suppress(ProcessLookupError):  # nothing is left of its group
            while time.monotonic() < until:
                os.killpg(driver.pid, signal.SIGKILL)  # servers that outlive it write their logs again
                driver.poll()
                time.sleep(0.02)
        driver.wait()
        self._reader.join(5)
        assert driver.stdout is not None
        driver.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def _check(options: EngineOptions) -> None:
    """Raises UserError for what Ray cannot do."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray: Ray is not installed; pip install 'searchfm[ray]'")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {options.device}: with --engine ray must be auto, cpu or cuda; Ray chooses the GPU")
    if options.workers_per_gpu != 1:
        raise UserError(
            f"--workers-per-gpu {options.workers_per_gpu}: with --engine ray, --gpus-per-worker shares a GPU: 0.25"
        )


def _own_address() -> str:
    """The address of this machine on its network, as Ray finds it too; loopback without a network."""
    return source_address("192.0.2.1") or "127.0.0.1"  # an address of documentation
