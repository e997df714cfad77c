"""The guard before both user interfaces under attack: raw bytes on real sockets, and another user of this machine."""

import ast
import inspect
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rows

from searchfm.home import Home
from searchfm.show import guard
from tests.programs import missing
from tests.serving import Served

pytestmark = pytest.mark.slow(seconds=5)

SECRET = "0123456789abcdef-attacked"


def talk(port: int, request: bytes, seconds: float = 20.0) -> bytes:
    """What a server answers until it closes the connection, or so many seconds after the last byte."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        answer = b""
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                answer += part
        except (ConnectionError, TimeoutError):  # closed before it had read all; kept open
            pass
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.fixture(scope="module")
def searched(new_home: Callable[[Path], Home], tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = new_home(tmp_path_factory.mktemp("attacked") / "home")
    rows.four(home)
    return home


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "token"
    file.touch(0o600)
    file.write_text(SECRET)
    return file


@pytest.fixture(scope="module", params=["", SECRET], ids=["loopback", "token"])
def served(searched: Home, token_file: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(searched, *(["--token-file", str(token_file)] if request.param else []))
    yield served
    served.end(signal.SIGTERM)


def request(
    target: str = "/api/studies",
    *headers: str,
    host: str | None = "127.0.0.1:{port}",
    method: str = "GET",
    version: str = "1.1",
    body: str = "",
    last: bool = True,
) -> str:
    """A request; {port} stands for that of the server. last: whether it asks to close the connection."""
    named = [] if host is None else [f"Host: {host}"]
    closing = ["Connection: close"] if last else []
    return "\r\n".join([f"{method} {target} HTTP/{version}", *named, *headers, *closing, "", body])


CHUNKED = "Transfer-Encoding: chunked"
FOREIGN = {  # attacks that both refuse, with a token and without
    "no Host": request(host=None),
    "no Host, HTTP/1.0": request(host=None, version="1.0"),
    "two Hosts": request("/", "Host: 127.0.0.1:{port}"),
    "a second, foreign Host": request("/", "Host: evil.example"),
    "a folded Host": request(host="evil.example\r\n 127.0.0.1"),
    "lines without CR": "GET /api/studies HTTP/1.1\nHost: evil.example\nConnection: close\n\n",
    "HTTP/2 without negotiation": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 500 * "a" + "\r\n\r\n",
    **{
        f"Host: {host!r}": request(host=host)
        for host in (
            *("", "*", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1, evil.example"),
            *("127.0.0.1@evil.example", "127.0.0.1:80@evil.example", "evil@127.0.0.1", "127.0.0.1 evil.example"),
            *("127.0.0.1/evil", "127.0.0.1#", "127.0.0.1?", "127.0.0.1\\evil", "127.0.0.1:", "127.0.0.1:1:1"),
            *("127.0.0.1:\xb2", "127.0.0.1\x00", "\xa0localhost", "lo\xe7alhost", "localhost.", "127.0.0.1."),
            *("0", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "017700000001", "0.0.0.0", "127.0.0.2"),
            *("::1", "[::1", "[::]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "[::1%25lo]"),
        )
    },
    **{
        f"Origin: {origin!r}": request("/api/studies", f"Origin: {origin}", method=method)
        for method in ("GET", "DELETE")
        for origin in (
            *("", "null", "http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1", "http://localhost:{port}"),
            *(
                "ftp://127.0.0.1:{port}",
                "chrome-extension://127.0.0.1:{port}",
                "//127.0.0.1:{port}",
                "127.0.0.1:{port}",
            ),
            *("http://127.0.0.1:{port}/evil", "http://evil@127.0.0.1:{port}", "http://127.0.0.1:{port}.evil.example"),
            *("http://127.0.0.1:{port} http://evil.example", "http://127.0.0.1:{port}\t.evil", "http://[::1"),
        )
    },
    "a second Origin": request("/", "Origin: http://127.0.0.1:{port}", "Origin: http://evil.example"),
    "a proxy's address": request("http://evil.example/api/studies"),
    "its own address, as for a proxy": request("http://127.0.0.1:{port}/api/studies"),
    "a proxy's address, and a foreign Host": request("http://127.0.0.1:{port}/api/studies", host="evil.example"),
    "CONNECT": request("evil.example:80", method="CONNECT"),
    "OPTIONS *": request("*", method="OPTIONS"),
    "X-Forwarded-Host": request("/", "X-Forwarded-Host: 127.0.0.1:{port}", host="evil.example"),
    "Forwarded": request("/", "Forwarded: host=127.0.0.1;for=127.0.0.1", host="evil.example"),
    "two lengths": request("/", "Content-Length: 4", "Content-Length: 5", method="POST", body="abcd"),
    "a negative length": request("/", "Content-Length: -4", method="POST", body="abcd"),
    "a signed length": request("/", "Content-Length: +4", method="POST", body="abcd"),
    "an unknown coding": request("/", "Transfer-Encoding: xchunked", method="POST", body="0\r\n\r\n"),
    "a space before the colon": request("/", "Transfer-Encoding : chunked", method="POST", body="0\r\n\r\n"),
    "NUL in a header": request("/", "X: a\x00b"),
    "NUL in a path": request("/\x00"),
    "a header's name beyond ASCII": request("/", "X\xe9: a"),
    "a path beyond ASCII": request("/\xe9"),
    "a space in a path": request("/a b"),
    "a space in a method": request(method="G E T"),
    "a header of 200 kB": request("/", "X: " + 200_000 * "a"),
    "20,000 headers": request("/", *(f"X{i}: a" for i in range(20_000))),
    "a path of 200 kB": request("/" + 200_000 * "a"),
    "a websocket of another page": request("/", "Upgrade: websocket", "Origin: http://evil.example"),
}


def test_what_no_browser_of_ours_sends_is_refused(served: Served) -> None:
    wrong = []
    for port in served.ports:
        for name, text in FOREIGN.items():
            answer = talk(port, text.replace("{port}", str(port)).encode("latin-1"))
            codes = statuses(answer)
            # h11 may have answered, and closed the connection, while the rest of a long request was on its way.
            if not set(codes) <= {400, 403} or not (codes or len(text) > 100_000):
                wrong.append((name, port, answer[:200]))
    assert wrong == []


PATHS = (
    *("/", "/api/studies", "/%2e%2e/api/studies", "/health/../api/studies", "/health/", "/health%2f", "/health%00"),
    *("/health;/api", "/%2568ealth", "//health", "/health#", "//evil.example", "/\\evil.example", "/%5cevil.example"),
    *(
        "/..%2f..%2fetc/passwd",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/%00",
        "/mlflow//evil.example",
        "/mlflow/%0d%0aX:y",
    ),
    *("/?token=", "/?token=&token=", f"/?token={SECRET}x", f"/?token={SECRET[:-1]}", f"/?token={SECRET.upper()}"),
    *(f"/?TOKEN={SECRET}", f"/?token={SECRET};x", "/?token=%ff%00", "/?token=%c3%a9"),
    *("/?token[]=" + SECRET, f"/?token=%20{SECRET}", "/?" + 2000 * "token=x&", "/version", "/api/2.0/mlflow/runs/get"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "PROPFIND", "UNHEARD")
HEADERS = (
    *("X-HTTP-Method-Override: GET", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "X-Original-URL: /health"),
    *("Authorization:", "Authorization: Bearer", f"Authorization: Bearer {SECRET}x", f"Authorization: Basic {SECRET}"),
    *(
        f"Authorization: Bearer {SECRET.upper()}",
        f"Authorization: Bearer x, Bearer {SECRET}",
        f"Cookie: token={SECRET}",
    ),
    *("Authorization: Bearer \xe9", "Cookie: searchfm-00000000=" + 64 * "0", "Cookie: \xff=\xfe", "X: \xff"),
    *(f"Authorization: Bearer x\r\nAuthorization: Bearer {SECRET}", "Upgrade: websocket\r\nSec-WebSocket-Version: 13"),
)


@pytest.mark.parametrize("served", [SECRET], indirect=True, ids=["token"])
def test_without_the_token_no_path_method_or_header_gets_anything(served: Served) -> None:
    attacks = [request(path, method=method) for path in PATHS for method in METHODS]
    attacks += [request("/api/studies", header, method=method) for header in HEADERS for method in ("GET", "DELETE")]
    attacks += [request("/health", method=method) for method in METHODS if method not in ("GET", "HEAD")]
    attacks += [request("/", version="1.0"), request("/", f"{CHUNKED}\r\nContent-Length: 3", method="POST", body="zz")]
    wrong = []
    for port in served.ports:
        for text in attacks:
            answer = talk(port, text.replace("{port}", str(port)).encode("latin-1"))
            if statuses(answer) != [401] or b"set-cookie" in answer.lower() or b"location" in answer.lower():
                wrong.append((text[:100], answer[:200]))
    assert wrong == []


@pytest.mark.parametrize("served", [SECRET], indirect=True, ids=["token"])
def test_a_login_leads_to_no_other_server_and_splits_no_answer(served: Served) -> None:
    paths = ("//evil.example/", "/\\evil.example", "/%5cevil.example", "/%2f%2fevil.example", "/%09/evil.example")
    for port in served.ports:
        for path in (*paths, "/%0d%0aX:y", "/a?b=%0d%0aX:y", "/%5c%5cevil.example", "/%ff"):
            target = f"{path}{'&' if '?' in path else '?'}token={SECRET}"
            answer = talk(port, request(target).replace("{port}", str(port)).encode())
            (location,) = re.findall(rb"(?im)^location: (.*)\r$", answer)
            assert re.match(rb"/(?![/\\])", location), location
            assert statuses(answer) == [303]
            assert not re.search(rb"(?im)^x:", answer)
            assert SECRET.encode() not in answer


def test_each_request_of_a_connection_is_judged_by_itself(served: Served) -> None:
    evil = request(host="evil.example")
    for port in served.ports:
        for first in (
            request("/health", last=False),
            request("/health", "Content-Length: 5", method="GET", body="abcde", last=False),
            # Where both are given, the chunks count, as RFC 9112 demands: what follows them is the next request.
            request("/health", "Content-Length: 4", CHUNKED, body="0\r\n\r\n", last=False),
        ):
            answer = talk(port, (first + evil).replace("{port}", str(port)).encode())
            assert statuses(answer) == [200, 403], first
        bad = request("/health", CHUNKED, body="-1\r\nabc\r\n0\r\n\r\n" + evil, last=False)
        assert statuses(talk(port, bad.replace("{port}", str(port)).encode())) in ([200], [200, 400], [400])


def test_no_protocol_but_http_is_spoken(served: Served) -> None:
    for port in served.ports:
        websocket = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        for headers in (websocket, ("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")):
            text = request("/health", *headers, "Connection: Upgrade, close", last=False).replace("{port}", str(port))
            assert statuses(talk(port, text.encode())) == [200], headers  # not 101


def test_half_requests_hold_up_no_other(served: Served) -> None:
    for port in served.ports:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        try:
            for connection in held:
                connection.sendall(b"GET / HTTP/1.1\r\nX: ")
            assert statuses(talk(port, request("/health").replace("{port}", str(port)).encode())) == [200]
        finally:
            for connection in held:
                connection.close()


@pytest.mark.parametrize("served", [""], indirect=True, ids=["loopback"])
def test_a_header_changes_no_method_and_trace_repeats_nothing(served: Served) -> None:
    override = request("/api/studies/1", "X-HTTP-Method-Override: DELETE", "X-Method-Override: DELETE")
    for text in (override, request("/api/studies/1", "Cookie: canary=1", method="TRACE"), request("/api/studies/1")):
        answer = talk(served.ports[0], text.replace("{port}", str(served.ports[0])).encode())
        assert b"canary" not in answer
    assert statuses(answer) == [200]  # the study is still there


def test_secrets_are_compared_in_constant_time_alone() -> None:
    """Read from the source: a test by the clock would prove nothing."""
    tree = ast.parse(inspect.getsource(guard))
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    of_secrets = [ast.unparse(node) for node in compared if re.search(r"token|pass_|secret", ast.unparse(node))]
    assert sorted(of_secrets) == [
        "key != 'token'",
        "key == 'token'",
        "self.token is None",
        "token is None",
        "token is None",
    ]
    assert "hmac.compare_digest(given.encode(), secret.encode())" in inspect.getsource(guard._equal)


ANOTHER = """
import json, sys, urllib.error, urllib.request
from pathlib import Path
ports, pids, files = json.loads(sys.argv[1])
got = []
for port in ports:
    for path in ("/", "/api/studies", "/version", "/health", "/ajax-api/2.0/mlflow/experiments/search", "/?token="):
        for method in ("GET", "POST", "DELETE"):
            try:
                address = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
                with urllib.request.urlopen(address, timeout=30) as answer:
                    got.append((path, method, answer.status, answer.read().decode()))
            except urllib.error.HTTPError as error:
                got.append((path, method, error.code, ""))
