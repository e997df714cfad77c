"""The engine of workers elsewhere: it listens, nodes dial in (`agent.py`), and jobs and events cross the wire.

A launcher starts the nodes' agents where the search itself must (SLURM, Ray); without one, users start them.
"""

import ipaddress
import os
import secrets
import shlex
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from websockets.sync.server import ServerConnection, serve

from searchfm.engines import DEFAULTS, EngineOptions
from searchfm.engines.wire import (
    ENTRIES,
    LOST_SECONDS,
    SETTINGS,
    Alive,
    Joined,
    Leave,
    Leaving,
    Link,
    Message,
    Stop,
    Versions,
    WireError,
    address,
    find_key,
    portable,
    server_tls,
    welcome,
)
from searchfm.errors import CodeNotAllowedError, SearchfmError, UserError, WorldError
from searchfm.jobs import EpochDone, Event, Failed, Finished, Interrupted, Job, Lost

SEEN_SECONDS = 10.0  # for a file that a node wrote to be seen here
CHECK = "check"  # id of the job of `each`


class Launcher(Protocol):
    """Starts agents on nodes, and ends them."""

    def host(self) -> str:
        """The address of this machine that nodes can reach. Raises UserError, WorldError."""

    def start(self, address: str) -> None:
        """Starts all agents; they dial `address`, HOST:PORT. Raises UserError, WorldError."""

    def check(self, nodes: int) -> None:
        """Called between two events, so it must not block. nodes: connected agents. Raises WorldError if there are
        none, no agent runs any more and none can come.
        """

    def close(self) -> None:
        """Ends all agents that were started."""


@dataclass(frozen=True)
class _Closed:
    """In place of a message: the connection is closed."""

    reason: str


@dataclass(eq=False)
class _Node:
    """A connection to an agent, whose `devices` are its workers."""

    link: Link
    host: str
    devices: tuple[str, ...]
    jobs: dict[str, Job] = field(default_factory=dict)
    received: float = 0.0  # when its last message came, on the engine's clock

    @property
    def free(self) -> int:
        return max(len(self.devices) - len(self.jobs), 0)


