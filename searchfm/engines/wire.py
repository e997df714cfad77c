"""What crosses between a coordinator and nodes elsewhere: JSON in WebSocket frames of bounded size, once both ends have
proved that they hold the same key. Nothing that comes from a socket is unpickled, and the key itself is never sent.

Each end sends a random nonce and the HMAC-SHA256 of both nonces. Frames after that are neither encrypted nor signed
unless TLS is used. Heartbeats show within ten seconds that a node, or the cable to it, is dead.
"""

import hashlib
import hmac
import os
import platform
import re
import secrets
import socket
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.connection import Connection

import searchfm
from searchfm.errors import SearchfmError, UserError
from searchfm.inputs import TEXT_BYTES, check_size, read_bytes
from searchfm.jobs import EpochDone, Failed, Finished, Interrupted, Job, Lost

PROTOCOL = 1  # of the messages below
KEY, KEY_FILE = "SEARCHFM_WORKER_KEY", "worker.key"
KEY_BYTES = 16  # of a key, at least
OTHER_KEY = "the coordinator has another key"
MESSAGE_BYTES = 4 << 20
ALIVE_SECONDS, LOST_SECONDS = 1.5, 8.0  # between two messages of a node at most; until a silent node is lost
# Of a connection; times in seconds. A node pings its coordinator, which may be busy or suspended for a while.
SETTINGS: Mapping[str, Any] = {
    "open_timeout": 10.0,
    "close_timeout": 1.0,
    "max_size": MESSAGE_BYTES,
    "compression": None,
}
# Entries that a node runs, each with the payload's keys that are folders of the home.
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "searchfm.learn.entries:prepare": (),
    "searchfm.learn.entries:forecast": (),
    "searchfm.learn.entries:trial": (),
    "searchfm.learn.entries:fit": (),
    "searchfm.learn.entries:test": ("model",),
    "searchfm.learn.entries:export": ("model",),
}


class WireError(SearchfmError):
    """The other end does not speak this protocol, or holds another key."""


@dataclass(frozen=True)
class Versions:
    """What must be equal at both ends, for trials of all nodes to be comparable."""

    python: str
    torch: str
    searchfm: str  # its number, and a digest of its sources

    @classmethod
    def here(cls) -> "Versions":
        """Those of this process."""
        package, digest = Path(searchfm.__file__).parent, hashlib.sha256()
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
        python = ".".join(platform.python_version_tuple()[:2])
        return cls(python, version("torch"), f"{searchfm.__version__} ({digest.hexdigest()[:12]})")

    def difference(self, other: "Versions") -> str:
        """The first difference in words, or nothing."""
        for name, here in asdict(self).items():
            if here != (there := asdict(other)[name]):
                return f"{name} is {here} here, and {there} at the coordinator"
        return ""


@dataclass(frozen=True)
class Challenge:
    """Coordinator to node: the first message of a connection."""

    protocol: int
    nonce: str


@dataclass(frozen=True)
class Answer:
    """Node to coordinator: its proof that it holds the key, and its own challenge."""

    nonce: str
    proof: str


@dataclass(frozen=True)
class Welcome:
    """Coordinator to node: its proof, and what the node must have. probe: a file of the home, with this content."""

    proof: str
    versions: Versions
    probe: str
    content: str


@dataclass(frozen=True)
class Joined:
    """Node to coordinator: it is ready. devices: one a worker. written: a file of the home that it wrote."""

    host: str
    devices: tuple[str, ...]
    written: str


@dataclass(frozen=True)
class Refused:
    """Node to coordinator: it cannot serve."""

    host: str
    reason: str


@dataclass(frozen=True)
class Stop:
    """Coordinator to node: stop this job."""

    job: str


@dataclass(frozen=True)
class Leave:
    """Coordinator to node: the search is over, or the node is not used, for a reason."""

    reason: str = ""


@dataclass(frozen=True)
class Leaving:
    """Node to coordinator: it takes no further job."""


@dataclass(frozen=True)
class Alive:
    """Node to coordinator: the heartbeat."""


