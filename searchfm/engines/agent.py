"""The dial-in worker (`searchfm worker HOST:PORT`): runs jobs of a coordinator elsewhere on a local engine of its own.

It accepts the entries of a table, and folders inside its home; it has no database, no tracker and no password. It dials
again when the connection breaks, and leaves when the search is over.
"""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from socket import gethostname
from ssl import SSLContext

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from searchfm.engines import DEFAULTS, EngineOptions
from searchfm.engines.local import LocalEngine
from searchfm.engines.wire import (
    ALIVE_SECONDS,
    ENTRIES,
    KEY,
    SETTINGS,
    Alive,
    Joined,
    Leave,
    Leaving,
    Link,
    Message,
    Refused,
    Stop,
    Versions,
    Welcome,
    WireError,
    address,
    client_tls,
    find_key,
    introduce,
    local,
)
from searchfm.errors import UserError, WorldError, one_line
from searchfm.forkserver import WARM, without_secrets
from searchfm.jobs import EpochDone, Failed, Finished, Interrupted, Job, Lost
from searchfm.stopping import STOP_SECONDS, exit_at_second

DEVICES = "searchfm.learn.entries:devices"
DIAL_SECONDS = 1.0  # between two attempts to connect
RETRY_SECONDS = 60.0  # of attempts, before a worker gives up