class RemoteEngine:
    """An `Engine` whose workers dial in at `host` and `port` (0: any). home: the folder that all nodes share."""

    def __init__(
        self,
        home: Path,
        host: str,
        port: int,
        *,
        options: EngineOptions = DEFAULTS,
        launcher: Launcher | None = None,
        notify: Callable[[str], None] = lambda line: None,
        entries: Mapping[str, tuple[str, ...]] = ENTRIES,
    ) -> None:
        self._options = options
        self._home, self._launcher, self._notify, self._entries = home, launcher, notify, entries
        self._key, self._versions = find_key(home, create=True), Versions.here()
        self._nodes: list[_Node] = []
        self._inbox: SimpleQueue[tuple[_Node, Message]] = SimpleQueue()
        self._pending: deque[Event] = deque()  # not returned yet
        self._each: Job | None = None
        self._checked: set[str] = set()  # hosts where it is done
        self._probe = Path(f".nodes-{secrets.token_hex(8)}") / "probe"
        self._content = secrets.token_hex(16)
        self._refusal = ""  # the last
        self._clock, self._read_at = 0.0, time.monotonic()  # seconds of reading; the last time, on the process's clock
        tls = server_tls(self._options.tls_cert, self._options.tls_key)
        try:
            self._server = serve(self._on_connection, host, port, ssl=tls, ping_interval=None, **SETTINGS)
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or 0
            reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
            raise UserError(f"--listen {host}:{port}: {reason}; name another address or port") from None
        self.port: int = self._server.socket.getsockname()[1]
        (home / self._probe).parent.mkdir(parents=True)
        (home / self._probe).write_text(self._content)
        threading.Thread(target=self._server.serve_forever, name="listener", daemon=True).start()
        if launcher is not None:
            try:
                launcher.start(f"{host}:{self.port}")
            except BaseException:
                self.close()
                raise

    # --- the engine ---------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Workers that can receive a job now, of nodes that `each` admitted."""
        return sum(node.free for node in self._nodes if self._admitted(node))

    @property
    def busy(self) -> bool:
        """Whether any job is under way, or its end not yet read."""
        return bool(self._pending) or any(node.jobs.keys() - {CHECK} for node in self._nodes)

    def expand(self, accelerators: Mapping[str, int]) -> Sequence[str]:
        """The devices of the workers that are there; all that come are used."""
        return [device for node in self._nodes for device in node.devices]

    def pack(self, memory: float) -> str:
        """Nothing: each node has a fixed number of workers."""
        return ""

    def each(self, job: Job) -> None:
        """Runs the job once on every host before it gets another one."""
        self._each = replace(job, id=CHECK, attempt=1)
        for node in self._nodes:
            self._begin_check(node)

    def submit(self, job: Job) -> None:
        """Sends the job to the node with most free workers."""
        self._send(max(filter(self._admitted, self._nodes), key=lambda node: node.free), job)

    def stop(self, job: str) -> None:
        """Sends a stop to the node that has the job."""
        for node in self._nodes:
            if job in node.jobs:
                with suppress(WireError):
                    node.link.send(Stop(job))

    def next_event(self, timeout: float) -> Event | None:
        """Reads one message at most."""
        if self._pending:
            return self._pending.popleft()
        if self._launcher is not None and self._inbox.empty():
            self._check_launcher(self._launcher)
        try:
            node, message = self._inbox.get(timeout=timeout)
        except Empty:
            self._lose_silent(timeout)
            return self._pending.popleft() if self._pending else None
        self._lose_silent(timeout)
        return self._receive(node, message)

    def close(self) -> None:
        """Lets all nodes leave, and ends what was launched."""
        for node in self._nodes:
            with suppress(WireError):
                node.link.send(Leave())
        if self._launcher is not None:
            self._launcher.close()
        self._server.shutdown()
        for node in self._nodes:
            node.link.close()
        shutil.rmtree(self._home / self._probe.parent, ignore_errors=True)

    def _lose_silent(self, timeout: float) -> None:
        """Loses the nodes that are silent for too long. timeout: seconds that this call may have waited."""
        # Between two calls the clock takes a second more at most: time in which this process did not run (Ctrl-Z), or
        # did something else, is not the nodes' silence. On a busy machine shorter times add up, and count.
        now = time.monotonic()
        self._clock += min(now - self._read_at, timeout + 1.0)
        self._read_at = now
        for node in list(self._nodes):
            if self._clock - node.received > LOST_SECONDS:
                self._lose(node, f"silent for {LOST_SECONDS:g} seconds")
                threading.Thread(target=node.link.close, daemon=True).start()  # it takes seconds

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _admitted(self, node: _Node) -> bool:
        return node.free > 0 and (self._each is None or node.host in self._checked)

    def _send(self, node: _Node, job: Job) -> None:
        node.jobs[job.id] = job
        with suppress(WireError):  # its end is read next, and the job is lost
            node.link.send(portable(job, self._home, self._entries))

    def _begin_check(self, node: _Node) -> None:
        """Runs the job of `each` on a host where it neither ran nor runs."""
        checking = any(other.host == node.host and CHECK in other.jobs for other in self._nodes)
        if self._each is not None and node.host not in self._checked and not checking and node.free > 0:
            self._send(node, self._each)

    def _end_check(self, node: _Node, event: Event | None) -> None:
        """Admits a host where the job of `each` has ended well; refuses it where the job failed."""
        node.jobs.pop(CHECK, None)
        others = [other for other in self._nodes if other.host == node.host]
        match event:
            case Finished():
                self._checked.add(node.host)
            case Failed(reason=reason):
                self._dismiss(others, reason)
            case _:  # its worker or the node is lost
                for other in others:
                    self._begin_check(other)

    def _dismiss(self, nodes: Sequence[_Node], reason: str) -> None:
        """Refuses nodes of one host that have joined; their jobs are handed back, not charged."""
        self._refuse(f"node {nodes[0].host}: {reason}")
        for node in nodes:
            self._nodes.remove(node)
            self._pending += [Interrupted(job.id, job.attempt) for job in node.jobs.values() if job.id != CHECK]
            node.jobs.clear()
            with suppress(WireError):
                node.link.send(Leave(reason))

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self._notify(f"refused {reason}")

    def _check_launcher(self, launcher: Launcher) -> None:
        try:
            launcher.check(len(self._nodes))
        except WorldError as error:
            raise WorldError(f"{error}; the last worker: {self._refusal}" if self._refusal else str(error)) from None

    # --- messages -----------------------------------------------------------------------------------------------------

    def _receive(self, node: _Node, message: Message) -> Event | None:
        match message:
            case Joined(devices=devices):
                self._nodes.append(node)
                self._notify(f"node {node.host} joined: {', '.join(devices)}")
                self._begin_check(node)
            case Leaving():
                node.devices = ()
                self._notify(f"node {node.host} leaves")
            case Alive():
                pass
            case _Closed(reason=reason):
                self._lose(node, reason)
            case EpochDone() | Finished() | Failed() | Interrupted() | Lost():
                return self._on_event(node, message)
            case other:
                self._lose(node, f"it sent {type(other).__name__}, which no node sends")
                node.link.close()
        return self._pending.popleft() if self._pending else None

    def _on_event(self, node: _Node, event: Event) -> Event | None:
        job = node.jobs.get(event.job)
        if job is None or job.attempt != event.attempt:
            return None
        if isinstance(event, Failed) and event.kind == CodeNotAllowedError.__name__:  # another agent may allow it
            self._dismiss([node], event.reason)
            for other in self._nodes:
                self._begin_check(other)
            return self._pending.popleft() if self._pending else None
        if not isinstance(event, EpochDone):
            del node.jobs[job.id]
        if job.id != CHECK:
            return event
        if not isinstance(event, EpochDone):
            self._end_check(node, event)
        return None

    def _lose(self, node: _Node, reason: str) -> None:
        """Removes a node whose connection is closed; its jobs are lost."""
        if node not in self._nodes:
            return  # it was refused
        self._nodes.remove(node)
        if node.devices:
            self._notify(f"node {node.host} is gone: {reason}")
        for job in node.jobs.values():
            if job.id != CHECK:
                self._pending.append(Lost(job.id, job.attempt, f"node {node.host} is lost ({reason})"))
        if CHECK in node.jobs:
            self._end_check(node, None)
        node.jobs.clear()  # what is still in the inbox comes too late

    def _on_connection(self, connection: ServerConnection) -> None:
        """One connection, in a thread of its own: all messages go to the inbox."""
        link, peer = Link(connection), connection.remote_address[0]
        try:
            joined = welcome(link, self._key, self._versions, self._probe.as_posix(), self._content)
            self._await(joined)
        except SearchfmError as error:
            self._refuse(str(error) if isinstance(error, UserError) else f"{peer}: {error}")
            return
        node, reason = _Node(link, joined.host, joined.devices, received=self._clock), "the connection was closed"
        self._inbox.put((node, joined))
        try:
            for message in link:
                node.received = self._clock
                self._inbox.put((node, message))
        except WireError as error:
            reason = str(error)
        self._inbox.put((node, _Closed(reason)))

    def _await(self, joined: Joined) -> None:
        """Waits for the file that a node wrote into its home. Raises UserError if it is not seen here."""
        written = self._home / self._probe.with_name(Path(joined.written).name)
        until = time.monotonic() + SEEN_SECONDS
        while time.monotonic() < until:
            with suppress(OSError):
                if written.read_text() == self._content:
                    written.unlink()
                    return
            time.sleep(0.05)
        raise UserError(f"node {joined.host}: what it writes into its home is not seen in {self._home}")