read = []
for path in [*(f"/proc/{pid}/{name}" for pid in pids for name in ("environ", "cmdline", "maps", "fd/0")), *files]:
    try:
        read.append(Path(path).read_bytes().decode(errors="replace"))
    except OSError:
        pass
print(json.dumps([got, read]))
"""


@pytest.mark.parametrize("served", [SECRET], indirect=True, ids=["token"])
def test_another_user_of_this_machine_gets_nothing_without_the_token(
    served: Served, searched: Home, token_file: Path
) -> None:
    if os.geteuid() != 0:
        missing("this test runs a process as another user, which needs root")
    files = [str(token_file), *(str(path) for path in searched.path.rglob("*") if path.is_file())]
    asked = json.dumps([served.ports, [served.process.pid, *served.family], files])
    command = ["/usr/bin/env", "python3", "-I", "-c", ANOTHER, asked]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # not that of the tests, which may be below /root
    done = subprocess.run(
        command, capture_output=True, text=True, user="nobody", cwd="/", env=environment, check=True, timeout=120
    )
    got, read = json.loads(done.stdout)
    answers = {(status, text) for path, method, status, text in got if (path, method) != ("/health", "GET")}
    assert answers == {(401, "")}
    assert {(status, text) for path, method, status, text in got if (path, method) == ("/health", "GET")} == {
        (200, "OK")
    }
    assert any("searchfm.show.dashboard" in text for text in read)  # command lines are everybody's
    assert not any(SECRET in text for text in read)