class Agent:
    """A node's end of the wire: `run` serves until the search is over.

    address: the coordinator's. home: the folder that both share. options: device, workers, data_dir, tls_cert. retry:
    seconds to go on dialling while no coordinator answers. devices: one a worker, in place of those that the options
    choose. host: the node's name.
    """

    def __init__(
        self,
        address: tuple[str, int],
        home: Path,
        key: bytes,
        options: EngineOptions = DEFAULTS,
        *,
        retry: float = RETRY_SECONDS,
        devices: Sequence[str] = (),
        entries: Mapping[str, tuple[str, ...]] = ENTRIES,
        warm: str = WARM,
        host: str | None = None,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.address, self.home, self.key = address, home, key
        self.options, self.retry, self.entries, self.notify = options, retry, entries, notify
        self.devices, self.host = devices, host or gethostname()
        self.signal = 0  # that ended it
        self._leave_by: float | None = None  # when it leaves even if jobs run
        self._joined = False
        self._wake, self._waker = Pipe(duplex=False)  # ends a wait for events of the engine
        self._engine = LocalEngine(["cpu"], warm, options=self.options, wake=[self._wake])
        self._running: set[str] = set()  # jobs

    def run(self) -> None:
        """Serves until the search is over or a signal comes. Raises UserError if this node is refused, WorldError if no
        coordinator answers.
        """
        tls, where = client_tls(self.options.tls_cert), f"{self.address[0]}:{self.address[1]}"
        with closing(self._engine):
            if self.devices:
                self._engine.resize(self.devices)
            else:
                self.devices = self._engine.expand(self._accelerators())
            answered = time.monotonic()
            while not self.signal:
                try:
                    self._connect(tls)
                    return
                except (OSError, WebSocketException, WireError) as error:  # TimeoutError is an OSError
                    if self._joined:
                        self.notify(f"{where}: {error}; its jobs are stopped; dialling again")
                        self._stop_jobs()
                        answered, self._joined = time.monotonic(), False
                    if time.monotonic() > answered + self.retry:
                        raise WorldError(f"{where}: no coordinator answers ({one_line(error)})") from None
                    time.sleep(DIAL_SECONDS)

    def terminate(self, number: int, _: object = None) -> None:
        """The handler of SIGTERM and SIGINT: jobs are stopped, and the coordinator resumes them elsewhere."""
        self.signal = number
        self._waker.send_bytes(b"")

    def _accelerators(self) -> Mapping[str, int]:
        """The numbers of this node's accelerators; a worker asks torch, so that this process need not load it."""
        if self.options.device == "cpu":
            return {"cuda": 0, "mps": 0}
        self._engine.submit(Job("devices", None, DEVICES, {}))
        while not isinstance(event := self._engine.next_event(1.0), Finished | Failed | Lost):
            if self.signal:
                raise SystemExit(128 + self.signal)
        if not isinstance(event, Finished):
            raise WorldError(f"torch cannot list this machine's devices: {event.reason}")
        return event.result

    def _connect(self, tls: SSLContext | None) -> None:
        """One connection, until the search is over. Raises OSError, WebSocketException or WireError if there is none,
        or it breaks.
        """
        host, port = self.address
        uri = f"{'wss' if tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"
        with connect(uri, ssl=tls, proxy=None, ping_interval=10.0, ping_timeout=60.0, **SETTINGS) as socket:
            link = Link(socket)
            welcome = introduce(link, self.key)
            try:
                written = self._check(welcome)
            except UserError as error:
                link.send(Refused(self.host, str(error)))
                raise
            link.send(Joined(self.host, tuple(self.devices), written))
            self._joined = True
            self.notify(f"joined {host}:{port} with {', '.join(self.devices)}")
            self._serve(link)

    def _check(self, welcome: Welcome) -> str:
        """Checks that this node can serve: the same home, the same versions. Returns a file that it wrote there."""
        if problem := Versions.here().difference(welcome.versions):
            raise UserError(problem)
        probe = self.home / welcome.probe
        try:
            content = probe.read_text()
            written = probe.with_name(secrets.token_hex(8))
            written.write_text(welcome.content)
        except OSError as error:
            raise UserError(f"{self.home} is not the coordinator's home, or is read-only: {error.strerror}") from None
        if content != welcome.content:
            raise UserError(f"{self.home} is not the coordinator's home: another {welcome.probe} is there")
        return written.relative_to(self.home).as_posix()

    def _serve(self, link: Link) -> None:
        inbox: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=self._receive, args=(link, inbox), daemon=True).start()
        threading.Thread(target=self._beat, args=(link,), daemon=True).start()
        while self._leave_by is None or (self._running and time.monotonic() < self._leave_by):
            self._leave_if_told(link)
            while self._wake.poll():
                self._wake.recv_bytes()
            while not inbox.empty():
                match inbox.get():
                    case Job() as received:
                        self._submit(link, received)
                    case Stop(job=job):
                        self._engine.stop(job)
                    case Leave(reason=""):
                        return
                    case Leave(reason=reason):
                        raise UserError(reason)
                    case WireError() as error:
                        raise error
                    case other:
                        raise WireError(f"{type(other).__name__} came, which no worker takes")
            event = self._engine.next_event(1.0)
            if event is not None:
                self._leave_if_told(link)  # first: a node with a free worker, not known to leave, would get a job
                _send(link, event)
                if not isinstance(event, EpochDone):
                    self._running.discard(event.job)

    def _leave_if_told(self, link: Link) -> None:
        """After a signal, says once that this node leaves, and stops its jobs."""
        if self.signal and self._leave_by is None:
            self._leave_by = time.monotonic() + STOP_SECONDS
            _send(link, Leaving())
            for job in self._running:
                self._engine.stop(job)

    def _beat(self, link: Link) -> None:
        """Sends heartbeats until the connection closes. Runs in a thread: the first worker's start blocks the other one
        while the fork server imports torch, 8 seconds and more on a busy machine.
        """
        with suppress(WireError):
            while True:
                link.send(Alive())
                time.sleep(ALIVE_SECONDS / 2)

    def _receive(self, link: Link, inbox: "SimpleQueue[Message]") -> None:
        """Puts all messages into the inbox, at last the error that ended the connection. Runs in a thread."""
        try:
            for message in link:
                inbox.put(message)
                self._waker.send_bytes(b"")
            inbox.put(WireError("the connection was closed"))
        except WireError as error:
            inbox.put(error)
        self._waker.send_bytes(b"")

    def _submit(self, link: Link, job: Job) -> None:
        if self.signal:
            _send(link, Interrupted(job.id, job.attempt))
            return
        try:
            ready = local(job, self.home, self.options.data_dir, self.entries)
        except WireError as error:
            _send(link, Failed(job.id, job.attempt, "WireError", str(error)))
            return
        self._running.add(job.id)
        self._engine.submit(ready)

    def _stop_jobs(self) -> None:
        """Stops the jobs of a coordinator that is gone: they write their checkpoints. Ends workers that do not stop."""
        for job in self._running:
            self._engine.stop(job)
        until = time.monotonic() + STOP_SECONDS
        while self._engine.busy and time.monotonic() < until:
            self._engine.next_event(0.5)
        if self._engine.busy:
            self._engine.close()  # the next job starts another worker
        self._running.clear()


def _send(link: Link, message: Message) -> None:
    """Sends a message. That the connection is closed is read from it, after what came before: perhaps `Leave`."""
    with suppress(WireError):
        link.send(message)


def main(where: str, home: Path, options: EngineOptions, retry: float, notify: Callable[[str], None]) -> None:
    """Runs an agent in this process, until it ends or a signal comes. Raises UserError, WorldError."""
    clean = without_secrets(os.environ)
    if clean != dict(os.environ):  # replaced, so that /proc shows none either
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], clean)
    host, port = address(where, "HOST:PORT")
    if not (host and port):
        raise UserError(f"HOST:PORT {where}: must be the address that the search printed, host and port")
    if options.workers_per_gpu == "auto":
        raise UserError("--workers-per-gpu auto: is for --engine local; here it must be a number")
    key = find_key(home)
    os.environ.pop(KEY, None)  # its workers need no key
    agent = Agent((host, port), home, key, options, retry=retry, notify=notify)
    exit_at_second(agent.terminate)
    agent.run()
    if agent.signal:
        raise SystemExit(128 + agent.signal)