def listen(options: EngineOptions, home: Path, notify: Callable[[str], None]) -> RemoteEngine:
    """The engine of workers that users start. Raises UserError."""
    host, port = address(options.listen or "", "--listen")
    if not host:
        raise UserError("--engine listen: needs --listen HOST:PORT, the address that workers dial")
    for name in ("workers", "device", "workers_per_gpu"):
        if (value := getattr(options, name)) != getattr(DEFAULTS, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: with --engine listen, each `searchfm worker` has its own {flag}")
    engine = RemoteEngine(home, host, port, options=options, notify=notify)
    notify(f"listening; on each machine that mounts {home}, type:")
    notify(f"  {shlex.join(['searchfm', *worker_command(options, home, f'{host}:{engine.port}')])}")
    _warn_unencrypted(options, host, notify)
    return engine


def launch(options: EngineOptions, home: Path, notify: Callable[[str], None], launcher: Launcher) -> RemoteEngine:
    """The engine of workers that a launcher starts. Raises UserError, WorldError."""
    host, port = address(options.listen or "", "--listen")
    host = host or launcher.host()
    _warn_unencrypted(options, host, notify)
    return RemoteEngine(home, host, port, options=options, launcher=launcher, notify=notify)


def worker_command(options: EngineOptions, home: Path, address: str) -> list[str]:
    """The arguments of a worker that dials `address`; the key stands in the home."""
    flags = {"--home": str(home), "--data-dir": options.data_dir, "--tls-cert": options.tls_cert}
    allowed = ["--allow-code"] if options.allow_code else []
    return ["worker", address, *(text for flag, value in flags.items() if value for text in (flag, value)), *allowed]


def _warn_unencrypted(options: EngineOptions, host: str, notify: Callable[[str], None]) -> None:
    with suppress(OSError, ValueError):
        if ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            return
    if options.tls_cert is None:
        notify("jobs and results cross the network unencrypted; --tls-cert and --tls-key encrypt them")
