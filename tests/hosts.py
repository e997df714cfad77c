"""Hosts made of Linux namespaces on one machine: each has its own network, name, processes and /tmp/ray.

A host lives as long as this process holds its stdin, so none outlives the tests, whatever ends them. Its files are the
machine's: every folder is shared.
"""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.programs import missing

NETWORK = "10.77.0."  # of addresses that exist in the hosts' namespaces alone
# The first process of a host, which ends when its stdin is closed; with it the kernel ends all others.
INIT = """
hostname "$1" && ip link set lo up && mkdir -p /tmp/ray "$2" && mount --bind "$2" /tmp/ray && echo up && exec cat
"""


class Host:
    """A host of its own. name: also its host name. folder: becomes its /tmp/ray."""

    def __init__(self, name: str, folder: Path, address: str) -> None:
        self.name, self.address = name, address
        self._started: list[Running] = []
        spaces = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = subprocess.Popen(
            [*spaces, "bash", "-c", INIT, "bash", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._unshare.stdout
        if (line := self._unshare.stdout.readline().strip()) != "up":
            self.kill()
            missing(f"this test makes network namespaces, which needs root: {line}")
        (child,) = psutil.Process(self._unshare.pid).children()
        self.pid = child.pid

    def enter(self, command: Sequence[str], *flags: str) -> list[str]:
        """The command, to be run on this host. flags: of nsenter, such as a user."""
        spaces = ["--net", "--uts", "--pid", "--mount"]
        return ["nsenter", f"--target={self.pid}", *spaces, *flags, "env", "-C", str(Path.cwd()), *command]

    def run(self, *command: str, **environment: str) -> str:
        """What a command prints; it must succeed."""
        return subprocess.run(
            self.enter(command), env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def start(self, *command: str, **environment: str) -> "Running":
        """Starts a command."""
        self._started.append(Running(self.enter(command), environment))
        return self._started[-1]

    def kill(self) -> None:
        """Ends all processes of the host at once."""
        self._unshare.kill()  # --kill-child
        self._unshare.communicate()
        for running in self._started:
            running.wait()


class Running:
    """A process on a host, whose output is read as it comes."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.lines: list[tuple[float, str]] = []  # time of a monotonic clock, line
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output:
            for line in output:
                self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, words: str, seconds: float = 120.0, count: int = 1, since: float = 0.0) -> float:
        """When the line with these words came, of several the last; of those after the time `since`."""
        until = time.monotonic() + seconds
        while len(times := [when for when, line in list(self.lines) if words in line and when > since]) < count:
            assert time.monotonic() < until, f"no {words!r} in: {self.text}"
            assert self._reader.is_alive(), f"no {words!r} in: {self.text}"
            time.sleep(0.02)
        return times[count - 1]

    def wait(self, seconds: float = 180.0) -> int:
        """Its exit code, once it has ended and all is read."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """Kills the process itself, -9; nsenter stands before it."""
        for child in psutil.Process(self.process.pid).children():
            child.kill()


class Network:
    """A head and workers on one switch; the machine's own network has no part in it."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder, self.workers = folder, {}
        self.head = Host("head", folder / "ray-head", NETWORK + "1")
        try:
            self._ip("link", "add", "br0", "type", "bridge")
            self._ip("addr", "add", f"{self.head.address}/24", "dev", "br0")
            self._ip("link", "set", "br0", "up")
            for number in range(1, workers + 1):
                self.add(f"node{number}")
        except BaseException:
            self.close()
            raise

    workers: dict[str, Host]

    def add(self, name: str) -> Host:
        """Another host, also under the name of one that was killed."""
        number = int(name.removeprefix("node"))
        host = Host(name, self.folder / f"ray-{name}", f"{NETWORK}{number + 1}")
        self.workers[name] = host
        self._ip("link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._ip("link", "set", f"v{number}", "master", "br0", "up")
        for command in (f"addr add {host.address}/24 dev eth0", "link set eth0 up"):
            host.run("ip", *command.split())
        return host

    def cut(self, name: str) -> None:
        """Pulls a host's cable: from now on nothing arrives, and no connection is closed."""
        self._ip("link", "set", name.replace("node", "v"), "down")

    def mend(self, name: str) -> None:
        """Plugs it in again."""
        self._ip("link", "set", name.replace("node", "v"), "up")

    def power_off(self, name: str) -> None:
        """Ends a host whose kernel closes no connection first."""
        self.cut(name)
        self.workers.pop(name).kill()
        # The kernel removes a namespace, and the cable with it, in its own time.
        link = ["ip", "link", "del", name.replace("node", "v")]
        subprocess.run(["nsenter", f"--target={self.head.pid}", "--net", *link], stderr=subprocess.DEVNULL, check=False)

    def close(self) -> None:
        """Ends all hosts with all their processes."""
        for host in (*self.workers.values(), self.head):
            host.kill()

    def _ip(self, *arguments: str) -> None:
        """Changes the head's network. The command keeps the machine's process numbers, which name other namespaces."""
        subprocess.run(["nsenter", f"--target={self.head.pid}", "--net", "ip", *arguments], check=True)
