"""One guard before both user interfaces: which requests reach optuna-dashboard and MLflow.

optuna-dashboard checks nothing, and each of its clients may delete studies; MLflow takes writes from any page on
localhost. The guard checks every request, whatever its method: the name in Host (against DNS rebinding), the page in
Origin (against pages of other servers), and a token, without which neither may be bound beyond loopback.
"""

import hashlib
import hmac
import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchfm.errors import UserError
from searchfm.inputs import read_text

TOKEN = "SEARCHFM_UI_TOKEN"
LOOPBACK = "127.0.0.1"
NAMES = frozenset({LOOPBACK, "localhost", "[::1]"})  # of this machine, as they stand in a URL
HEALTH = "/health"  # answers without a token, and the same whatever there is: for health checks
_NAME = r"\[[0-9a-f:.]+\]|[a-z0-9._-]+"
_HOST = re.compile(rf"({_NAME})(:\d+)?")
_TOKEN = re.compile(
    r"[A-Za-z0-9._~+/=-]{16,512}"
)  # what a Bearer header carries (RFC 6750), long enough not to be guessed
# A page of another server must not frame ours, nor receive its address; a picture must not be taken for a page.
_HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "SAMEORIGIN", "Referrer-Policy": "same-origin"}
_NO_TOKEN = (
    "A token is required: open the address with ?token=TOKEN once, or send the header Authorization: Bearer TOKEN.\n"
)


@dataclass(frozen=True)
class Access:
    """Where a server listens and whom it answers. Raises UserError for a name or a combination that cannot be."""

    host: str = LOOPBACK  # address that it binds
    names: tuple[str, ...] = ()  # further names in the Host header, without port
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in self.names:
            if not re.fullmatch(_NAME, _bracketed(name)):
                raise UserError(f"--allow-host {name!r}: must be a host name or an IP address, without port")
        if not _is_loopback(self.host) and self.token is None:
            raise UserError(
                f"--host {self.host}: a server beyond loopback requires a token; set {TOKEN}, or name its file with "
                "--token-file"
            )

    @property
    def allowed(self) -> frozenset[str]:
        """The names that a Host header may have."""
        # 0.0.0.0 and :: name no machine; browsers send them to loopback, which foreign pages have used.
        own = () if _unspecified(self.host) else (self.host,)
        return NAMES | {_bracketed(name) for name in (*self.names, *own)}

    def address(self, port: int) -> str:
        """The address of a server, for people: on loopback or at the first further name, else where it is bound."""
        own = LOOPBACK if _unspecified(self.host) else self.host
        name = own if _is_loopback(self.host) or not self.names else self.names[0]
        return f"http://{_bracketed(name)}:{port}"


def read_token(file: Path | None) -> str | None:
    """The token: the file's content, else SEARCHFM_UI_TOKEN, else None. Raises UserError, which does not quote it."""
    source = f"--token-file {file}" if file else TOKEN
    try:
        token = read_text(file).strip() if file else os.environ.get(TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {getattr(error, 'strerror', 'not text')}") from None
    if token is None:
        return None
    if not _TOKEN.fullmatch(token):
        raise UserError(f"{source}: must be 16 to 512 characters out of A-Z a-z 0-9 . _ ~ + / = -")
    return token


def with_token(address: str, token: str | None) -> str:
    """The address that sets the cookie. Its fragment stays the last part."""
    if token is None:
        return address
    parts = urlsplit(address)
    query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("token", token)])
    return parts._replace(path=parts.path or "/", query=query).geturl()


class Guard:
    """An ASGI app before another: 403 for a foreign Host or Origin, 401 without the token, if there is one.

    The token comes as `Authorization: Bearer`, which MLflow's clients send (MLFLOW_TRACKING_TOKEN), as `?token=`, which
    sets a cookie and leads to the same address without it, or as that cookie.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.allowed, self.token = app, access.allowed, access.token
        # Browsers send the cookies of a host to all its ports, also to other people's: not the token itself. A name
        # for each token: two services on one host do not log each other out.
        self.pass_ = hmac.new((self.token or "").encode(), b"searchfm cookie", hashlib.sha256).hexdigest()
        self.cookie = f"searchfm-{self.pass_[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself, or lets the app answer."""
        match scope["type"]:
            case "lifespan":
                await self.app(scope, receive, send)
            case "http":
                response = self.check(scope)
                await (response or self.app)(scope, receive, _with_headers(send))
            case _:  # neither has websockets
                await send({"type": "websocket.close", "code": 1008})

    def check(self, scope: Scope) -> Response | None:
        """The answer to a request that does not reach the app; None if it does."""
        headers, path = Headers(scope=scope), scope["path"]
        if path == HEALTH and scope["method"] in ("GET", "HEAD"):
            return PlainTextResponse("OK")
        hosts = [host.lower() for host in headers.getlist("host")]
        host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if host is None or host[1] not in self.allowed:
            return _refusal(
                403, "This host name is not allowed here; `searchfm dashboard --allow-host NAME` adds one.\n"
            )
        # The port counts too: another server on this machine may be somebody else's. https: behind a proxy with TLS.
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")
        if any(origin.lower() not in own for origin in headers.getlist("origin")):
            return _refusal(403, "Requests from pages of another server are not allowed.\n")
        if not path.startswith("/"):  # an address for a proxy, with a host of its own
            return _refusal(403, "Requests for another server are not allowed.\n")
        return self._authorize(scope, headers) if self.token else None

    def _authorize(self, scope: Scope, headers: Headers) -> Response | None:
        assert self.token
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(value.strip(), self.token):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] in ("GET", "HEAD") and any(_equal(v, self.token) for key, v in query if key == "token"):
            return self._enter(scope, [(key, v) for key, v in query if key != "token"])
        if _equal(cookie_parser(headers.get("cookie", "")).get(self.cookie, ""), self.pass_):
            return None
        return _refusal(401, _NO_TOKEN, {"WWW-Authenticate": "Bearer"})

    def _enter(self, scope: Scope, query: list[tuple[str, str]]) -> Response:
        path = "/" + quote(scope["path"].lstrip("/"))  # `//name` would lead to another server
        target = f"{path}?{urlencode(query)}" if query else path
        response = RedirectResponse(target, 303, {"Cache-Control": "no-store"})
        secure = scope["scheme"] == "https"
        response.set_cookie(self.cookie, self.pass_, httponly=True, samesite="strict", secure=secure)
        return response


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            message["headers"] = headers.raw
        await send(message)

    return sending


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return PlainTextResponse(sentence, status, headers)


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _bracketed(name: str) -> str:
    """A host name as it stands in a URL."""
    return f"[{name.lower()}]" if ":" in name and not name.startswith("[") else name.lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