Message: TypeAlias = Any  # of the classes of KINDS
CLASSES = (Challenge, Answer, Welcome, Joined, Refused, Stop, Leave, Leaving, Alive)
KINDS = {kind.__name__: kind for kind in (*CLASSES, Job, EpochDone, Finished, Failed, Interrupted, Lost)}


def encode(message: Message) -> bytes:
    """A message as JSON: [kind, fields]."""
    return msgspec.json.encode([type(message).__name__, message], enc_hook=str)


def decode(data: bytes | str) -> Message:
    """Raises WireError for anything but a message."""
    try:
        kind, values = msgspec.json.decode(data, type=tuple[str, dict[str, Any]])
        return msgspec.convert(values, KINDS[kind], dec_hook=lambda kind, value: kind(value))
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"no message of searchfm: {type(error).__name__}") from None


class Link:
    """One end of a connection. Messages are received in one thread; any thread sends."""

    def __init__(self, socket: Connection) -> None:
        self.socket = socket

    def send(self, message: Message) -> None:
        """Raises WireError once the connection is closed."""
        try:
            self.socket.send(encode(message), text=True)
        except ConnectionClosed as error:
            raise WireError(f"the connection is closed ({closing(error)})") from None

    def receive(self, *kinds: type, timeout: float = 10.0) -> Any:
        """The next message, which must be of one of these kinds. Raises WireError."""
        expected = " or ".join(kind.__name__ for kind in kinds)
        try:
            message = decode(self.socket.recv(timeout))
        except TimeoutError:
            raise WireError(f"no {expected} within {timeout:g} seconds") from None
        except ConnectionClosed as error:
            raise WireError(f"the connection was closed ({closing(error)})") from None
        if not isinstance(message, kinds):
            raise WireError(f"{type(message).__name__} came, must be {expected}")
        return message

    def __iter__(self) -> Iterator[Message]:
        """All messages until the other end closes. Raises WireError if the connection breaks, or for what is none."""
        try:
            for data in self.socket:
                yield decode(data)
        except ConnectionClosed as error:
            raise WireError(f"the connection broke ({closing(error)})") from None

    def close(self) -> None:
        """Closes the connection."""
        self.socket.close()


def closing(error: ConnectionClosed) -> str:
    """Why a connection closed, in a few words."""
    frame = error.rcvd or error.sent
    return (frame.reason or f"code {frame.code}") if frame else "without a close frame"


# --- the handshake ----------------------------------------------------------------------------------------------------


def welcome(link: Link, key: bytes, versions: Versions, probe: str, content: str) -> Joined:
    """The coordinator's side. Raises WireError for another key, UserError for a node that cannot serve."""
    nonce = secrets.token_hex(16)
    link.send(Challenge(PROTOCOL, nonce))
    answer = link.receive(Answer)
    if not _equal(answer.proof, _proof(key, "node", nonce, answer.nonce)):
        link.send(Leave(OTHER_KEY))
        raise WireError("it has another key")
    link.send(Welcome(_proof(key, "coordinator", nonce, answer.nonce), versions, probe, content))
    joined = link.receive(Joined, Refused, timeout=120.0)
    if isinstance(joined, Refused):
        raise UserError(f"node {joined.host}: {joined.reason}")
    assert isinstance(joined, Joined)
    return joined


def introduce(link: Link, key: bytes) -> Welcome:
    """The node's side, up to the welcome. Raises WireError, UserError for another key."""
    challenge = link.receive(Challenge)
    if challenge.protocol != PROTOCOL:
        raise UserError(f"the coordinator speaks protocol {challenge.protocol}, this worker {PROTOCOL}")
    nonce = secrets.token_hex(16)
    link.send(Answer(nonce, _proof(key, "node", challenge.nonce, nonce)))
    answer = link.receive(Welcome, Leave)
    if isinstance(answer, Leave):  # not the text of a peer that has not proved to have the key
        raise UserError(OTHER_KEY)
    if not _equal(answer.proof, _proof(key, "coordinator", challenge.nonce, nonce)):
        raise UserError("the listener has another key: it is no coordinator of this home")
    assert isinstance(answer, Welcome)
    return answer


def _proof(key: bytes, role: str, first: str, second: str) -> str:
    return hmac.new(key, f"searchfm/{PROTOCOL}/{role}/{first}/{second}".encode(), hashlib.sha256).hexdigest()


