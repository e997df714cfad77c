"""A proxy before PostgreSQL that cuts a connection at a COMMIT, where its client cannot know the outcome."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Self

import psycopg
from sqlalchemy import make_url

from tests.programs import worker_port


class Cut(Enum):
    """What becomes of a COMMIT; the client sees a dropped connection each time."""

    BEFORE = "it does not reach the server, which rolls back"
    AFTER = "it is done, and the answer is lost"
    LATE = "it reaches the server a while after the client has lost the connection"


LATE_SECONDS = 0.2


class Proxy:
    """Forwards connections to the server of a database URL. `url` leads through it."""

    def __init__(self, url: str) -> None:
        self._server = make_url(url)
        self._port = worker_port(6300)
        self.url = self._server.set(port=self._port).render_as_string(hide_password=False)
        self.commits = 0
        self.cut: Callable[[int], Cut | None] = lambda commit: None  # by the number of the COMMIT, from 1
        self._pairs: dict[socket.socket, socket.socket] = {}  # the server's end by the client's
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def open(self) -> None:
        """Accepts connections."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._start(self._accept, self._listener)

    def close(self) -> None:
        """Drops all connections, and refuses new ones."""
        self._close(self._listener)
        for ends in list(self._pairs.items()):
            self._close(*ends)

    def cut_clients(self, server_after: float) -> None:
        """Drops all connections; the server learns of it so many seconds later."""
        for client, server in list(self._pairs.items()):
            self._start(self._end_later, server, server_after)
            self._close(client)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection((self._server.host, self._server.port))
                except OSError:  # the server is away
                    client.close()
                    continue
                self._pairs[client] = server
                lost = threading.Event()
                self._start(self._send, client, server, lost)
                self._start(self._answer, client, server, lost)

    def _send(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if b"COMMIT" in data:
                    self.commits += 1
                    match self.cut(self.commits):
                        case Cut.BEFORE:
                            break
                        case Cut.AFTER:
                            lost.set()
                        case Cut.LATE:
                            lost.set()
                            self._close(client)
                            time.sleep(LATE_SECONDS)
                            server.sendall(data)
                            return  # `_answer` closes the server's end
                server.sendall(data)
        if not lost.is_set() and client in self._pairs:
            self._close(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if lost.is_set():
                    break
                client.sendall(data)
        self._close(client, server)

    def _end_later(self, server: socket.socket, seconds: float) -> None:
        time.sleep(seconds)
        self._close(server)

    def _close(self, *ends: socket.socket) -> None:
        for end in ends:
            self._pairs.pop(end, None)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
            end.close()


def drop_all(url: str) -> int:
    """Ends all other connections to the database, and waits for their ends; returns their number."""
    with psycopg.connect(url, autocommit=True) as connection:
        dropped = connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        return len(dropped.fetchall())