def _equal(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(), expected.encode())  # of texts it takes ASCII alone


def find_key(home: Path, *, create: bool = False) -> bytes:
    """The key that a coordinator and its nodes share: SEARCHFM_WORKER_KEY, else the home's file. Raises UserError for a
    short key, a file that others can read, or none, unless it is to be created.
    """
    path = home / KEY_FILE
    if value := os.environ.get(KEY):
        return _long(value.encode(), KEY)
    try:
        if create:
            home.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32) + "\n")
        mode, key = stat.S_IMODE(path.stat().st_mode), read_bytes(path, TEXT_BYTES).strip()
    except OSError as error:
        raise UserError(f"{path}: the key cannot be read ({error.strerror}); is --home the shared one?") from None
    if mode & 0o077:
        raise UserError(f"{path}: has mode {mode:o}, must be 600, since whoever reads the key can send jobs")
    return _long(key, str(path))


def _long(key: bytes, where: str) -> bytes:
    """The key, unless it can be guessed. A file that another process has just created may be empty still."""
    if len(key) < KEY_BYTES:
        raise UserError(f"{where}: the key has {len(key)} characters, must have {KEY_BYTES} or more")
    return key


def address(text: str, option: str) -> tuple[str, int]:
    """HOST:PORT, HOST or :PORT; "" or 0 for what is missing. Raises UserError, with the option's name."""
    host, _, port = text.rpartition(":") if ":" in text.rsplit("]")[-1] else (text, "", "0")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise UserError(f"{option} {text}: must be HOST:PORT")
    return host.strip("[]"), int(port)


def source_address(host: str) -> str | None:
    """The address from which packets for a host leave; none is sent. None without a route."""
    with suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    return None


def server_tls(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """TLS of a listener. Raises UserError."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("--tls-cert and --tls-key: must be given together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for path in (cert, key):
            check_size(Path(path), TEXT_BYTES)
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"--tls-cert {cert}, --tls-key {key}: {error.strerror or error}") from None
    return context


def client_tls(cert: str | None) -> ssl.SSLContext | None:
    """TLS of a node, which trusts this certificate alone, whatever its host name. Raises UserError."""
    if cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    try:
        check_size(Path(cert), TEXT_BYTES)
        context.load_verify_locations(cert)
    except OSError as error:
        raise UserError(f"--tls-cert {cert}: {error.strerror or error}") from None
    return context


# --- paths ------------------------------------------------------------------------------------------------------------


def portable(job: Job, home: Path, entries: Mapping[str, tuple[str, ...]] = ENTRIES) -> Job:
    """The job with paths relative to the home, as it crosses."""
    payload = {**job.payload, **{key: _relative(job.payload[key], home) for key in entries.get(job.entry, ())}}
    return replace(job, folder=job.folder and PurePosixPath(_relative(job.folder, home)), payload=payload)  # type: ignore[arg-type]


def local(job: Job, home: Path, data_dir: str | None, entries: Mapping[str, tuple[str, ...]]) -> Job:
    """The job as it runs on a node: paths below its own home, data in its own folder. Raises WireError for an entry
    that is not in the table, or a folder outside the home.
    """
    if job.entry not in entries:
        raise WireError(f"entry {job.entry!r}: must be one of {', '.join(entries)}")
    payload = {**job.payload, **{key: str(_inside(job.payload.get(key), home)) for key in entries[job.entry]}}
    if data_dir is not None and "data_dir" in payload:
        payload["data_dir"] = data_dir
    return replace(job, folder=None if job.folder is None else _inside(job.folder, home), payload=payload)


def _relative(path: Any, home: Path) -> str:
    return Path(path).relative_to(home).as_posix()


def _inside(path: Any, home: Path) -> Path:
    try:
        whole: Path = (home / path).resolve()
        if whole == home.resolve() or not whole.is_relative_to(home.resolve()):
            raise ValueError
    except (TypeError, ValueError, OSError, RuntimeError):  # the last of links to themselves
        raise WireError(f"folder {str(path)[:100]!r} is outside the home") from None
    return whole
